"""A trace beside Bergson's MAGIC: one training, one question, the influence of every row."""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import numpy as np
import torch
import typer
from jaxtyping import Float
from rich.table import Table
from scipy import stats
from torch import Tensor

from scripts.bench.build_peers import installed
from scripts.bench.record import write_record
from scripts.bench.through_run.magic_sides import EXACT, OTHER, PEER, Side, both_sides
from scripts.bench.through_run.untied import untied_facts
from scripts.console import one_sentence_errors, print_json, stderr
from service.versions import revision

TOP = 20
TOGETHER = 4
"""Questions of the trace of several."""
DEFINITIONS = {
    "plain_training_seconds": "of the processor; ratios are to their median",
    "training_ratio": "processor time of a training that keeps what the way back needs, over a "
    "plain training of the same batches",
    "backward_ratio": "processor time from the last state to the influences of all rows on one "
    "question, over a plain training",
    "together_ratio": "the same a question, of several traced together",
    "peak_mb": "largest resident memory on the way back for one question, over that before it",
    "pearson, spearman, top20_shared": f"of influences of all rows with those of {PEER} at its "
    "default epsilon inside of the root",
    "rounding": "the same, beside the same trace of the training that computes attention as the "
    "others do",
    "largest_difference": "of an influence from those, over the largest of them",
    "weights_difference": "largest of any weight after training, from the last state "
    "recorded with the same attention as Bergson's",
    "weights_difference_in": "the parameter that has it",
    "weights_distance": "norm of all these differences, over that of what the training changed",
}
FORMS = {
    "pearson": ("Pearson", ".4f"),
    "spearman": ("Spearman", ".4f"),
    "top20_shared": (f"top {TOP} shared", ".2f"),
    "weights_difference": ("weights differ", ".1g"),
    "training_ratio": ("training", ".2f"),
    "backward_ratio": ("way back", ".2f"),
    "together_ratio": (f"of {TOGETHER}", ".2f"),
    "peak_mb": ("MB", ".0f"),
}
"""Columns of the table for people."""

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
@one_sentence_errors
def main(
    out: Annotated[Path, typer.Option(help="Where to work.")] = Path("runs/through-run"),
    rows: Annotated[int, typer.Option(help="Of the fine-tuning, at most.")] = 320,
    record: Annotated[bool, typer.Option(help="Write docs/benchmarks/magic_*.json.")] = True,
) -> None:
    """Trace a question through one training by both systems; the last line is JSON.

    Bergson trains on the recorded batches with its own trainer and optimizer, a model whose head is
    not tied to its embeddings: it would move a tied tensor twice a step. It needs an environment of
    peers, which `python -m scripts.bench.build --help` tells how to make.
    """
    if installed("bergson") is None:
        raise ValueError(
            "bergson is not installed; make an environment of peers as "
            "`python -m scripts.bench.build --help` tells, and run this with its Python."
        )
    task = untied_facts(out, rows, TOGETHER)
    folder = out / "magic"
    shutil.rmtree(folder, ignore_errors=True)
    plain, sides = both_sides(task, folder)
    first = task.run.state(0).parameters
    found = [_row(name, sides, median(plain), first, TOGETHER) for name in sides]
    _show(found)
    document = {
        "task": f"{task.description}; the base model's head is trained apart from its embeddings",
        "train_rows": len(task.run.rows),
        "steps": len(task.run.steps),
        "questions_together": TOGETHER,
        "threads": torch.get_num_threads(),
        "plain_training_seconds": plain,
        "rows": [{**row, "commit": revision()} for row in found],
        "versions": {name: installed(name) for name in ("torch", "bergson", "torchopt")},
        "definitions": DEFINITIONS,
    }
    if record:
        stderr.print(f"Record: {write_record('magic', document)}", highlight=False)
    print_json(document)


def _row(
    name: str, sides: Mapping[str, Side], plain: float, first: Mapping[str, Tensor], together: int
) -> dict[str, Any]:
    side = sides[name]
    row: dict[str, Any] = {
        "system": name,
        "root_epsilon": side.root_epsilon,
        "finite_rows": int(np.isfinite(side.influences).sum()),
    }
    if name != PEER and row["finite_rows"] == len(side.influences):
        row |= _compared(side.influences, sides[PEER].influences)
    if name.endswith(OTHER):
        same = sides[name.removesuffix(OTHER)]
        row["rounding"] = _compared(side.influences, same.influences)
    row |= _weights(side.last, sides[EXACT].last, first)
    row |= {
        "training_ratio": side.training.seconds / plain,
        "backward_ratio": side.backward.seconds / plain,
        "peak_mb": side.backward.peak_mb,
    }
    if side.together is not None:
        row["together_ratio"] = side.together.seconds / together / plain
    return row


def _compared(own: Float[np.ndarray, "row"], others: Float[np.ndarray, "row"]) -> dict[str, float]:
    best, theirs = ({*np.argsort(-values)[:TOP].tolist()} for values in (own, others))
    return {
        "pearson": float(stats.pearsonr(own, others).statistic),
        "spearman": float(stats.spearmanr(own, others).statistic),
        "top20_shared": len(best & theirs) / TOP,
        "largest_difference": float(np.abs(own - others).max() / np.abs(others).max()),
    }


def _weights(
    weights: Mapping[str, Tensor], last: Mapping[str, Tensor], first: Mapping[str, Tensor]
) -> dict[str, Any]:
    """How far weights are from the recorded last ones."""
    largest = {name: float((weights[name] - last[name]).abs().max()) for name in last}
    where = max(largest, key=lambda name: largest[name])
    apart, moved = (
        sum(float((one[name] - last[name]).double().square().sum()) for name in last) ** 0.5
        for one in (weights, first)
    )
    return {
        "weights_difference": largest[where],
        "weights_difference_in": where if largest[where] else None,
        "weights_distance": apart / moved,
    }


def _show(rows: Sequence[Mapping[str, Any]]) -> None:
    title = "Influences beside Bergson's own; times in plain trainings"
    table = Table("system", *(name for name, _ in FORMS.values()), title=title)
    for row in rows:
        told = [(row.get(key), form) for key, (_, form) in FORMS.items()]
        cells = ["" if value is None else format(value, form) for value, form in told]
        table.add_row(row["system"], *cells)
    stderr.print(table)


if __name__ == "__main__":
    app()
