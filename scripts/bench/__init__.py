"""Measurements; each keeps a dated record under docs/benchmarks/."""
