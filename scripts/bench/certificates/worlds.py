"""Queries whose exact values are known, and the hostile corpora that certificates are tried on."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float

from service.search.proxies import Proxies


class Known:
    """A scorer that looks exact scores up.

    Args:
        scores: of all rows; NaN where there is none.
    """

    def __init__(self, scores: Float[np.ndarray, "row"]) -> None:
        self._scores = scores

    def score(self, rows: Sequence[int]) -> Float[np.ndarray, "scored"]:
        """Exact scores of ``rows``."""
        return self._scores[list(rows)]


@dataclass(frozen=True, kw_only=True)
class World:
    """One query's proxies and the truth about it.

    Attributes:
        truth: exact ranking values of all rows, those that cannot be scored included.
        scores: what the scorer gives; NaN where it cannot score.
        proxies: the proposer's.
    """

    truth: Float[np.ndarray, "row"]
    scores: Float[np.ndarray, "row"]
    proxies: Proxies

    def recall(self, found: Iterable[int], k: int) -> float:
        """Share of the true top k found; a tie with the k-th best counts as found."""
        threshold = np.partition(self.truth, len(self.truth) - k)[len(self.truth) - k]
        rows = np.fromiter(found, dtype=int)
        return min(1.0, float(np.sum(self.truth[rows] >= threshold)) / k)


def plain(
    truth: Float[np.ndarray, "row"],
    proxies: Float[np.ndarray, "row"],
    noise: float,
    relative: float,
) -> World:
    """A world of cosines in which every row can be scored."""
    rows = len(truth)
    values = proxies.astype(np.float64)
    live = values != 0
    return World(
        truth=truth.astype(np.float64),
        scores=truth.astype(np.float64),
        proxies=Proxies(
            values=values,
            sigmas=noise * live,
            relative=relative,
            divisors=np.ones(rows),
            failed=np.zeros(rows, dtype=bool),
        ),
    )


Change = Callable[[World, np.random.Generator], World]
"""What a hostile configuration does to the rows of one query."""


def _select(world: World, rows: np.ndarray) -> World:
    return World(truth=world.truth[rows], scores=world.scores[rows], proxies=world.proxies.at(rows))


def unchanged(world: World, generator: np.random.Generator) -> World:
    """As it is."""
    return world


def duplicated(world: World, generator: np.random.Generator) -> World:
    """A tenth of the rows ten times each, with the same codes."""
    rows = generator.permutation(len(world.truth))[: len(world.truth) // 10]
    return _select(world, np.tile(rows, 10))


def nearly_duplicated(world: World, generator: np.random.Generator) -> World:
    """The same, but each copy's values and errors differ by a few hundredths of an error scale."""
    copied = duplicated(world, generator)
    scale = float(np.max(world.proxies.sigmas))
    shift, error = 0.03 * scale * generator.standard_normal((2, len(copied.truth)))
    truth = copied.truth + shift
    values = copied.proxies.values + shift + error
    return replace(
        copied, truth=truth, scores=truth, proxies=replace(copied.proxies, values=values)
    )


def tied(world: World, generator: np.random.Generator) -> World:
    """Exact values rounded to half an error scale, so that many tie at the threshold."""
    step = 0.5 * float(np.max(world.proxies.sigmas))
    truth = np.round(world.truth / step) * step
    return replace(world, truth=truth, scores=truth)


def shuffled(world: World, generator: np.random.Generator) -> World:
    """Proxies of 15 % of the rows exchanged among them: no sketch errs like this."""
    rows = generator.permutation(len(world.truth))[: int(0.15 * len(world.truth))]
    values = world.proxies.values.copy()
    values[rows] = values[generator.permutation(rows)]
    return replace(world, proxies=replace(world.proxies, values=values))


def heavy_norms(world: World, generator: np.random.Generator) -> World:
    """Ranked by score, with norms of a Pareto law without a variance."""
    norms = 1 + generator.pareto(1.5, len(world.truth))
    proxies = world.proxies
    truth = world.truth * norms
    return World(
        truth=truth,
        scores=truth,
        proxies=replace(proxies, values=proxies.values * norms, sigmas=proxies.sigmas * norms),
    )


def some_nan(world: World, generator: np.random.Generator) -> World:
    """One row in 500 gives no score, of which nothing tells beforehand."""
    scores = world.scores.copy()
    scores[generator.random(len(scores)) < 0.002] = np.nan
    return replace(world, scores=scores)


def some_missing(world: World, generator: np.random.Generator) -> World:
    """One row in 500 is not in the index, its codes having failed."""
    failed = generator.random(len(world.truth)) < 0.002
    values = np.where(failed, -np.inf, world.proxies.values)
    return replace(world, proxies=replace(world.proxies, failed=failed, values=values))


HOSTILE: dict[str, Change] = {
    "exact duplicates": duplicated,
    "near-duplicates": nearly_duplicated,
    "ties": tied,
    "15 % of proxies shuffled": shuffled,
    "heavy-tailed norms": heavy_norms,
    "NaN rows": some_nan,
    "rows missing from the index": some_missing,
}
EXPECTED_TO_FAIL = {"15 % of proxies shuffled"}
