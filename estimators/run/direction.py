"""The run's direction: its adjoint as one direction that gradients of the final model meet.

With the optimizer's scaling ``D_t`` taken as a constant of each step and momentum left out, the
adjoint goes backward by ``a_t = (1 - decay) a_(t+1) - H_t D_t a_(t+1)`` (D holds the rate), and a
reading of row i at step t changes f by ``-<D_t a_(t+1), grad L_i> / divisor_t`` for one unit of
weight. Averaged over the steps of a segment of the run this is a direction, whose inner product
with the gradient of any row, of the final model say, is the influence in nats of f of that row,
read once in the segment at a step drawn at random.

A second moment of nearly nothing counts as a tenth of its tensor's mean: see
``estimators.run.updates.SMALLEST``. Engstrom et al. 2025 for the exact adjoint; the fixed scaling
and the average are this project's.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from estimators.run.curvature import Curvature, curvature_products
from estimators.run.passes import put, step_gradients
from estimators.run.recorded import Recipe, Row, State, Step
from estimators.run.updates import scaling

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class DirectionPlan:
    """How directions are found.

    Attributes:
        curvature: of the steps: Gauss-Newton's of half of each batch, or the whole Hessian.
        segments: parts of the run, each with a direction of its own; None takes one an epoch.
        seed: of the rows that stand for a batch.
    """

    curvature: Curvature = "gauss-newton"
    segments: int | None = None
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class StepBack:
    """How to go back over a run's steps.

    Attributes:
        model: its trained parameters require gradients, in float32 or float64.
        parameters: these, by name.
        recipe: of the run.
        rows: of the run.
        curvature: of the steps.
        seed: of the rows that stand for a batch.
    """

    model: nn.Module
    parameters: Mapping[str, nn.Parameter]
    recipe: Recipe
    rows: Sequence[Row]
    curvature: Curvature
    seed: int = 0


def direction_back(
    how: StepBack, step: Step, before: State, after: State, adjoints: Sequence[Tensors]
) -> tuple[list[dict[str, Tensor]], list[dict[str, Tensor]]]:
    """Each question's adjoint before a step, and ``D_t a_(t+1)``, what the step's rows meet.

    Args:
        how: the run.
        step: to go back over.
        before: the state before it.
        after: the state behind it.
        adjoints: with respect to the parameters behind it, one a question.
    """
    put(how.parameters, before)
    gradients = None
    if how.recipe.clipping is not None:
        ones = torch.ones(len(how.rows)).to(next(iter(how.parameters.values())))
        gradients = step_gradients(how.model, how.parameters, how.rows, step, ones)
    scales = scaling(how.recipe, before.step, step.rates, gradients, after.moments)
    met = [{name: scales[name] * value for name, value in one.items()} for one in adjoints]
    pairs = zip(adjoints, met, strict=True)
    found = [_decayed(how.recipe, step, one, pushed) for one, pushed in pairs]
    generator = torch.Generator().manual_seed(how.seed + before.step)
    for batch in step.batches:
        products = curvature_products(
            how.model, how.parameters, how.rows, batch, met, how.curvature, generator
        )
        for one, product in zip(found, products, strict=True):
            for name, value in product.items():
                one[name] = one[name] - value
    return found, met


def _decayed(recipe: Recipe, step: Step, adjoint: Tensors, met: Tensors) -> dict[str, Tensor]:
    found = {}
    for group, rate in zip(recipe.groups, step.rates, strict=True):
        for name in group.parameters:
            if recipe.optimizer == "adamw":
                found[name] = (1 - rate * group.weight_decay) * adjoint[name]
            else:  # the decay is a part of the gradient
                found[name] = adjoint[name] - group.weight_decay * met[name]
    return found


def segment_count(rows: Sequence[Row], steps: Sequence[Step], most: int = 8) -> int:
    """Segments of a run: one an epoch, at most ``most``."""
    readings = sum(len(batch.rows) for step in steps for batch in step.batches)
    return min(most, len(steps), max(1, round(readings / max(1, len(rows)))))


Number = TypeVar("Number", int, Int[np.ndarray, "step"])


def segment_of(step: Number, steps: int, segments: int) -> Number:
    """The segment that a step, or each of several steps, lies in."""
    return step * segments // steps


class Directions:
    """Sums of what was met, by question and segment.

    Args:
        steps: of the run.
        segments: how many.
        questions: how many.

    Attributes:
        found: the sums, by question, segment and name of parameter.
    """

    def __init__(self, steps: Sequence[Step], segments: int, questions: int) -> None:
        self._steps, self._segments = steps, segments
        self._sizes = [0] * segments
        for number in range(len(steps)):
            self._sizes[segment_of(number, len(steps), segments)] += 1
        self.found: list[list[dict[str, Tensor]]] = [
            [{} for _ in range(segments)] for _ in range(questions)
        ]

    def add(self, number: int, met: Sequence[Tensors]) -> None:
        """Add what the rows of step ``number`` meet, one a question."""
        step = self._steps[number]
        segment = segment_of(number, len(self._steps), self._segments)
        weight = -_unit(step) / self._sizes[segment]
        for question, values in enumerate(met):
            sums = self.found[question][segment]
            for name, value in values.items():
                add = weight * value
                sums[name] = sums[name] + add if name in sums else add


def _unit(step: Step) -> float:
    """Mean over the step's readings of one over the divisor."""
    readings = sum(len(batch.rows) for batch in step.batches)
    return sum(len(batch.rows) / batch.divisor for batch in step.batches) / readings


def reading_weights(
    rows: int, steps: Sequence[Step], segments: int
) -> Float[Tensor, "segment row"]:
    """How much each row was read in each segment; 1 for once, at the segment's mean rate.

    The influence of a row of the run is the sum over segments of this times the inner product of
    the segment's direction with its gradient.
    """
    found = torch.zeros(segments, rows, dtype=torch.float64)
    units = torch.zeros(segments, dtype=torch.float64)
    sizes = torch.zeros(segments, dtype=torch.float64)
    for number, step in enumerate(steps):
        segment, rate = segment_of(number, len(steps), segments), max(step.rates)
        units[segment] += rate * _unit(step)
        sizes[segment] += 1
        for batch in step.batches:
            for row in batch.rows:
                found[segment, row] += rate / batch.divisor
    means = units / sizes
    return torch.where(means[:, None] > 0, found / means[:, None], 0.0)
