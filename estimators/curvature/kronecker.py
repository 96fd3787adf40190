"""Kronecker-factored covariances of a layer's inputs and output gradients, and their eigenbases."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from estimators.curvature.accumulation import LongSum, pad_columns
from estimators.model.gradients import widen
from estimators.model.layers import LinearLayer

_BLOCK = 256
"""Rows of a symmetric product that are computed together, from the diagonal on: measured best of
128 to 1024 at widths 769 to 3073 on a CPU, 0.5 to 0.6 times the full product."""


@dataclass(frozen=True, kw_only=True)
class Eigenbasis:
    """``A = Q_A diag(left_values) Q_A^T`` and ``S = Q_S diag(right_values) Q_S^T``.

    Attributes:
        left: Q_A.
        right: Q_S.
        left_values: eigenvalues of A in ascending order, never negative.
        right_values: eigenvalues of S, likewise.
        positions: mean number of counted positions an example.
    """

    left: Float[Tensor, "in in"]
    right: Float[Tensor, "out out"]
    left_values: Float[Tensor, "in"]
    right_values: Float[Tensor, "out"]
    positions: float

    def tensors(self, name: str) -> dict[str, Tensor]:
        """All of it under the name of its layer, see ``estimators.operators.eigenbasis``."""
        parts = {
            "left": self.left,
            "right": self.right,
            "left_values": self.left_values,
            "right_values": self.right_values,
            "positions": torch.tensor(self.positions, dtype=self.left.dtype),
        }
        return {f"{name}.{part}": tensor.cpu() for part, tensor in parts.items()}


class Covariances:
    """Sums of ``a a^T`` and ``d d^T`` over tokens, for each layer.

    Products and short sums are in the model's precision (float32 at least), long sums in float64.

    Args:
        tensors: for each layer NAME, ``NAME.inputs`` [in, in] and ``NAME.gradients`` [out, out],
            float64, of which the upper triangles count, and ``NAME.seen``, the numbers of
            sequences and of positions.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        names = [key.removesuffix(".seen") for key in tensors if key.endswith(".seen")]
        self._sums = {
            name: (LongSum(tensors[f"{name}.inputs"]), LongSum(tensors[f"{name}.gradients"]))
            for name in names
        }
        self._seen = {name: tensors[f"{name}.seen"].clone() for name in names}

    @classmethod
    def begin(cls, layers: Sequence[LinearLayer]) -> Self:
        """Nothing added yet."""
        tensors = {}
        for layer in layers:
            for part, width in (("inputs", layer.in_features), ("gradients", layer.out_features)):
                tensors[f"{layer.name}.{part}"] = torch.zeros(width, width, dtype=torch.float64)
            tensors[f"{layer.name}.seen"] = torch.zeros(2, dtype=torch.int64)
        return cls(tensors)

    def add(self, layer: LinearLayer, a: Tensor, d: Tensor, positions: Tensor) -> None:
        """Add one batch: ``a`` [batch, token, in], ``d`` [batch, token, out].

        Only ``positions`` count, indices into the flattened tokens. All memory is taken before the
        sums are touched: running out of it leaves them alone.
        """
        rows = [pad_columns(widen(_take(values, positions))) for values in (a, d)]
        sums = self._sums[layer.name]
        recent = [part.recent(x) for part, x in zip(sums, rows, strict=True)]
        for target, x in zip(recent, rows, strict=True):
            _add_symmetric(target, x)
        self._seen[layer.name] += torch.tensor([len(a), len(positions)])

    def settle(self) -> None:
        """Move recent products into the float64 sums."""
        for sums in self._sums.values():
            for part in sums:
                part.settle()

    def tensors(self) -> dict[str, Tensor]:
        """What is settled; the class rebuilds itself from it."""
        tensors = {}
        for name, (inputs, gradients) in self._sums.items():
            tensors[f"{name}.inputs"] = inputs.total
            tensors[f"{name}.gradients"] = gradients.total
            tensors[f"{name}.seen"] = self._seen[name]
        return tensors

    def eigenbases(self, layers: Sequence[LinearLayer]) -> dict[str, Eigenbasis]:
        """Decompose the mean covariances in float64 and let go of the sums.

        The results have the precision of the layers' weights, float32 at least.

        Raises:
            ValueError: a layer saw no token or no gradient, or a covariance is not finite.
        """
        return {layer.name: self._decompose(layer) for layer in layers}

    def _decompose(self, layer: LinearLayer) -> Eigenbasis:
        name = layer.name
        sequences, positions = self._seen[name].tolist()
        if positions == 0:
            raise ValueError(
                f"Layer {name} saw no token while fitting: it never ran, or every example is "
                f"empty. Leave it out with a layer pattern or fit on other examples."
            )
        # Quantised layers have integers for weights, or none of that name.
        dtype = getattr(getattr(layer.module, "weight", None), "dtype", None)
        dtype = torch.float64 if dtype == torch.float64 else torch.float32
        parts = []
        for part, side in zip(self._sums.pop(name), ("input", "output gradient"), strict=True):
            mean = part.total / positions
            if not torch.isfinite(mean).all():
                raise ValueError(
                    f"The {side} covariance of layer {name} is not finite: the model gives NaN or "
                    f"infinite values on the fitting examples; check the model's weights."
                )
            if side == "output gradient" and not mean.any():
                raise ValueError(
                    f"No gradient reached layer {name} while fitting: its output does not change "
                    f"the loss (a LoRA adapter that was never trained has B = 0, so A gets none). "
                    f"Train it, or leave it out with a layer pattern."
                )
            values, vectors = _eigh(mean.triu() + mean.triu(1).T)
            # Row-major like a file's tensors, so that a loaded estimator gives the same bits.
            parts.append((vectors.to(dtype).contiguous(), values.clamp_min(0).to(dtype)))
        (left, left_values), (right, right_values) = parts
        return Eigenbasis(
            left=left,
            right=right,
            left_values=left_values,
            right_values=right_values,
            positions=positions / sequences,
        )


def _take(
    values: Float[Tensor, "batch token feature"], positions: Int[Tensor, "position"]
) -> Float[Tensor, "position feature"]:
    return values.flatten(0, 1).index_select(0, positions)


def _add_symmetric(target: Float[Tensor, "n n"], rows: Float[Tensor, "row n"]) -> None:
    """Add ``rows^T rows`` to ``target``, of which the upper triangle counts."""
    for start in range(0, rows.shape[1], _BLOCK):
        end = start + _BLOCK
        target[start:end, start:].addmm_(rows[:, start:end].T, rows[:, start:])


def _eigh(matrix: Float[Tensor, "n n"]) -> tuple[Float[Tensor, "n"], Float[Tensor, "n n"]]:
    """Eigenvalues in ascending order and eigenvectors of a symmetric matrix.

    On a CPU by NumPy, whose LAPACK took 0.6 times the processor time of PyTorch's at width 3073.
    """
    if matrix.device.type != "cpu":
        values, vectors = torch.linalg.eigh(matrix)
        return values, vectors
    found = np.linalg.eigh(matrix.numpy())
    return torch.from_numpy(found.eigenvalues), torch.from_numpy(found.eigenvectors)
