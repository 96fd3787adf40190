"""Which rows should a run have read besides? Chosen by each estimator, added, the run repeated."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import cast

import numpy as np
from jaxtyping import Float
from transformers import AutoTokenizer, PreTrainedModel

from estimators.run.direction import DirectionPlan
from estimators.run.recorded import Row
from estimators.scorers.bm25 import BM25
from scripts.bench.through_run.reruns import Reruns
from scripts.bench.through_run.scores import at_the_end, met
from scripts.bench.through_run.tasks import SEED, Task
from scripts.console import show_progress
from service.run.folder import RecordedRun
from service.run.replay import record_without
from service.tracing.directions import trace_directions

DAMPING = 0.1


def additions(
    task: Task, out: Path, known: Reruns, questions: int, top: int
) -> dict[str, list[float]]:
    """Change of each of the first questions when its best rows are added, by estimator.

    A random half of the rows is left out; every estimator sees the run without them and chooses
    among them.

    Args:
        task: whose run is repeated.
        out: where to work.
        known: runs repeated before.
        questions: how many.
        top: rows added.
    """
    left = sorted(known.random(0.5, 1)[0])
    task = replace(task, questions=task.questions[:questions])
    scores = _scores(_half(task, out, left), [task.run.rows[row] for row in left], out)
    base = known.without([left], "runs without half of the rows")[0]
    found = {}
    for name, values in scores.items():
        best = np.argsort(-values, axis=1, kind="stable")[:, :top]
        sets = [sorted({*left} - {left[place] for place in chosen}) for chosen in best]
        after = known.without(sets, f"runs with {top} rows added: {name}")
        found[name] = [float(after[q, q] - base[q]) for q in range(questions)]
    return found


def _half(task: Task, out: Path, left: Sequence[int]) -> Task:
    """The same fine-tuning without some rows, recorded."""
    folder, tuned = out / "run", out / "tuned"
    if not tuned.is_dir():
        record_without(task.run, task.model, left, folder, show_progress)
        cast(PreTrainedModel, task.model).save_pretrained(tuned)
        AutoTokenizer.from_pretrained(task.tuned).save_pretrained(tuned)
    return replace(task, run=RecordedRun.open(folder), tuned=tuned)


def _scores(
    half: Task, rows: Sequence[Row], out: Path
) -> dict[str, Float[np.ndarray, "question row"]]:
    """Of rows that the run did not read."""
    plan = DirectionPlan()
    found = trace_directions(
        half.run, half.model, half.questions, out / "directions", {}, plan, show_progress
    )
    parts = [found.segments(question) for question in range(len(half.questions))]
    every = met(half, rows, parts)[0]
    chosen = {"one direction": every.sum(1)}
    chosen |= {name: one.values for name, one in at_the_end(half, rows, [DAMPING]).items()}
    words = AutoTokenizer.from_pretrained(half.tuned)
    lexical = BM25(lambda: [words.decode(row.tokens) for row in rows])
    asked = [words.decode(question[0][0].tokens) for question in half.questions]
    chosen["BM25"] = np.stack([lexical.scores(text) for text in asked])
    chosen["random rows"] = np.random.default_rng(SEED).random(chosen["BM25"].shape)
    return chosen
