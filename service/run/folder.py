"""A recorded run on disk."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from estimators.run.recorded import UNCOUNTED, Batch, Recipe, Row, State, Step
from index.errors import IndexCorrupt
from index.files import read_sealed, sha256_of
from service.checkpoints import ModelSource
from service.run.errors import RunCorrupt, RunMissing
from service.run.facts import SCHEMA, Finished, RunFacts
from service.run.states import read_state

RUN = "run.json"
FINISHED = "finished.json"
STOPPED = "stopped.json"
ROWS = "rows.jsonl"
STEPS = "steps.jsonl"
STATES = "states"
AGAIN = "copy it again, or record the run again"


def state_path(folder: Path, step: int) -> Path:
    """Where the state after ``step`` steps lies."""
    return folder / STATES / f"{step:06d}.safetensors"


@dataclass(frozen=True, kw_only=True)
class RecordedRun:
    """A run that is whole.

    Attributes:
        folder: where it lies.
        facts: what was known before its first step.
        finished: what was known after its last.
        rows: each different one once, in the order in which they were first read.
        steps: all of them.
    """

    folder: Path
    facts: RunFacts
    finished: Finished
    rows: Sequence[Row]
    steps: Sequence[Step]

    @classmethod
    def open(cls, folder: Path) -> "RecordedRun":
        """Read a run; its states are read when they are asked for.

        Raises:
            RunMissing: there is none.
            RunCorrupt: it was cut short, is damaged, was edited or has another schema.
        """
        if not (folder / RUN).is_file():
            raise RunMissing(f"There is no recorded run in {folder} ({RUN}).")
        facts = _facts(folder)
        finished = _finished(folder)
        rows = tuple(_row(item) for item in _lines(folder / ROWS, finished.rows_sha256))
        steps = tuple(_step(item) for item in _lines(folder / STEPS, finished.steps_sha256))
        return cls(folder=folder, facts=facts, finished=finished, rows=rows, steps=steps)

    @property
    def recipe(self) -> Recipe:
        """How gradients became steps."""
        return self.facts.recipe

    @property
    def model(self) -> ModelSource | None:
        """Where the model comes from, of an adapter its base model."""
        return self.facts.source

    @property
    def state_steps(self) -> tuple[int, ...]:
        """After how many steps states were kept, the first (0) and the last included."""
        return tuple(sorted(self.finished.states))

    def state(self, step: int) -> State:
        """The state after ``step`` steps.

        Raises:
            RunMissing: none was kept then.
            RunCorrupt: its file is missing or was changed.
        """
        if step not in self.finished.states:
            raise RunMissing(
                f"No state was kept after {step} steps of {self.folder}; there are those after "
                f"{', '.join(map(str, self.state_steps))}."
            )
        return read_state(state_path(self.folder, step), self.finished.states[step])


def _sealed(path: Path) -> dict[str, Any]:
    try:
        return read_sealed(path, AGAIN)
    except IndexCorrupt as error:
        raise RunCorrupt(str(error)) from error


def _facts(folder: Path) -> RunFacts:
    document = _sealed(folder / RUN)
    if document.get("schema") != SCHEMA:
        raise RunCorrupt(
            f"{folder / RUN} has schema {document.get('schema')}, this version reads {SCHEMA}; "
            f"record the run again, or read it with the version that recorded it "
            f"({document.get('versions', {}).get('etymon', 'unknown')})."
        )
    return RunFacts.of(document)


def _finished(folder: Path) -> Finished:
    if (folder / FINISHED).is_file():
        finished = Finished.of(_sealed(folder / FINISHED))
        _check(folder / RUN, finished.run_sha256)
        return finished
    if (folder / STOPPED).is_file():
        stopped = _sealed(folder / STOPPED)
        raise RunCorrupt(
            f"The recording in {folder} ended after {stopped['steps']} steps, before the training "
            f"did: {stopped['reason']}"
        )
    raise RunCorrupt(
        f"The run in {folder} is not whole: {FINISHED} is missing, so it was cut short or is still "
        f"under way; record it again."
    )


def _lines(path: Path, sha256: str) -> Iterator[dict[str, Any]]:
    _check(path, sha256)
    with path.open(encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)


def _check(path: Path, sha256: str) -> None:
    if not path.is_file():
        raise RunCorrupt(f"{path} is missing; {AGAIN}.")
    if (found := sha256_of(path)) != sha256:
        raise RunCorrupt(
            f"{path} was changed after it was written: its SHA-256 is {found}, the run has "
            f"{sha256}; {AGAIN}."
        )


def _row(item: dict[str, Any]) -> Row:
    tokens = tuple(item["tokens"])
    labels = [UNCOUNTED] * len(tokens)
    for start, stop in item["counted"]:
        labels[start:stop] = tokens[start:stop]
    return Row(id=item["id"], tokens=tokens, labels=tuple(labels))


def _step(item: dict[str, Any]) -> Step:
    batches = tuple(
        Batch(rows=tuple(batch["rows"]), divisor=batch["divisor"], width=batch["width"])
        for batch in item["batches"]
    )
    return Step(batches=batches, rates=tuple(item["rates"]))
