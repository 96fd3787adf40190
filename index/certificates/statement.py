"""The forms in which certificates and shares are reported."""

from dataclasses import dataclass, field
from typing import Literal

Status = Literal["certified", "not certified", "refused", "exhaustive"]
"""Certified: the target is reached at the stated confidence. Not certified: only the stated bound
is (which may be 0); recall may well be higher. Refused: an assumption failed its check. Exhaustive:
every scorable row was scored exactly, so nothing can have been missed."""


@dataclass(frozen=True, kw_only=True)
class Certificate:
    """One statement about the recall of one answer.

    Attributes:
        type: "sketch", "audit" or "calibration".
        status: see ``Status``.
        recall_lower_bound: recall of the exact top k is at least this, in [0, 1]; None if refused.
            For "calibration" it is reached by the share of queries that ``scope`` names.
        recall_target: what was asked for.
        confidence: of the bound, in (0, 1); 1 if exhaustive.
        scope: what the statement is about.
        probability_over: what is random in it.
        assumptions: what must hold for it.
        observed: the counts and figures that it was computed from.
        sentence: one plain sentence for people.
    """

    type: Literal["sketch", "audit", "calibration"]
    status: Status
    recall_lower_bound: float | None
    recall_target: float
    confidence: float
    scope: str
    probability_over: str
    assumptions: tuple[str, ...]
    observed: dict[str, float | int | str] = field(default_factory=dict)
    sentence: str

    @property
    def open_rows(self) -> int | None:
        """Further rows whose exact scores would certify the target, about; None if not known."""
        rows = self.observed.get("open_rows")
        return None if rows is None else int(rows)


@dataclass(frozen=True, kw_only=True)
class Share:
    """What part of all positive scores some results carry.

    Attributes:
        estimate: in [0, 1]; None if nothing can be said.
        low: lower end of its confidence interval.
        high: upper end.
        confidence: of the interval; 1 if every row was scored, 0 if nothing can be said.
        sampled: random rows that the interval stands on; 0 if every row was scored.
        sentence: one plain sentence for people, with the reason where there is no estimate.
    """

    estimate: float | None
    low: float | None
    high: float | None
    confidence: float
    sampled: int
    sentence: str


def no_share(reason: str) -> Share:
    """Nothing can be said, and why."""
    return Share(
        estimate=None,
        low=None,
        high=None,
        confidence=0.0,
        sampled=0,
        sentence=f"No share is stated: {reason}.",
    )


def allowed_misses(k: int, recall: float) -> int:
    """The largest number of missed rows J with ``(k - J) / k >= recall``.

    Raises:
        ValueError: k below 1 or recall outside (0, 1].
    """
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}.")
    if not 0 < recall <= 1:
        raise ValueError(f"The recall target must be above 0 and at most 1, got {recall}.")
    misses = int(k - k * recall)
    while misses + 1 <= k and (k - misses - 1) / k >= recall:
        misses += 1
    while (k - misses) / k < recall:
        misses -= 1
    return misses


def check_confidence(confidence: float) -> None:
    """Raise ValueError unless 0 < confidence < 1."""
    if not 0 < confidence < 1:
        raise ValueError(f"The confidence must be between 0 and 1 (exclusive), got {confidence}.")
