"""Fit, build and rescoring over plain passes of the same batches."""

import math
import time
from collections.abc import Callable, Iterable

import torch

from estimators.curvature.fitting import fit_estimator
from estimators.model.gradients import Gradients
from estimators.model.layers import find_layers
from estimators.model.selection import LayerSelection
from estimators.operators.ekfac import EKFac
from estimators.operators.identity import Identity
from estimators.rescoring import query_gradients, score_batch_for_queries
from estimators.sketching.sketch import SketchPlan
from estimators.sketching.slices import SketchSlices
from index.codes.vectors import make_index
from scripts.bench.gpu.measuring import Measurement, Report, forget_peak, measure, peak
from scripts.bench.gpu.sizes import Sizes, timed_problem
from scripts.bench.passes import Problem, forward, plain, rescore, synchronise
from service.indexing.encoding import encode_gradients

DAMPING = 0.1
SLICES = 16
TOGETHER = 8
"""Queries that are scored by the same passes."""


def fit(name: str, sizes: Sizes, device: torch.device, report: Report) -> None:
    """EK-FAC factors of all layers: two passes, and the decompositions between them; one query.

    One layer is fitted beforehand, so that libraries are loaded.
    """
    problem = timed_problem(name, sizes, device)
    selection = LayerSelection(widest=sizes.widest.get(name))
    layers = find_layers(problem.model, selection).layers
    floor = measure(device, lambda: plain(problem), sizes.repeats)
    fit_estimator("ekfac", problem.model, layers[:1], problem.sequences[:1])
    common = {"part": "fit", **_facts(problem), "layers": len(layers), "widest": selection.widest}
    stages = _Stages(device)
    forget_peak(device)

    def progress(stage: str, batches: Iterable[object]) -> Iterable[object]:
        """Rows of the stage before this one, which is timed by itself, and of this one."""
        if stage == "eigenvalues":
            report({**common, "what": "decompositions", **stages.end().over(floor)})
        yield from batches
        report({**common, "what": f"{stage}, a pass", **stages.end().over(floor)})

    fitted = fit_estimator(
        "ekfac",
        problem.model,
        layers,
        problem.sequences,
        token_budget=problem.budget,
        progress=progress,
    )
    report({**common, "what": "the fit", **stages.whole().over(floor)})
    gradients, _ = query_gradients(problem.model, layers, problem.sequences[:1])
    operator = EKFac(fitted.tensors())
    found = measure(device, lambda: operator.precondition(gradients, DAMPING), sizes.repeats)
    report({**common, "what": "a query's direction", **found.over(floor)})


class _Stages:
    """Times of consecutive stages."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._start = self._first = self._now()

    def _now(self) -> float:
        synchronise(self._device)
        return time.perf_counter()

    def end(self) -> Measurement:
        """Since the end of the stage before; the peak since the beginning."""
        before, self._start = self._start, self._now()
        return Measurement(seconds=self._start - before, peak_bytes=peak(self._device))

    def whole(self) -> Measurement:
        """Since the beginning."""
        return Measurement(seconds=self._now() - self._first, peak_bytes=peak(self._device))


def build(name: str, sizes: Sizes, device: torch.device, report: Report) -> None:
    """The sketch of every gradient; the same with its code, which the host makes.

    Without curvature: every whitening folds into matrices of the same shapes.
    """
    problem = timed_problem(name, sizes, device)
    layers = find_layers(problem.model).layers
    plan = SketchPlan(
        seed=0, dimensions=sizes.dimensions, rank=max(1, math.isqrt(sizes.dimensions) // 2)
    )
    slices = SketchSlices(layers, Identity().whitening(layers, DAMPING), plan, SLICES)
    index = make_index("one-bit", sizes.dimensions)

    def sketches() -> None:
        for positions in problem.batches:
            slices.first.training(problem.model, problem.batch(positions))

    def codes(count: int) -> None:
        some = slices.up_to(count)
        encode_gradients(problem.model, some, index, problem.sequences, problem.budget)

    floor = measure(device, lambda: plain(problem), sizes.repeats)
    common = {"part": "build", **_facts(problem), "layers": len(layers)}
    actions: dict[str, Callable[[], None]] = {
        "sketches": sketches,
        "sketches and codes": lambda: codes(1),
        f"{SLICES} slices": lambda: codes(SLICES),
    }
    for what, action in actions.items():
        found = measure(device, action, sizes.repeats)
        report({**common, "what": what, **found.over(floor)})


def rescoring(name: str, sizes: Sizes, device: torch.device, report: Report) -> None:
    """Exact scores of all sequences, for one query and for several at once."""
    problem = timed_problem(name, sizes, device)
    layers = find_layers(problem.model).layers
    floor = measure(device, lambda: forward(problem), sizes.repeats)
    common = {"part": "rescoring", **_facts(problem), "layers": len(layers)}
    one = measure(device, rescore(problem), sizes.repeats)
    report({**common, "queries": 1, **one.over(floor)})
    together = min(TOGETHER, len(problem.sequences))
    directions: Gradients = query_gradients(problem.model, layers, problem.sequences[:together])[0]

    def several() -> None:
        for positions in problem.batches:
            score_batch_for_queries(problem.model, layers, directions, problem.batch(positions))

    found = measure(device, several, sizes.repeats)
    report({**common, "queries": together, **found.over(floor)})


def _facts(problem: Problem) -> dict[str, object]:
    parameters = sum(p.numel() for p in problem.model.parameters())
    length = len(problem.sequences[0].tokens)
    return {
        "model": problem.name,
        "parameters": parameters,
        "sequences": len(problem.sequences),
        "length": length,
        "token_budget": problem.budget,
    }
