"""What a training run did, step by step, and derivatives through it."""
