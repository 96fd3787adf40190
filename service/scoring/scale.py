"""What one unit of an estimator's score is worth, as measured for a run; kept by the index."""

import bisect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from pydantic import ValidationError

from index.errors import IndexCorrupt
from index.files import read_sealed
from index.manifest import Record

FILE_NAME = "scale.json"
NO_SCALE = (
    "What one unit of score is worth in log p was not measured for this run, estimator and "
    "parameters; scores only rank. Where the run was recorded and traced, etymon scale measures it."
)
"""Why nothing is known where nothing was measured."""


class Asked(Protocol):
    """An estimator with its parameters, as ``estimators.chosen.Chosen`` is, which needs torch."""

    @property
    def name(self) -> str:
        """In the registry."""

    @property
    def values(self) -> Mapping[str, float]:
        """Of its parameters."""

    @property
    def grounds_sha256(self) -> str:
        """Of the model, factors and examples that it stands on."""

    @property
    def fingerprint(self) -> str:
        """Of all that its scores depend on besides the question."""


class Interval(Record):
    """An estimate over questions.

    Attributes:
        value: the estimate.
        low: lower end of its confidence interval.
        high: upper end.
    """

    value: float
    low: float
    high: float


class SizeScale(Record):
    """What a unit of score was worth where so many rows were left out together.

    Attributes:
        rows: left out.
        nats_per_unit: change of the measured value for one unit of their summed score.
        sets: how many sets it was measured on.
    """

    rows: int
    nats_per_unit: Interval
    sets: int


class SignTest(Record):
    """Of two random sets of rows, does the one that scores put higher stand higher by the run?

    Attributes:
        right: pairs of sets in the right order.
        pairs: in all.
        p_value: that chance alone orders so many rightly, one-sided.
    """

    right: int
    pairs: int
    p_value: float


class Scale(Record):
    """The scale of one estimator with its parameters.

    Attributes:
        estimator: its name.
        parameters: all of them.
        fingerprint: of all that its scores depend on besides the question.
        nats_per_unit: change of the measured value for one unit of score, to first order and one
            row at a time; the interval is for another question of the same kind.
        spread: a single strong row's effect is off by at most so many times the geometric mean of
            its own prediction and the question's largest one.
        spread_confidence: how often.
        sign_test: whether scores say anything of the run.
        held_out_slope: of sums over random sets, the run's over those predicted with the factor of
            the other questions; 1 is exact.
        rank_correlation: over rows, with the run's own influences; mean over questions.
        shared_top: part of the run's strongest rows that are among the estimator's.
        by_size: of the strongest rows, left out together; empty without retrainings.
        random_sets: of random rows, likewise.
        refused: why it is not used; None if it is.
    """

    estimator: str
    parameters: dict[str, float]
    fingerprint: str
    nats_per_unit: Interval
    spread: float
    spread_confidence: float
    sign_test: SignTest
    held_out_slope: Interval
    rank_correlation: Interval
    shared_top: Interval
    by_size: list[SizeScale]
    random_sets: SizeScale | None
    refused: str | None

    @property
    def title(self) -> str:
        """Name and parameters, as in "ekfac (damping 0.1)"."""
        return titled(self.estimator, self.parameters)

    def of_set(self, rows: int) -> Interval | None:
        """Nats a unit for so many rows together, interpolated on the logarithm of their number.

        None beyond the sizes that were measured.
        """
        sizes = [one.rows for one in self.by_size]
        if not sizes or not min(sizes) <= rows <= max(sizes):
            return None
        place = max(bisect.bisect_left(sizes, rows), 1)
        first, last = self.by_size[place - 1], self.by_size[min(place, len(sizes) - 1)]
        span = math.log(last.rows / first.rows)
        part = math.log(rows / first.rows) / span if span else 0.0
        one, other = first.nats_per_unit, last.nats_per_unit
        return Interval(
            value=one.value + part * (other.value - one.value),
            low=one.low + part * (other.low - one.low),
            high=one.high + part * (other.high - one.high),
        )


class ScaleRecord(Record):
    """All that was learnt from one trace for one index.

    Attributes:
        schema_version: of this file.
        model_sha256: of the model.
        grounds_sha256: of model, factors and rows of the index.
        run_sha256: of the run.
        trace_sha256: of its trace.
        questions: that were traced.
        rows: of the run that the index holds.
        run_rows: of the run in all.
        partly_counted: rows of which the run counted only some tokens, as a score does not.
        top: rows that ``shared_top`` and ``spread`` are about.
        retrainings: of the run, besides the one with all rows.
        confidence: of all intervals but ``spread``.
        scales: one an estimator with its parameters.
        seconds: that it took.
    """

    schema_version: Literal[1] = 1
    model_sha256: str
    grounds_sha256: str
    run_sha256: str
    trace_sha256: str
    questions: int
    rows: int
    run_rows: int
    partly_counted: int
    top: int
    retrainings: int
    confidence: float
    scales: list[Scale]
    seconds: float

    @property
    def measured_by(self) -> str:
        """How, in a sentence."""
        traced = (
            f"A trace of {self.questions} questions through the recorded run, over "
            f"{self.rows:,} of its {self.run_rows:,} rows: to first order, one row at a time"
        )
        if not self.retrainings:
            return f"{traced}."
        return f"{traced}; sets of rows by {self.retrainings} retrainings."


@dataclass(frozen=True)
class IndexScales:
    """What an index knows of the worth of its scores.

    Attributes:
        record: what was learnt; None if nothing was.
    """

    record: ScaleRecord | None

    def find(self, chosen: Asked) -> Scale | str:
        """The scale of an estimator with its parameters, or why there is none, in a sentence."""
        named = titled(chosen.name, chosen.values)
        if self.record is None:
            return NO_SCALE
        found = [s for s in self.record.scales if s.fingerprint == chosen.fingerprint]
        if found:
            return found[0] if found[0].refused is None else found[0].refused
        if self.record.grounds_sha256 != chosen.grounds_sha256:
            return (
                "What one unit of score is worth was measured for another model, other factors or "
                "other rows than the index has now; run etymon scale again."
            )
        known = "; ".join(scale.title for scale in self.record.scales)
        return (
            f"What one unit of score is worth was measured for {known}, not for {named}; run "
            f"etymon scale with these --estimators and --dampings."
        )


def find_scales(folder: Path) -> IndexScales:
    """What was learnt for the index in ``folder``, if anything was.

    Raises:
        IndexCorrupt: it was edited or has another schema.
    """
    path = folder / FILE_NAME
    if not path.is_file():
        return IndexScales(None)
    content = read_sealed(path, "delete it, or run etymon scale again")
    try:
        return IndexScales(ScaleRecord.model_validate(content))
    except ValidationError as error:
        raise IndexCorrupt(f"{path} has an unexpected form: {error}") from error


def titled(name: str, values: Mapping[str, float]) -> str:
    """Name and parameters, as in "ekfac (damping 0.1)"."""
    told = ", ".join(f"{key} {value:g}" for key, value in values.items())
    return f"{name} ({told})" if told else name


def best_scale(scales: Sequence[Scale]) -> Scale:
    """The one whose order of rows is nearest to the run's."""
    return max(scales, key=lambda scale: scale.rank_correlation.value)
