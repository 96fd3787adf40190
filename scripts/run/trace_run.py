"""Trace questions through a recorded run: what each row did to what the model says."""

import csv
import io
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.table import Table
from rich.text import Text

from estimators.run.direction import DirectionPlan, segment_count
from estimators.run.updates import SMALLEST
from index.files import read_sealed, write_whole
from scripts.console import one_sentence_errors, print_json, print_plain, show_logs, show_progress
from scripts.console import stderr as screen
from scripts.texts import printable
from service.checkpoints import ModelSource, read_tokenizer
from service.models import BadQuery, context_of
from service.run.errors import RunMismatch
from service.run.folder import RecordedRun
from service.run.loading import load_first_model
from service.run.replay import retrain
from service.tracing.basis import trace_by_basis
from service.tracing.directions import RunDirections, trace_directions
from service.tracing.price import TracePrice, predict_trace
from service.tracing.questions import AskedQuestion, read_questions
from service.tracing.trace import MANIFEST, Trace, measured_values, trace_run

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
GROWING = 100.0
"""Times the norm at the end: an adjoint that grows so much says that the run is not smooth."""


@app.command()
@one_sentence_errors
def main(
    run: Annotated[Path, typer.Argument(help="Folder of the recorded run.")],
    questions: Annotated[
        Path,
        typer.Argument(help="JSONL with 'prompt', 'completion' and, for a contrast, 'against'."),
    ],
    out: Annotated[Path, typer.Option(help="Folder for the influences.")],
    k: Annotated[int, typer.Option(min=1, help="Rows to print a question and direction.")] = 5,
    check: Annotated[
        int,
        typer.Option(
            min=0,
            help="Repeat the run so often without a random 5 % of its rows, and print what was "
            "predicted beside what was measured.",
        ),
    ] = 0,
    model: Annotated[
        str | None,
        typer.Option(
            help="Folder or name of the model before training, where it no longer lies where the "
            "run says."
        ),
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="Folder or name of the tokenizer, where the model has none.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="Where to compute, e.g. cpu or cuda.")] = None,
    seed: Annotated[int, typer.Option(help="Of the rows that --check leaves out.")] = 0,
    epochs: Annotated[
        bool, typer.Option("--epochs", help="Also print what each epoch's readings of a row did.")
    ] = False,
    tokens: Annotated[
        bool,
        typer.Option(
            "--tokens", help="Also keep the part of each token of the rows, and print the largest."
        ),
    ] = False,
    readings: Annotated[
        Path | None,
        typer.Option(help="CSV for the influence of every reading: question, step, row, nats."),
    ] = None,
    rank: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="For many questions of a kind: trace only so many directions that their gradients "
            "have in common, at the price of so many questions, and say what they leave out.",
        ),
    ] = None,
    direction: Annotated[
        bool,
        typer.Option(
            "--direction",
            help="Score no row; keep the run's direction for each question, with which the "
            "estimator run-direction ranks any rows, read or not. Cheaper.",
        ),
    ] = False,
    exact: Annotated[
        bool,
        typer.Option(
            "--exact",
            help="Second moments next to nothing as they are: the derivative at weight 1, which "
            "predicts small changes of weights exactly, and leaving rows out less well. With "
            "--direction: the whole Hessian of every batch, not the Gauss-Newton matrix of a "
            "random half.",
        ),
    ] = False,
    checkpoint_seconds: Annotated[
        float, typer.Option(min=0, help="Least time between two records of how far it is.")
    ] = 60.0,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only predict time and memory; write nothing.")
    ] = False,
) -> None:
    r"""Differentiate backward through all steps of a run: the influence of every row.

    Influences are in nats of what is asked: leaving a row out of the run
    changes it by minus that, to first order. An interrupted trace goes on
    if the command is repeated.

    Example:
    etymon trace runs/mine/run questions.jsonl --out runs/mine/trace --check 2
    """
    show_logs()
    start = time.perf_counter()
    scored = {"--check": check > 0, "--epochs": epochs, "--tokens": tokens}
    scored |= {"--readings": readings is not None, "--rank": rank is not None}
    _check_together(scored, direction=direction)
    recorded = RecordedRun.open(run)
    asked = read_questions(questions)
    source = recorded.model if model is None else ModelSource.of(model)
    if source is None:
        raise RunMismatch("The run does not name its model; give it with --model.")
    if tokenizer is not None:
        source = ModelSource.of(source.title, tokenizer=tokenizer)
    words = read_tokenizer(source, trust_remote_code=False)
    loaded: Any = load_first_model(recorded, source, device=device)
    encoded = [one.encode(words, context_of(loaded, words)) for one in asked]
    plan = DirectionPlan(curvature="hessian" if exact else "gauss-newton") if direction else None
    if dry_run:
        price = predict_trace(recorded, loaded, encoded[:rank], plan)
        shared = len(encoded[:rank]) / len(encoded)
        price = replace(price, trainings_a_question=shared * price.trainings_a_question)
        _show_price(price, len(encoded))
        return
    about = {"asked": [asdict(one) for one in asked]}
    if plan is not None:
        kept = trace_directions(
            recorded,
            loaded,
            encoded,
            out,
            about,
            plan,
            show_progress,
            checkpoint_seconds,
            source=source,
        )
        _report_directions(kept, out, start)
        return
    work = trace_run if rank is None else partial(trace_by_basis, rank=rank)
    found = work(
        recorded,
        loaded,
        encoded,
        out,
        about,
        show_progress,
        checkpoint_seconds,
        by_token=tokens,
        smallest=0.0 if exact else SMALLEST,
        source=source,
    )
    for number, one in enumerate(asked):
        _show(one, found, number, recorded, words, k, epochs=epochs)
    _warn_of_growth(found.norms.tolist())
    left_out = {} if rank is None else _told_left_out(out)
    if readings is not None:
        _write_readings(readings, found, recorded)
    checked = _checked(recorded, loaded, encoded, found, check, seed) if check else None
    print_json(
        {
            "out": str(out),
            "questions": len(asked),
            "rows": found.count,
            "steps": len(recorded.steps),
            "values": found.values,
            "adjoint_norms": [[norms[-1], norms[0]] for norms in found.norms.tolist()],
            **left_out,
            "check": checked,
            "seconds": time.perf_counter() - start,
        }
    )


def _check_together(given: Mapping[str, bool], *, direction: bool) -> None:
    """Refuse options that would be left out in silence."""
    useless = [name for name, value in given.items() if value]
    if direction and useless:
        raise BadQuery(
            f"{' and '.join(useless)} need the influence of rows, and --direction scores none; "
            f"leave one of them out, or trace twice into the same folder."
        )


def _report_directions(found: RunDirections, out: Path, start: float) -> None:
    _warn_of_growth(found.norms)
    print_json(
        {
            "out": str(out),
            "questions": len(found.values),
            "segments": len(found.weights),
            "values": found.values,
            "adjoint_norms": [[norms[-1], norms[0]] for norms in found.norms],
            "seconds": time.perf_counter() - start,
        }
    )


def _show_price(price: TracePrice, questions: int) -> None:
    print_plain(
        f"Tracing {questions} questions will take about {price.seconds / 60:,.1f} minutes, "
        f"{price.trainings_a_question:.1f} trainings each, and {price.peak_mb:,.0f} MB of memory "
        f"at most ({price.training_peak_mb:,.0f} for the run's own steps)."
    )
    print_json(asdict(price))


def _show(
    asked: AskedQuestion,
    found: Trace,
    number: int,
    run: RecordedRun,
    words: Any,
    k: int,
    *,
    epochs: bool,
) -> None:
    parts = found.by_segment(segment_count(run.rows, run.steps))[number]
    totals = parts.sum(0)
    against = "" if asked.against is None else f" rather than '{printable(asked.against)}'"
    print_plain(
        f"\n{printable(asked.prompt)} |{printable(asked.completion)}{against}   "
        f"{found.values[number]:+.3f} nats"
    )
    table = Table(box=None, pad_edge=False, padding=(0, 1))
    more = [f"epoch {n}" for n in range(1, len(parts) + 1)] if epochs else []
    for heading in ("influence, nats", *more, "row", "text"):
        table.add_column(heading, justify="right" if heading != "text" else "left")
    order = np.argsort(-totals, kind="stable")
    for row in [*order[:k], *order[::-1][:k][::-1]]:
        own = [f"{value:+.4f}" for value in parts[:, row]] if epochs else []
        text = printable(words.decode(run.rows[row].tokens))[:300]
        table.add_row(f"{totals[row]:+.4f}", *own, run.rows[row].id[:16], Text(text))
        if found.tokens is not None:
            table.add_row(
                "", *[""] * len(own), "", Text(_largest_tokens(found, number, row, run, words))
            )
    screen.print(table)


def _largest_tokens(
    found: Trace, number: int, row: int, run: RecordedRun, words: Any, count: int = 5
) -> str:
    """The tokens of a row that carry most of its influence, as what is predicted."""
    assert found.tokens is not None
    start = sum(len(one.tokens) for one in run.rows[:row])
    tokens = run.rows[row].tokens
    values = found.tokens[number, start : start + len(tokens)]
    order = np.argsort(-np.abs(values), kind="stable")[:count]
    return "  ".join(f"{printable(words.decode([tokens[i]]))} {values[i]:+.4f}" for i in order)


def _write_readings(path: Path, found: Trace, run: RecordedRun) -> None:
    lines = io.StringIO()
    table = csv.writer(lines)
    table.writerow(["question", "step", "row", "nats"])
    for question, influences in enumerate(found.influences.tolist(), start=1):
        for step, row, value in zip(found.steps, found.rows, influences, strict=True):
            table.writerow([question, int(step) + 1, run.rows[row].id, value])
    write_whole(path, lines.getvalue().encode())
    print_plain(f"The influence of every reading is in {path}.")


def _told_left_out(out: Path) -> dict[str, Any]:
    """What the directions leave out of each question."""
    manifest = read_sealed(out / MANIFEST, "trace the run again")
    found = {key: manifest[key] for key in ("rank", "left_out", "left_out_nats")}
    parts, worth = np.array(found["left_out"]), np.array(found["left_out_nats"])
    print_plain(
        f"\nDirections traced: {found['rank']}. They leave out {np.median(parts):.0%} of the norm "
        f"of a question's gradient in the median, {parts.max():.0%} at most; if that does as much "
        f"as the directions do, it is {np.median(worth):.2g} and {worth.max():.2g} nats a row."
    )
    return found


def _warn_of_growth(adjoints: Sequence[Sequence[float]]) -> None:
    for number, norms in enumerate(adjoints):
        if not norms[0] <= GROWING * norms[-1]:
            print_plain(
                f"warning: the adjoint of question {number + 1} grew {norms[0] / norms[-1]:,.0f} "
                f"times on its way to the first step: the run is not smooth in its weights, and "
                f"what was found means little. A smaller rate, a longer warm-up or a larger "
                f"epsilon of Adam helps."
            )


def _checked(
    run: RecordedRun, model: Any, encoded: Sequence[Any], found: Trace, times: int, seed: int
) -> dict[str, Any]:
    """Predicted and measured changes of runs without a random 5 % of the rows."""
    generator = np.random.default_rng(seed)
    full = np.array(measured_values(run, model, encoded, retrain(run, model, [1.0] * found.count)))
    predicted, measured = [], []
    for _ in range(times):
        left = generator.permutation(found.count)[: max(1, found.count // 20)]
        weights = np.ones(found.count)
        weights[left] = 0
        state = retrain(run, model, weights.tolist(), show_progress)
        measured.append(np.array(measured_values(run, model, encoded, state)) - full)
        predicted.append(-found.totals[:, left].sum(1))
    x, y = np.array(predicted), np.array(measured)
    slope = float((x * y).sum() / (x * x).sum()) if x.any() else None
    for number, (guesses, changes) in enumerate(zip(x.T, y.T, strict=True), start=1):
        pairs = ", ".join(f"{a:+.3f} / {b:+.3f}" for a, b in zip(guesses, changes, strict=True))
        print_plain(f"question {number}, without 5 % of the rows, predicted / measured: {pairs}")
    if slope is not None:
        print_plain(f"measured over predicted change: {slope:.2f} (1 is exact)")
    return {"predicted": x.tolist(), "measured": y.tolist(), "slope": slope}


if __name__ == "__main__":
    app()
