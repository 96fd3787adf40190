"""A run's files while it is recorded."""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from estimators.run.recorded import UNCOUNTED, Batch, State
from estimators.storage import fingerprint_tensors
from index.files import sha256_of, write_sealed
from service.run.batches import Numbers, ReadBatch, content_id
from service.run.errors import Unrecordable
from service.run.facts import Finished, RunFacts
from service.run.folder import FINISHED, ROWS, RUN, STEPS, STOPPED, state_path
from service.run.states import write_state

RowIds = Mapping[tuple[int, ...], str] | Callable[[tuple[int, ...]], str]
"""The caller's id of a row by its tokens, without padding."""


class RunWriter:
    """Appends rows and steps, keeps states, and says at the end that the run is whole.

    Args:
        folder: without a run.
        ids: of rows; None calls each by the hash of its content.

    Raises:
        Unrecordable: the folder holds a run already.
    """

    def __init__(self, folder: Path, ids: RowIds | None = None) -> None:
        if any((folder / name).exists() for name in (RUN, ROWS, STEPS)):
            raise Unrecordable(
                f"{folder} holds a run already; choose another folder, or remove this one."
            )
        self.folder = folder
        self.steps = 0
        self._ids = ids
        self._numbers: dict[str, int] = {}
        self._states: dict[int, str] = {}
        folder.mkdir(parents=True, exist_ok=True)
        self._rows = _Lines(folder / ROWS)
        self._steps = _Lines(folder / STEPS)

    def begin(self, facts: RunFacts) -> None:
        """Write what is known before the first step."""
        write_sealed(self.folder / RUN, facts.document())

    def number(self, tokens: Numbers, labels: Numbers) -> int:
        """A row's number; a row that was never seen is written."""
        key = content_id(tokens, labels)
        if key not in self._numbers:
            self._numbers[key] = len(self._numbers)
            plain = tuple(tokens.tolist())
            spans = list(_spans(labels))
            self._rows.write({"id": self._id(key, plain), "tokens": plain, "counted": spans})
        return self._numbers[key]

    def batch(self, batch: ReadBatch, divisor: float) -> Batch:
        """A forward pass whose rows have numbers."""
        rows = tuple(self.number(tokens, labels) for tokens, labels in batch.rows())
        return Batch(rows=rows, divisor=divisor, width=batch.width)

    def step(self, batches: Sequence[Batch], rates: Sequence[float]) -> None:
        """Append a step."""
        passes = [
            {"rows": batch.rows, "divisor": batch.divisor, "width": batch.width}
            for batch in batches
        ]
        self._steps.write({"batches": passes, "rates": list(rates)})
        self.steps += 1

    def has_state(self, step: int) -> bool:
        """Whether the state after ``step`` steps is kept."""
        return step in self._states

    def state(self, state: State) -> None:
        """Keep a state, and all rows and steps before it."""
        self._states[state.step] = write_state(state_path(self.folder, state.step), state)
        self._rows.flush()
        self._steps.flush()

    def finish(self, last: State) -> None:
        """Keep the last state and say that the run is whole."""
        if not self.has_state(last.step):
            self.state(last)
        finished = Finished(
            steps=self.steps,
            rows=len(self._numbers),
            run_sha256=sha256_of(self.folder / RUN),
            trained_sha256=fingerprint_tensors(last.parameters),
            steps_sha256=self._steps.close(),
            rows_sha256=self._rows.close(),
            states=self._states,
        )
        write_sealed(self.folder / FINISHED, finished.document())

    def stop(self, reason: str) -> None:
        """Say why the recording ended before the training did."""
        self._steps.close()
        self._rows.close()
        write_sealed(self.folder / STOPPED, {"steps": self.steps, "reason": reason})

    def discard(self) -> None:
        """Leave nothing behind; before the first step only."""
        self._steps.close()
        self._rows.close()
        for name in (ROWS, STEPS):
            (self.folder / name).unlink(missing_ok=True)

    def _id(self, key: str, tokens: tuple[int, ...]) -> str:
        if self._ids is None:
            return key
        try:
            found = self._ids(tokens) if callable(self._ids) else self._ids[tokens]
        except KeyError as error:
            raise Unrecordable(
                f"No id is given for a row of {len(tokens)} tokens that begins with "
                f"{list(tokens[:8])}; name every row, by its tokens as the model reads them."
            ) from error
        return str(found)


class _Lines:
    """JSON lines, hashed as they are written."""

    def __init__(self, path: Path) -> None:
        self._file: IO[bytes] = path.open("xb")
        self._digest = hashlib.sha256()

    def write(self, item: Mapping[str, Any]) -> None:
        line = (json.dumps(item, separators=(",", ":"), ensure_ascii=False) + "\n").encode()
        self._digest.update(line)
        self._file.write(line)

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> str:
        """The file's SHA-256."""
        self._file.close()
        return self._digest.hexdigest()


def _spans(labels: Numbers) -> Iterator[tuple[int, int]]:
    """Where labels count, from and to."""
    counted = np.concatenate([[False], labels != UNCOUNTED, [False]])
    edges = np.flatnonzero(counted[1:] != counted[:-1]).tolist()
    yield from zip(edges[::2], edges[1::2], strict=True)
