"""Where a model's outputs stop being finite."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from estimators.model.measurement import next_token_logits
from estimators.model.tokens import TokenBatch


@torch.no_grad()
def first_not_finite(model: nn.Module, batch: TokenBatch) -> str | None:
    """Name of the first module, in order of computation, with a NaN or infinite output.

    Inner modules come before those that they are parts of. None if all outputs are finite.

    Args:
        model: a causal language model; run once, and left as it was.
        batch: what it reads.
    """
    found: list[str] = []
    handles = [
        module.register_forward_hook(_notes(name, found)) for name, module in model.named_modules()
    ]
    try:
        next_token_logits(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None


def _notes(name: str, found: list[str]) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
    def after_forward(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        first = output[0] if isinstance(output, tuple) and output else output
        if isinstance(first, Tensor) and not torch.isfinite(first).all():
            found.append(name)

    return after_forward
