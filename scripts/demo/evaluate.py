"""The demo's closing table: which method finds the sources, and which finds what matters."""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich import box
from rich.table import Table

from estimators.grounds import training_sequence
from estimators.model.tokens import Sequence1D
from estimators.scorers.bm25 import BM25
from index.codes.vectors import best_rows
from scripts import options
from scripts.console import one_sentence_errors, print_json, show_progress, stderr
from scripts.demo.tail_patch import TailPatch
from service.models import load_model
from service.scoring.exhaustive import exact_scores
from service.search.opening import open_index
from service.search.query import Query
from service.search.retrieval import Retriever

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
DEPTH = 10
"""Retrieved examples that are judged."""
SPARE = 20
"""Ranked examples kept, so that ten are left when the source's own are taken out."""

GAINS = {
    "gain": "\ngain",
    "gain_without_source": "without\nsource",
    "gain_wrong_answers": "wrong\nanswers",
}
"""Causal columns and their headings."""

Rankings = list[np.ndarray]
"""For each query the best rows, best first."""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """One evaluated query: its tokens, text and, if it has one, the document of its source."""

    sequence: Sequence1D
    prompt: str
    completion: str
    document: str | None


@app.command()
@one_sentence_errors
def main(
    model: options.Model,
    index: Annotated[Path, typer.Option(help="Folder of the EK-FAC index.")],
    queries: Annotated[Path, typer.Option(help="What scripts.demo.train_model wrote.")],
    right: Annotated[int, typer.Option(help="Queries that the model answers rightly.")] = 70,
    wrong: Annotated[int, typer.Option(help="Queries that it answers wrongly.")] = 30,
    causal: Annotated[
        bool,
        typer.Option(help="With the causal columns: a training step for each query and method."),
    ] = True,
    by_score: Annotated[
        bool,
        typer.Option(help="Ask Etymon for the ranking by score too, not the normalised one only."),
    ] = True,
    learning_rate: Annotated[float, typer.Option(help="Of the one causal training step.")] = 0.1,
    token_budget: options.TokenBudget = 1024,
    seed: Annotated[int, typer.Option(help="Of the drawn queries and the random baseline.")] = 0,
    device: options.Device = "cpu",
    dtype: options.DType = "auto",
) -> None:
    """Compare Etymon with exhaustive EK-FAC, gradient dot product, BM25 and chance.

    Source columns are over the rightly answered queries, by the document of each example. The
    causal columns give the mean change of log p(completion), in nats, after one plain gradient
    step on the ten best examples; "without source" leaves out every example of the source's
    document; "wrong answers" are completions that no document states.
    """
    start = time.perf_counter()
    retriever = Retriever(
        open_index(index, load_model(model, device=device, dtype=dtype)), token_budget
    )
    asked = _draw_queries(retriever, queries, right, wrong, seed)
    methods = _rank(retriever, asked, token_budget, seed, by_score)
    documents = [retriever.index.examples[r].document for r in range(len(retriever.index.examples))]
    gains: Mapping[str, dict[str, float]] = {}
    if causal:
        patch = TailPatch(retriever.loaded.model, learning_rate)
        gains = _gains(retriever, methods, asked, documents, patch)
    rows = [
        {"method": name, **_source_columns(found, asked, documents), **gains.get(name, {})}
        for name, found in methods.items()
    ]
    _show(rows, asked)
    print_json(
        {
            "rows": rows,
            "right": sum(q.document is not None for q in asked),
            "wrong": sum(q.document is None for q in asked),
            "learning_rate": learning_rate if causal else None,
            "examples": len(documents),
            "seconds": time.perf_counter() - start,
        }
    )


def _draw_queries(
    retriever: Retriever, path: Path, right: int, wrong: int, seed: int
) -> list[Asked]:
    found = [json.loads(line) for line in path.read_text().splitlines()]
    generator = np.random.default_rng(seed)
    chosen: list[dict[str, Any]] = []
    for correct, count in ((True, right), (False, wrong)):
        pool = [q for q in found if q["correct"] is correct and q["completion"].strip()]
        if len(pool) < count:
            raise ValueError(
                f"{path} has {len(pool)} queries answered {'rightly' if correct else 'wrongly'}, "
                f"{count} are asked for; train longer or ask for fewer."
            )
        chosen += [pool[i] for i in generator.choice(len(pool), size=count, replace=False)]
    return [
        Asked(
            sequence=retriever.loaded.encode_query(q["prompt"], q["completion"]),
            prompt=q["prompt"],
            completion=q["completion"],
            document=q["document"] if q["correct"] else None,
        )
        for q in chosen
    ]


def _rank(
    retriever: Retriever, asked: Sequence[Asked], token_budget: int, seed: int, by_score: bool
) -> dict[str, Rankings]:
    index = retriever.index
    scores = exact_scores(
        retriever.loaded,
        {
            "ekfac": index.estimators.own.directions,
            "dot": index.estimators.choose_gradients("identity").directions,
        },
        index.examples,
        [q.sequence for q in asked],
        token_budget=token_budget,
        progress=show_progress,
    )
    norms = np.where(index.norms > 0, index.norms, np.inf)
    lexical = BM25(index.examples.texts)
    generator = np.random.default_rng(seed)
    total = len(norms)
    rankings: dict[str, Callable[[int, Asked], np.ndarray]] = {
        "exhaustive": lambda i, q: best_rows(scores["ekfac"][i], SPARE),
        "exhaustive, normalised": lambda i, q: best_rows(scores["ekfac"][i] / norms, SPARE),
        "dot product": lambda i, q: best_rows(scores["dot"][i], SPARE),
        "BM25": lambda i, q: best_rows(lexical.scores(q.prompt + q.completion), SPARE),
        "random": lambda i, q: generator.choice(total, size=SPARE, replace=False),
    }
    found = {
        name: [_two_stage(retriever, q, ranking, seed) for q in show_progress(name.strip(), asked)]
        for name, ranking in (("Etymon", "score"), ("Etymon, normalised", "normalised"))
        if by_score or ranking == "normalised"
    }
    for name, rank in rankings.items():
        found[name] = [rank(i, q) for i, q in enumerate(asked)]
    return found


def _two_stage(retriever: Retriever, asked: Asked, ranking: Any, seed: int) -> np.ndarray:
    query = Query(
        prompt=asked.prompt,
        completion=asked.completion,
        k=SPARE,
        ranking=ranking,
        budget=5 * SPARE,
        recall=0.9,
        calibration_rows=16,
        audit_rows=0,
        seed=seed,
    )
    return np.array([result.row for result in retriever.answer(query).results])


def _source_columns(
    found: Rankings, asked: Sequence[Asked], documents: Sequence[str]
) -> dict[str, float]:
    ranks = []
    for rows, query in zip(found, asked, strict=True):
        if query.document is not None:
            matches = [documents[row] == query.document for row in rows[:DEPTH]]
            ranks.append(matches.index(True) + 1 if any(matches) else None)
    return {
        "first": float(np.mean([rank == 1 for rank in ranks])),
        "in_first_ten": float(np.mean([rank is not None for rank in ranks])),
        "mean_reciprocal_rank": float(np.mean([1 / rank if rank else 0 for rank in ranks])),
    }


def _gains(
    retriever: Retriever,
    methods: Mapping[str, Rankings],
    asked: Sequence[Asked],
    documents: Sequence[str],
    patch: TailPatch,
) -> dict[str, dict[str, float]]:
    """Mean gains in nats with their standard errors, by method."""
    known: dict[tuple[int, ...], float] = {}

    def gain(number: int, rows: np.ndarray) -> float:
        key = (number, *sorted(int(row) for row in rows[:DEPTH]))
        if key not in known:
            examples = [training_sequence(retriever.index.examples, r) for r in key[1:]]
            known[key] = patch.gain(asked[number].sequence, examples)
        return known[key]

    gains: dict[str, dict[str, list[float]]] = {
        name: {"gain": [], "gain_without_source": [], "gain_wrong_answers": []} for name in methods
    }
    for number in show_progress("causal effect", range(len(asked))):
        document = asked[number].document
        for name, found in methods.items():
            rows = found[number]
            if document is None:
                gains[name]["gain_wrong_answers"].append(gain(number, rows))
                continue
            gains[name]["gain"].append(gain(number, rows))
            others = np.array([row for row in rows if documents[row] != document])
            gains[name]["gain_without_source"].append(gain(number, others))
    return {
        name: {
            key: figure
            for column, values in columns.items()
            for key, figure in (
                (column, float(np.mean(values))),
                (f"{column}_error", float(np.std(values, ddof=1) / np.sqrt(len(values)))),
            )
        }
        for name, columns in gains.items()
    }


def _show(rows: Sequence[dict[str, Any]], asked: Sequence[Asked]) -> None:
    right = sum(query.document is not None for query in asked)
    gains = [name for name in GAINS if name in rows[0]]
    table = Table(
        title=f"{right} rightly and {len(asked) - right} wrongly answered queries",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        caption="Source columns: the document that states the fact among the examples found. "
        + (_about_gains(rows, gains) if gains else "")
        + "'exhaustive' is exact EK-FAC over every example, Etymon the two-stage answer.",
        caption_justify="left",
    )
    table.add_column("method", no_wrap=True)
    headings = ("source\nfirst", "in first\nten", "MRR\n@10", *(GAINS[name] for name in gains))
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            row["method"],
            f"{row['first']:.0%}",
            f"{row['in_first_ten']:.0%}",
            f"{row['mean_reciprocal_rank']:.2f}",
            *(f"{row[name]:+.2f}" for name in gains),
        )
    stderr.print(table)


def _about_gains(rows: Sequence[dict[str, Any]], gains: Sequence[str]) -> str:
    errors = [max(row[f"{name}_error"] for row in rows) for name in gains]
    return (
        "Gains: mean change of log p(completion) in nats by one plain gradient step on the ten "
        "best examples (such a step favours the dot product by construction); standard errors are "
        f"at most {errors[0]:.2f}, {errors[1]:.2f} and {errors[2]:.2f}. "
    )


if __name__ == "__main__":
    app()
