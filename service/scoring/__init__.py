"""Exact scores of examples."""
