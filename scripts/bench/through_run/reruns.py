"""Runs made again without some of their rows, in several processes; kept as they are made."""

import json
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float

from scripts.bench.through_run.tasks import SEED, Task
from scripts.console import show_progress
from service.run.folder import RecordedRun
from service.run.loading import load_first_model
from service.run.replay import retrain
from service.tracing.trace import measured_values
from service.tracing.walk import Question

SHARES = (0.05, 0.5)
"""Of the rows that a repeated run leaves out."""

_worker: dict[str, Any] = {}


def _begin(folder: Path, questions: list[Question]) -> None:
    torch.set_num_threads(1)
    run = RecordedRun.open(folder)
    _worker.update(run=run, model=load_first_model(run), questions=questions)


def _values_without(left: Sequence[int]) -> list[float]:
    run, model = _worker["run"], _worker["model"]
    weights = [1.0] * len(run.rows)
    for row in left:
        weights[row] = 0.0
    return measured_values(run, model, _worker["questions"], retrain(run, model, weights))


class Reruns:
    """Values of all questions after the run without some rows.

    Args:
        task: whose run is repeated.
        path: JSON lines of what was measured; what is there is not measured again.
    """

    def __init__(self, task: Task, path: Path) -> None:
        self._task, self._path = task, path
        self._known: dict[tuple[int, ...], list[float]] = {}
        if path.is_file():
            for line in path.read_text().splitlines():
                item = json.loads(line)
                self._known[tuple(item["left_out"])] = item["values"]

    def without(
        self, sets: Sequence[Sequence[int]], what: str
    ) -> Float[np.ndarray, "set question"]:
        """F of each question after the run without each of the sets."""
        keys = [tuple(sorted(map(int, one))) for one in sets]
        todo = [key for key in dict.fromkeys(keys) if key not in self._known]
        if todo:
            given = (self._task.run.folder, self._task.questions)
            with (
                ProcessPoolExecutor(os.cpu_count(), get_context("spawn"), _begin, given) as pool,
                self._path.open("a") as file,
            ):
                found = pool.map(_values_without, todo)
                for key in show_progress(what, todo):
                    values = next(found)
                    self._known[key] = values
                    file.write(json.dumps({"left_out": key, "values": values}) + "\n")
                    file.flush()
        return np.array([self._known[key] for key in keys])

    def changes(
        self, sets: Sequence[Sequence[int]], what: str
    ) -> Float[np.ndarray, "set question"]:
        """Measured value without each set, less that of the whole run."""
        whole = self.without([()], "the whole run")
        found: np.ndarray = self.without(sets, what) - whole
        return found

    def random(self, share: float, count: int) -> list[list[int]]:
        """Random sets of a share of the rows."""
        generator = np.random.default_rng([SEED, round(1000 * share)])
        rows = len(self._task.run.rows)
        return [generator.permutation(rows)[: round(share * rows)].tolist() for _ in range(count)]


def removals(
    reruns: Reruns,
    scores: Mapping[str, Float[np.ndarray, "question row"]],
    questions: int,
    top: int,
) -> dict[str, list[float]]:
    """Change of each of the first questions when its own top rows are left out, by estimator."""
    sets = {
        name: [np.argsort(-values[q], kind="stable")[:top].tolist() for q in range(questions)]
        for name, values in scores.items()
    }
    found = {}
    for name, own in sets.items():
        changes = reruns.changes(own, f"runs without the top {top}: {name}")
        found[name] = [float(changes[q, q]) for q in range(questions)]
    return found
