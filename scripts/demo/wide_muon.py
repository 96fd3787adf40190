"""Muon in the precision of the gradients."""

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


class WideMuon(torch.optim.Muon):
    """PyTorch's Muon with its iterations in the gradients' own precision.

    PyTorch narrows them to bfloat16, whose products take ten times as long on processors that have
    no instructions for them.
    """

    def step(self, closure: Any = None) -> Any:
        """One step; see ``torch.optim.Muon``."""
        with _NoBfloat16():
            return super().step(closure)  # type: ignore[no-untyped-call]


class _NoBfloat16(TorchFunctionMode):
    """``x.bfloat16()`` is a copy of x meanwhile."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is Tensor.bfloat16:
            return args[0].clone()
        return func(*args, **(kwargs or {}))
