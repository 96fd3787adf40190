"""Tracing questions through a recorded run: the influence of every row, step by step."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from safetensors.torch import load_file, save
from torch import Tensor, nn

from estimators.model.progress import Progress, no_progress
from estimators.run.adjoint import Adjoint, measured_value, step_back
from estimators.run.direction import segment_of
from estimators.run.passes import trainable
from estimators.run.recorded import Batch, State
from estimators.run.updates import SMALLEST
from index.files import exclusive, read_sealed, sha256_of, write_sealed, write_whole
from service.checkpoints import ModelSource
from service.run.errors import RunMismatch
from service.run.folder import RecordedRun
from service.run.optimizers import named_parameters
from service.tracing.carried import Timed, carry
from service.tracing.price import predict_trace
from service.tracing.walk import Parameters, Question, Walk, check_same, trace_facts

MANIFEST = "trace.json"
INFLUENCES = "influences.safetensors"
PARTIAL = "partial.safetensors"


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
        tokens: the part of each token as what is predicted, over all readings of its row, the rows'
            tokens one after the other; they sum to the row's influence. None unless asked for.
    """

    values: list[float]
    norms: Float[np.ndarray, "question point"]
    steps: Int[np.ndarray, "reading"]
    rows: Int[np.ndarray, "reading"]
    influences: Float[np.ndarray, "question reading"]
    count: int
    tokens: Float[np.ndarray, "question token"] | None = None

    @property
    def totals(self) -> Float[np.ndarray, "question row"]:
        """Over all readings; leaving the row out changes f by minus that, to first order."""
        return self.by_segment(1)[:, 0]

    def by_segment(self, segments: int) -> Float[np.ndarray, "question segment row"]:
        """The same, over the readings in each of so many equal parts of the run."""
        found = np.zeros((len(self.influences), segments, self.count))
        part = segment_of(self.steps, self.norms.shape[1] - 1, segments)
        for question, values in enumerate(self.influences):
            np.add.at(found[question], (part, self.rows), values.astype(np.float64))
        return found


def trace_run(
    run: RecordedRun,
    model: nn.Module,
    questions: Sequence[Question],
    out: Path,
    about: Mapping[str, Any],
    progress: Progress = no_progress,
    interval: float = 60.0,
    *,
    by_token: bool = False,
    smallest: float = SMALLEST,
    source: ModelSource | None = None,
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
        by_token: also keep the part of each token of the rows.
        smallest: part of a tensor's mean second moment that each of its entries has at least, as
            the optimizer is differentiated; 0 takes them as they are.
        source: where the model before training was loaded from; None takes what the run says.

    Raises:
        RunMismatch: the folder holds a trace of another run or of other questions, or the run's
            precision has no faithful derivative.
    """
    facts = trace_facts(run, questions, about) | {"smallest_moment": smallest}
    facts |= {"by_token": True} if by_token else {}
    out.mkdir(parents=True, exist_ok=True)
    with exclusive(out):
        if (out / MANIFEST).is_file():
            check_same(out / MANIFEST, facts)
            return read_trace(out)
        timed = Timed(progress)
        walk = Walk(run, model, questions, out / PARTIAL, facts, interval)
        influences = _Influences(run, model, smallest, by_token=by_token)
        walk.go(influences, timed)
        found = _trace_of(walk, influences, run)
        facts["seconds"] = timed.seconds(len(run.steps))
        finish_trace(run, model, questions, out, facts, found, source)
        (out / PARTIAL).unlink(missing_ok=True)
    return found


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


def finish_trace(
    run: RecordedRun,
    model: nn.Module,
    questions: Sequence[Question],
    out: Path,
    facts: Mapping[str, Any],
    found: Trace,
    source: ModelSource | None,
) -> None:
    """Write a trace, what it carries of its run, and last its manifest."""
    tensors = {
        "steps": torch.from_numpy(found.steps),
        "rows": torch.from_numpy(found.rows),
        "influences": torch.from_numpy(found.influences),
        "norms": torch.from_numpy(found.norms),
    }
    if found.tokens is not None:
        tensors["tokens"] = torch.from_numpy(found.tokens)
    write_whole(out / INFLUENCES, bytes(save(tensors)))
    manifest = {
        **facts,
        **carry(run, model, out, source),
        "price": asdict(predict_trace(run, model, questions[:1])),
        "values": found.values,
        "rows": found.count,
        "influences_sha256": sha256_of(out / INFLUENCES),
    }
    write_sealed(out / MANIFEST, manifest)


class _Influences:
    """Every reading's influence, step by step; of tokens their sums."""

    def __init__(
        self, run: RecordedRun, model: nn.Module, smallest: float, *, by_token: bool
    ) -> None:
        self._run, self._model, self._smallest, self._by_token = run, model, smallest, by_token
        self._found: list[Tensor] = []
        self._starts = np.cumsum([0, *(len(row.tokens) for row in run.rows)])
        self.tokens: Tensor | None = None

    def back(
        self,
        parameters: Parameters,
        number: int,
        before: State,
        after: State,
        adjoints: Sequence[Adjoint],
    ) -> list[Adjoint]:
        """See ``Visit``."""
        run = self._run
        step = run.steps[number]
        found, parts = step_back(
            self._model, parameters, run.recipe, run.rows, step, before, adjoints, self._smallest
        )
        for batch, influences in zip(step.batches, parts, strict=True):
            self._found.append(influences.sum(2).float().cpu())
            if self._by_token:
                self._add_tokens(batch, influences.double().cpu())
        return found

    def _add_tokens(self, batch: Batch, influences: Float[Tensor, "question row token"]) -> None:
        if self.tokens is None:
            shape = (len(influences), int(self._starts[-1]))
            self.tokens = torch.zeros(shape, dtype=torch.float64)
        for place, row in enumerate(batch.rows):
            first, last = int(self._starts[row]) + 1, int(self._starts[row + 1])
            self.tokens[:, first:last] += influences[:, place, : last - first]

    def tensors(self) -> dict[str, Tensor]:
        """See ``Visit``."""
        found = {"influences": self.influences}
        return found if self.tokens is None else {**found, "tokens": self.tokens}

    def take_up(self, tensors: Mapping[str, Tensor]) -> None:
        """See ``Visit``."""
        self._found = [tensors["influences"].cpu()]
        self.tokens = tensors["tokens"].cpu() if "tokens" in tensors else None

    @property
    def influences(self) -> Tensor:
        """Of all readings so far, the last step's first: [question, reading]."""
        return torch.cat(self._found, dim=1)


def _trace_of(walk: Walk, found: _Influences, run: RecordedRun) -> Trace:
    read = [
        (number, row)
        for number in range(len(run.steps) - 1, -1, -1)
        for batch in run.steps[number].batches
        for row in batch.rows
    ]
    steps, rows = np.array(read, dtype=np.int64).reshape(-1, 2).T
    return Trace(
        values=walk.values,
        norms=np.array(walk.norms)[:, ::-1].copy(),
        steps=steps.copy(),
        rows=rows.copy(),
        influences=found.influences.numpy(),
        count=len(run.rows),
        tokens=None if found.tokens is None else found.tokens.float().numpy(),
    )
