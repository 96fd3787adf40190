"""K-FAC: curvature as a Kronecker product of two covariances (Martens and Grosse 2015)."""

from collections.abc import Sequence
from typing import ClassVar, Self

import torch
from jaxtyping import Float
from torch import Tensor

from estimators.contracts import RunPass
from estimators.curvature.kronecker import Covariances
from estimators.model.layers import LinearLayer
from estimators.operators.eigenbasis import EigenbasisOperator


class KFac(EigenbasisOperator):
    """K-FAC influence: curvature as a Kronecker product of two covariances.

    ``H = T * A x S``; A and S are means over token positions, T the mean positions an example.

    The factor T puts the eigenvalues in units of the mean loss of an example (a sum over its
    tokens), under K-FAC's assumption that tokens are independent. EK-FAC's factors hold A and S
    too, so an index built with them answers for K-FAC. Of a weight with a row for each vocabulary
    entry, A is the diagonal of second moments; of a tied one H is the sum over both uses.
    """

    needs: ClassVar[tuple[str, ...]] = ("left_values", "right_values", "positions")

    @classmethod
    def fit(cls, layers: Sequence[LinearLayer], run_pass: RunPass) -> Self:
        """One pass for the covariances."""
        covariances = run_pass("covariances", Covariances, lambda: Covariances.begin(layers))
        tensors: dict[str, Tensor] = {}
        for name, basis in covariances.eigenbases(layers).items():
            tensors |= basis.tensors(name)
        return cls(tensors)

    def eigenvalues(self, name: str) -> Float[Tensor, "in out"]:
        """Products of the two sides' eigenvalues, times the mean positions an example."""
        left, right, positions = (self._tensors[f"{name}.{part}"] for part in self.needs)
        product = torch.outer(left, right) if left.ndim == 1 else left.T @ right
        return product * float(positions)
