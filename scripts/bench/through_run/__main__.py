"""Trace questions through recorded fine-tunings, leave rows out, repeat them, and compare."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from jaxtyping import Float
from rich.table import Table
from scipy import stats

from scripts.bench.record import write_record
from scripts.bench.through_run.additions import additions
from scripts.bench.through_run.ranks import rank_errors
from scripts.bench.through_run.reruns import SHARES, Reruns, removals
from scripts.bench.through_run.scores import Scored, all_scores
from scripts.bench.through_run.tasks import MAKERS, Task, make_tasks
from scripts.console import one_sentence_errors, print_json, stderr
from service.versions import revision

TOP = 20
WIDTH = 150
"""Of the table, at least."""
REMOVED = (
    "run",
    "direction by epoch",
    "one direction",
    "EK-FAC, damping 0.1",
    "dot product",
)
"""Estimators whose best rows are left out, each question's own."""

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
@one_sentence_errors
def main(
    out: Annotated[Path, typer.Option(help="Where to work.")] = Path("runs/through-run"),
    tasks: Annotated[str, typer.Option(help="Of facts,prose.")] = ",".join(MAKERS),
    rows: Annotated[int, typer.Option(help="Of each fine-tuning, at most.")] = 1000,
    questions: Annotated[int, typer.Option(help="Of each fine-tuning.")] = 12,
    reruns: Annotated[int, typer.Option(help="For each share of rows left out.")] = 32,
    removed: Annotated[int, typer.Option(help="Questions whose best rows are left out.")] = 4,
    added: Annotated[int, typer.Option(help="Questions for which rows are added.")] = 8,
    record: Annotated[bool, typer.Option(help="Write docs/benchmarks/through_run_*.json.")] = True,
) -> None:
    """LDS of every estimator, by task: rank correlation of predicted and measured log p.

    Over repeated runs without random rows; mean over questions, with a bootstrap interval over
    them. Repeated runs are kept in the working folder and not made twice.
    """
    found: list[dict[str, Any]] = []
    facts: dict[str, Any] = {}
    for task in make_tasks(out, tasks.split(","), rows, questions):
        scores = all_scores(task, out / task.name)
        known = Reruns(task, out / task.name / "reruns.jsonl")
        measured = {share: _measured(known, share, reruns, len(task.run.rows)) for share in SHARES}
        changes = _removed(known, scores, min(removed, questions))
        own = [
            {"task": task.name, **_row(name, one, scores["run"].values, measured)}
            | {"removal_change": changes.get(name)}
            for name, one in scores.items()
        ]
        own += [{"task": task.name, "estimator": name} for name in ("BM25", "random rows")]
        own[-1]["removal_change"] = changes["random rows"]
        gains = _added(known, task, out / task.name / "half", min(added, questions))
        own = [row | gains.get(row["estimator"], {}) for row in own]
        _show(task, own)
        found += own
        facts[task.name] = {
            "description": task.description,
            "training_seconds": task.training_seconds,
            "recorder_share": task.recorder_share,
            "ranks": rank_errors(task, scores["run"].values),
        }
    document = {"tasks": facts, "rows": [{**row, "commit": revision()} for row in found]}
    if record:
        stderr.print(f"Record: {write_record('through_run', document)}")
    print_json(document)


Measured = tuple[Float[np.ndarray, "set row"], Float[np.ndarray, "set question"]]


def _measured(known: Reruns, share: float, count: int, rows: int) -> Measured:
    """Which rows were left out (1), and how the questions changed."""
    sets = known.random(share, count)
    left = np.zeros((count, rows))
    for number, one in enumerate(sets):
        left[number, one] = 1
    return left, known.changes(sets, f"runs without {share:.0%} of the rows")


def _removed(known: Reruns, scores: Mapping[str, Scored], questions: int) -> dict[str, float]:
    """Mean change of questions, their own top rows left out."""
    if not questions:
        return {"random rows": float("nan")}
    values = {name: scores[name].values for name in REMOVED}
    generator = np.random.default_rng(0)
    values["random rows"] = generator.random(values["run"].shape)
    found = removals(known, values, questions, TOP)
    return {name: float(np.mean(one)) for name, one in found.items()}


def _added(known: Reruns, task: Task, out: Path, questions: int) -> dict[str, dict[str, float]]:
    """Mean change of questions, each one's top rows of those left out added, with an interval."""
    if not questions:
        return {}
    found = {}
    for name, changes in additions(task, out, known, questions, TOP).items():
        low, high = stats.bootstrap(
            (changes,), np.mean, rng=np.random.default_rng(0)
        ).confidence_interval
        found[name] = {
            "addition_change": float(np.mean(changes)),
            "addition_low": float(low),
            "addition_high": float(high),
        }
    return found


def _row(
    name: str,
    scored: Scored,
    exact: Float[np.ndarray, "question row"],
    measured: Mapping[float, Measured],
) -> dict[str, Any]:
    row: dict[str, Any] = {"estimator": name}
    scores = scored.values
    for share, (left, change) in measured.items():
        predicted = -left @ scores.T
        each = [
            float(stats.spearmanr(p, m).statistic)
            for p, m in zip(predicted.T, change.T, strict=True)
        ]
        label = f"lds_{round(100 * share)}"
        spread = stats.bootstrap((each,), np.mean, rng=np.random.default_rng(0))
        row[label] = float(np.mean(each))
        row[f"{label}_low"], row[f"{label}_high"] = map(float, spread.confidence_interval)
        if share == SHARES[0]:
            row |= _slopes(predicted, change)
    pairs = list(zip(scores, exact, strict=True))
    shared = [len({*np.argsort(-a)[:TOP]} & {*np.argsort(-b)[:TOP]}) / TOP for a, b in pairs]
    row["top20_shared"] = float(np.mean(shared))
    row["rank_correlation"] = float(np.mean([stats.spearmanr(a, b).statistic for a, b in pairs]))
    return row | {"trainings_a_query": scored.trainings, "peak_mb": scored.peak_mb}


def _slopes(
    predicted: Float[np.ndarray, "set question"], change: Float[np.ndarray, "set question"]
) -> dict[str, float]:
    """Measured over predicted change, through the origin; and that of a scale learnt elsewhere.

    The latter takes its factor from the other half of the questions, each half in turn.
    """
    learnt = []
    for half in (0, 1):
        others, own = np.s_[:, half::2], np.s_[:, 1 - half :: 2]
        factor = (predicted[others] * change[others]).sum() / (predicted[others] ** 2).sum()
        scaled = factor * predicted[own]
        learnt.append((scaled * change[own]).sum() / (scaled**2).sum())
    whole = (predicted * change).sum() / (predicted**2).sum()
    return {"slope": float(whole), "slope_learnt": float(np.mean(learnt))}


def _show(task: Task, rows: Sequence[Mapping[str, Any]]) -> None:
    stderr.print(
        f"{task.name}: {task.description}. One training takes {task.training_seconds:.0f} s; "
        f"recording adds {task.recorder_share:.1%}.",
        highlight=False,
    )
    table = Table(title="Predictions against repeated runs", title_justify="left")
    headings = ("estimator", "LDS, 5 % left out", "LDS, half", f"top {TOP} shared", "slope")
    more = (f"top {TOP} left out", f"{TOP} rows added", "trainings a question")
    for heading in (*headings, *more):
        table.add_column(heading)
    for row in rows:
        cells = [
            f"{row[k]:.3f} ({row[f'{k}_low']:.2f} to {row[f'{k}_high']:.2f})" if k in row else ""
            for k in ("lds_5", "lds_50")
        ]
        numbers = [
            "" if row.get(name) is None else format(row[name], form)
            for name, form in (
                ("top20_shared", ".2f"),
                ("slope", ".3g"),
                ("removal_change", "+.2f"),
                ("addition_change", "+.2f"),
                ("trainings_a_query", ".2f"),
            )
        ]
        table.add_row(row["estimator"], *cells, *numbers)
    stderr.print(table, width=max(stderr.width, WIDTH))


if __name__ == "__main__":
    app()
