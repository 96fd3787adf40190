"""Demonstrations: the whole way on real text."""
