"""Query calibration: how far a shortlist must reach for most queries of a kind.

For queries whose exact scores of *all* rows are known, the effort that each would have needed is
known too: how many rows of the shortlist, or how many error scales below the k-th best. A
distribution-free tolerance limit (Wilks 1941) of these efforts is enough, with the stated
confidence, for at least the stated share of all queries of the same kind. Nothing is assumed about
proxies, so that any proposer can be calibrated: sketches, codes without a law, BM25.

Choosing the smallest effort that passes is testing "too many queries fail" from the largest effort
down, in a fixed order, until the first that cannot be rejected; hence no correction for the search.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float, Int
from scipy import stats

from index.certificates.statement import Certificate, allowed_misses, check_confidence

Effort = Literal["error scales", "rows"]
"""What a query's effort is counted in: rescoring goes on until every row left out lies so many
error scales below the k-th best exact value, or until so many rows of the shortlist are done."""


@dataclass(frozen=True, kw_only=True)
class TrueTop:
    """One calibration query: its best rows by exact value, best first, and what a proposer said.

    Attributes:
        exact: exact values, descending.
        proxies: the proposer's values of the same rows.
        scales: error scales of the proxies, as at the exact value of the last of the top k; see
            ``efforts``. All 1 if the proposer knows none.
        ranks: places in the proposer's order, from 1.
    """

    exact: Float[np.ndarray, "row"]
    proxies: Float[np.ndarray, "row"]
    ranks: Int[np.ndarray, "row"]


def scales_below(
    threshold: float, proxies: Float[np.ndarray, "row"], scales: Float[np.ndarray, "row"]
) -> Float[np.ndarray, "row"]:
    """Error scales by which proxies lie below a threshold; infinite where no scale is known."""
    gaps = threshold - proxies
    sure = np.where(gaps > 0, np.inf, -np.inf)
    np.divide(gaps, scales, out=sure, where=scales > 0)
    return sure


def effort_needed(efforts: Float[np.ndarray, "row"], k: int, recall: float) -> float:
    """The smallest effort that finds enough of the top k, given the effort that finds each of them.

    Raises:
        ValueError: fewer than k efforts, or k or recall out of range.
    """
    if len(efforts) < k:
        raise ValueError(f"Need the efforts of the top {k} rows, got {len(efforts)}.")
    wanted = k - allowed_misses(k, recall)
    return float(np.partition(efforts[:k], wanted - 1)[wanted - 1])


def failures_allowed(queries: int, share: float, confidence: float) -> int:
    """How many calibration queries may fail; -1 if even none is too few queries.

    The largest f with ``P(Binomial(queries, 1 - share) <= f) <= 1 - confidence``.
    """
    check_confidence(confidence)
    check_confidence(share)
    failures = -1
    while stats.binom.cdf(failures + 1, queries, 1 - share) <= 1 - confidence:
        failures += 1
    return failures


def queries_needed(share: float, confidence: float) -> int:
    """The fewest calibration queries from which anything can be stated (none failing)."""
    check_confidence(confidence)
    check_confidence(share)
    return math.ceil(math.log(1 - confidence) / math.log(share) - 1e-9)


def tolerance_limit(needed: Sequence[float], share: float, confidence: float) -> float:
    """The smallest effort that is enough for ``share`` of all queries, with ``confidence``.

    An upper tolerance limit: an order statistic of the efforts that the calibration queries needed.

    Returns:
        inf if there are too few calibration queries, or too many that no effort serves.
    """
    allowed = failures_allowed(len(needed), share, confidence)
    if allowed < 0:
        return math.inf
    return float(np.sort(needed)[len(needed) - 1 - allowed])
