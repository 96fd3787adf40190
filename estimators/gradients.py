"""Per-example gradients of layers, as values."""

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

Gradients = Mapping[str, Tensor]
"""Layer name -> gradient [..., in, out]; all layers have the same leading dimensions, if any."""


def sum_over_tokens(
    a: Float[Tensor, "batch token in"], d: Float[Tensor, "batch token out"]
) -> Float[Tensor, "batch in out"]:
    """``G = sum_t a_t d_t^T`` for each sequence of a batch."""
    return torch.bmm(a.transpose(1, 2), d)


def find_non_finite(gradients: Gradients) -> str | None:
    """The first layer with a NaN or infinite entry, or None."""
    for name, gradient in gradients.items():
        if not torch.isfinite(gradient).all():
            return name
    return None
