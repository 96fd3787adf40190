"""Coverage, usefulness and cost of certificates."""
