"""K-FAC: curvature as a Kronecker product of two covariances (Martens and Grosse 2015)."""

from collections.abc import Sequence
from typing import Self

import torch

from estimators.contracts import RunPass
from estimators.curvature.kronecker import Covariances
from estimators.model.layers import LinearLayer
from estimators.operators.eigenbasis import EigenbasisOperator


class KFac(EigenbasisOperator):
    """``H = T * A x S``; A and S are means over token positions, T the mean positions an example.

    The factor T puts the eigenvalues in units of the mean loss of an example (a sum over its
    tokens), under K-FAC's assumption that tokens are independent.
    """

    @classmethod
    def fit(cls, layers: Sequence[LinearLayer], run_pass: RunPass) -> Self:
        """One pass for the covariances."""
        covariances = run_pass("covariances", Covariances, lambda: Covariances.begin(layers))
        tensors = {}
        for name, basis in covariances.eigenbases(layers).items():
            values = torch.outer(basis.left_values, basis.right_values)
            tensors[f"{name}.left"], tensors[f"{name}.right"] = basis.left.cpu(), basis.right.cpu()
            tensors[f"{name}.eigenvalues"] = (values * covariances.mean_positions(name)).cpu()
        return cls(tensors)
