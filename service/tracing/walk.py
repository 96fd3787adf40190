"""Backward through a recorded run's steps, from its states; resumable to the same bits."""

import json
import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn

from estimators.model.progress import Progress
from estimators.model.tokens import Sequence1D
from estimators.run.adjoint import Adjoint, final_adjoint
from estimators.run.passes import advance, trainable
from estimators.run.recorded import State
from index.files import read_sealed, sha256_of, write_whole
from service.run.errors import RunMismatch
from service.run.folder import FINISHED, RecordedRun
from service.run.optimizers import named_parameters

logger = logging.getLogger(__name__)

Question = Sequence[tuple[Sequence1D, float]]
"""Sequences with weights; what is measured is the weighted sum of their log-probabilities."""

Parameters = Mapping[str, nn.Parameter]

SCHEMA = 1
"""Of the manifests of what was traced."""


class Visit(Protocol):
    """What is done at each step of a walk, and what comes of it."""

    def back(
        self,
        parameters: Parameters,
        number: int,
        before: State,
        after: State,
        adjoints: Sequence[Adjoint],
    ) -> list[Adjoint]:
        """The adjoints before step ``number``, of those behind it; one a question."""
        ...

    def tensors(self) -> Mapping[str, Tensor]:
        """What was found so far."""
        ...

    def take_up(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from what ``tensors`` gave."""
        ...


class Walk:
    """A walk under way: adjoints at a step, their norms behind it.

    Args:
        run: recorded, in float32 or float64 without autocast.
        model: the run's, in any state; it is left as it was.
        questions: whose adjoints go backward, together.
        partial: file in which an interrupted walk is kept.
        facts: what the walk depends on; one of other facts is not taken up.
        interval: least number of seconds between two records of how far it is.

    Raises:
        RunMismatch: the run's precision has no faithful derivative.
    """

    def __init__(
        self,
        run: RecordedRun,
        model: nn.Module,
        questions: Sequence[Question],
        partial: Path,
        facts: Mapping[str, Any],
        interval: float,
    ) -> None:
        check_precision(run)
        self._run, self._model, self._questions = run, model, questions
        self._partial, self._interval = partial, interval
        self._identity = json.dumps(facts, sort_keys=True)
        self._parameters: Parameters = {}
        self._adjoints: list[Adjoint] = []
        self._at = len(run.steps)
        self.values: list[float] = []
        self.norms: list[list[float]] = []

    def go(self, visit: Visit, progress: Progress) -> None:
        """Go back from the end, or from where it was interrupted, to the first step."""
        named = named_parameters(self._model)
        with trainable(self._model, self._run.recipe, named) as self._parameters:
            if not self._resume(visit):
                self._begin()
            written = time.monotonic()
            todo = [s for s in reversed(self._run.state_steps) if s < self._at]
            numbers = [n for s in todo for n in self._steps_from(s)]
            states: dict[int, State] = {}
            after = on_device(self._run.state(self._at), self._device)
            for number in progress("trace", numbers):
                if number not in states:
                    states = self._states_before(number)
                before = states.pop(number)
                self._adjoints = visit.back(self._parameters, number, before, after, self._adjoints)
                for norms, adjoint in zip(self.norms, self._adjoints, strict=True):
                    norms.append(adjoint.norm)
                self._at, after = number, before
                if not states and time.monotonic() - written > self._interval:
                    self._keep(visit)
                    written = time.monotonic()

    @property
    def _device(self) -> torch.device:
        return next(iter(self._parameters.values())).device

    def _steps_from(self, start: int) -> list[int]:
        """Steps after the kept state ``start``, last first."""
        later = [s for s in self._run.state_steps if s > start]
        return list(range(min([*later, self._at]) - 1, start - 1, -1))

    def _states_before(self, number: int) -> dict[int, State]:
        """The states before ``number`` and the steps before it, back to the last that was kept."""
        run = self._run
        start = max(s for s in run.state_steps if s <= number)
        ones = torch.ones(len(run.rows)).to(next(iter(self._parameters.values())))
        state = on_device(run.state(start), self._device)
        states = {start: state}
        for step in range(start, number):
            state = advance(
                self._model, self._parameters, run.recipe, run.rows, run.steps[step], state, ones
            )
            states[step + 1] = state
        return states

    def _begin(self) -> None:
        last = on_device(self._run.state(self._at), self._device)
        for question in self._questions:
            adjoint, value = final_adjoint(self._model, self._parameters, last, question)
            self._adjoints.append(adjoint)
            self.values.append(value)
            self.norms.append([adjoint.norm])

    def _keep(self, visit: Visit) -> None:
        """Record how far it is, as a whole."""
        tensors = {f"visit|{name}": value for name, value in visit.tensors().items()}
        tensors["norms"] = torch.tensor(self.norms)
        for place, adjoint in enumerate(self._adjoints):
            for name, value in adjoint.parameters.items():
                tensors[f"{place}|parameters|{name}"] = value.contiguous()
            for kind, moments in adjoint.moments.items():
                for name, value in moments.items():
                    tensors[f"{place}|{kind}|{name}"] = value.contiguous()
        header = json.dumps({"at": self._at, "values": self.values, "identity": self._identity})
        write_whole(self._partial, bytes(save(tensors, metadata={"etymon": header})))

    def _resume(self, visit: Visit) -> bool:
        """Take up a record of the same walk; False if there is none."""
        header = _header(self._partial)
        if header is None or header["identity"] != self._identity:
            return False
        tensors = load_file(self._partial, device=str(self._device))
        self._at, self.values = int(header["at"]), list(header["values"])
        self.norms = tensors.pop("norms").tolist()
        found: dict[str, Tensor] = {}
        parts: list[dict[str, dict[str, Tensor]]] = [{} for _ in self._questions]
        for key, value in tensors.items():
            if key.startswith("visit|"):
                found[key.removeprefix("visit|")] = value
                continue
            place, kind, name = key.split("|", 2)
            parts[int(place)].setdefault(kind, {})[name] = value
        self._adjoints = [
            Adjoint(parameters=part.pop("parameters"), moments=part) for part in parts
        ]
        visit.take_up(found)
        logger.info("Going on with an interrupted trace: %d steps are left.", self._at)
        return True


def _header(path: Path) -> dict[str, Any] | None:
    try:
        with safe_open(path, framework="pt") as file:
            found: dict[str, Any] = json.loads(file.metadata()["etymon"])
            return found
    except (SafetensorError, OSError, KeyError, TypeError, ValueError):
        return None


def on_device(state: State, device: torch.device) -> State:
    """A state whose tensors are on a device."""
    return State(
        step=state.step,
        parameters={name: value.to(device) for name, value in state.parameters.items()},
        moments={
            kind: {name: value.to(device) for name, value in moments.items()}
            for kind, moments in state.moments.items()
        },
    )


def check_precision(run: RecordedRun) -> None:
    """Refuse a run whose rounding is no part of its derivatives.

    Raises:
        RunMismatch: it computed in less than float32.
    """
    if run.facts.autocast is not None or run.facts.dtype not in ("float32", "float64"):
        how = run.facts.autocast or run.facts.dtype
        raise RunMismatch(
            f"The run computed in {how}, whose rounding has no derivative; record a run in float32 "
            f"to trace it."
        )


def as_json(question: Question) -> list[Any]:
    """A question as it is written and sent."""
    return [[list(map(int, s.tokens)), s.first_target, weight] for s, weight in question]


def from_json(question: list[Any]) -> Question:
    """What ``as_json`` gave."""
    return [(Sequence1D(tokens=tuple(t), first_target=first), w) for t, first, w in question]


def trace_facts(
    run: RecordedRun, questions: Sequence[Question], about: Mapping[str, Any]
) -> dict[str, Any]:
    """What a trace depends on, for its manifest."""
    return {
        "schema": SCHEMA,
        "run_sha256": sha256_of(run.folder / FINISHED),
        "questions": [as_json(question) for question in questions],
        "about": dict(about),
    }


def check_same(manifest: Path, facts: Mapping[str, Any]) -> None:
    """Refuse a folder in which something else was traced.

    Raises:
        RunMismatch: the facts in its manifest are others.
    """
    found = read_sealed(manifest, "trace the run again")
    differs = [key for key in facts if found.get(key) != json.loads(json.dumps(facts[key]))]
    if differs:
        raise RunMismatch(
            f"{manifest.parent} holds a trace of another run or of other questions "
            f"({', '.join(differs)}); choose another folder."
        )
