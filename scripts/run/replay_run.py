"""Make a recorded training run again: as it was, or with other weights of its rows."""

import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from estimators.storage import fingerprint_tensors
from scripts.console import one_sentence_errors, print_json, print_plain, show_logs, show_progress
from service.checkpoints import ModelSource, UnusableModel, read_tokenizer
from service.run.folder import RecordedRun
from service.run.loading import load_first_model
from service.run.replay import Comparison, record_without, replay, retrain
from service.run.weights import read_weights

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
@one_sentence_errors
def main(
    run: Annotated[Path, typer.Argument(help="Folder of the recorded run.")],
    weights: Annotated[
        Path | None,
        typer.Option(
            help='JSON lines {"id": ..., "weight": ...} or {"row": ..., "weight": ...}: train with '
            "these weights of the rows' losses, 1 for rows not named."
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="Folder or name of the model before training (of an adapter, its base model), "
            "where it no longer lies where the run says; NAME@REVISION for a state of a repository."
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for the model as it is after the last step.")
    ] = None,
    record: Annotated[
        Path | None,
        typer.Option(
            help="With --weights that are 0 or 1: folder for the record of this training, which is "
            "a run without the rows of weight 0."
        ),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(help="Where to compute, e.g. cpu or cuda; where it was by default."),
    ] = None,
) -> None:
    r"""Make a recorded run again and compare it with every state that was kept.

    With --weights it is a retraining: a row of weight 0 is left out, but
    keeps its place in batches. With --record too, that training can be traced
    in its turn, e.g. to learn which of the rows left out it should have read.

    Example:
    etymon replay runs/mine/run --weights without.jsonl --out runs/mine/without
    """
    show_logs()
    start = time.perf_counter()
    recorded = RecordedRun.open(run)
    chosen = None if weights is None else read_weights(weights, recorded.rows)
    left_out = None if record is None else _left_out(chosen)
    source = recorded.model if model is None else ModelSource.of(model)
    loaded: Any = load_first_model(recorded, source, device=device)
    comparison = None
    if chosen is None:
        state, comparison = replay(recorded, loaded, show_progress)
        _show(comparison, recorded)
    elif record is not None and left_out is not None:
        state = record_without(recorded, loaded, left_out, record, show_progress)
    else:
        state = retrain(recorded, loaded, chosen, show_progress)
    if out is not None:
        _save(loaded, source, out)
    print_json(
        {
            "run": str(run),
            "steps": state.step,
            "rows": len(recorded.rows),
            **_weighted(chosen),
            **_compared(comparison),
            "trained_sha256": fingerprint_tensors(state.parameters),
            "out": out and str(out),
            "record": record and str(record),
            "seconds": time.perf_counter() - start,
        }
    )


def _left_out(weights: Sequence[float] | None) -> list[int]:
    if weights is None or not set(weights) <= {0.0, 1.0}:
        raise ValueError(
            "--record needs --weights that are 0 or 1: a record holds the rows that were read, not "
            "how much they weighed."
        )
    return [row for row, weight in enumerate(weights) if weight == 0.0]


def _show(comparison: Comparison, run: RecordedRun) -> None:
    if comparison.first_difference is None:
        print_plain(f"identical, bit for bit, in all {comparison.states} states")
    else:
        print_plain(
            f"differs from step {comparison.first_difference} of {len(run.steps)} on, by "
            f"{comparison.largest_difference:.2g} of a tensor's largest number at most"
        )


def _compared(comparison: Comparison | None) -> dict[str, Any]:
    if comparison is None:
        return {"identical": None}
    return {"identical": comparison.first_difference is None, **asdict(comparison)}


def _weighted(weights: Sequence[float] | None) -> dict[str, int]:
    changed = [weight for weight in weights or () if weight != 1.0]
    return {"reweighted_rows": len(changed), "left_out_rows": changed.count(0.0)}


def _save(model: Any, source: ModelSource | None, out: Path) -> None:
    """The model in Hugging Face's format, with the tokenizer if there is one."""
    model.save_pretrained(out)
    if source is None:
        return
    try:
        read_tokenizer(source, trust_remote_code=False).save_pretrained(out)
    except UnusableModel as error:
        print_plain(f"no tokenizer is saved with it: {error}")


if __name__ == "__main__":
    app()
