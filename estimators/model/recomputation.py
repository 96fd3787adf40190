"""Gradient checkpointing: activations are computed again in the backward pass, not kept."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from estimators.layers.watching import RECOMPUTED


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
        own = vars(block)
        own[RECOMPUTED] = block.forward
        own["forward"] = _recomputed(block)
    return len(blocks)


@contextmanager
def kept_activations(model: nn.Module) -> Iterator[None]:
    """Let blocks keep everything meanwhile, as without ``recompute_blocks``."""
    owners = [vars(m) for m in model.modules() if RECOMPUTED in vars(m)]
    before = [(own, own["forward"]) for own in owners]
    for own in owners:
        own["forward"] = own.pop(RECOMPUTED)
    try:
        yield
    finally:
        for own, forward in before:
            own[RECOMPUTED], own["forward"] = own["forward"], forward


def _recomputed(block: nn.Module) -> Callable[..., Any]:
    plain = block.forward

    def forward(*positional: Any, **named: Any) -> Any:
        return vars(block)[RECOMPUTED](*positional, **named)

    @wraps(plain)
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
