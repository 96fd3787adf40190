"""The two contracts of this package: an Estimator preconditions, a Scorer scores exactly."""

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol, Self

import numpy as np
from jaxtyping import Float
from torch import Tensor

from estimators.gradients import Gradients
from estimators.layers import LinearLayer
from estimators.whitening import LayerWhitening

FitVisitor = Callable[[LinearLayer, Tensor, Tensor, int], None]
"""Receives a layer, its inputs ``a`` [batch, token, in], output gradients ``d`` [batch, token, out]
(both 0 at positions that serve no counted token) and the number of positions that do serve one."""

RunPass = Callable[[str, FitVisitor], int]
"""``run_pass(name, visit)``: one forward and backward pass over the fitting examples, shown to
people as ``name``; returns the number of examples seen."""


class Estimator(Protocol):
    """An inverse-curvature operator over a model's attributed layers."""

    @classmethod
    def fit(cls, layers: Sequence[LinearLayer], run_pass: RunPass) -> Self:
        """Estimate the curvature with as many passes as needed (none for the identity)."""
        ...

    def precondition(self, gradients: Gradients, damping: float) -> dict[str, Tensor]:
        """``(H + lambda I)^-1`` applied to ``gradients`` ([..., in, out] a layer).

        ``damping`` is relative: lambda of a layer is ``damping`` times its mean eigenvalue.
        """
        ...

    def whitening(self, layers: Sequence[LinearLayer], damping: float) -> dict[str, LayerWhitening]:
        """The coordinates in which training gradients are best sketched."""
        ...

    def tensors(self) -> Mapping[str, Tensor]:
        """Everything that was fitted, by name; the class rebuilds itself from it (``cls(...)``)."""
        ...


class Scorer(Protocol):
    """Scores training rows exactly for one query, by gradients or by any other means."""

    def score(self, rows: Sequence[int]) -> Float[np.ndarray, "rows"]:
        """Exact scores of ``rows`` in nats, positive = proponent; NaN where there is none."""
        ...
