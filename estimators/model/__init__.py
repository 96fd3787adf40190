"""What a model's layers are, and passes through it."""
