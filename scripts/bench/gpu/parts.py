"""The parts, the most important first, and how long each may take."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from scripts.bench.gpu.agreement import agreement
from scripts.bench.gpu.gradients import build, fit, rescoring
from scripts.bench.gpu.measuring import Report
from scripts.bench.gpu.scan import scan
from scripts.bench.gpu.sizes import Sizes


@dataclass(frozen=True, kw_only=True)
class Part:
    """A part of the measurement.

    Attributes:
        run: measures and reports.
        seconds: that it may take at most.
    """

    run: Callable[[Sizes, torch.device, Report], None]
    seconds: float


PARTS = {
    "agreement": Part(run=agreement, seconds=45),
    "scan": Part(run=partial(scan, kernel=True), seconds=80),
    "build llama-135m": Part(run=partial(build, "llama-135m"), seconds=45),
    "rescoring llama-135m": Part(run=partial(rescoring, "llama-135m"), seconds=45),
    "fit llama-135m": Part(run=partial(fit, "llama-135m"), seconds=80),
    "build llama-1b": Part(run=partial(build, "llama-1b"), seconds=60),
    "rescoring llama-1b": Part(run=partial(rescoring, "llama-1b"), seconds=60),
    "fit llama-1b": Part(run=partial(fit, "llama-1b"), seconds=240),
    "scan without kernel": Part(run=partial(scan, kernel=False), seconds=80),
}
"""All limits together exceed the time that there is: the last parts take what is left."""
