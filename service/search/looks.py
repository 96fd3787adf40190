"""What one search has read of its rows, look by look, and how deep it has them."""

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, Int

from index.certificates.sketch import LATER, CalibrationCheck, check_calibration
from index.codes.vectors import best_rows
from service.search.proxies import Proxies
from service.search.shards import Shard

WIDER = 4
"""Of the first rows to be rescored, at each look the best so many for one at the next."""
AT_ONCE, ROUNDS = 1 << 14, 4
"""Rows whose further slices are read in one go, which bounds the memory; and how often at most for
one step of a search, which bounds its time. Rows beyond that count as they were scanned."""


class Looks:
    """Estimates of one search's rows after each look, and how deep they lie; no row is read twice.

    The depth of a row is that of the look that has it deepest, in error scales of the first look:
    a scale of a later one counts as ``1 / LATER``, as its certificate has it. Scales are raised by
    ``inflations``, a factor a look.

    Args:
        shard: of all rows.
    """

    def __init__(self, shard: Shard) -> None:
        self._shard = shard
        nothing = np.empty(0, dtype=np.int64)
        self._rows = [nothing] * shard.looks
        self._read = [shard.at(nothing, look) for look in range(shard.looks)]

    def at(self, rows: Int[np.ndarray, "asked"], look: int) -> Proxies:
        """Estimates of given rows after a look, in that order."""
        if look == 0:
            return self._shard.at(rows)
        fresh = np.setdiff1d(rows, self._rows[look])
        if len(fresh):
            known = np.concatenate([self._rows[look], fresh])
            order = np.argsort(known)
            read = self._shard.at(fresh, look)
            self._rows[look], self._read[look] = (
                known[order],
                read.after(self._read[look]).at(order),
            )
        return self._read[look].at(np.searchsorted(self._rows[look], rows))

    def last(self, rows: Int[np.ndarray, "asked"]) -> Proxies:
        """Estimates of given rows after all looks."""
        return self.at(rows, self._shard.looks - 1)

    def each(self, rows: Int[np.ndarray, "asked"]) -> list[Proxies]:
        """Estimates of given rows after each look."""
        return [self.at(rows, look) for look in range(self._shard.looks)]

    def inflations(
        self, rows: Int[np.ndarray, "near"], exact: Float[np.ndarray, "near"]
    ) -> list[float]:
        """By how much errors exceed their scales among rows near the query, at each look.

        Root mean square of residuals over scales; 1 at least, and where no row has a scale.

        Args:
            rows: near the query.
            exact: their exact ranking values.
        """
        found = []
        for near in self.each(rows):
            scales = near.scales(exact)
            noisy = scales > 0
            residuals = (exact - near.values)[noisy] / scales[noisy]
            found.append(max(1.0, float(np.sqrt(np.mean(residuals**2)))) if noisy.any() else 1.0)
        return found

    def check(
        self, rows: Int[np.ndarray, "drawn"], exact: Float[np.ndarray, "drawn"]
    ) -> CalibrationCheck | None:
        """Errors of random rows against their scales, at the look that fares worst.

        None if no row has both a scale and an exact value.
        """
        checks = []
        for drawn in self.each(rows):
            if ((drawn.sigmas > 0) & np.isfinite(exact)).any():
                scales = drawn.scales(np.nan_to_num(exact))
                checks.append(check_calibration(exact, drawn.values, scales, self._shard.looks))
        return max(checks, key=lambda check: check.mean_square / check.limit, default=None)

    def first(self, count: int, without: Bool[np.ndarray, "row"]) -> Int[np.ndarray, "first"]:
        """The best rows by all of their codes, among more by each look before."""
        looks = self._shard.looks
        rows = self._shard.best(count * WIDER ** (looks - 1), without)
        for look in range(1, looks):
            values = self.at(rows, look).values
            rows = rows[best_rows(values, count * WIDER ** (looks - 1 - look))]
        return rows

    def depths(
        self,
        rows: Int[np.ndarray, "asked"],
        threshold: float,
        inflations: Sequence[float],
        goal: float = math.inf,
    ) -> Float[np.ndarray, "asked"]:
        """How deep each row lies below a ranking value.

        Later looks are had only at rows that no look before has beyond ``goal``.
        """
        deepest = np.full(len(rows), -np.inf)
        for look, unit in enumerate(_units(inflations)):
            near = deepest <= goal
            part = self.at(rows[near], look)
            depths = np.minimum(part.depths(threshold), part.deepest) / unit
            deepest[near] = np.maximum(deepest[near], depths)
        return deepest

    def deepest(self, inflations: Sequence[float]) -> float:
        """Beyond this depth no look can tell anything, see ``Proxies.deepest``."""
        nothing = self.each(np.empty(0, dtype=np.int64))
        units = _units(inflations)
        return max(look.deepest / unit for look, unit in zip(nothing, units, strict=True))

    def contenders(
        self,
        threshold: float,
        goal: float,
        inflations: Sequence[float],
        without: Bool[np.ndarray, "row"],
        count: int,
    ) -> Int[np.ndarray, "next"]:
        """The rows that no look has deeper than ``goal``; those shallowest at the last look.

        Args:
            threshold: ranking value that depths are counted from.
            goal: of the search.
            inflations: of the error scales, by look.
            without: rows to pass over.
            count: how many at most.
        """
        if self._shard.looks == 1 or threshold == -math.inf:
            return self._shard.contenders(threshold, goal, without, count).rows
        reach = self._reach(goal)
        for _ in range(ROUNDS):
            found = self._shard.contenders(threshold, reach, without, AT_ONCE)
            depths = self.depths(found.rows, threshold, inflations, goal)
            near = found.rows[depths <= goal]
            if len(near) or found.beyond > reach or not len(found.rows):
                break
            without = without.copy()
            without[found.rows] = True
        chosen: np.ndarray = near[best_rows(-self.last(near).depths(threshold), count)]
        return chosen

    def reached(
        self,
        threshold: float,
        goal: float,
        inflations: Sequence[float],
        without: Bool[np.ndarray, "row"],
    ) -> float:
        """A depth above which no row lies, ``without`` aside.

        The largest such up to ``goal``, unless more rows than are read in one go lie within it.
        """
        if self._shard.looks == 1 or threshold == -math.inf:
            least = self._shard.contenders(threshold, -math.inf, without, 0).beyond
            return min(least, self._shard.deepest())
        reach, least = self._reach(goal), self.deepest(inflations)
        for _ in range(ROUNDS):
            found = self._shard.contenders(threshold, reach, without, AT_ONCE)
            depths = self.depths(found.rows, threshold, inflations, goal)
            least = min(least, float(depths.min(initial=math.inf)))
            if least <= goal or found.beyond > reach or not len(found.rows):
                break
            without = without.copy()
            without[found.rows] = True
        return min(least, found.beyond)

    def _reach(self, goal: float) -> float:
        """The depth at the first look up to which rows may be contenders."""
        return goal if goal < self._shard.deepest() else math.inf


def _units(inflations: Sequence[float]) -> list[float]:
    """Error scales of each look that count as one of the first's."""
    first, *later = inflations
    return [1.0, *(LATER * inflation / first for inflation in later)]
