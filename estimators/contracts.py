"""The two contracts of this package: an Estimator preconditions, a Scorer scores exactly."""

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol, Self, TypeVar

import numpy as np
from jaxtyping import Float
from torch import Tensor

from estimators.model.gradients import Gradients
from estimators.model.layers import LinearLayer
from estimators.sketching.whitening import LayerWhitening


class Accumulator(Protocol):
    """Running sums over the fitting examples; a class is built from what its ``tensors()`` gave."""

    def add(self, layer: LinearLayer, a: Tensor, d: Tensor, positions: Tensor) -> None:
        """Add a batch's inputs ``a`` [batch, token, in] and output gradients ``d`` of one layer.

        ``positions`` index the flattened tokens that serve a counted token; elsewhere ``d`` is 0.
        Running out of memory must leave the sums as they were.
        """
        ...

    def settle(self) -> None:
        """Called every some thousand tokens: move short sums into long ones."""
        ...

    def tensors(self) -> Mapping[str, Tensor]:
        """Everything that was settled."""
        ...


Sums = TypeVar("Sums", bound=Accumulator)


class RunPass(Protocol):
    """One forward and backward pass over the fitting examples, which can be interrupted."""

    def __call__(
        self, name: str, kind: Callable[[Mapping[str, Tensor]], Sums], begin: Callable[[], Sums]
    ) -> Sums:
        """The sums after the pass.

        Args:
            name: one of ``PASSES``, shown to people.
            kind: rebuilds the sums of an interrupted pass from their tensors.
            begin: empty sums, where no interrupted pass is found; what comes before the pass,
                earlier passes included, belongs in here, so that it is not repeated.
        """
        ...


PASSES = ("covariances", "eigenvalues")
"""Every pass that an estimator may ask for; each draws labels of its own."""


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
