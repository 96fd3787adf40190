"""What scores say of a training without some rows, where their scale was measured."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from service.scoring.scale import Asked, IndexScales, Scale, ScaleRecord


@dataclass(frozen=True, kw_only=True)
class Removal:
    """What leaving one result out of the training would do, by a measured scale.

    Attributes:
        nats: change of the measured value to first order; negative for a proponent.
        low: lower end of its interval.
        high: upper end.
        confidence: of the interval, which is for one of the strongest rows of another question.
    """

    nats: float
    low: float
    high: float
    confidence: float


@dataclass(frozen=True, kw_only=True)
class JointRemoval:
    """What leaving several results out of the training together would do.

    Attributes:
        rows: how many.
        nats: change of the measured value; None if sets of this size were not measured.
        low: lower end of its interval.
        high: upper end.
        confidence: of the interval; 0 if nothing can be said.
        sentence: one plain sentence for people.
    """

    rows: int
    nats: float | None
    low: float | None
    high: float | None
    confidence: float
    sentence: str


@dataclass(frozen=True, kw_only=True)
class Effect:
    """What one unit of score is worth, measured for a run, an estimator and its parameters.

    Attributes:
        nats_per_unit: change of the measured value for one unit of score.
        low: lower end of its confidence interval, for another question of the same kind.
        high: upper end.
        confidence: of the interval.
        measured_by: how it was measured, in a sentence.
        spread: half of a single result's interval, in units of the geometric mean of its own
            prediction and the question's largest one.
        spread_confidence: of that interval.
        scale: what was measured; None for scores that need no scale.
    """

    nats_per_unit: float
    low: float
    high: float
    confidence: float
    measured_by: str
    spread: float = 0.0
    spread_confidence: float = 1.0
    scale: Scale | None = None

    @classmethod
    def of(cls, scale: Scale, record: ScaleRecord) -> Self:
        """As a record has it."""
        return cls(
            nats_per_unit=scale.nats_per_unit.value,
            low=scale.nats_per_unit.low,
            high=scale.nats_per_unit.high,
            confidence=record.confidence,
            measured_by=record.measured_by,
            spread=scale.spread,
            spread_confidence=scale.spread_confidence,
            scale=scale,
        )

    def of_removal(self, score: float, largest: float) -> Removal:
        """Of a single row with this score; the question's largest is of either sign."""
        change = -score * self.nats_per_unit
        off = self.spread * abs(self.nats_per_unit) * math.sqrt(abs(score * largest))
        return Removal(
            nats=change, low=change - off, high=change + off, confidence=self.spread_confidence
        )

    def of_joint_removal(self, scores: Sequence[float]) -> JointRemoval:
        """Of several rows together: by retrainings without so many rows, else not at all."""
        rows, total = len(scores), sum(scores)
        found = None if self.scale is None else self.scale.of_set(rows)
        if found is None:
            return JointRemoval(
                rows=rows, nats=None, low=None, high=None, confidence=0.0,
                sentence=self._not_measured(rows),
            )  # fmt: skip
        change, *ends = (-total * worth for worth in (found.value, found.low, found.high))
        return JointRemoval(
            rows=rows, nats=change, low=min(ends), high=max(ends),
            confidence=self.confidence,
            sentence=f"Leaving all {rows} results out of the training together: {change:+.2g} nats "
            f"({min(ends):+.2g} to {max(ends):+.2g} at {self.confidence:.0%} confidence, by "
            f"retrainings without such sets).",
        )  # fmt: skip

    def _not_measured(self, rows: int) -> str:
        if self.scale is None:
            return (
                f"Leaving all {rows} results out together can do less or more than the sum of "
                f"their scores; etymon replay --weights trains without them."
            )
        measured = [one.rows for one in self.scale.by_size]
        if not measured:
            return (
                f"What leaving all {rows} results out together would do was not measured, and can "
                f"be less or more than their sum; etymon scale --retrainings measures it."
            )
        return (
            f"What leaving all {rows} results out together would do was not measured: sets of "
            f"{min(measured)} to {max(measured)} rows were."
        )


OF_THE_RUN = Effect(
    nats_per_unit=1.0,
    low=1.0,
    high=1.0,
    confidence=1.0,
    measured_by="Scores are nats of the measured value already, to first order: they were "
    "differentiated through the run itself.",
)
"""Of scores that need no scale."""

OF_A_DIRECTION = (
    "Scores are nats of the measured value already, to first order, for an example that is read "
    "once an epoch; what leaving out one that was read would do, the estimator run says."
)
"""Why scores by the run's direction have no scale."""


def effect_of(scales: IndexScales, chosen: Asked) -> tuple[Effect | None, str | None]:
    """The measured scale of an estimator's scores, or why there is none."""
    found = scales.find(chosen)
    if isinstance(found, str) or scales.record is None:
        return None, str(found)
    return Effect.of(found, scales.record), None


def removal_of(effect: Effect | None, score: float, largest: float) -> Removal | None:
    """What leaving out a row with this score would do, where the scale was measured."""
    return None if effect is None else effect.of_removal(score, largest)
