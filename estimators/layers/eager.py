"""Mixtures of experts computed expert by expert."""

from typing import Any

from torch import nn

_CHOICE = "_experts_implementation_internal"


def make_eager(model: nn.Module) -> None:
    """Let transformers compute experts one after another, each by products of its own.

    Its other ways (grouped, batched) are products of many experts in one call, which do not tell
    one expert's inputs from another's; nor do they exist in float64.
    """
    for module in model.modules():
        config: Any = getattr(module, "config", None)
        if getattr(config, _CHOICE, None) not in (None, "eager"):
            setattr(config, _CHOICE, "eager")
