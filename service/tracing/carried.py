"""What a trace carries of its run, so that it can be served where the run does not lie."""

import hashlib
import json
import time
from collections.abc import Iterable, Iterator, Sequence, Sized
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from estimators.model.layers import plain_name
from estimators.model.progress import Progress
from estimators.model.tokens import Spans, spans_of
from estimators.run.recorded import UNCOUNTED, Row
from estimators.storage import fingerprint_tensors
from index.files import sha256_of, write_whole
from service.checkpoints import ModelSource
from service.run.errors import RunMismatch
from service.run.folder import RecordedRun
from service.run.model_facts import source_of
from service.run.optimizers import named_parameters

ROWS = "rows.jsonl"


@dataclass(frozen=True, kw_only=True)
class CarriedRow:
    """A row of the run without its text.

    Attributes:
        id: in the run.
        content: hash of its tokens.
        counted: stretches of tokens that counted; None in traces that do not say.
    """

    id: str
    content: bytes
    counted: Spans | None = None


def content_hash(tokens: bytes) -> bytes:
    """Of a row's token ids, 32-bit integers in little-endian order, without padding."""
    return hashlib.sha256(tokens).digest()


def carry(
    run: RecordedRun, model: nn.Module, out: Path, source: ModelSource | None
) -> dict[str, Any]:
    """Write the rows beside a trace.

    Args:
        run: that was traced.
        model: the run's, in any state.
        out: folder of the trace.
        source: where the model before training was loaded from.

    Returns:
        For the trace's manifest: where run and model lie, and hashes of the rows and of all weights
        after the last step.
    """
    lines = [
        json.dumps({"id": r.id, "content": _content(r).hex(), "counted": _counted(r)}) + "\n"
        for r in run.rows
    ]
    write_whole(out / ROWS, "".join(lines).encode())
    source = source_of(model, source or run.model)
    return {
        "run": str(run.folder.resolve()),
        "model": source and asdict(source),
        "rows_sha256": sha256_of(out / ROWS),
        "last_weights_sha256": last_weights_sha256(run, model),
    }


def read_carried(out: Path, sha256: str) -> Sequence[CarriedRow]:
    """The rows that ``carry`` wrote, in the run's order.

    Raises:
        RunMismatch: they are missing or were changed.
    """
    path = out / ROWS
    if not path.is_file() or sha256_of(path) != sha256:
        raise RunMismatch(f"{path} is missing or was changed; trace the run again.")
    items = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    return [
        CarriedRow(
            id=item["id"],
            content=bytes.fromhex(item["content"]),
            counted=None
            if (spans := item.get("counted")) is None
            else tuple((start, stop) for start, stop in spans),
        )
        for item in items
    ]


def last_weights_sha256(run: RecordedRun, model: nn.Module) -> str:
    """Of all weights after the last step, as ``fingerprint_model`` has it of the saved model.

    Args:
        run: the run.
        model: the run's, in any state.
    """
    last = run.state(run.state_steps[-1]).parameters
    names = {id(parameter): name for name, parameter in named_parameters(model).items()}

    def after(value: Tensor) -> Tensor:
        return last.get(names.get(id(value), ""), value)

    weights = model.state_dict(keep_vars=True)
    return fingerprint_tensors({plain_name(name): after(v) for name, v in weights.items()})


class Timed:
    """Progress that measures what all items would take, also where the first were done before.

    Args:
        progress: that is shown.
    """

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._items, self._seconds = 0, 0.0

    def __call__(self, description: str, items: Iterable[Any]) -> Iterator[Any]:
        """Yield ``items``."""
        start = time.perf_counter()
        self._items = len(items) if isinstance(items, Sized) else 0
        yield from self._progress(description, items)
        self._seconds = time.perf_counter() - start

    def seconds(self, items: int) -> float:
        """Of so many items."""
        return self._seconds * items / max(self._items, 1)


def _counted(row: Row) -> Spans:
    """Of the tokens after the first, which nothing precedes."""
    mask = [False, *(label != UNCOUNTED for label in row.labels[1:])]
    return spans_of(mask[: len(row.tokens)])


def _content(row: Row) -> bytes:
    return content_hash(np.array(row.tokens, dtype="<i4").tobytes())
