"""Dated benchmark records under docs/benchmarks/."""

import datetime
import json
import os
import platform
from pathlib import Path
from typing import Any

import torch

from index.files import write_whole
from service.versions import revision

FOLDER = Path(__file__).parents[2] / "docs" / "benchmarks"


def hardware() -> str:
    """A short name of this machine's hardware: the GPU's, or the number of processor cores."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name().lower().replace(" ", "-")
    return f"cpu{os.cpu_count()}"


def record_path(name: str) -> Path:
    """Where today's record of a benchmark is, or would be."""
    return FOLDER / f"{name}_{hardware()}_{datetime.datetime.now(datetime.UTC):%Y%m%d}.json"


def write_record(name: str, document: dict[str, Any], *, merge: bool = False) -> Path:
    """Write ``docs/benchmarks/<name>_<hardware>_<yyyymmdd>.json``; returns its path.

    Args:
        name: of the benchmark.
        document: what was measured.
        merge: keep what a record of the same day holds besides, each part with its commit.
    """
    now = datetime.datetime.now(datetime.UTC)
    path = record_path(name)
    if merge and path.is_file():
        kept = json.loads(path.read_text())
        commits = {**kept.get("commits", {}), **document.get("commits", {})}
        document = {**kept, **document, "commits": commits}
    facts = {"commit": revision(), "date": now.isoformat(timespec="seconds")}
    machine = {
        "processor": platform.machine(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
    }
    whole = {**document, **facts, "machine": machine}
    write_whole(path, json.dumps(whole, indent=1).encode())
    return path
