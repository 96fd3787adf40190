"""Shards of rows: the few questions that a search asks of all rows, answered block by block."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from index.codes.vectors import best_rows
from service.search.proxies import Proxies

BLOCK = 1 << 16
"""Rows whose estimates are computed together, which bounds the memory beside the codes' sums."""

Rows = Int[np.ndarray, "asked"] | slice


@dataclass(frozen=True, kw_only=True)
class Contenders:
    """Rows that lie no deeper than was asked.

    Attributes:
        rows: the shallowest first; ties in order of row.
        depths: of these.
        beyond: depth of the shallowest row that is not among them; inf if there is none.
    """

    rows: Int[np.ndarray, "found"]
    depths: Float[np.ndarray, "found"]
    beyond: float


class Shard(ABC):
    """Estimates of some rows' ranking values for one question.

    Subclasses give the estimates of given rows; all else follows. An answer over several shards is
    made of theirs: the best of the best, the shallowest of the contenders, sums.

    Attributes:
        failed: rows that have no finite gradient, and are never among the answers.
        relative: see ``Proxies``.
        lawful: see ``Proxies``.
        unit: of depths.
        looks: estimates that there are of a row, each from more of its codes than the one before;
            the first of every row, the later ones of those that are asked for.
    """

    failed: Bool[np.ndarray, "row"]
    relative: float
    lawful: bool
    unit: str
    looks: int

    def __len__(self) -> int:
        return len(self.failed)

    def deepest(self, *, slack: bool = False) -> float:
        """Beyond this a depth says nothing, see ``Proxies.deepest``."""
        nothing = self.at(slice(0, 0))
        return (nothing.with_slack() if slack else nothing).deepest

    @abstractmethod
    def at(self, rows: Rows, look: int = 0) -> Proxies:
        """Estimates of given rows after a look, in that order."""

    @abstractmethod
    def among(self, rows: Int[np.ndarray, "kept"]) -> "Shard":
        """A shard of some of the rows, numbered anew."""

    @abstractmethod
    def negated(self) -> "Shard":
        """Estimates of the opposite values."""

    def best(self, count: int, without: Bool[np.ndarray, "row"]) -> Int[np.ndarray, "best"]:
        """The ``count`` rows with the largest estimates, best first; ties go to the lower row.

        Args:
            count: how many; fewer if there are not so many.
            without: rows to pass over, besides the failed ones.
        """
        rows, values = np.empty(0, dtype=np.int64), np.empty(0)
        for some, part in self._blocks(without):
            rows, values = np.concatenate([rows, some]), np.concatenate([values, part.values])
            kept = best_rows(values, count)
            rows, values = rows[kept], values[kept]
        return rows

    def contenders(
        self,
        threshold: float,
        depth: float,
        without: Bool[np.ndarray, "row"],
        most: int,
        *,
        slack: bool = False,
    ) -> Contenders:
        """Rows at most ``depth`` below a threshold, as ``Proxies.depths`` measures it.

        Args:
            threshold: ranking value that depths are counted from.
            depth: of the deepest row wanted.
            without: rows to pass over, besides the failed ones.
            most: the shallowest so many.
            slack: whether depths are those that calibrations use.
        """
        rows, depths = np.empty(0, dtype=np.int64), np.empty(0)
        beyond = math.inf
        for some, part in self._blocks(without):
            found = (part.with_slack() if slack else part).depths(threshold)
            near = found <= depth
            beyond = min(beyond, float(found[~near].min(initial=math.inf)))
            rows = np.concatenate([rows, some[near]])
            depths = np.concatenate([depths, found[near]])
            kept = best_rows(-depths, most)
            rest = np.ones(len(rows), dtype=bool)
            rest[kept] = False
            beyond = min(beyond, float(depths[rest].min(initial=math.inf)))
            rows, depths = rows[kept], depths[kept]
        return Contenders(rows=rows, depths=depths, beyond=beyond)

    def guessed(self, without: Bool[np.ndarray, "row"]) -> float:
        """Sum of the estimates of positive scores over all rows but ``without`` and failed ones."""
        parts = (np.maximum(part.scores(), 0).sum() for _, part in self._blocks(without))
        return float(sum(parts))

    def _blocks(
        self, without: Bool[np.ndarray, "row"]
    ) -> Iterator[tuple[Int[np.ndarray, "open"], Proxies]]:
        """Numbers and estimates of the rows that are not passed over, some at a time."""
        for start in range(0, len(self), BLOCK):
            end = start + BLOCK
            rows = start + np.flatnonzero(~without[start:end] & ~self.failed[start:end])
            if len(rows):
                yield rows, self.at(rows)


class DenseShard(Shard):
    """Estimates that lie in memory, whatever they were made from.

    Args:
        proxies: of all rows.
        later: the same after each further look.
    """

    def __init__(self, proxies: Proxies, *later: Proxies) -> None:
        self._proxies = (proxies, *later)
        self.failed = proxies.failed
        self.relative, self.lawful = proxies.relative, proxies.lawful
        self.unit, self.looks = proxies.unit, 1 + len(later)

    def at(self, rows: Rows, look: int = 0) -> Proxies:
        """Estimates of given rows after a look, in that order."""
        return self._proxies[look].at(rows)

    def among(self, rows: Int[np.ndarray, "kept"]) -> Shard:
        """A shard of some of the rows, numbered anew."""
        return DenseShard(*(proxies.among(rows) for proxies in self._proxies))

    def negated(self) -> Shard:
        """Estimates of the opposite values."""
        return DenseShard(*(proxies.negated() for proxies in self._proxies))


class Found:
    """Rows with their exact scores, in order of row; NaN where a row has none."""

    def __init__(self) -> None:
        self.rows = np.empty(0, dtype=np.int64)
        self.scores = np.empty(0)
        self._divisors = np.empty(0)

    def add(
        self,
        rows: Int[np.ndarray, "fresh"],
        scores: Float[np.ndarray, "fresh"],
        divisors: Float[np.ndarray, "fresh"],
    ) -> None:
        """Rows that were not there, with what divides their scores to rank them."""
        order = np.argsort(together := np.concatenate([self.rows, rows]), kind="stable")
        self.rows = together[order]
        self.scores = np.concatenate([self.scores, scores])[order]
        self._divisors = np.concatenate([self._divisors, divisors])[order]

    def best(self, k: int) -> tuple[Int[np.ndarray, "best"], Float[np.ndarray, "best"]]:
        """The k rows with the largest ranking values, and these; ties go to the lower row."""
        finite = np.isfinite(self.scores)
        rows, values = self.rows[finite], (self.scores / self._divisors)[finite]
        chosen = best_rows(values, k)
        return rows[chosen], values[chosen]

    def scores_of(self, rows: Int[np.ndarray, "asked"]) -> Float[np.ndarray, "asked"]:
        """Exact scores of rows; NaN where there is none."""
        return self._of(rows, self.scores)

    def values_of(self, rows: Int[np.ndarray, "asked"]) -> Float[np.ndarray, "asked"]:
        """Ranking values of rows; NaN where there is none."""
        return self._of(rows, self.scores / self._divisors)

    def _of(
        self, rows: Int[np.ndarray, "asked"], known: Float[np.ndarray, "found"]
    ) -> Float[np.ndarray, "asked"]:
        if not len(known):
            return np.full(len(rows), np.nan)
        places = np.minimum(np.searchsorted(self.rows, rows), len(known) - 1)
        return np.where(self.rows[places] == rows, known[places], np.nan)
