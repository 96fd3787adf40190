"""Rankings by values that were computed twice, so that rounding may order nearly equal ones."""

from collections.abc import Sequence

import numpy as np


def assert_best_first(rows: Sequence[int], values: np.ndarray, rounding: float) -> None:
    """``rows`` are the rows of the largest ``values``, largest first.

    Args:
        rows: found; none twice.
        values: of all rows, by another way.
        rounding: values that differ by so much of the largest are taken for equal.
    """
    assert len(set(rows)) == len(rows)
    equal = rounding * float(np.abs(values).max())
    found = values[list(rows)]
    assert (np.diff(found) <= equal).all(), "not in order"
    others = np.delete(values, list(rows))
    assert not len(others) or others.max() <= found.min() + equal, "a better row is left out"
