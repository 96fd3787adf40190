"""Seconds and peak memory of work on a device."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

from scripts.bench.passes import synchronise

Row = dict[str, Any]
Report = Callable[[Row], None]
"""Takes a row as soon as it is measured."""


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """What some work took.

    Attributes:
        seconds: median.
        peak_bytes: most memory that PyTorch held on the device at once; None on a CPU.
    """

    seconds: float
    peak_bytes: int | None

    def over(self, floor: "Measurement") -> Row:
        """Both, and their ratio, as part of a row."""
        return {
            "seconds": round(self.seconds, 5),
            "floor_seconds": round(floor.seconds, 5),
            "ratio": round(self.seconds / floor.seconds, 3),
            "peak_device_bytes": self.peak_bytes,
            "floor_peak_device_bytes": floor.peak_bytes,
        }


def measure(
    device: torch.device, action: Callable[[], object], repeats: int, *, warm: bool = True
) -> Measurement:
    """Median seconds of ``repeats`` runs, after one more that is not timed if ``warm``."""
    if warm:
        action()
    forget_peak(device)
    seconds = []
    for _ in range(repeats):
        synchronise(device)
        start = time.perf_counter()
        action()
        synchronise(device)
        seconds.append(time.perf_counter() - start)
    return Measurement(seconds=median(seconds), peak_bytes=peak(device))


def forget_peak(device: torch.device) -> None:
    """Begin to watch the device's memory anew."""
    if device.type == "cuda":
        torch.cuda.init()  # type: ignore[no-untyped-call]  # there are no statistics before
        torch.cuda.reset_peak_memory_stats(device)


def peak(device: torch.device) -> int | None:
    """Most memory that PyTorch held on the device since then; None on a CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
