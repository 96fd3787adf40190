"""Processor time and memory of a piece of work."""

import ctypes
import gc
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

Found = TypeVar("Found")

PROCESS = Path("/proc/self")


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a piece of work took.

    Attributes:
        seconds: of the processor, all threads together.
        peak_mb: largest resident memory meanwhile, over that before; None where Linux does not
            tell.
    """

    seconds: float
    peak_mb: float | None


def measured(work: Callable[[], Found]) -> tuple[Found, Cost]:
    """What ``work`` gives, and its cost."""
    gc.collect()
    linux = sys.platform == "linux"
    before = _reset_peak() if linux else 0.0
    start = time.process_time()
    found = work()
    seconds = time.process_time() - start
    return found, Cost(seconds=seconds, peak_mb=_resident_mb("VmHWM") - before if linux else None)


def _reset_peak() -> float:
    """Give freed memory back, and begin to watch the largest anew; what is resident, in MB."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # of glibc
    if trim is not None:
        trim(0)
    (PROCESS / "clear_refs").write_text("5")
    return _resident_mb("VmRSS")


def _resident_mb(kind: str) -> float:
    lines = (PROCESS / "status").read_text().splitlines()
    (line,) = [line for line in lines if line.startswith(f"{kind}:")]
    return int(line.split()[1]) / 1024
