"""What tracing questions through a run will take: time and memory."""

import resource
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from estimators.run.adjoint import final_adjoint, step_back
from estimators.run.direction import DirectionPlan, StepBack, direction_back, segment_count
from estimators.run.passes import advance, trainable
from estimators.run.recorded import State
from service.run.folder import RecordedRun
from service.run.optimizers import named_parameters
from service.tracing.walk import Question, check_precision, on_device


def segments_of(run: RecordedRun, plan: DirectionPlan) -> int:
    """How many segments the run is parted into."""
    return plan.segments or segment_count(run.rows, run.steps)


@dataclass(frozen=True, kw_only=True)
class TracePrice:
    """What a trace will take, by one step in the middle of the run.

    Attributes:
        seconds: of the whole trace, without loading the model.
        trainings_a_question: its part for each question, in trainings of the run.
        peak_mb: largest memory of the process, or of the device where that computes.
        training_peak_mb: the same for the run's own steps.
    """

    seconds: float
    trainings_a_question: float
    peak_mb: float
    training_peak_mb: float


def predict_trace(
    run: RecordedRun,
    model: nn.Module,
    questions: Sequence[Question],
    plan: DirectionPlan | None = None,
) -> TracePrice:
    """Measure one step forward and backward, and count it for all; nothing is written.

    Args:
        run: recorded.
        model: the run's.
        questions: to be traced together.
        plan: of directions; None prices the influence of every row.
    """
    check_precision(run)
    with trainable(model, run.recipe, named_parameters(model)) as parameters:
        device = next(iter(parameters.values())).device
        ones = torch.ones(len(run.rows)).to(next(iter(parameters.values())))
        number = max(s for s in run.state_steps if s <= len(run.steps) // 2)
        number = min(number, len(run.steps) - 1)
        before, step = on_device(run.state(number), device), run.steps[number]
        given = (model, parameters, run.recipe, run.rows, step, before)
        after = advance(*given, ones)  # the first pass is slower
        start = time.perf_counter()
        advance(*given, ones)
        forward = time.perf_counter() - start
        training_peak = _peak_mb(device)
        adjoints = [final_adjoint(model, parameters, before, one)[0] for one in questions]
        start = time.perf_counter()
        if plan is None:
            step_back(*given, adjoints)
        else:
            how = StepBack(
                model=model, parameters=parameters, recipe=run.recipe, rows=run.rows,
                curvature=plan.curvature, seed=plan.seed,
            )  # fmt: skip
            direction_back(how, step, before, after, [one.parameters for one in adjoints])
        backward = time.perf_counter() - start
    gaps = zip(run.state_steps, run.state_steps[1:], strict=False)
    held = max(later - earlier for earlier, later in gaps) - 1  # states between two that were kept
    more = held * _megabytes(after)
    if plan is not None:
        sums = segments_of(run, plan) * len(questions)
        more += sums * _megabytes(State(step=0, parameters=adjoints[0].parameters, moments={}))
    return TracePrice(
        seconds=len(run.steps) * (forward + backward),
        trainings_a_question=(forward + backward) / forward / len(questions),
        peak_mb=_peak_mb(device) + more,
        training_peak_mb=training_peak,
    )


def _megabytes(state: State) -> float:
    tensors: list[Tensor] = list(state.parameters.values())
    tensors += [value for moments in state.moments.values() for value in moments.values()]
    return sum(value.numel() * value.element_size() for value in tensors) / 2**20


def _peak_mb(device: torch.device) -> float:
    """Of the device if it has memory of its own, else of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)
