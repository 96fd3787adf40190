"""The identity: plain gradient dot products, i.e. TracIn at one checkpoint (Pruthi et al. 2020)."""

from collections.abc import Mapping, Sequence
from typing import Self

import torch
from torch import Tensor

from estimators.contracts import RunPass
from estimators.model.gradients import Gradients
from estimators.model.layers import LinearLayer
from estimators.sketching.whitening import LayerWhitening


class Identity:
    """``H + lambda I`` replaced by the identity; nothing is fitted and damping has no effect."""

    def __init__(self, tensors: Mapping[str, Tensor] | None = None) -> None:
        if tensors:
            raise ValueError(f"The identity has no factors, got {sorted(tensors)}.")

    @classmethod
    def fit(cls, layers: Sequence[LinearLayer], run_pass: RunPass) -> Self:
        """Fit nothing."""
        return cls()

    def precondition(self, gradients: Gradients, damping: float) -> dict[str, Tensor]:
        """The gradients themselves."""
        return dict(gradients)

    def whitening(self, layers: Sequence[LinearLayer], damping: float) -> dict[str, LayerWhitening]:
        """No whitening: with constant inverse curvature, weights of 1 minimise the noise."""
        return {
            layer.name: LayerWhitening(
                left_basis=None,
                right_basis=None,
                left_scale=torch.ones(layer.in_features),
                right_scale=torch.ones(layer.out_features),
            )
            for layer in layers
        }

    def tensors(self) -> Mapping[str, Tensor]:
        """Nothing."""
        return {}
