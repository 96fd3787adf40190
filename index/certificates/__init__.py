"""Recall certificates: what a shortlist may have missed, with stated confidence.

Recall is always against the exact scorer's own ranking of the corpus, never against causal truth.
Certificates know nothing of models or estimators: they take proxy scores, error scales and exact
scores.
"""
