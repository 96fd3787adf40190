"""Eigenbases of sums of outer products."""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from estimators.model.layers import LinearLayer

_BLOCK = 256
"""Rows of a symmetric product that are computed together, from the diagonal on: measured best of
128 to 1024 at widths 769 to 3073 on a CPU, 0.5 to 0.6 times the full product."""


@dataclass(frozen=True, kw_only=True)
class Eigenbasis:
    """``A = Q_A diag(left_values) Q_A^T`` and ``S = Q_S diag(right_values) Q_S^T``.

    Attributes:
        left: Q_A; None for the identity, over a vocabulary.
        right: Q_S.
        left_values: eigenvalues of A in ascending order, never negative; over a vocabulary second
            moments of its entries, one row a use of the weight.
        right_values: eigenvalues of S, likewise; second moments along Q_S, one row a use.
        positions: mean number of counted positions an example.
        shared: of an expert that saw too few tokens, how many it saw; everything else is then that
            of all experts of its kind together. None of others.
    """

    left: Float[Tensor, "in in"] | None
    right: Float[Tensor, "out out"]
    left_values: Float[Tensor, "*use in"]
    right_values: Float[Tensor, "*use out"]
    positions: float
    shared: int | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """Inputs and outputs."""
        return self.left_values.shape[-1], self.right_values.shape[-1]

    def tensors(self, name: str) -> dict[str, Tensor]:
        """All of it under the name of its layer, see ``estimators.operators.eigenbasis``."""
        parts = {
            "left": self.left,
            "right": self.right,
            "left_values": self.left_values,
            "right_values": self.right_values,
            "positions": torch.tensor(self.positions, dtype=self.right.dtype),
            "shared": None if self.shared is None else torch.tensor(self.shared),
        }
        return {f"{name}.{p}": tensor.cpu() for p, tensor in parts.items() if tensor is not None}


def add_symmetric(target: Float[Tensor, "n n"], rows: Float[Tensor, "row n"]) -> None:
    """Add ``rows^T rows`` to ``target``, of which the upper triangle counts."""
    for start in range(0, rows.shape[1], _BLOCK):
        end = start + _BLOCK
        target[start:end, start:].addmm_(rows[:, start:end].T, rows[:, start:])


def decompose(
    mean: Float[Tensor, "n n"], layer: LinearLayer, *, side: str
) -> tuple[Float[Tensor, "n n"], Float[Tensor, "n"]]:
    """Eigenvectors and eigenvalues, ascending and never negative.

    Decomposed in float64; the results have the precision of the layer's weights, float32 at least.

    Args:
        mean: a covariance, of which the upper triangle counts.
        layer: whose it is.
        side: of the layer, for people.

    Raises:
        ValueError: the covariance is not finite, or one of output gradients is zero.
    """
    if not torch.isfinite(mean).all():
        raise ValueError(
            f"The {side} covariance of layer {layer.name} is not finite: the model gives NaN or "
            f"infinite values on the fitting examples; check the model's weights."
        )
    if side == OUTPUT_GRADIENT and not mean.any():
        raise ValueError(
            f"No gradient reached layer {layer.name} while fitting: its output does not change "
            f"the loss (a LoRA adapter that was never trained has B = 0, so A gets none). "
            f"Train it, or leave it out with a layer pattern."
        )
    values, vectors = _eigh(mean.triu() + mean.triu(1).T)
    # Row-major like a file's tensors, so that a loaded estimator gives the same bits.
    dtype = precision_of(layer)
    return vectors.to(dtype).contiguous(), values.clamp_min(0).to(dtype)


OUTPUT_GRADIENT = "output gradient"


class Decompositions:
    """Decomposes one layer's covariance after another; one like the one before is not done again.

    Layers that read the same activations, such as queries, keys and values or the blocks of a wide
    layer, have the same covariance to the bit.

    Args:
        side: of the layers, for people.
    """

    def __init__(self, side: str) -> None:
        self._side = side
        self._last: tuple[Tensor, Tensor, Tensor] | None = None

    def __call__(
        self, mean: Float[Tensor, "n n"], layer: LinearLayer
    ) -> tuple[Float[Tensor, "n n"], Float[Tensor, "n"]]:
        """As ``decompose``; nobody else holds the tensors."""
        if self._last is not None:
            before, vectors, values = self._last
            same = before.device == mean.device and vectors.dtype == precision_of(layer)
            if same and torch.equal(before, mean):
                return vectors.clone(), values.clone()
        vectors, values = decompose(mean, layer, side=self._side)
        self._last = mean, vectors, values
        return vectors, values


def check_seen(layer: LinearLayer, positions: int) -> None:
    """Raise ValueError if a layer saw no token."""
    if positions == 0:
        raise ValueError(
            f"Layer {layer.name} saw no token while fitting: it never ran, or every example is "
            f"empty. Leave it out with a layer pattern or fit on other examples."
        )


def precision_of(layer: LinearLayer) -> torch.dtype:
    """That of its factors."""
    # Quantised layers have integers for weights, or none of that name.
    dtype = getattr(layer.weight, "dtype", None)
    return torch.float64 if dtype == torch.float64 else torch.float32


def device_of(layer: LinearLayer) -> torch.device:
    """Where its weights are, and so its gradients."""
    parameter = next(layer.module.parameters(), None)
    return torch.device("cpu") if parameter is None else parameter.device


def _eigh(matrix: Float[Tensor, "n n"]) -> tuple[Float[Tensor, "n"], Float[Tensor, "n n"]]:
    """Eigenvalues in ascending order and eigenvectors of a symmetric matrix.

    On a CPU by NumPy, whose LAPACK took 0.6 times the processor time of PyTorch's at width 3073.
    """
    if matrix.device.type != "cpu":
        values, vectors = torch.linalg.eigh(matrix)
        return values, vectors
    found = np.linalg.eigh(matrix.numpy())
    return torch.from_numpy(found.eigenvalues), torch.from_numpy(found.eigenvectors)
