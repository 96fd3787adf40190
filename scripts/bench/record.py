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


def hardware(device: str = "cuda") -> str:
    """A short name of this machine's hardware: the GPU's, or the number of processor cores.

    Args:
        device: "cpu" if a GPU, where there is one, had no part in it.
    """
    if device != "cpu" and torch.cuda.is_available():
        return torch.cuda.get_device_name().lower().replace(" ", "-")
    return f"cpu{os.cpu_count()}"


def record_path(name: str, folder: Path = FOLDER, machine: str | None = None) -> Path:
    """Where today's record of a benchmark is, or would be."""
    today = datetime.datetime.now(datetime.UTC)
    return folder / f"{name}_{machine or hardware()}_{today:%Y%m%d}.json"


def write_record(
    name: str,
    document: dict[str, Any],
    *,
    merge: bool = False,
    folder: Path = FOLDER,
    machine: str | None = None,
) -> Path:
    """Write ``docs/benchmarks/<name>_<hardware>_<yyyymmdd>.json``; returns its path.

    Args:
        name: of the benchmark.
        document: what was measured.
        merge: keep what a record of the same day holds besides, each part with its commit.
        folder: another than docs/benchmarks.
        machine: its hardware's name; found out if None.
    """
    now = datetime.datetime.now(datetime.UTC)
    path = record_path(name, folder, machine)
    if merge and path.is_file():
        kept = json.loads(path.read_text())
        commits = {**kept.get("commits", {}), **document.get("commits", {})}
        document = {**kept, **document, "commits": commits}
    facts = {"commit": revision(), "date": now.isoformat(timespec="seconds")}
    facts_of_machine = {
        "processor": platform.machine(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
    }
    whole = {**document, **facts, "machine": facts_of_machine}
    write_whole(path, json.dumps(whole, indent=1).encode())
    return path
