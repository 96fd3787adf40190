"""A trial: an adjoint without a pass of the model, by EK-FAC's curvature of parts of the run.

The adjoint goes back as in ``estimators.run.direction``, but a step's curvature is that of its part
of the run: EK-FAC, embeddings included, fitted at a state in the middle of the part, over a random
half of the rows, times a scale. ``a_t = exp(-H D) a_(t+1)`` is taken in ``SUBSTEPS`` equal steps,
so that no step's rate times curvature passes 2. What rows meet is ``D a``, as there.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from scipy import stats
from torch import Tensor, nn

from estimators.curvature.fitting import fit_estimator
from estimators.model.layers import LinearLayer, VocabularyLayer
from estimators.model.selection import LayerSelection
from estimators.model.tokens import Sequence1D
from estimators.operators.ekfac import EKFac
from estimators.run.adjoint import final_adjoint
from estimators.run.direction import Directions
from estimators.run.passes import trainable
from estimators.run.updates import scaling
from scripts.bench.through_run.reruns import SHARES, Reruns
from scripts.bench.through_run.scores import met
from scripts.bench.through_run.tasks import SEED, Task, make_tasks
from scripts.console import one_sentence_errors, print_json, print_plain, show_progress
from service.checkpoints import ModelSource
from service.models import LoadedModel, load_model
from service.run.optimizers import named_parameters

SUBSTEPS = 2
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
@one_sentence_errors
def main(
    out: Annotated[Path, typer.Option(help="Where the other benchmark worked.")] = Path(
        "runs/through-run"
    ),
    task: Annotated[str, typer.Option(help="One of facts, prose.")] = "facts",
    rows: Annotated[int, typer.Option(help="Of the fine-tuning, as it was made.")] = 1000,
    questions: Annotated[int, typer.Option(help="As they were asked.")] = 12,
    parts: Annotated[int, typer.Option(help="Of the run, each with curvature of its own.")] = 3,
    scales: Annotated[str, typer.Option(help="Of the curvature.")] = "0,1,8,16",
    reruns: Annotated[int, typer.Option(help="Of those that were made, for each share.")] = 32,
) -> None:
    """LDS of the trial, against the reruns of ``python -m scripts.bench.through_run``."""
    (made,) = make_tasks(out, [task], rows, questions)
    selection = LayerSelection(patterns=made.layers, embeddings=task == "facts")
    loaded = load_model(ModelSource.of(str(made.tuned)), layers=selection)
    start = time.process_time()
    curvatures = [_curvature(made, loaded, part, parts) for part in range(parts)]
    fitted = (time.process_time() - start) / made.training_seconds
    known = Reruns(made, out / task / "reruns.jsonl")
    found = []
    for scale in map(float, scales.split(",")):
        start = time.process_time()
        sums = _walk(made, loaded.coverage.layers, curvatures, scale)
        cost = (time.process_time() - start) / made.training_seconds / questions
        values = met(made, made.run.rows, sums.found)[0].sum(1)
        row: dict[str, Any] = {"scale": scale, "trainings_a_query": cost, "trainings_once": fitted}
        for share in SHARES:
            row[f"lds_{round(100 * share)}"] = _lds(known, share, reruns, values)
        print_plain(str(row))
        found.append(row)
    print_json({"task": task, "parts": parts, "rows": found})


@dataclass(frozen=True)
class Curvature:
    """Of one part of the run, for the mean of the rows' summed losses."""

    fitted: EKFac

    def times(self, layer: LinearLayer, x: Tensor) -> Tensor:
        """The product with [question, in, out]."""
        factors = self.fitted.tensors()
        left, right = factors.get(f"{layer.name}.left"), factors[f"{layer.name}.right"].to(x)
        values = self.fitted.eigenvalues(layer.name).to(x)
        if left is None:
            return (x @ right * values) @ right.T
        left = left.to(x)
        return left @ (left.T @ x @ right * values) @ right.T


def _curvature(task: Task, loaded: LoadedModel, part: int, parts: int) -> Curvature:
    run = task.run
    middle = (part + 0.5) * len(run.steps) / parts
    state = run.state(min(run.state_steps, key=lambda step: abs(step - middle)))
    named = named_parameters(loaded.model)
    with torch.no_grad():
        for name, value in state.parameters.items():
            named[name].copy_(value)
    order = np.random.default_rng([SEED, part]).permutation(len(run.rows))
    some = [Sequence1D(tokens=run.rows[i].tokens, row=int(i)) for i in order[: len(run.rows) // 2]]
    layers = loaded.coverage.layers
    found = fit_estimator("ekfac", loaded.model, layers, some, progress=show_progress)
    assert isinstance(found, EKFac)
    return Curvature(found)


def _walk(
    task: Task, layers: Sequence[LinearLayer], curvatures: Sequence[Curvature], scale: float
) -> Directions:
    run = task.run
    with trainable(task.model, run.recipe, named_parameters(task.model)) as parameters:
        last = run.state(len(run.steps))
        found = [final_adjoint(task.model, parameters, last, q)[0] for q in task.questions]
    adjoints = {n: torch.stack([one.parameters[n] for one in found]) for n in parameters}
    sums = Directions(run.steps, 1, len(task.questions))
    kept = [step for step in run.state_steps if step > 0]  # scalings change slowly
    for number in range(len(run.steps) - 1, -1, -1):
        step = run.steps[number]
        near = min(kept, key=lambda one: abs(one - number - 1))
        scales = scaling(run.recipe, near - 1, step.rates, None, run.state(near).moments)
        curvature = curvatures[number * len(curvatures) // len(run.steps)]
        weight = scale * sum(len(batch.rows) / batch.divisor for batch in step.batches)
        pushed = {n: torch.zeros_like(value) for n, value in adjoints.items()}
        for _ in range(SUBSTEPS):
            now = {n: scales[n] * value for n, value in adjoints.items()}
            pushed = {n: value + now[n] / SUBSTEPS for n, value in pushed.items()}
            _pull(adjoints, now, layers, curvature, weight / SUBSTEPS)
        sums.add(number, [{n: v[q] for n, v in pushed.items()} for q in range(len(found))])
    return sums


def _pull(
    adjoints: dict[str, Tensor],
    pushed: Mapping[str, Tensor],
    layers: Sequence[LinearLayer],
    curvature: Curvature,
    weight: float,
) -> None:
    """Subtract the curvature's product from the adjoints of the layers' weights and biases."""
    for layer in layers:
        questions = range(len(next(iter(pushed.values()))))
        x = torch.stack([layer.part_of({n: v[q] for n, v in pushed.items()}) for q in questions])
        product = weight * curvature.times(layer, x)
        for name in layer.parameter_names:
            own = product[:, -1] if name.endswith(".bias") else product[:, : _inputs(layer)]
            if isinstance(layer.module, nn.Linear) and not isinstance(layer, VocabularyLayer):
                own = own.mT if own.ndim == 3 else own
            adjoints[name] = adjoints[name] - own


def _inputs(layer: LinearLayer) -> int:
    return layer.in_features - int(layer.has_bias)


def _lds(known: Reruns, share: float, count: int, values: Any) -> float:
    sets = known.random(share, count)
    left = np.zeros((count, values.shape[1]))
    for number, one in enumerate(sets):
        left[number, one] = 1
    change, predicted = known.changes(sets, "reruns"), -left @ values.T
    pairs = zip(predicted.T, change.T, strict=True)
    return float(np.mean([stats.spearmanr(p, m).statistic for p, m in pairs]))


if __name__ == "__main__":
    app()
