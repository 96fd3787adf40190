"""Recall for each index size, beside other layouts."""
