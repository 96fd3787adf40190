"""Trace questions through a recorded run: what each row did to what the model says."""

import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.table import Table
from rich.text import Text

from scripts.console import one_sentence_errors, print_json, print_plain, show_logs, show_progress
from scripts.console import stderr as screen
from scripts.query import printable
from service.checkpoints import ModelSource, read_tokenizer
from service.models import context_of
from service.run.errors import RunMismatch
from service.run.folder import RecordedRun
from service.run.loading import load_first_model
from service.run.replay import retrain
from service.tracing.questions import AskedQuestion, read_questions
from service.tracing.trace import (
    Trace,
    TracePrice,
    measured_values,
    predict_trace,
    trace_run,
)

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
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only predict the time; write nothing.")
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
    if dry_run:
        _show_price(predict_trace(recorded, loaded, encoded), len(encoded))
        return
    about = {"asked": [asdict(one) for one in asked]}
    found = trace_run(recorded, loaded, encoded, out, about, show_progress)
    for number, one in enumerate(asked):
        _show(one, found, number, recorded, words, k)
    _warn_of_growth(found)
    checked = _checked(recorded, loaded, encoded, found, check, seed) if check else None
    print_json(
        {
            "out": str(out),
            "questions": len(asked),
            "rows": found.count,
            "steps": len(recorded.steps),
            "values": found.values,
            "adjoint_norms": [[norms[-1], norms[0]] for norms in found.norms.tolist()],
            "check": checked,
            "seconds": time.perf_counter() - start,
        }
    )


def _show_price(price: TracePrice, questions: int) -> None:
    print_plain(
        f"Tracing {questions} questions will take about {price.seconds / 60:,.1f} minutes, "
        f"{price.trainings_a_question:.1f} trainings each."
    )
    print_json(asdict(price))


def _show(
    asked: AskedQuestion, found: Trace, number: int, run: RecordedRun, words: Any, k: int
) -> None:
    totals = found.totals[number]
    against = "" if asked.against is None else f" rather than '{printable(asked.against)}'"
    print_plain(
        f"\n{printable(asked.prompt)} |{printable(asked.completion)}{against}   "
        f"{found.values[number]:+.3f} nats"
    )
    table = Table(box=None, pad_edge=False, padding=(0, 1))
    for heading in ("influence, nats", "row", "text"):
        table.add_column(heading, justify="right" if heading != "text" else "left")
    order = np.argsort(-totals, kind="stable")
    for row in [*order[:k], *order[::-1][:k][::-1]]:
        text = words.decode(run.rows[row].tokens)
        table.add_row(f"{totals[row]:+.4f}", run.rows[row].id[:16], Text(printable(text)[:300]))
    screen.print(table)


def _warn_of_growth(found: Trace) -> None:
    for number, norms in enumerate(found.norms):
        if norms[0] > GROWING * norms[-1]:
            print_plain(
                f"warning: the adjoint of question {number + 1} grew {norms[0] / norms[-1]:,.0f} "
                f"times on its way to the first step: the run is not smooth in its weights, and "
                f"these influences mean little. A smaller rate, a longer warm-up or a larger "
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
