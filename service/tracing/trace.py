"""Tracing questions through a recorded run: the influence of every row, step by step."""

import json
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn

from estimators.model.progress import Progress, no_progress
from estimators.model.tokens import Sequence1D
from estimators.run.adjoint import Adjoint, final_adjoint, measured_value, step_back
from estimators.run.passes import advance, trainable
from estimators.run.recorded import State
from index.files import exclusive, read_sealed, sha256_of, write_sealed, write_whole
from service.run.errors import RunMismatch
from service.run.folder import FINISHED, RecordedRun
from service.run.optimizers import named_parameters

logger = logging.getLogger(__name__)

MANIFEST = "trace.json"
INFLUENCES = "influences.safetensors"
PARTIAL = "partial.safetensors"
SCHEMA = 1

Question = Sequence[tuple[Sequence1D, float]]
"""Sequences with weights; what is measured is the weighted sum of their log-probabilities."""


@dataclass(frozen=True, kw_only=True)
class Trace:
    """What each reading of a row did to each question.

    Attributes:
        values: f of each question after the run, in nats.
        norms: of each question's adjoint before each step, then after the last: [question, step].
        steps: number of the step of each reading.
        rows: number of the row of each reading.
        influences: ``df / dw`` of each reading, in nats of f: [question, reading].
        count: rows of the run.
    """

    values: list[float]
    norms: Float[np.ndarray, "question point"]
    steps: Int[np.ndarray, "reading"]
    rows: Int[np.ndarray, "reading"]
    influences: Float[np.ndarray, "question reading"]
    count: int

    @property
    def totals(self) -> Float[np.ndarray, "question row"]:
        """Over all readings; leaving the row out changes f by minus that, to first order."""
        found = np.zeros((len(self.influences), self.count))
        for question, values in enumerate(self.influences):
            np.add.at(found[question], self.rows, values.astype(np.float64))
        return found


def trace_run(
    run: RecordedRun,
    model: nn.Module,
    questions: Sequence[Question],
    out: Path,
    about: Mapping[str, Any],
    progress: Progress = no_progress,
    interval: float = 60.0,
) -> Trace:
    """Trace questions backward through a run into the folder ``out``, or finish such a trace.

    Questions share the passes through the model. An interrupted trace goes on where it was, and
    ends with the same bits.

    Args:
        run: recorded, in float32 or float64 without autocast.
        model: the run's, in any state; it is left as it was.
        questions: what is measured.
        out: folder to write.
        about: further facts for the manifest, e.g. the questions in words.
        progress: shows the steps.
        interval: least number of seconds between two records of how far it is.

    Raises:
        RunMismatch: the folder holds a trace of another run or of other questions, or the run's
            precision has no faithful derivative.
    """
    _check_precision(run)
    facts = {
        "schema": SCHEMA,
        "run_sha256": sha256_of(run.folder / FINISHED),
        "questions": [[[list(s.tokens), s.first_target, w] for s, w in q] for q in questions],
        "about": dict(about),
    }
    out.mkdir(parents=True, exist_ok=True)
    with exclusive(out):
        if (out / MANIFEST).is_file():
            _check_same(out, facts)
            return read_trace(out)
        found = _Tracer(run, model, questions, out / PARTIAL, facts, interval).trace(progress)
        tensors = {
            "steps": torch.from_numpy(found.steps),
            "rows": torch.from_numpy(found.rows),
            "influences": torch.from_numpy(found.influences),
            "norms": torch.from_numpy(found.norms),
        }
        write_whole(out / INFLUENCES, bytes(save(tensors)))
        manifest = {
            **facts,
            "values": found.values,
            "rows": found.count,
            "influences_sha256": sha256_of(out / INFLUENCES),
        }
        write_sealed(out / MANIFEST, manifest)
        (out / PARTIAL).unlink(missing_ok=True)
    return found


@dataclass(frozen=True, kw_only=True)
class TracePrice:
    """What a trace will take, by one step in the middle of the run.

    Attributes:
        seconds: of the whole trace, without loading the model.
        trainings_a_question: its part for each question, in trainings of the run.
    """

    seconds: float
    trainings_a_question: float


def predict_trace(run: RecordedRun, model: nn.Module, questions: Sequence[Question]) -> TracePrice:
    """Time one step forward and backward, and count it for all; nothing is written."""
    _check_precision(run)
    with trainable(model, run.recipe, named_parameters(model)) as parameters:
        like = next(iter(parameters.values()))
        ones = torch.ones(len(run.rows)).to(like)
        number = max(s for s in run.state_steps if s <= len(run.steps) // 2)
        number = min(number, len(run.steps) - 1)
        state, step = _on(run.state(number), like.device), run.steps[number]
        adjoints = [final_adjoint(model, parameters, state, one)[0] for one in questions]
        given = (model, parameters, run.recipe, run.rows, step, state)
        advance(*given, ones)  # the first pass is slower
        start = time.perf_counter()
        advance(*given, ones)
        forward = time.perf_counter() - start
        step_back(*given, adjoints)
        backward = time.perf_counter() - start - forward
    steps = len(run.steps)
    return TracePrice(
        seconds=steps * (forward + backward),
        trainings_a_question=(forward + backward) / forward / len(questions),
    )


def measured_values(
    run: RecordedRun, model: nn.Module, questions: Sequence[Question], state: State
) -> list[float]:
    """F of each question in a state of the run, in nats; the model is left as it was."""
    with trainable(model, run.recipe, named_parameters(model)) as parameters:
        return [measured_value(model, parameters, state, one) for one in questions]


def read_trace(folder: Path) -> Trace:
    """Read what ``trace_run`` wrote.

    Raises:
        RunMismatch: there is no whole trace, or it was changed.
    """
    if not (folder / MANIFEST).is_file():
        raise RunMismatch(f"There is no whole trace in {folder} ({MANIFEST}); run etymon trace.")
    manifest = read_sealed(folder / MANIFEST, "trace the run again")
    if sha256_of(folder / INFLUENCES) != manifest["influences_sha256"]:
        raise RunMismatch(f"{folder / INFLUENCES} was changed; trace the run again.")
    found = {name: value.numpy() for name, value in load_file(folder / INFLUENCES).items()}
    return Trace(values=manifest["values"], count=manifest["rows"], **found)


class _Tracer:
    """A trace under way: adjoints at a step, and the influences behind it."""

    def __init__(
        self,
        run: RecordedRun,
        model: nn.Module,
        questions: Sequence[Question],
        partial: Path,
        facts: Mapping[str, Any],
        interval: float,
    ) -> None:
        self._run, self._model, self._questions = run, model, questions
        self._partial, self._interval = partial, interval
        self._identity = json.dumps(facts, sort_keys=True)
        self._parameters: dict[str, nn.Parameter] = {}
        self._adjoints: list[Adjoint] = []
        self._values: list[float] = []
        self._norms: list[list[float]] = []
        self._found: list[Tensor] = []
        self._at = len(run.steps)

    def trace(self, progress: Progress) -> Trace:
        """Go back from the end, or from where it was interrupted, to the first step."""
        named = named_parameters(self._model)
        with trainable(self._model, self._run.recipe, named) as self._parameters:
            if not self._resume():
                self._begin()
            written = time.monotonic()
            todo = [s for s in reversed(self._run.state_steps) if s < self._at]
            numbers = [n for s in todo for n in self._steps_from(s)]
            states: dict[int, State] = {}
            for number in progress("trace", numbers):
                if number not in states:
                    states = self._states_before(number)
                self._back(number, states.pop(number))
                if not states and time.monotonic() - written > self._interval:
                    self._keep()
                    written = time.monotonic()
        return self._result()

    def _steps_from(self, start: int) -> list[int]:
        """Steps after the kept state ``start``, last first."""
        later = [s for s in self._run.state_steps if s > start]
        return list(range(min([*later, self._at]) - 1, start - 1, -1))

    def _states_before(self, number: int) -> dict[int, State]:
        """The states before ``number`` and the steps before it, back to the last that was kept."""
        start = max(s for s in self._run.state_steps if s <= number)
        like = next(iter(self._parameters.values()))
        ones = torch.ones(len(self._run.rows)).to(like)
        state = _on(self._run.state(start), like.device)
        states = {start: state}
        for step in range(start, number):
            state = advance(
                self._model,
                self._parameters,
                self._run.recipe,
                self._run.rows,
                self._run.steps[step],
                state,
                ones,
            )
            states[step + 1] = state
        return states

    def _begin(self) -> None:
        like = next(iter(self._parameters.values()))
        last = _on(self._run.state(self._at), like.device)
        for question in self._questions:
            adjoint, value = final_adjoint(self._model, self._parameters, last, question)
            self._adjoints.append(adjoint)
            self._values.append(value)
            self._norms.append([adjoint.norm])

    def _back(self, number: int, state: State) -> None:
        step = self._run.steps[number]
        self._adjoints, found = step_back(
            self._model,
            self._parameters,
            self._run.recipe,
            self._run.rows,
            step,
            state,
            self._adjoints,
        )
        self._found.append(found.detach().float().cpu())
        for norms, adjoint in zip(self._norms, self._adjoints, strict=True):
            norms.append(adjoint.norm)
        self._at = number

    def _result(self) -> Trace:
        read = [
            (number, row)
            for number in range(len(self._run.steps) - 1, self._at - 1, -1)
            for batch in self._run.steps[number].batches
            for row in batch.rows
        ]
        steps, rows = np.array(read, dtype=np.int64).reshape(-1, 2).T
        return Trace(
            values=self._values,
            norms=np.array(self._norms)[:, ::-1].copy(),
            steps=steps.copy(),
            rows=rows.copy(),
            influences=torch.cat(self._found, dim=1).numpy(),
            count=len(self._run.rows),
        )

    def _keep(self) -> None:
        """Record how far it is, as a whole."""
        tensors = {"found": torch.cat(self._found, dim=1), "norms": torch.tensor(self._norms)}
        for place, adjoint in enumerate(self._adjoints):
            for name, value in adjoint.parameters.items():
                tensors[f"{place}|parameters|{name}"] = value.contiguous()
            for kind, moments in adjoint.moments.items():
                for name, value in moments.items():
                    tensors[f"{place}|{kind}|{name}"] = value.contiguous()
        header = json.dumps({"at": self._at, "values": self._values, "identity": self._identity})
        write_whole(self._partial, bytes(save(tensors, metadata={"etymon": header})))

    def _resume(self) -> bool:
        """Take up a record of the same trace; False if there is none."""
        header = _header(self._partial)
        if header is None or header["identity"] != self._identity:
            return False
        tensors = load_file(self._partial)
        device = next(iter(self._parameters.values())).device
        self._at, self._values = int(header["at"]), list(header["values"])
        self._found = [tensors.pop("found")]
        self._norms = tensors.pop("norms").tolist()
        parts: list[dict[str, dict[str, Tensor]]] = [{} for _ in self._questions]
        for key, value in tensors.items():
            place, kind, name = key.split("|", 2)
            parts[int(place)].setdefault(kind, {})[name] = value.to(device)
        self._adjoints = [
            Adjoint(parameters=part.pop("parameters"), moments=part) for part in parts
        ]
        logger.info("Going on with an interrupted trace: %d steps are left.", self._at)
        return True


def _header(path: Path) -> dict[str, Any] | None:
    try:
        with safe_open(path, framework="pt") as file:
            found: dict[str, Any] = json.loads(file.metadata()["etymon"])
            return found
    except (SafetensorError, OSError, KeyError, TypeError, ValueError):
        return None


def _on(state: State, device: torch.device) -> State:
    return State(
        step=state.step,
        parameters={name: value.to(device) for name, value in state.parameters.items()},
        moments={
            kind: {name: value.to(device) for name, value in moments.items()}
            for kind, moments in state.moments.items()
        },
    )


def _check_precision(run: RecordedRun) -> None:
    if run.facts.autocast is not None or run.facts.dtype not in ("float32", "float64"):
        how = run.facts.autocast or run.facts.dtype
        raise RunMismatch(
            f"The run computed in {how}, whose rounding has no derivative; record a run in float32 "
            f"to trace it."
        )


def _check_same(out: Path, facts: Mapping[str, Any]) -> None:
    found = read_sealed(out / MANIFEST, "trace the run again")
    differs = [key for key in facts if found.get(key) != json.loads(json.dumps(facts[key]))]
    if differs:
        raise RunMismatch(
            f"{out} holds a trace of another run or of other questions ({', '.join(differs)}); "
            f"choose another folder."
        )
