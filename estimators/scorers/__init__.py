"""Estimators without gradients, one a file."""
