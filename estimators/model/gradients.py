"""Per-example gradients of layers, as values."""

from collections.abc import Iterator, Mapping

import torch
from jaxtyping import Float
from torch import Tensor

Gradients = Mapping[str, Tensor]
"""Layer name -> gradient [..., in, out]; all layers have the same leading dimensions, if any."""


MOST_CACHED_BYTES = 2**24
"""Gradients of one layer that are formed at once on a CPU. More of them leave its caches, and
memory from 32 MB on is mapped anew at every allocation: two to three times as slow at width 1536.
"""


def negated(gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    """``-gradients``; each layer is taken from the argument, so that both are never held whole."""
    return {name: -gradients.pop(name) for name in list(gradients)}


def sum_over_tokens(
    a: Float[Tensor, "batch token in"], d: Float[Tensor, "batch token out"]
) -> Float[Tensor, "batch in out"]:
    """``G = sum_t a_t d_t^T`` for each sequence of a batch."""
    return torch.bmm(a.transpose(1, 2), d)


def apply_layer(
    weights: Float[Tensor, "in out"], a: Float[Tensor, "batch token width"], has_bias: bool
) -> Float[Tensor, "batch token out"]:
    """``a`` times weights whose last row is a bias, if there is one: no 1 is appended to ``a``."""
    if not has_bias:
        return a @ weights
    return torch.addmm(weights[-1], a.flatten(0, 1), weights[:-1]).view(
        *a.shape[:2], weights.shape[1]
    )


def cached_parts(
    a: Float[Tensor, "batch token in"], d: Float[Tensor, "batch token out"]
) -> Iterator[slice]:
    """Consecutive parts of a batch whose gradients fit into the caches; on a GPU, the whole batch.

    One sequence at least is in each part.
    """
    batch = len(a)
    each = a.shape[2] * d.shape[2] * a.element_size()
    size = max(1, MOST_CACHED_BYTES // each) if a.device.type == "cpu" else batch
    for start in range(0, batch, size):
        yield slice(start, start + size)


def find_non_finite(gradients: Gradients) -> str | None:
    """The first layer with a NaN or infinite entry, or None."""
    for name, gradient in gradients.items():
        if not torch.isfinite(gradient).all():
            return name
    return None


def widen(values: Tensor) -> Tensor:
    """float32 at least: bfloat16 and float16 are widened, float64 is kept."""
    return values if values.dtype == torch.float64 else values.float()
