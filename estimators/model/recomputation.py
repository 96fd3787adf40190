"""Gradient checkpointing: activations are computed again in the backward pass, not kept."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer


def recompute_blocks(model: nn.Module) -> int:
    """Let every transformer block keep its inputs only; changes no number.

    Unlike ``model.gradient_checkpointing_enable()`` it works in evaluation mode: no module is put
    in training mode, whose dropout would change gradients. The first run of a block keeps no graph,
    so that hooks see each of its layers once, in the second.

    Returns:
        The number of blocks.

    Raises:
        ValueError: the model has no block that transformers marks as one.
    """
    blocks = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    if not blocks:
        raise ValueError(
            f"{type(model).__name__} has no blocks that can be checkpointed; load it without "
            f"gradient checkpointing."
        )
    for block in blocks:
        vars(block)["forward"] = _recomputed(block.forward)
    return len(blocks)


def _recomputed(forward: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(forward)
    def run(*positional: Any, **named: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*positional, **named)
        # Only positional tensors get gradients.
        moved = [k for k, v in named.items() if isinstance(v, Tensor) and v.requires_grad]
        rest = {k: v for k, v in named.items() if k not in moved}

        def call(*values: Any) -> Any:
            count = len(positional)
            return forward(*values[:count], **dict(zip(moved, values[count:], strict=True)), **rest)

        values = (*positional, *(named[k] for k in moved))
        return checkpoint(call, *values, use_reentrant=True, preserve_rng_state=False)

    return run
