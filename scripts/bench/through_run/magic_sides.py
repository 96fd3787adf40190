"""Both systems' training, way back and influences, measured over a plain training."""

import contextlib
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from torch import Tensor

from estimators.run.updates import SMALLEST
from scripts.bench.through_run.bergson_magic import BergsonMagic
from scripts.bench.through_run.costs import Cost, measured
from scripts.bench.through_run.tasks import Task
from service.run.folder import RecordedRun
from service.run.replay import record_without, retrain
from service.tracing.trace import trace_run

PEER = "Bergson's MAGIC"
EXACT = "etymon, exact derivative"
FLOOR = "etymon"
OTHER = ", other attention"
"""After the name of a side of the same training by PyTorch's own attention: what rounding does."""


@dataclass(frozen=True, kw_only=True)
class Side:
    """What one system found, and what it took.

    Attributes:
        influences: of every row on the first question, in nats.
        training: keeping what the way back needs.
        backward: for the first question.
        last: weights after training, by name.
        together: for all questions; None if they were not traced together.
        root_epsilon: inside of the optimizer's root; None of a recorded optimizer.
    """

    influences: Float[np.ndarray, "row"]
    training: Cost
    backward: Cost
    last: Mapping[str, Tensor]
    together: Cost | None = None
    root_epsilon: float | None = None


def both_sides(task: Task, folder: Path) -> tuple[list[float], dict[str, Side]]:
    """Processor time of plain trainings, and each system in some variants.

    All but those of ``OTHER`` attention compute attention as Bergson has it, "eager".

    Args:
        task: whose run is trained again and traced.
        folder: where to work, empty.
    """
    ones = [1.0] * len(task.run.rows)
    trainings = []

    def plain() -> None:
        _attend(task, "eager")
        trainings.append(measured(lambda: retrain(task.run, task.model, ones))[1].seconds)

    plain()  # the first is slower
    plain()
    sides = {PEER: _bergson(task, folder / "bergson", None)}
    plain()
    sides[EXACT] = _etymon(task, folder / "exact", "eager", 0.0)
    sides[FLOOR] = _etymon(task, folder / "floor", "eager", SMALLEST, together=True)
    plain()
    sides[EXACT + OTHER] = _etymon(task, folder / "exact-other", "sdpa", 0.0)
    sides[FLOOR + OTHER] = _etymon(task, folder / "floor-other", "sdpa", SMALLEST)
    sides[f"{PEER}, no epsilon inside the root"] = _bergson(task, folder / "rootless", 0.0)
    plain()
    return trainings[1:], sides


def _attend(task: Task, how: str) -> None:
    model: Any = task.model
    model.set_attn_implementation(how)


def _bergson(task: Task, folder: Path, root_epsilon: float | None) -> Side:
    with contextlib.redirect_stdout(sys.stderr):
        peer = BergsonMagic(task.run, folder, root_epsilon)
        _, training = measured(peer.train)
        last = {name: value.clone() for name, value in peer.weights.items()}
        influences, backward = measured(lambda: peer.influences(task.questions[:1]))
    return Side(
        influences=influences[0],
        training=training,
        backward=backward,
        last=last,
        root_epsilon=peer.root_epsilon,
    )


def _etymon(
    task: Task, folder: Path, attention: str, smallest: float, *, together: bool = False
) -> Side:
    """Record the run again with this attention, and trace that."""
    _attend(task, attention)
    model = task.model
    state, training = measured(lambda: record_without(task.run, model, [], folder / "run"))
    run = RecordedRun.open(folder / "run")
    assert [row.id for row in run.rows] == [row.id for row in task.run.rows]

    def trace(count: int) -> Float[np.ndarray, "question row"]:
        out, asked = folder / f"trace-{count}", task.questions[:count]
        return trace_run(run, model, asked, out, {}, interval=math.inf, smallest=smallest).totals

    influences, backward = measured(lambda: trace(1))
    return Side(
        influences=influences[0],
        training=training,
        backward=backward,
        last=state.parameters,
        together=measured(lambda: trace(len(task.questions)))[1] if together else None,
    )
