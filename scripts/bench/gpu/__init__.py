"""Fit, build, rescoring and scan on a GPU, over floors of the same run."""
