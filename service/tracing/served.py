"""Traces of a run as an index serves them: looked up by question, over the rows of the index."""

import hashlib
import json
import logging
import threading
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from safetensors import safe_open

from estimators.grounds import Questions, Untraced
from estimators.model.tokens import Sequence1D
from index.examples import ExampleStore
from index.files import read_sealed, sha256_of
from service.checkpoints import ModelSource
from service.models import LoadedModel
from service.run.errors import RunFault, RunMismatch
from service.run.folder import FINISHED
from service.tracing.carried import read_carried
from service.tracing.matching import Matching
from service.tracing.trace import INFLUENCES, MANIFEST
from service.tracing.walk import Question

MORE = "more"
"""Folder in a trace with traces of further questions, each in a folder of its own."""
KEPT = 8
"""Questions whose influences are kept in memory."""
AGAIN = "trace the run again"

log = logging.getLogger(__name__)


def fingerprint_of(question: Question) -> str:
    """As questions are known by, see ``Questions.fingerprint``."""
    return Questions(sequences=[question]).fingerprint(0)


@dataclass(frozen=True, kw_only=True)
class TraceFolder:
    """A trace on disk.

    Attributes:
        folder: where it is.
        manifest: what it is made of.
    """

    folder: Path
    manifest: Mapping[str, Any]

    @classmethod
    def open(cls, folder: Path) -> "TraceFolder":
        """Read a whole trace.

        Raises:
            RunMismatch: there is none, it was changed, or it carries nothing of its run.
        """
        if not (folder / MANIFEST).is_file():
            raise RunMismatch(
                f"There is no whole trace in {folder} ({MANIFEST} is missing); run etymon trace, "
                f"or repeat it if it was interrupted."
            )
        manifest = read_sealed(folder / MANIFEST, AGAIN)
        if "last_weights_sha256" not in manifest:
            raise RunMismatch(
                f"The trace in {folder} is of an earlier version, which kept nothing of the run's "
                f"rows and last weights beside it; {AGAIN}, into another folder."
            )
        if sha256_of(folder / INFLUENCES) != manifest["influences_sha256"]:
            raise RunMismatch(f"{folder / INFLUENCES} was changed; {AGAIN}.")
        return cls(folder=folder, manifest=manifest)

    @cached_property
    def numbers(self) -> Mapping[str, int]:
        """Of its questions, by their fingerprints."""
        return {
            fingerprint_of([(Sequence1D(tokens=tuple(t), first_target=f), w) for t, f, w in one]): n
            for n, one in enumerate(self.manifest["questions"])
        }

    def totals(self, number: int) -> Float[np.ndarray, "run_row"]:
        """``df/dw_i`` of every row of the run over all its readings, in nats of f."""
        with safe_open(self.folder / INFLUENCES, framework="np") as file:
            rows = file.get_tensor("rows")
            values = file.get_slice("influences")[number].astype(np.float64)
        found: np.ndarray = np.bincount(rows, weights=values, minlength=self.manifest["rows"])
        return found


class ServedTrace:
    """Influences of an index' rows on the questions that were traced.

    Further questions may be traced beside it while it is served; they are found when they are
    asked for.

    Args:
        folder: of the trace.
        examples: of the index.
        loaded: the model that is served.
        run: where the run lies; None takes what the trace says.

    Raises:
        RunMismatch: there is no such trace, the model is not the run's last state, the index has
            none of the run's rows, or the run that is given is another.
        RunFault: there is no run where one is said to be.
    """

    def __init__(
        self, folder: Path, examples: ExampleStore, loaded: LoadedModel, run: Path | None = None
    ) -> None:
        first = TraceFolder.open(folder)
        self.folder = folder
        self.facts = first.manifest
        self._check_model(loaded)
        carried = read_carried(folder, self.facts["rows_sha256"])
        self.matching = Matching.of(carried, examples)
        if self.matching.lacking.all():
            raise RunMismatch(
                f"The index has none of the {len(carried):,} rows that the run of the trace in "
                f"{folder} read, by their tokens; build the index from the texts of the run, as "
                f"its model read them."
            )
        self._run = run
        if run is not None:
            check_run(self)
        self._parts = [first]
        self._cached: OrderedDict[str, tuple[np.ndarray, float]] = OrderedDict()
        self._turn = threading.Lock()
        self._find_more()
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
    def questions(self) -> int:
        """How many were traced."""
        return len({fingerprint for part in self._parts for fingerprint in part.numbers})

    def influences(self, fingerprint: str) -> Float[np.ndarray, "row"]:
        """``df/dw_i`` of every row of the index, in nats of f; 0 where the run never read it.

        Raises:
            Untraced: the question was not traced.
        """
        return self._found(fingerprint)[0]

    def has(self, fingerprint: str) -> bool:
        """Whether a question was traced, by now."""
        with self._turn:
            return self._place(fingerprint) is not None

    def notes(self, fingerprint: str) -> tuple[str, ...]:
        """What to know of the influences on a question, a sentence each.

        Raises:
            Untraced: the question was not traced.
        """
        return self.told(self._found(fingerprint)[1])

    def told(self, lost: float | None = None) -> tuple[str, ...]:
        """How the run's rows and the index' rows go together, a sentence each.

        Args:
            lost: part of all absolute influence on a question that rows have which the index lacks.
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
        return tuple(told)

    def place_for(self, questions: Iterable[str]) -> Path:
        """Folder in which to trace further questions together, given their fingerprints."""
        facts = json.dumps([self.sha256, sorted(questions)])
        return self.folder / MORE / hashlib.sha256(facts.encode()).hexdigest()[:16]

    def _found(self, fingerprint: str) -> tuple[np.ndarray, float]:
        """Influences, and what part of all influence the rows have that the index lacks."""
        with self._turn:
            if fingerprint not in self._cached:
                place = self._place(fingerprint)
                if place is None:
                    raise Untraced(self._price())
                totals = place[0].totals(place[1])
                found = self.matching.over_index(totals), self.matching.lost(totals)
                self._cached[fingerprint] = found
                if len(self._cached) > KEPT:
                    self._cached.popitem(last=False)
            return self._cached[fingerprint]

    def _place(self, fingerprint: str) -> tuple[TraceFolder, int] | None:
        for look_again in (False, True):
            if look_again:
                self._find_more()
            for part in self._parts:
                if fingerprint in part.numbers:
                    return part, part.numbers[fingerprint]
        return None

    def _find_more(self) -> None:
        known = {part.folder for part in self._parts}
        for path in sorted(self.folder.glob(f"{MORE}/*/{MANIFEST}")):
            if path.parent in known:
                continue
            try:
                part = TraceFolder.open(path.parent)
            except ValueError as error:
                log.warning("questions that were traced later are left out: %s", error)
                continue
            if part.manifest["run_sha256"] == self.sha256:
                self._parts.append(part)

    def _price(self) -> str:
        price = self.facts["price"]
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


def untraced(trace: ServedTrace, questions: Sequence[Question]) -> list[Question]:
    """Those that were not traced, each once."""
    found = {fingerprint_of(question): question for question in questions}
    return [question for key, question in sorted(found.items()) if not trace.has(key)]


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
