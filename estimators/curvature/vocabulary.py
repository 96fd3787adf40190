"""Curvature of a weight with a row for each vocabulary entry: a diagonal over the vocabulary.

A covariance over the vocabulary would be its square in size. Its diagonal is exact for embeddings
(two tokens are never read at one position) and leaves out the couplings ``-p_v p_w`` of a head.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from estimators.curvature.accumulation import LongSum, pad_columns
from estimators.curvature.eigenbasis import (
    Eigenbasis,
    add_symmetric,
    check_seen,
    decompose,
    precision_of,
)
from estimators.model.layers import VocabularyLayer
from estimators.model.terms import VocabularyTerms


class VocabularyCovariances:
    """Sums over positions, for each use of the weight, of ``x_v^2`` and of ``y y^T``.

    x and y are the two sides of the gradient's terms, see ``estimators.model.terms``.

    Args:
        tensors: ``inputs`` [use, vocabulary] and ``gradients`` [use, feature, feature], float64,
            and ``seen``, the numbers of sequences and of each use's positions.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._inputs = tensors["inputs"].clone()
        self._gradients = [LongSum(total) for total in tensors["gradients"]]
        self._seen = tensors["seen"].clone()

    @staticmethod
    def empty(layer: VocabularyLayer) -> dict[str, Tensor]:
        """What a layer begins with."""
        uses, wide = len(layer.uses), torch.float64
        return {
            "inputs": torch.zeros(uses, layer.in_features, dtype=wide),
            "gradients": torch.zeros(uses, layer.out_features, layer.out_features, dtype=wide),
            "seen": torch.zeros(1 + uses, dtype=torch.int64),
        }

    def add(self, terms: VocabularyTerms) -> None:
        """Add one batch. All memory is taken before the sums are touched."""
        squares, sides = zip(*terms.moments(), strict=True)
        more = torch.stack(squares).double()
        rows = [pad_columns(side) for side in sides]
        recent = [part.recent(x) for part, x in zip(self._gradients, rows, strict=True)]
        self._inputs = self._inputs.to(more.device)
        self._inputs += more
        for target, x in zip(recent, rows, strict=True):
            add_symmetric(target, x)
        self._seen += torch.tensor([len(terms.batch.rows), *map(len, rows)])

    def settle(self) -> None:
        """Move recent products into the float64 sums."""
        for part in self._gradients:
            part.settle()

    def tensors(self) -> dict[str, Tensor]:
        """What is settled; the class rebuilds itself from it."""
        gradients = torch.stack([part.total for part in self._gradients])
        return {"inputs": self._inputs, "gradients": gradients, "seen": self._seen}

    def eigenbasis(self, layer: VocabularyLayer) -> Eigenbasis:
        """The identity over the vocabulary; over features, one basis for all uses.

        With T_u the mean positions an example, M_u the mean of ``x x^T``'s diagonal and C_u that of
        ``y y^T``, K-FAC's curvature is ``sum_u T_u M_u x C_u`` if uses are independent. The basis
        is that of its sum over the vocabulary; it is the exact one where there is one use.

        Raises:
            ValueError: no token was seen, or the model gives non-finite values.
        """
        sequences, *positions = self._seen.tolist()
        check_seen(layer, min(positions))
        counts = torch.tensor(positions, dtype=torch.float64, device=self._inputs.device)
        rates = counts / sequences
        moments = self._inputs / counts[:, None] * (rates / rates[0])[:, None]
        means = [part.total / n for part, n in zip(self._gradients, positions, strict=True)]
        whole = sum(m.sum() * c for m, c in zip(moments, means, strict=True))
        assert isinstance(whole, Tensor)
        right, _ = decompose(whole, layer, side="vocabulary layer's")
        dtype = precision_of(layer)
        symmetric = [c.triu() + c.triu(1).T for c in means]
        wide = right.double()
        along = [((c @ wide) * wide).sum(0).clamp_min(0) for c in symmetric]
        return Eigenbasis(
            left=None,
            right=right,
            left_values=moments.to(dtype),
            right_values=torch.stack(along).to(dtype),
            positions=float(rates[0]),
        )
