"""Names that others than the registry know estimators by; needs no torch."""

RUN_DIRECTION = "run-direction"
THROUGH_RUN = ("run", RUN_DIRECTION)
"""Estimators that answer questions which were traced through the training run, in nats."""
