"""Kronecker-factored covariances of a layer's inputs and output gradients, and their eigenbases."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from estimators.layers import LinearLayer


@dataclass(frozen=True, kw_only=True)
class Eigenbasis:
    """``A = Q_A diag(left_values) Q_A^T`` and ``S = Q_S diag(right_values) Q_S^T``.

    Attributes:
        left: Q_A.
        right: Q_S.
        left_values: eigenvalues of A in ascending order, never negative.
        right_values: eigenvalues of S, likewise.
    """

    left: Float[Tensor, "in in"]
    right: Float[Tensor, "out out"]
    left_values: Float[Tensor, "in"]
    right_values: Float[Tensor, "out"]


class Covariances:
    """Sums of ``a a^T`` and ``d d^T`` over tokens, for each layer.

    Each batch's product is taken in the model's precision (float32 at least) and added in float64,
    so that the order and number of batches hardly matter.
    """

    def __init__(self, layers: Sequence[LinearLayer]) -> None:
        self._sums = {
            layer.name: (
                torch.zeros(layer.in_features, layer.in_features, dtype=torch.float64),
                torch.zeros(layer.out_features, layer.out_features, dtype=torch.float64),
            )
            for layer in layers
        }
        self._positions = dict.fromkeys(self._sums, 0)
        self._dtype = torch.float32

    def add(self, layer: LinearLayer, a: Tensor, d: Tensor, positions: int) -> None:
        """Add one batch: ``a`` [batch, token, in], ``d`` [batch, token, out], 0 where masked.

        Both products exist before either is added: running out of memory leaves the sums alone.
        """
        products = []
        for total, values in zip(self._sums[layer.name], (a, d), strict=True):
            flat = widen(values).flatten(0, 1)
            self._dtype = flat.dtype
            products.append((flat.T @ flat).to(total))
        for total, product in zip(self._sums[layer.name], products, strict=True):
            total += product
        self._positions[layer.name] += positions

    def positions(self, name: str) -> int:
        """How many token positions layer ``name`` has seen."""
        return self._positions[name]

    def eigenbases(self) -> dict[str, Eigenbasis]:
        """Decompose the mean covariances in float64; results in the precision of the products.

        Raises:
            ValueError: a layer saw no token or no gradient, or a covariance is not finite.
        """
        return {name: self._decompose(name) for name in self._sums}

    def _decompose(self, name: str) -> Eigenbasis:
        positions = self._positions[name]
        if positions == 0:
            raise ValueError(
                f"Layer {name} saw no token while fitting: it never ran, or every example is "
                f"empty. Leave it out with a layer pattern or fit on other examples."
            )
        parts = []
        for total, side in zip(self._sums[name], ("input", "output gradient"), strict=True):
            if not torch.isfinite(total).all():
                raise ValueError(
                    f"The {side} covariance of layer {name} is not finite: the model gives NaN or "
                    f"infinite values on the fitting examples; check the model's weights."
                )
            if side == "output gradient" and not total.any():
                raise ValueError(
                    f"No gradient reached layer {name} while fitting: its output does not change "
                    f"the loss (a LoRA adapter that was never trained has B = 0, so A gets none). "
                    f"Train it, or leave it out with a layer pattern."
                )
            values, vectors = torch.linalg.eigh(total / positions)
            # Row-major like a file's tensors, so that a loaded estimator gives the same bits.
            vectors = vectors.to(self._dtype).contiguous()
            parts.append((vectors, values.clamp_min(0).to(self._dtype)))
        (left, left_values), (right, right_values) = parts
        return Eigenbasis(
            left=left, right=right, left_values=left_values, right_values=right_values
        )


def widen(values: Tensor) -> Tensor:
    """float32 at least: bfloat16 and float16 are widened, float64 is kept."""
    return values if values.dtype == torch.float64 else values.float()
