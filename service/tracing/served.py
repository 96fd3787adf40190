"""Traces of a run as an index serves them: looked up by question, over the rows of the index."""

import hashlib
import json
import logging
import threading
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float
from torch import Tensor

from estimators.grounds import Untraced
from estimators.model.layers import LinearLayer
from estimators.names import RUN_DIRECTION
from estimators.run.updates import SMALLEST
from index.examples import ExampleStore
from index.files import sha256_of
from service.checkpoints import ModelSource
from service.models import LoadedModel
from service.run.errors import RunFault, RunMismatch
from service.run.folder import FINISHED
from service.tracing.carried import read_carried
from service.tracing.matching import Matching
from service.tracing.parts import MORE, DirectionFolder, Parts, TraceFolder, fingerprint_of
from service.tracing.walk import Question

KEPT = 8
"""Questions whose influences are kept in memory."""

log = logging.getLogger(__name__)


class ServedTrace:
    """What was traced, as an index serves it: influences of its rows, directions, or both.

    Further questions may be traced beside it while it is served; they are found when they are
    asked for.

    Args:
        folder: of the trace.
        examples: of the index.
        loaded: the model that is served.
        run: where the run lies; None takes what the trace says.

    Raises:
        RunMismatch: there is no such trace, the model is not the run's last state, the index has
            none of the run's rows and there are no directions, or the run that is given is another.
        RunFault: there is no run where one is said to be.
    """

    def __init__(
        self, folder: Path, examples: ExampleStore, loaded: LoadedModel, run: Path | None = None
    ) -> None:
        self._traces = Parts(folder, TraceFolder)
        self._directions = Parts(folder, DirectionFolder)
        first = self._traces.first or self._directions.first or TraceFolder.open(folder)
        self.folder = folder
        self.facts = first.manifest
        self._check_model(loaded)
        carried = read_carried(folder, self.facts["rows_sha256"])
        self.matching = Matching.of(carried, examples)
        if self.matching.lacking.all() and self._directions.first is None:
            raise RunMismatch(
                f"The index has none of the {len(carried):,} rows that the run of the trace in "
                f"{folder} read, by their tokens; build the index from the texts of the run, as "
                f"its model read them."
            )
        self._run = run
        if run is not None:
            check_run(self)
        self._cached: OrderedDict[str, tuple[np.ndarray, float, float]] = OrderedDict()
        self._turn = threading.Lock()
        self._traces.find_more(self.sha256)
        self._directions.find_more(self.sha256)
        if self._traces.first is not None:
            level = logging.WARNING if self.matching.lacking.any() else logging.INFO
            log.log(level, "trace %s: %s", folder, " ".join(self.told()))

    @property
    def sha256(self) -> str:
        """Of the run."""
        found: str = self.facts["run_sha256"]
        return found

    @property
    def run(self) -> Path:
        """Where the run lies, or lay when it was traced."""
        return self._run or Path(self.facts["run"])

    @property
    def source(self) -> ModelSource | None:
        """Of the run's model before training."""
        named = self.facts["model"]
        return named and ModelSource(**named)

    @property
    def smallest_moment(self) -> float:
        """How further questions are traced, so that they agree with the first."""
        first = self._traces.first
        return SMALLEST if first is None else first.smallest_moment

    @property
    def questions(self) -> int:
        """How many were traced."""
        return len(self._traces.known | self._directions.known)

    def influences(self, fingerprint: str) -> Float[np.ndarray, "row"]:
        """``df/dw_i`` of every row of the index, in nats of f; 0 where the run never read it.

        Raises:
            Untraced: the question was not traced.
        """
        return self._found(fingerprint)[0]

    def direction(self, fingerprint: str) -> Mapping[str, Tensor]:
        """The run's direction for a question, by name of parameter.

        Raises:
            Untraced: none was traced for it.
        """
        with self._turn:
            place = self._directions.place(fingerprint, self.sha256)
        if place is None:
            raise Untraced(self._price(RUN_DIRECTION))
        return place[0].direction(place[1])

    @property
    def directed(self) -> Mapping[str, int]:
        """Sizes of the parameters that directions have, by name."""
        first = self._directions.first
        return {} if first is None else first.parameters

    def has(self, fingerprint: str, estimator: str = "run") -> bool:
        """Whether a question was traced, by now, for an estimator."""
        with self._turn:
            return self._parts(estimator).place(fingerprint, self.sha256) is not None

    def _parts(self, estimator: str) -> Parts[TraceFolder] | Parts[DirectionFolder]:
        return self._directions if estimator == RUN_DIRECTION else self._traces

    def notes(self, fingerprint: str) -> tuple[str, ...]:
        """What to know of the influences on a question, a sentence each.

        Raises:
            Untraced: the question was not traced.
        """
        return self.told(*self._found(fingerprint)[1:])

    def told(self, lost: float | None = None, left_out: float = 0.0) -> tuple[str, ...]:
        """How the run's rows and the index' rows go together, a sentence each.

        Args:
            lost: part of all absolute influence on a question that rows have which the index lacks.
            left_out: part of the norm of a question's gradient that was not traced.
        """
        matching = self.matching
        told = [
            f"The run never read {matching.unread:,} of the {matching.rows:,} rows of the index; "
            f"their influence is exactly 0."
        ]
        if lacking := int(matching.lacking.sum()):
            changed = f" ({matching.changed:,} have other tokens there)" * bool(matching.changed)
            held = (
                "" if lost is None else f"; they hold {lost:.1%} of all influence on this question"
            )
            told.append(
                f"{lacking:,} of the {len(matching.lacking):,} rows that the run read are not in "
                f"the index{changed}, so they cannot be listed{held}."
            )
        if matching.copies:
            told.append(
                f"{matching.copies:,} rows of the index have the same tokens as others, so that "
                f"the run does not tell them apart; they share the influence equally."
            )
        if matching.otherwise:
            told.append(
                f"Of {matching.otherwise:,} rows of the index other tokens count than the run "
                f"counted, so that their gradients are not the run's: build the index from "
                f"conversations, completions or labels, as the run was trained."
            )
        if left_out > 1e-3:
            told.append(
                f"The question was traced through directions that it shares with others, which "
                f"leave out {left_out:.1%} of the norm of its gradient."
            )
        return tuple(told)

    def place_for(self, questions: Iterable[str]) -> Path:
        """Folder in which to trace further questions together, given their fingerprints."""
        facts = json.dumps([self.sha256, sorted(questions)])
        return self.folder / MORE / hashlib.sha256(facts.encode()).hexdigest()[:16]

    def _found(self, fingerprint: str) -> tuple[np.ndarray, float, float]:
        """Influences; part of all influence of rows that the index lacks; part not traced."""
        with self._turn:
            if fingerprint not in self._cached:
                place = self._traces.place(fingerprint, self.sha256)
                if place is None:
                    raise Untraced(self._price("run"))
                part, number = place
                totals = part.totals(number)
                matched = self.matching.over_index(totals), self.matching.lost(totals)
                self._cached[fingerprint] = (*matched, part.left_out(number))
                if len(self._cached) > KEPT:
                    self._cached.popitem(last=False)
            return self._cached[fingerprint]

    def _price(self, estimator: str) -> str:
        takes, first = (
            "what it takes is not known before one was traced",
            self._parts(estimator).first,
        )
        if first is not None:
            price = first.manifest["price"]
            takes = (
                f"tracing it takes about {_duration(price['seconds'])}, "
                f"{price['trainings_a_question']:.1f} trainings"
            )
        if (self.run / FINISHED).is_file():
            return (
                f"This question was not traced through the run; ask it as a job (POST /v1/jobs): "
                f"{takes}, and less a question for several in one job."
            )
        return (
            f"This question was not traced through the run, which no longer lies in {self.run}; "
            f"start the service with --run FOLDER, its place, and ask as a job: {takes}."
        )

    def _check_model(self, loaded: LoadedModel) -> None:
        wanted = self.facts["last_weights_sha256"]
        if loaded.model_sha256 != wanted:
            raise RunMismatch(
                f"The trace in {self.folder} is of a run that ended with other weights: their "
                f"SHA-256 is {wanted[:16]}..., '{loaded.source}' has {loaded.model_sha256[:16]}... "
                f"Serve the model as the run left it, in the precision that it was trained in, or "
                f"leave the trace out."
            )


def told_of_layers(trace: ServedTrace, layers: Sequence[LinearLayer]) -> tuple[str, ...]:
    """What part of the run's direction the layers of an index hold, in a sentence if not all."""
    held = {name for layer in layers for name in layer.parameter_names}
    sizes = trace.directed
    share = sum(size for name, size in sizes.items() if name in held) / sum(sizes.values())
    if share == 1:
        return ()
    return (
        f"The layers of this index hold {share:.0%} of the numbers that the run trained; what the "
        f"others would add is not in these scores.",
    )


def untraced(trace: ServedTrace, questions: Sequence[Question], estimator: str) -> list[Question]:
    """Those that were not traced for an estimator, each once."""
    found = {fingerprint_of(question): question for question in questions}
    return [question for key, question in sorted(found.items()) if not trace.has(key, estimator)]


def check_run(trace: ServedTrace) -> None:
    """Raise RunFault unless the run that was traced lies where it is said to be."""
    if not (trace.run / FINISHED).is_file():
        raise RunFault(
            f"The run no longer lies in {trace.run}, and without it no further question can be "
            f"traced; start the service with --run FOLDER, its place."
        )
    if sha256_of(trace.run / FINISHED) != trace.sha256:
        raise RunMismatch(
            f"The run in {trace.run} is not the one of the trace in {trace.folder}; start the "
            f"service with --run FOLDER, the place of that one."
        )


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{max(seconds, 1):.0f} s"
    return f"{seconds / 60:.0f} minutes"
