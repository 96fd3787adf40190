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

import numpy as np
from jaxtyping import Float
from scipy import stats

from index.certificates.statement import Certificate, Status, allowed_misses, check_confidence

SHARE = 0.95
"""Of all queries of the calibration queries' kind, for which the statement holds."""


@dataclass(frozen=True, kw_only=True)
class CalibrationEvidence:
    """What the certificate is computed from.

    Attributes:
        needed: by each calibration query to reach the recall that is asked for, with the rows that
            cannot be scored counted among its misses.
        reached: by this query: whatever needs less effort was rescored; inf if every row that has a
            gradient was scored.
        unit: what efforts are counted in, in words.
        unscorable: rows that cannot be scored; each may be a miss.
        stale: why the calibration does not hold for this query or index; None if it does.
    """

    needed: Sequence[float]
    reached: float
    unit: str
    unscorable: int = 0
    stale: str | None = None


def effort_needed(efforts: Float[np.ndarray, "row"], k: int, misses: int) -> float:
    """The smallest effort that finds all but ``misses`` of the top k, given each row's effort.

    Args:
        efforts: that find each of the best rows by exact value, best first.
        k: rows that are looked for.
        misses: how many of them may be missed; below 0 no effort is enough.

    Raises:
        ValueError: fewer than k efforts.
    """
    if len(efforts) < k:
        raise ValueError(f"Need the efforts of the top {k} rows, got {len(efforts)}.")
    if misses < 0:
        return math.inf
    wanted = k - misses
    return float(np.partition(efforts[:k], wanted - 1)[wanted - 1]) if wanted else -math.inf


def failures_allowed(queries: int, share: float, confidence: float) -> int:
    """How many calibration queries may fail; -1 if even none is too few queries.

    The largest f with ``P(Binomial(queries, 1 - share) <= f) <= 1 - confidence``.
    """
    check_confidence(confidence)
    check_confidence(share)
    at_most = stats.binom.cdf(np.arange(queries + 1), queries, 1 - share)
    return int((at_most <= 1 - confidence).sum()) - 1


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


def certify_calibration(
    evidence: CalibrationEvidence,
    k: int,
    recall: float,
    confidence: float,
    share: float = SHARE,
) -> Certificate:
    """Whether the search went as deep as ``share`` of the calibration queries' kind need.

    Raises:
        ValueError: k, recall, confidence or share out of range.
    """
    misses = allowed_misses(k, recall)
    limit = tolerance_limit(evidence.needed, share, confidence)
    everything = math.isinf(evidence.reached) and evidence.reached > 0
    bound: float | None = max(0.0, 1 - evidence.unscorable / k) if everything else 0.0
    status: Status = "not certified"
    if everything and not evidence.unscorable:
        status = "exhaustive"
    elif evidence.stale is not None:
        status, bound = "refused", None
    elif limit < math.inf and evidence.reached > limit:
        status, bound = "certified", 1 - misses / k
    allowed = failures_allowed(len(evidence.needed), share, confidence)
    return Certificate(
        type="calibration",
        status=status,
        recall_lower_bound=bound,
        recall_target=recall,
        confidence=1.0 if status == "exhaustive" else confidence,
        scope=f"at least {share:.0%} of the queries of the kind that the index was calibrated "
        f"with, searched as deeply as this one; not this answer by itself",
        probability_over="the choice of the calibration queries",
        assumptions=("this query is of the same kind as the calibration queries",),
        observed={
            "calibration_queries": len(evidence.needed),
            "failures_allowed": max(0, allowed),
            "share_of_queries": share,
            "required_effort": limit if math.isfinite(limit) else str(limit),
            "reached_effort": str(evidence.reached) if everything else evidence.reached,
            "effort_unit": evidence.unit,
        },
        sentence=_sentence(status, evidence, k, k - misses, confidence, share),
    )


def _sentence(
    status: Status,
    evidence: CalibrationEvidence,
    k: int,
    found: int,
    confidence: float,
    share: float,
) -> str:
    if status == "exhaustive":
        return "Every row that has a gradient was scored, so nothing was missed."
    if status == "refused":
        return f"No statement: {evidence.stale}."
    queries = len(evidence.needed)
    if status == "certified":
        return (
            f"With {confidence:.0%} confidence, at least {share:.0%} of queries like the "
            f"{queries} that the index was calibrated with find {found} or more of their {k} "
            f"highest-scoring training examples when searched as deeply as this one; for a query "
            f"of another kind this says nothing."
        )
    if failures_allowed(queries, share, confidence) < 0:
        return (
            f"No statement: {queries} calibration queries are too few, "
            f"{queries_needed(share, confidence)} are needed."
        )
    return "The search was less deep than the calibration queries need; rescore more rows."
