"""Which architectures of transformers are attributed, and what share of their weights."""
