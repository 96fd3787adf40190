"""Scores of every row of a run by each estimator, and what they cost."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from estimators.curvature.fitting import fit_estimator
from estimators.model.selection import LayerSelection
from estimators.model.tokens import Sequence1D
from estimators.run.adjoint import final_adjoint
from estimators.run.direction import DirectionPlan, Directions, reading_weights
from estimators.run.passes import batch_losses, put, trainable
from estimators.run.recorded import Batch, Row
from estimators.run.updates import SMALLEST, scaling
from index.examples import ExampleStore
from scripts.bench.through_run.tasks import Task
from scripts.console import show_progress
from service.checkpoints import ModelSource
from service.models import load_model
from service.run.optimizers import named_parameters
from service.scoring.estimators import Estimators
from service.scoring.exhaustive import exact_scores
from service.tracing.directions import trace_directions
from service.tracing.price import predict_trace, segments_of
from service.tracing.trace import trace_run

DAMPINGS = (0.001, 0.01, 0.1, 1.0)
Scores = Float[np.ndarray, "question row"]


@dataclass(frozen=True, kw_only=True)
class Scored:
    """What an estimator says of every row.

    Attributes:
        values: positive = raised the answer.
        trainings: what a question costs, in trainings of the run; None where it is not stated.
        peak_mb: of the trace, predicted; None where it is not stated.
    """

    values: Scores
    trainings: float | None = None
    peak_mb: float | None = None


def all_scores(task: Task, out: Path) -> dict[str, Scored]:
    """By name of estimator."""
    found = {
        "run": _traced(task, out / "trace", SMALLEST),
        "run, exact derivative": _traced(task, out / "trace-exact", 0.0),
    }
    found |= _directed(task, out / "directions", DirectionPlan())
    found |= _of_last_gradient(task)
    return {**found, **at_the_end(task, task.run.rows)}


def _traced(task: Task, folder: Path, smallest: float) -> Scored:
    price = predict_trace(task.run, task.model, task.questions)
    start = time.process_time()
    trace = trace_run(
        task.run, task.model, task.questions, folder, {}, show_progress, smallest=smallest
    )
    cost = (time.process_time() - start) / task.training_seconds / len(task.questions)
    return Scored(values=trace.totals, trainings=_kept(folder, cost), peak_mb=price.peak_mb)


def _kept(folder: Path, cost: float) -> float:
    """The cost, of the first time where the folder was there already."""
    path = folder / "trainings.txt"
    if not path.is_file():
        path.write_text(str(cost))
    return float(path.read_text())


def _directed(task: Task, folder: Path, plan: DirectionPlan) -> dict[str, Scored]:
    price = predict_trace(task.run, task.model, task.questions, plan)
    start = time.process_time()
    found = trace_directions(task.run, task.model, task.questions, folder, {}, plan, show_progress)
    cost = (time.process_time() - start) / task.training_seconds / len(task.questions)
    given = {"trainings": _kept(folder, cost), "peak_mb": price.peak_mb}
    parts = [found.segments(question) for question in range(len(task.questions))]
    every, indexed, linear = met(task, task.run.rows, parts)
    weights = found.weights.numpy()[None]
    return {
        "direction by epoch": Scored(values=(every * weights).sum(1), **given),
        "one direction": Scored(values=every.sum(1), **given),
        "one direction, index with embeddings": Scored(values=indexed.sum(1), **given),
        "one direction, linear layers": Scored(values=linear.sum(1), **given),
    }


def met(
    task: Task, rows: Sequence[Row], parts: Sequence[Sequence[Mapping[str, Tensor]]]
) -> Float[np.ndarray, "part question segment row"]:
    """Each direction times the final model's gradient of each row.

    Parts of it: all; what an index with ``--embeddings`` holds, so all but position embeddings and
    scales of norms; linear layers only, without embedding and head, which are tied here.
    """
    run, model = task.run, task.model
    shape = (len(parts), len(parts[0]), len(rows))
    found = np.zeros((3, *shape))
    with trainable(model, run.recipe, named_parameters(model)) as parameters:
        put(parameters, run.state(len(run.steps)))
        tall = {n: torch.stack([p[n].flatten() for q in parts for p in q]) for n in parameters}
        sizes = {n: p.ndim for n, p in parameters.items()}
        indexed = {n for n in parameters if _layers_weight(n, sizes) and ".wpe." not in n}
        linear = {n for n in indexed if ".wte." not in n}
        for number, row in enumerate(show_progress("gradients of the last model", rows)):
            gradient = _gradient(task, parameters, rows, number, row)
            for name, own in gradient.items():
                values = (tall[name] @ own.flatten()).numpy().reshape(shape[:2])
                for place, names in enumerate((parameters, indexed, linear)):
                    if name in names:
                        found[place, :, :, number] += values
    return found


def _layers_weight(name: str, dimensions: Mapping[str, int]) -> bool:
    """Whether it is a matrix, or the bias beside one."""
    return dimensions.get(name.replace(".bias", ".weight"), 0) == 2


def _gradient(
    task: Task, parameters: Mapping[str, Tensor], rows: Sequence[Row], number: int, row: Row
) -> dict[str, Tensor]:
    batch = Batch(rows=(number,), divisor=1.0, width=len(row.tokens))
    loss = batch_losses(task.model, rows, batch, torch.device("cpu")).sum()
    found = torch.autograd.grad(loss, list(parameters.values()), materialize_grads=True)
    return dict(zip(parameters, found, strict=True))


def _of_last_gradient(task: Task) -> dict[str, Scored]:
    """Adam's scaling of every step times the gradient of the answer at the end: no curvature."""
    run, model = task.run, task.model
    segments = segments_of(run, DirectionPlan())
    sums = Directions(run.steps, segments, len(task.questions))
    with trainable(model, run.recipe, named_parameters(model)) as parameters:
        last = run.state(len(run.steps))
        adjoints = [final_adjoint(model, parameters, last, q)[0].parameters for q in task.questions]
    kept = np.array([step for step in run.state_steps if step > 0])  # scalings change slowly
    moments, held = run.state(int(kept[0])).moments, int(kept[0])
    for number, step in enumerate(run.steps):
        near = int(kept[np.abs(kept - number - 1).argmin()])
        if near != held:
            moments, held = run.state(near).moments, near
        scales = scaling(run.recipe, near - 1, step.rates, None, moments)
        sums.add(number, [{n: scales[n] * v for n, v in one.items()} for one in adjoints])
    every = met(task, run.rows, sums.found)[0]
    weights = reading_weights(len(run.rows), run.steps, segments).numpy()[None]
    return {"Adam-scaled last gradient": Scored(values=(every * weights).sum(1))}


@dataclass(frozen=True)
class _Examples:
    """Rows as exact scoring asks for them."""

    rows: Sequence[Row]

    def __len__(self) -> int:
        return len(self.rows)

    def tokens(self, row: int) -> tuple[int, ...]:
        return self.rows[row].tokens


def at_the_end(
    task: Task, rows: Sequence[Row], dampings: Sequence[float] = DAMPINGS
) -> dict[str, Scored]:
    """Scores of rows by the last model alone: EK-FAC at several dampings, and the dot product.

    EK-FAC's curvature is that of the rows that the run read.
    """
    loaded = load_model(
        ModelSource.of(str(task.tuned)), layers=LayerSelection(patterns=task.layers)
    )
    sequences = [Sequence1D(tokens=row.tokens, row=i) for i, row in enumerate(task.run.rows)]
    fitted = fit_estimator(
        "ekfac", loaded.model, loaded.coverage.layers, sequences, progress=show_progress
    )
    examples = cast(ExampleStore, _Examples(rows))
    estimators = Estimators.of_factors(loaded, examples, "ekfac", fitted, dampings[0])
    chosen = {
        f"EK-FAC, damping {damping:g}": estimators.choose_gradients("ekfac", {"damping": damping})
        for damping in dampings
    }
    chosen["dot product"] = estimators.choose_gradients("identity")
    found = exact_scores(
        loaded,
        {name: one.directions for name, one in chosen.items()},
        examples,
        [question[0][0] for question in task.questions],
        progress=show_progress,
    )
    return {name: Scored(values=values.astype(float)) for name, values in found.items()}
