"""The run repeated without some rows, to see what sets of rows are worth together."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float, Int
from torch import nn

from estimators.model.progress import Progress, no_progress
from service.run.errors import RunMismatch
from service.run.replay import retrain
from service.scaling.evidence import Common, TracedRun
from service.scaling.fitting import LEAST_QUESTIONS, SET_SHARE, Retraining
from service.scaling.kept import MeasuredValues
from service.tracing.trace import measured_values

SIZES = (1, 5, 20)
"""Strongest rows that are left out together."""
MOST = 4
"""Sizes are at most one of so many of all rows."""
TIMED_STEPS = 3
"""Steps by which a retraining's time is predicted, after one that warms up."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Rows to leave out.

    Attributes:
        rows: by their places among the shared rows.
        question: whose strongest rows they are; None if they are random.
    """

    rows: Int[np.ndarray, "left"]
    question: int | None


def sizes_among(rows: int) -> list[int]:
    """Of so many rows, how many strongest ones are left out together."""
    return [size for size in SIZES if size <= rows // MOST]


def check_count(count: int, rows: int) -> None:
    """Raise RunMismatch if so many retrainings give no interval."""
    sizes = sizes_among(rows)
    needed = LEAST_QUESTIONS * (len(sizes) + 1)
    if count < needed:
        told = " and ".join(map(str, sizes))
        raise RunMismatch(
            f"{count} retrainings are too few: {needed} are needed, for {LEAST_QUESTIONS} "
            f"questions each without its {told} strongest rows and without a random set."
        )


def plan_retrainings(
    scores: Float[np.ndarray, "question row"], count: int, seed: int
) -> list[Plan]:
    """For one question after another its strongest proponents in each size, and a random set.

    Questions come in random order. What is left over when all had their turn goes to random sets.

    Args:
        scores: by which rows are strong.
        count: of retrainings.
        seed: of questions and random sets.

    Raises:
        RunMismatch: they are too few for an interval.
    """
    questions, rows = scores.shape
    sizes = sizes_among(rows)
    each = len(sizes) + 1
    check_count(count, rows)
    generator = np.random.default_rng(seed)
    plans = []
    for question in generator.permutation(questions)[: count // each].tolist():
        order = np.argsort(-scores[question], kind="stable")
        plans += [Plan(rows=order[:size], question=question) for size in sizes]
    size = max(1, round(SET_SHARE * rows))
    while len(plans) < count:
        plans.append(Plan(rows=generator.permutation(rows)[:size], question=None))
    return plans


def measure_retrainings(
    traced: TracedRun,
    common: Common,
    model: nn.Module,
    plans: Sequence[Plan],
    progress: Progress = no_progress,
) -> list[Retraining]:
    """Repeat the run as each plan says, and once with all rows, and measure every question.

    What was measured is kept beside the trace and not measured again.

    Args:
        traced: the run.
        common: what places among the shared rows mean.
        model: the run's, as ``load_first_model`` gave it.
        plans: what to leave out.
        progress: shows the retrainings.

    Raises:
        RunFault: what was measured cannot be kept.
    """
    run = traced.run
    kept = MeasuredValues(traced.folder, traced.sha256)
    values = []
    for left in progress("retrainings", [np.array([], dtype=int), *(p.rows for p in plans)]):
        absent = common.run_rows[np.isin(common.run_place, left)]
        found = kept.of(absent)
        if found is None:
            weights = np.ones(len(run.rows))
            weights[absent] = 0
            state = retrain(run, model, weights.tolist())
            found = measured_values(run, model, traced.questions, state)
            kept.keep(absent, found)
        values.append(np.array(found))
    return [
        Retraining(rows=plan.rows, question=plan.question, changes=value - values[0])
        for plan, value in zip(plans, values[1:], strict=True)
    ]


def seconds_of_a_retraining(traced: TracedRun, model: nn.Module) -> float:
    """Predicted by some steps that are made."""
    run, seconds = traced.run, []
    for steps in (run.steps[:1], run.steps[: 1 + TIMED_STEPS]):
        start = time.perf_counter()
        retrain(replace(run, steps=steps), model, [1.0] * len(run.rows))
        seconds.append(time.perf_counter() - start)
    made = min(TIMED_STEPS, len(run.steps) - 1)
    a_step = (seconds[1] - seconds[0]) / made if made else seconds[1]
    return max(a_step, 0.0) * len(run.steps)
