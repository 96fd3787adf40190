"""Sums over many batches: added in working precision, settled in float64."""

import torch
from torch import Tensor

_MULTIPLE = 16


class LongSum:
    """A matrix that many terms are added to.

    Terms are added in the precision of the products (float32 at least), where a matrix product can
    accumulate in place; ``settle`` moves what has come together into float64. Settled often enough,
    the order and number of batches hardly matter.

    Args:
        total: float64, what the sum begins with.
    """

    def __init__(self, total: Tensor) -> None:
        self._total = total
        self._recent: Tensor | None = None

    @property
    def total(self) -> Tensor:
        """Everything that is settled, float64."""
        return self._total

    def recent(self, terms: Tensor) -> Tensor:
        """The part that is not settled, for terms of this precision and device to be added to.

        Rows and columns are ``aligned``. Memory that the sum needs is taken here, before anything
        is added.
        """
        if self._recent is None:
            rows, columns = self._total.shape
            self._total = self._total.to(terms.device)
            self._recent = terms.new_zeros(aligned(rows), aligned(columns))
        return self._recent

    def settle(self) -> None:
        """Move what was added since the last time into the total."""
        if self._recent is not None:
            rows, columns = self._total.shape
            self._total += self._recent[:rows, :columns]
            self._recent.zero_()


def aligned(width: int) -> int:
    """The next multiple of 16: a product with 769 columns costs 1.4 times one with 784."""
    return -(-width // _MULTIPLE) * _MULTIPLE


def pad_columns(values: Tensor) -> Tensor:
    """Zeros appended to the last dimension up to an ``aligned`` width."""
    missing = aligned(values.shape[-1]) - values.shape[-1]
    return torch.nn.functional.pad(values, (0, missing)) if missing else values
