"""Whether the interval around the share of the results holds the truth as often as it says."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from jaxtyping import Float
from rich.table import Table

from scripts import options
from scripts.bench.certificates.worlds import Known
from scripts.bench.corpora import TEXTS, Subject, factbook, trained
from scripts.bench.one_index import built
from scripts.bench.record import write_record
from scripts.console import one_sentence_errors, print_json, show_progress, stderr
from service.scoring.exhaustive import exact_scores
from service.search.answer import Clock
from service.search.proxies import Proxies
from service.search.query import Query, Ranking, Side
from service.search.retrieval import Retriever
from service.search.search import Search
from service.search.shards import DenseShard
from service.versions import revision

CONFIDENCE = 0.95
RANKINGS: tuple[Ranking, ...] = ("normalised", "score")
SIDES: tuple[Side, ...] = ("proponents", "opponents")

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
@one_sentence_errors
def main(
    corpora: Annotated[
        str, typer.Option(help=f"Of factbook (the demo's), {', '.join(sorted(TEXTS))}.")
    ] = "profiles,fields,factbook",
    queries: Annotated[int, typer.Option(help="That are asked of each corpus.")] = 24,
    seeds: Annotated[int, typer.Option(help="Draws of the random rows for each query.")] = 20,
    k: Annotated[int, typer.Option(help="Results of an answer.")] = 10,
    dimensions: Annotated[int, typer.Option(help="Of the index.")] = 16384,
    rows: Annotated[int, typer.Option(help="Of a corpus that is made here.")] = 4000,
    epochs: Annotated[int, typer.Option(help="Of a model that is trained here.")] = 8,
    out: Annotated[Path, typer.Option(help="Where to work.")] = Path("runs/shares"),
    demo: Annotated[Path, typer.Option(help="Where `make demo` worked.")] = Path("runs/demo"),
    token_budget: options.TokenBudget = 1024,
    record: Annotated[bool, typer.Option(help="Write docs/benchmarks/shares_*.json.")] = True,
) -> None:
    """Score every row exactly, then search again and again with other random rows.

    Example: python -m scripts.bench.certificates.shares --corpora profiles --queries 15
    """
    start = time.perf_counter()
    found: list[dict[str, Any]] = []
    described = {}
    for name in corpora.split(","):
        if name == "factbook":
            subject = factbook(out / name, demo, queries)
        else:
            subject = trained(name, out / name, queries, rows, epochs)
        described[name] = subject.description
        found += measure(subject, out / name, dimensions, token_budget, k, seeds)
    document = {
        "rows": found,
        "corpora": described,
        "dimensions": dimensions,
        "command": f"python -m scripts.bench.certificates.shares --corpora {corpora} "
        f"--queries {queries} --seeds {seeds} --k {k} --dimensions {dimensions} --rows {rows} "
        f"--epochs {epochs}",
        "seconds": time.perf_counter() - start,
    }
    show(found)
    if record:
        stderr.print(f"Recorded in {write_record('shares', document)}.", highlight=False)
    print_json(document)


def measure(
    subject: Subject, out: Path, dimensions: int, token_budget: int, k: int, seeds: int
) -> list[dict[str, Any]]:
    """Both rankings and directions on one corpus."""
    retriever = Retriever(built(subject, out, dimensions), token_budget)
    loaded, own = retriever.loaded, retriever.index.estimators.own
    sequences = [loaded.encode_query(*query) for query in subject.queries]
    truth = exact_scores(
        loaded,
        {"": own.directions},
        retriever.index.examples,
        sequences,
        token_budget=token_budget,
        progress=show_progress,
    )[""]
    directions = [retriever.directions(sequence)[0] for sequence in sequences]
    found = []
    for ranking in RANKINGS:
        proxies = [retriever.proxies(one, ranking) for one in directions]
        for side in SIDES:
            query = Query(k=k, ranking=ranking, direction=side, confidence=CONFIDENCE)
            title = f"{subject.name}, {ranking}, {side}"
            asked = list(zip(truth.astype(np.float64), proxies, strict=True))
            trials = [
                answers(query, scores, estimates, range(seeds * number, seeds * (number + 1)))
                for number, (scores, estimates) in enumerate(show_progress(title, asked))
            ]
            facts = {"corpus": subject.name, "rows": truth.shape[1], "ranking": ranking}
            found.append({**facts, "direction": side, "k": k, **summarise(trials)})
    return found


def answers(
    query: Query, scores: Float[np.ndarray, "row"], proxies: Proxies, seeds: Sequence[int]
) -> Float[np.ndarray, "answer 4"]:
    """True share, lower end, upper end and random rows of each answer; those without are left out.

    Args:
        query: with its direction.
        scores: exact, positive = proponent.
        proxies: for proponents.
        seeds: one an answer.
    """
    if query.direction == "opponents":
        scores, proxies = -scores, proxies.negated()
    positive = np.maximum(np.nan_to_num(scores), 0)
    found = []
    for seed in seeds:
        search = Search(query, DenseShard(proxies), seed)
        search.run(Known(scores), Clock())
        share = search.share()
        if share.low is not None and share.high is not None:
            true = float(positive[search.best(query.k)].sum() / positive.sum())
            found.append((true, share.low, share.high, share.sampled))
    return np.array(found).reshape(-1, 4)


def summarise(trials: Sequence[Float[np.ndarray, "answer 4"]]) -> dict[str, Any]:
    """How often the truth was inside, over all answers and for the worst query."""
    true, low, high, sampled = np.concatenate(trials).T
    each = [inside(*one.T[:3]).mean() for one in trials if len(one)]
    return {
        "queries": len(trials),
        "answers": len(true),
        "coverage": float(inside(true, low, high).mean()),
        "coverage_of_worst_query": float(min(each)),
        "median_width": float(np.median(high - low)),
        "median_share": float(np.median(true)),
        "median_sampled": float(np.median(sampled)),
        "confidence": CONFIDENCE,
        "commit": revision(),
    }


def inside(
    true: Float[np.ndarray, "answer"],
    low: Float[np.ndarray, "answer"],
    high: Float[np.ndarray, "answer"],
) -> Any:
    """Whether the truth lies in each interval; ends count, within rounding."""
    return (low <= true + 1e-9) & (true <= high + 1e-9)


def show(rows: Sequence[dict[str, Any]]) -> None:
    """The table for people."""
    figures = (
        *("answers", "coverage", "coverage_of_worst_query"),
        *("median_width", "median_share", "median_sampled"),
    )
    table = Table("corpus", "ranking", "direction", *figures)
    for row in rows:
        cells = [f"{row[figure]:.3g}" for figure in figures]
        table.add_row(row["corpus"], row["ranking"], row["direction"], *cells)
    stderr.print(table)


if __name__ == "__main__":
    app()
