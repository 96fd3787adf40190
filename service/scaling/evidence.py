"""Scores and traced influences of the same rows on the same questions."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int

from estimators.chosen import GradientEstimator
from estimators.model.progress import Progress, no_progress
from estimators.model.tokens import Sequence1D
from estimators.rescoring import measure_queries
from estimators.run.recorded import UNCOUNTED
from index.examples import ExampleStore
from index.files import read_sealed, sha256_of
from service.models import LoadedModel
from service.run.errors import RunMismatch
from service.run.folder import FINISHED, RecordedRun
from service.scoring.exhaustive import exact_scores
from service.search.opening import OpenIndex
from service.tracing.trace import MANIFEST, Trace, read_trace
from service.tracing.walk import Question

NEAR = 0.01
"""Nats by which two measurements of a question by the same weights may differ, e.g. on another
device; models of two steps of a training differ by more."""


@dataclass(frozen=True, kw_only=True)
class TracedRun:
    """A run with a trace of it.

    Attributes:
        run: that was recorded.
        trace: influences of its rows.
        questions: that were traced, as weighted sequences.
        sha256: of the trace.
        folder: of the trace.
    """

    run: RecordedRun
    trace: Trace
    questions: Sequence[Question]
    sha256: str
    folder: Path

    @classmethod
    def read(cls, run: Path, trace: Path) -> "TracedRun":
        """Both folders.

        Raises:
            RunFault: one is not whole, or the trace is of another run.
        """
        recorded, found = RecordedRun.open(run), read_trace(trace)
        manifest = read_sealed(trace / MANIFEST, "trace the run again")
        if manifest["run_sha256"] != sha256_of(run / FINISHED):
            raise RunMismatch(
                f"The trace in {trace} is of another run than the one in {run}; give the run that "
                f"was traced, or trace this one."
            )
        questions = [
            [(Sequence1D(tokens=tuple(t), first_target=first), w) for t, first, w in parts]
            for parts in manifest["questions"]
        ]
        return cls(
            run=recorded,
            trace=found,
            questions=questions,
            sha256=sha256_of(trace / MANIFEST),
            folder=trace,
        )


@dataclass(frozen=True, kw_only=True)
class Common:
    """Rows that a run and an index share; copies and differently counted rows are taken together.

    Attributes:
        index_rows: of each index row that is shared, its number.
        index_place: its place among the shared.
        run_rows: of each run row that is shared, its number.
        run_place: its place among the shared.
        count: how many are shared, each text once.
        partly_counted: shared run rows of which the run counted only some tokens.
    """

    index_rows: Int[np.ndarray, "row"]
    index_place: Int[np.ndarray, "row"]
    run_rows: Int[np.ndarray, "other"]
    run_place: Int[np.ndarray, "other"]
    count: int
    partly_counted: int

    def of_index(
        self, values: Float[np.ndarray, "question row"]
    ) -> Float[np.ndarray, "question shared"]:
        """Sums over copies of values of ``index_rows``."""
        return _summed(values, self.index_place, self.count)

    def of_run(
        self, values: Float[np.ndarray, "question other"]
    ) -> Float[np.ndarray, "question shared"]:
        """Sums over rows of the same text, of values of all rows of the run."""
        return _summed(values[:, self.run_rows], self.run_place, self.count)


def common_rows(run: RecordedRun, examples: ExampleStore) -> Common:
    """The rows of the run that the index holds: those with the same tokens.

    A recorded run has each sequence of tokens once whatever its ids, so that copies in the index
    stand for one row of the run, and their scores add up.

    Raises:
        RunMismatch: there is none.
    """
    numbers: dict[tuple[int, ...], list[int]] = {}
    for number, row in enumerate(run.rows):
        numbers.setdefault(row.tokens, []).append(number)
    pairs = [(row, examples.tokens(row)) for row in range(len(examples))]
    shared = [(row, tokens) for row, tokens in pairs if tokens in numbers]
    if not shared:
        same = len({row.id for row in run.rows} & set(examples.ids()))
        why = f", though {same:,} have the same id: their tokens differ" if same else ""
        raise RunMismatch(
            f"None of the {len(run.rows):,} rows of the run is in the index{why}; build the index "
            f"on the rows that the run was trained on, cut as the run cut them."
        )
    places: dict[tuple[int, ...], int] = {}
    index_place = [places.setdefault(tokens, len(places)) for _, tokens in shared]
    read = [(number, place) for tokens, place in places.items() for number in numbers[tokens]]
    return Common(
        index_rows=np.array([row for row, _ in shared]),
        index_place=np.array(index_place),
        run_rows=np.array([number for number, _ in read]),
        run_place=np.array([place for _, place in read]),
        count=len(places),
        partly_counted=sum(UNCOUNTED in run.rows[number].labels[1:] for number, _ in read),
    )


def check_same_model(traced: TracedRun, loaded: LoadedModel, token_budget: int) -> None:
    """See that the index' model says what the run's model said at its end.

    Raises:
        RunMismatch: it gives a traced question another log-probability.
    """
    pairs = zip(traced.questions, traced.trace.values, strict=True)
    for number, (parts, expected) in enumerate(pairs, start=1):
        found = measure_queries(loaded.model, loaded.coverage.layers, [parts], token_budget)
        value = sum(w * v for v, (_, w) in zip(found.values[0], parts, strict=True))
        if not abs(value - expected) <= NEAR * max(1.0, abs(expected)):
            raise RunMismatch(
                f"The index' model is not the one at the end of the run: it gives traced question "
                f"{number} a log p of {value:.3f}, the run's gives {expected:.3f}. Build the index "
                f"with the model that the run ended with."
            )


def scores_of_questions(
    index: OpenIndex,
    estimators: Mapping[str, GradientEstimator],
    questions: Sequence[Question],
    rows: Sequence[int],
    token_budget: int,
    progress: Progress = no_progress,
) -> dict[str, Float[np.ndarray, "question row"]]:
    """Exact scores of index rows for each estimator; 0 for rows that cannot be scored.

    The parts of a question are scored by themselves and added up with their weights: directions are
    linear in the question's gradient.
    """
    parts = [(number, s, w) for number, one in enumerate(questions) for s, w in one]
    found = exact_scores(
        index.loaded,
        {name: one.directions for name, one in estimators.items()},
        index.examples,
        [sequence for _, sequence, _ in parts],
        rows=rows,
        token_budget=token_budget,
        progress=progress,
    )
    mixing = np.zeros((len(questions), len(parts)))
    for place, (number, _, weight) in enumerate(parts):
        mixing[number, place] = weight
    return {name: mixing @ np.nan_to_num(one.astype(np.float64)) for name, one in found.items()}


def _summed(
    values: Float[np.ndarray, "question row"], places: Int[np.ndarray, "row"], count: int
) -> Float[np.ndarray, "question shared"]:
    found = np.zeros((len(values), count))
    for one, sums in zip(values, found, strict=True):
        np.add.at(sums, places, one)
    return found
