"""Directions of queries by an operator at one damping, as tests ask for them."""

from torch import Tensor

from estimators.model.gradients import Gradients, negated


def query_directions(operator, gradients: Gradients, damping: float) -> dict[str, Tensor]:
    """``-(H + lambda I)^-1 grad f``: its inner product with ``grad L(z)`` is the score."""
    return negated(dict(operator.precondition(gradients, damping)))
