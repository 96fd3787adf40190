"""Training runs on disk: recorded and repeated."""
