"""Indexes: codes, norms and ids on disk, vector search over them, and recall certificates.

Nothing here knows of models or gradients, and nothing imports torch. A row is one example of the
training set; rows are numbered from 0 in the order of the corpus.
"""
