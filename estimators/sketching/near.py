"""Fixed tensors, each copied only once to the device and precision that asks for it."""

import torch
from torch import Tensor


class Near:
    """Fixed tensors by name."""

    def __init__(self) -> None:
        self._own: dict[str, Tensor] = {}
        self._copies: dict[tuple[str, torch.device, torch.dtype], Tensor] = {}

    def add(self, name: str, tensor: Tensor) -> None:
        """Keep a tensor under a name."""
        self._own[name] = tensor

    def __call__(self, name: str, like: Tensor) -> Tensor:
        """The tensor ``name`` on the device of ``like``, in its precision if it is a float."""
        own = self._own[name]
        dtype = like.dtype if own.is_floating_point() else own.dtype
        if own.device == like.device and own.dtype == dtype:
            return own
        key = (name, like.device, dtype)
        if key not in self._copies:
            self._copies[key] = own.to(device=like.device, dtype=dtype)
        return self._copies[key]
