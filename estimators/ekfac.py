"""EK-FAC: K-FAC's eigenbasis with eigenvalues measured in it (George et al. 2018)."""

from collections.abc import Mapping, Sequence
from typing import Self

import torch
from jaxtyping import Float
from torch import Tensor

from estimators.contracts import RunPass
from estimators.eigenbasis import EigenbasisOperator, eigenbasis_tensors
from estimators.gradients import sum_over_tokens
from estimators.kronecker import Covariances, Eigenbasis, widen
from estimators.layers import LinearLayer


class EKFac(EigenbasisOperator):
    """``L_ij = E_example[(Q_A^T G Q_S)_ij^2]``: exact second moments along K-FAC's eigenvectors."""

    @classmethod
    def fit(cls, layers: Sequence[LinearLayer], run_pass: RunPass) -> Self:
        """One pass for the covariances, one for the corrected eigenvalues."""
        covariances = Covariances(layers)
        run_pass("covariances", covariances.add)
        bases = covariances.eigenbases()
        corrected = CorrectedEigenvalues(bases)
        examples = run_pass("eigenvalues", corrected.add)
        return cls(eigenbasis_tensors(bases, corrected.means(examples)))


class CorrectedEigenvalues:
    """Sums over examples of squared per-example gradients in an eigenbasis, in float64."""

    def __init__(self, bases: Mapping[str, Eigenbasis]) -> None:
        self._bases = bases
        self._sums = {
            name: torch.zeros(len(b.left_values), len(b.right_values), dtype=torch.float64)
            for name, b in bases.items()
        }

    def add(self, layer: LinearLayer, a: Tensor, d: Tensor, positions: int) -> None:
        """Add the examples of one batch."""
        basis = self._bases[layer.name]
        rotated = rotated_gradients(widen(a), widen(d), basis.left, basis.right)
        total = self._sums[layer.name]
        total += rotated.square_().sum(0).to(total)

    def means(self, examples: int) -> dict[str, Tensor]:
        """``L`` for each layer, in the basis' precision."""
        return {
            name: (total / examples).to(self._bases[name].left.dtype)
            for name, total in self._sums.items()
        }


def rotated_gradients(
    a: Float[Tensor, "batch token in"],
    d: Float[Tensor, "batch token out"],
    left: Float[Tensor, "in in"],
    right: Float[Tensor, "out out"],
) -> Float[Tensor, "batch in out"]:
    """``Q_A^T G Q_S`` for each sequence, rotating whichever costs less: tokens or gradients."""
    left, right = left.to(a), right.to(d)
    tokens, width, out = a.shape[1], a.shape[2], d.shape[2]
    if tokens * (width**2 + out**2) < width * out * (width + out):
        return sum_over_tokens(a @ left, d @ right)
    return left.T @ sum_over_tokens(a, d) @ right
