"""The identity: plain gradient dot products, i.e. TracIn at one checkpoint (Pruthi et al. 2020)."""

from collections.abc import Mapping, Sequence
from typing import ClassVar, Self

import torch
from torch import Tensor

from estimators.contracts import RunPass
from estimators.grounds import Grounds, Parameter, Questions
from estimators.model.gradients import Gradients
from estimators.model.layers import LinearLayer
from estimators.sketching.whitening import LayerWhitening


class Identity:
    """The dot product of gradients: the identity in place of curvature; nothing is fitted."""

    parameters: ClassVar[Mapping[str, Parameter]] = {}

    def __init__(self, tensors: Mapping[str, Tensor] | None = None) -> None:
        if tensors:
            raise ValueError(f"The identity has no factors, got {sorted(tensors)}.")

    @classmethod
    def fit(cls, layers: Sequence[LinearLayer], run_pass: RunPass) -> Self:
        """Fit nothing."""
        return cls()

    @classmethod
    def open(cls, grounds: Grounds) -> Self:
        """Every index has what it needs: nothing."""
        return cls()

    def directions(self, questions: Questions, values: Mapping[str, float]) -> dict[str, Tensor]:
        """``-grad f``."""
        return {name: -gradient for name, gradient in questions.gradients.items()}

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
