"""K-FAC: curvature as a Kronecker product of two covariances (Martens and Grosse 2015)."""

from collections.abc import Sequence
from typing import Self

import torch

from estimators.contracts import RunPass
from estimators.eigenbasis import EigenbasisOperator, eigenbasis_tensors
from estimators.kronecker import Covariances
from estimators.layers import LinearLayer


class KFac(EigenbasisOperator):
    """``H = T * A x S``; A and S are means over token positions, T the mean positions an example.

    The factor T puts the eigenvalues in units of the mean loss of an example (a sum over its
    tokens), under K-FAC's assumption that tokens are independent.
    """

    @classmethod
    def fit(cls, layers: Sequence[LinearLayer], run_pass: RunPass) -> Self:
        """One pass for the covariances."""
        covariances = Covariances(layers)
        examples = run_pass("covariances", covariances.add)
        bases = covariances.eigenbases()
        eigenvalues = {
            name: torch.outer(basis.left_values, basis.right_values)
            * (covariances.positions(name) / examples)
            for name, basis in bases.items()
        }
        return cls(eigenbasis_tensors(bases, eigenvalues))
