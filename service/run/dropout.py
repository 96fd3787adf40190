"""Dropout, whose masks no record holds."""

from collections.abc import Iterator
from typing import Any

from torch import nn

MARK = "drop"
"""What the names of such rates have in common: ``p`` of Dropout aside."""


def active_dropout(model: nn.Module, *, in_training_only: bool = True) -> Iterator[str]:
    """Names of rates above 0.

    Args:
        model: the model.
        in_training_only: pass over modules in evaluation mode.
    """
    for name, module in model.named_modules():
        if module.training or not in_training_only:
            for attribute in _rates(module):
                yield f"{name}.{attribute}" if name else attribute


def silence_dropout(model: nn.Module) -> None:
    """Set every rate to 0."""
    for module in model.modules():
        for attribute in list(_rates(module)):
            setattr(module, attribute, 0.0)


def _rates(module: nn.Module) -> Iterator[str]:
    for attribute, value in vars(module).items():
        kind = isinstance(module, nn.modules.dropout._DropoutNd) and attribute == "p"
        if (kind or MARK in attribute) and _is_rate(value):
            yield attribute


def _is_rate(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0
