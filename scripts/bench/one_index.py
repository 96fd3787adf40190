"""One index, every estimator by gradients: recall, noise and certificates for each direction."""

import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from jaxtyping import Float
from rich.table import Table

from estimators.chosen import GradientEstimator
from scripts import options
from scripts.bench.corpora import TEXTS, Subject, factbook, trained
from scripts.bench.record import write_record
from scripts.console import one_sentence_errors, print_json, show_progress, stderr
from scripts.demo.steps import Steps
from service.models import load_model
from service.scoring.exhaustive import exact_scores
from service.search.opening import open_index
from service.search.query import Query
from service.search.retrieval import Retriever
from service.versions import revision

ESTIMATORS: tuple[tuple[str, Mapping[str, float]], ...] = (
    ("ekfac", {"damping": 0.1}),
    ("ekfac", {"damping": 0.001}),
    ("ekfac", {"damping": 1.0}),
    ("kfac", {"damping": 0.1}),
    ("identity", {}),
)
K, SHORTLIST = 10, 50
PAIRS = 512
"""Random rows a query, over which the noise is measured."""

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
@one_sentence_errors
def main(
    corpora: Annotated[
        str, typer.Option(help=f"Of factbook (the demo's), {', '.join(sorted(TEXTS))}.")
    ] = "profiles,factbook",
    queries: Annotated[int, typer.Option(help="That are asked of each corpus.")] = 60,
    dimensions: Annotated[int, typer.Option(help="Of the index.")] = 65536,
    rows: Annotated[int, typer.Option(help="Of a corpus that is made here.")] = 4000,
    epochs: Annotated[int, typer.Option(help="Of a model that is trained here.")] = 8,
    out: Annotated[Path, typer.Option(help="Where to work.")] = Path("runs/one-index"),
    demo: Annotated[Path, typer.Option(help="Where `make demo` worked.")] = Path("runs/demo"),
    token_budget: options.TokenBudget = 1024,
    record: Annotated[bool, typer.Option(help="Write docs/benchmarks/one_index_*.json.")] = True,
) -> None:
    """Build one index a corpus, whitened by EK-FAC, and ask it by five estimators.

    For each: the exact top 10 within the best 50 by the codes, the codes' error against their law,
    and answers with their certificates, whose bounds are held against exact scores of every row.

    Example: python -m scripts.bench.one_index --corpora factbook
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
        found += measure(subject, out / name, dimensions, token_budget)
    document = {
        "rows": found,
        "corpora": described,
        "dimensions": dimensions,
        "command": f"python -m scripts.bench.one_index --corpora {corpora} --queries {queries} "
        f"--dimensions {dimensions} --rows {rows} --epochs {epochs}",
        "seconds": time.perf_counter() - start,
    }
    show(found)
    if record:
        stderr.print(f"Recorded in {write_record('one_index', document)}.", highlight=False)
    print_json(document)


def measure(
    subject: Subject, out: Path, dimensions: int, token_budget: int
) -> list[dict[str, Any]]:
    """All estimators on one corpus, by an index that is built for it."""
    retriever = Retriever(built(subject, out, dimensions), token_budget)
    index, loaded = retriever.index, retriever.loaded
    choose = index.estimators.choose_gradients
    chosen = [choose(name, given) for name, given in ESTIMATORS]
    exact = exact_scores(
        loaded,
        {estimator.fingerprint: estimator.directions for estimator in chosen},
        index.examples,
        [loaded.encode_query(*query) for query in subject.queries],
        token_budget=token_budget,
        progress=show_progress,
    )
    norms = np.where(index.norms > 0, index.norms, np.inf)
    return [
        {
            "corpus": subject.name,
            "rows": len(norms),
            **_row(retriever, subject, estimator, exact[estimator.fingerprint] / norms),
            "commit": revision(),
        }
        for estimator in chosen
    ]


def built(subject: Subject, out: Path, dimensions: int) -> Any:
    """An index of the corpus with factors that hold K-FAC's eigenvalues, too."""
    factors, folder = out / "ekfac.safetensors", out / f"index-{dimensions}"
    shared = ("--model", str(subject.model), "--data", str(subject.corpus))
    if not (folder / "manifest.json").is_file():
        shutil.rmtree(folder, ignore_errors=True)
        steps = Steps()
        steps.command("fit", *shared, "--out", str(factors), "--examples", "2048")
        steps.command(
            "build",
            *shared,
            *("--id-column", "id", "--factors", str(factors), "--out", str(folder)),
            *("--dimensions", str(dimensions), "--slices", "1"),
        )
    return open_index(folder, load_model(str(subject.model)))


def _row(
    retriever: Retriever,
    subject: Subject,
    estimator: GradientEstimator,
    truth: Float[np.ndarray, "query row"],
) -> dict[str, Any]:
    """One row of the record; ``truth`` are exact normalised scores."""
    index = retriever.index
    within, residuals, recalls, certified, violations, rescored = [], [], [], 0, 0, []
    generator = np.random.default_rng(0)
    described = ", ".join([estimator.name, *(f"{k} {v:g}" for k, v in estimator.values.items())])
    for number, (prompt, completion) in enumerate(
        show_progress(f"{subject.name}, {described}", subject.queries)
    ):
        values = truth[number]
        sequence = retriever.loaded.encode_query(prompt, completion)
        directions, _ = retriever.directions(sequence, estimator)
        length = float(index.sketch.query({n: d[None] for n, d in directions.items()})[1][0])
        estimates = retriever.proxies(directions, "normalised").values
        top = np.argsort(-values, kind="stable")[:K]
        shortlist = np.argsort(-estimates, kind="stable")[:SHORTLIST]
        within.append(len(np.intersect1d(top, shortlist)) / K)
        drawn = generator.permutation(len(values))[:PAIRS]
        residuals.append((estimates - values)[drawn] / length)
        query = Query(
            prompt=prompt,
            completion=completion,
            k=K,
            estimator=estimator.name,
            parameters=estimator.values,
            seed=number,
        )
        answer = retriever.answer(query)
        recall = _recall([result.row for result in answer.results], values)
        recalls.append(recall)
        rescored.append(answer.rescored_rows)
        bounds = {c.type: c for c in answer.certificates}
        certified += bounds["sketch"].status in ("certified", "exhaustive")
        violations += sum(
            c.recall_lower_bound is not None and recall < c.recall_lower_bound - 1e-9
            for c in answer.certificates
        )
    noise = index.manifest.sketch.noise
    return {
        "estimator": estimator.name,
        "parameters": dict(estimator.values),
        "queries": len(subject.queries),
        "r10_at_50": float(np.mean(within)),
        "noise_seen": float(np.sqrt(np.mean(np.square(residuals)))),
        "noise_law": noise.predicted,
        "certified": certified,
        "violations": violations,
        "recall": float(np.mean(recalls)),
        "median_rescored_rows": float(np.median(rescored)),
    }


def _recall(found: Sequence[int], values: Float[np.ndarray, "row"]) -> float:
    """Of the exact top; what ties with the last of it within rounding counts."""
    threshold = float(np.sort(values)[-K])
    return float(np.mean(values[list(found)] >= threshold - 1e-5 * abs(threshold)))


def show(rows: Sequence[dict[str, Any]]) -> None:
    """The table for people."""
    headings = ("r10_at_50", "noise_seen", "noise_law", "certified", "violations", "recall")
    table = Table("corpus", "estimator", *headings)
    for row in rows:
        values = ", ".join(f"{key} {value:g}" for key, value in row["parameters"].items())
        cells = [f"{row[h]:.4g}" for h in headings]
        table.add_row(row["corpus"], f"{row['estimator']} {values}".strip(), *cells)
    stderr.print(table)


if __name__ == "__main__":
    app()
