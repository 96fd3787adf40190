"""Tracing many questions through a few directions that their gradients have in common.

The adjoint of a question is linear in the gradient of what it measures, and so is the influence of
every row. With the gradients ``g_q`` of Q questions at the end of the run, scaled to norm 1, the
eigenvectors u and eigenvalues l of their Gram matrix give R orthonormal directions

    b_r = sum_q u_qr / sqrt(l_r) g_q / |g_q|,
    g_q / |g_q| = sum_r u_qr sqrt(l_r) b_r + (what is left out)

Each direction is a weighted set of the questions, so it is traced as one; the influence of a row on
a question is the same sum over the influences on the directions. The squared norm of what is left
out is ``1 - sum_r u_qr^2 l_r``; over all questions no R directions leave out less.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from shutil import rmtree
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from estimators.model.progress import Progress, no_progress
from estimators.run.adjoint import final_adjoint
from estimators.run.passes import trainable
from estimators.run.recorded import State
from estimators.run.updates import SMALLEST
from index.files import exclusive
from service.checkpoints import ModelSource
from service.run.folder import RecordedRun
from service.run.optimizers import named_parameters
from service.tracing.trace import (
    MANIFEST,
    Trace,
    finish_trace,
    measured_values,
    read_trace,
    trace_run,
)
from service.tracing.walk import Question, check_same, on_device, trace_facts

FOLDER = "basis"
"""In the trace's folder while it is made."""
TOGETHER = 32
"""Gradients that are held at once, twice."""
LEAST = 1e-10
"""Of the largest eigenvalue: directions of less are rounding."""


@dataclass(frozen=True, kw_only=True)
class Basis:
    """Directions that questions have in common.

    Attributes:
        weights: of each question in each direction, which has norm 1.
        parts: of each direction in the gradient of each question, its norm included.
        norms: of the gradients of the questions.
        left_out: norm of what no direction holds, of each question's gradient, in parts of it.
    """

    weights: Float[np.ndarray, "direction question"]
    parts: Float[np.ndarray, "question direction"]
    norms: Float[np.ndarray, "question"]
    left_out: Float[np.ndarray, "question"]

    @classmethod
    def of(cls, gram: Float[np.ndarray, "question question"], rank: int) -> "Basis":
        """The ``rank`` directions that leave out least; fewer if the gradients span fewer.

        Args:
            gram: inner products of the questions' gradients.
            rank: at least 1.
        """
        norms = np.maximum(np.sqrt(np.diag(gram)), np.finfo(np.float32).tiny)
        values, vectors = np.linalg.eigh(gram / np.outer(norms, norms))
        kept = np.argsort(-values)[:rank]
        kept = kept[values[kept] > LEAST * values.max()]
        roots, vectors = np.sqrt(values[kept]), vectors[:, kept]
        own = vectors * roots
        return cls(
            weights=(vectors / roots).T / norms,
            parts=own * norms[:, None],
            norms=norms,
            left_out=np.sqrt(np.clip(1 - np.square(own).sum(1), 0, None)),
        )

    def questions(self, asked: Sequence[Question]) -> list[Question]:
        """Each direction as a weighted set of what was asked."""
        return [
            [
                (sequence, weight * float(own))
                for question, own in zip(asked, weights, strict=True)
                for sequence, weight in question
            ]
            for weights in self.weights
        ]


def trace_by_basis(
    run: RecordedRun,
    model: nn.Module,
    questions: Sequence[Question],
    out: Path,
    about: Mapping[str, Any],
    progress: Progress = no_progress,
    interval: float = 60.0,
    *,
    rank: int,
    by_token: bool = False,
    smallest: float = SMALLEST,
    source: ModelSource | None = None,
) -> Trace:
    """Trace questions through at most ``rank`` directions into ``out``, as ``trace_run`` does.

    The price is that of so many questions. What the directions leave out of each question's
    gradient is in the manifest (``left_out``, part of its norm), as is what that would make of a
    row's influence if it did as much as a direction does (``left_out_nats``, root mean square over
    rows): an estimate, not a bound. Norms of adjoints are those of orthogonal directions.

    Args:
        run: see ``trace_run``, like the others.
        model: the run's.
        questions: what is measured.
        out: folder to write.
        about: further facts for the manifest.
        progress: shows the steps.
        interval: least number of seconds between two records of how far it is.
        rank: largest number of directions.
        by_token: also keep the part of each token of the rows.
        smallest: least second moment.
        source: where the model before training was loaded from.

    Raises:
        ValueError: the rank is not between 1 and the number of questions.
        RunMismatch: see ``trace_run``.
    """
    if not 1 <= rank <= len(questions):
        raise ValueError(
            f"The rank is {rank}; give one from 1 to the number of questions, {len(questions)}."
        )
    facts = trace_facts(run, questions, about) | {"smallest_moment": smallest, "rank": rank}
    facts |= {"by_token": True} if by_token else {}
    out.mkdir(parents=True, exist_ok=True)
    with exclusive(out):
        if (out / MANIFEST).is_file():
            check_same(out / MANIFEST, facts)
            return read_trace(out)
        basis = Basis.of(gram_matrix(run, model, questions, progress), rank)
        common = trace_run(
            run,
            model,
            basis.questions(questions),
            out / FOLDER,
            {},
            progress,
            interval,
            by_token=by_token,
            smallest=smallest,
            source=source,
        )
        values = measured_values(run, model, questions, run.state(len(run.steps)))
        found = combined(common, basis.parts, values)
        facts["left_out"] = basis.left_out.tolist()
        usual = float(np.sqrt(np.square(common.totals).mean()))  # of a gradient of norm 1
        facts["left_out_nats"] = (basis.left_out * basis.norms * usual).tolist()
        finish_trace(run, model, questions, out, facts, found, source)
        rmtree(out / FOLDER)
    return found


def gram_matrix(
    run: RecordedRun,
    model: nn.Module,
    questions: Sequence[Question],
    progress: Progress = no_progress,
) -> Float[np.ndarray, "question question"]:
    """Inner products of the gradients of what is measured, at the end of the run, in float64."""
    found = np.zeros((len(questions), len(questions)))
    starts = range(0, len(questions), TOGETHER)
    pairs = [(first, second) for first in starts for second in starts if second >= first]
    with trainable(model, run.recipe, named_parameters(model)) as parameters:
        device = next(iter(parameters.values())).device
        last = on_device(run.state(len(run.steps)), device)

        def gradients(start: int) -> Float[Tensor, "question parameter"]:
            asked = questions[start : start + TOGETHER]
            return torch.stack(list(_flat_gradients(model, parameters, last, asked)))

        held, own = -1, torch.empty(0)
        for first, second in progress("gradients of the questions", pairs):
            if first != held:
                held, own = first, gradients(first)
            others = own if second == first else gradients(second)
            block = _products(own, others)
            found[first : first + len(own), second : second + len(others)] = block
            found[second : second + len(others), first : first + len(own)] = block.T
    return found


def _flat_gradients(
    model: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    last: State,
    questions: Sequence[Question],
) -> Iterator[Tensor]:
    for question in questions:
        adjoint, _ = final_adjoint(model, parameters, last, question)
        yield torch.cat([value.flatten() for value in adjoint.parameters.values()])


def _products(own: Tensor, others: Tensor, width: int = 1 << 20) -> Float[np.ndarray, "own other"]:
    """Added up in float64, some parameters at a time."""
    total = torch.zeros(len(own), len(others), dtype=torch.float64, device=own.device)
    for start in range(0, own.shape[1], width):
        part = slice(start, start + width)
        total += own[:, part].double() @ others[:, part].double().T
    found: np.ndarray = total.cpu().numpy()
    return found


def combined(
    common: Trace, parts: Float[np.ndarray, "question direction"], values: list[float]
) -> Trace:
    """The trace of each question, as a sum over those of the directions."""
    tokens = None if common.tokens is None else (parts @ common.tokens).astype(np.float32)
    return Trace(
        values=values,
        norms=np.sqrt(np.square(parts) @ np.square(common.norms)),
        steps=common.steps,
        rows=common.rows,
        influences=(parts @ common.influences.astype(np.float64)).astype(np.float32),
        count=common.count,
        tokens=tokens,
    )
