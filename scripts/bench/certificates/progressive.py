"""What further slices of the codes save: exact scores for a certificate, and what they cost."""

import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from jaxtyping import Float
from rich.table import Table

from estimators.grounds import training_sequence
from estimators.model.tokens import plan_batches
from scripts import options
from scripts.bench.certificates.worlds import Known
from scripts.bench.corpora import TEXTS, Subject, factbook, trained
from scripts.bench.passes import Problem, plain
from scripts.bench.record import write_record
from scripts.console import one_sentence_errors, print_json, show_progress, stderr
from scripts.demo.steps import Steps
from service.coding import further_bytes, later_looks
from service.indexing.sketching import ShardJob
from service.models import load_model
from service.scoring.exhaustive import exact_scores
from service.search.answer import Clock
from service.search.opening import OpenIndex, open_index
from service.search.proposing import CodedShard, estimate_rows
from service.search.query import Query
from service.search.retrieval import Retriever
from service.search.search import Search
from service.versions import revision

BATCHES = 12
"""Of the corpus' rows, on which the build is timed beside a plain pass."""
REPETITIONS = 3

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
@one_sentence_errors
def main(
    corpora: Annotated[
        str, typer.Option(help=f"Of factbook (the demo's), {', '.join(sorted(TEXTS))}.")
    ] = "profiles,speeches,factbook",
    queries: Annotated[int, typer.Option(help="That are asked of each corpus.")] = 30,
    slices: Annotated[str, typer.Option(help="Of the codes, ascending.")] = "1,4,16",
    k: Annotated[str, typer.Option(help="Results of an answer.")] = "10,100",
    budget: Annotated[int, typer.Option(help="Most rows to rescore.")] = 1000,
    dimensions: Annotated[int, typer.Option(help="Of a slice.")] = 16384,
    rows: Annotated[int, typer.Option(help="Of a corpus that is made here.")] = 4000,
    epochs: Annotated[int, typer.Option(help="Of a model that is trained here.")] = 8,
    out: Annotated[Path, typer.Option(help="Where to work.")] = Path("runs/progressive"),
    demo: Annotated[Path, typer.Option(help="Where `make demo` worked.")] = Path("runs/demo"),
    token_budget: options.TokenBudget = 1024,
    record: Annotated[bool, typer.Option(help="Write docs/benchmarks/progressive_*.json.")] = True,
) -> None:
    """Score every row exactly, then search with one slice of the codes and with more.

    Example: python -m scripts.bench.certificates.progressive --corpora profiles --queries 15
    """
    start = time.perf_counter()
    counts, wanted = ([int(n) for n in text.split(",")] for text in (slices, k))
    found: list[dict[str, Any]] = []
    described = {}
    for name in corpora.split(","):
        if name == "factbook":
            subject = factbook(out / name, demo, queries)
        else:
            subject = trained(name, out / name, queries, rows, epochs)
        described[name] = subject.description
        index = built(subject, out / name, dimensions, max(counts))
        ratios = build_ratios(index, counts, token_budget)
        found += measure(subject, index, counts, wanted, budget, token_budget, ratios)
    document = {
        "rows": found,
        "corpora": described,
        "command": f"python -m scripts.bench.certificates.progressive --corpora {corpora} "
        f"--queries {queries} --slices {slices} --k {k} --budget {budget} "
        f"--dimensions {dimensions} --rows {rows} --epochs {epochs}",
        "definitions": {
            "exact": "rows scored exactly because of their estimates; 64 random ones come on top",
            "build_ratio": "seconds of gradients to codes / forward and backward of the same rows",
        },
        "seconds": time.perf_counter() - start,
    }
    show(found)
    if record:
        stderr.print(f"Recorded in {write_record('progressive', document)}.", highlight=False)
    print_json(document)


def built(subject: Subject, out: Path, dimensions: int, slices: int) -> OpenIndex:
    """An index of the corpus with so many slices, and a fixed seed."""
    factors, folder = out / "ekfac.safetensors", out / f"index-{dimensions}-{slices}"
    shared = ("--model", str(subject.model), "--data", str(subject.corpus))
    steps = Steps()
    if not factors.is_file():
        steps.command("fit", *shared, "--out", str(factors), "--examples", "2048")
    if not (folder / "manifest.json").is_file():
        shutil.rmtree(folder, ignore_errors=True)
        steps.command(
            "build",
            *shared,
            *("--id-column", "id", "--factors", str(factors), "--out", str(folder)),
            *("--dimensions", str(dimensions), "--slices", str(slices), "--seed", "1"),
        )
    return open_index(folder, load_model(str(subject.model)))


def build_ratios(index: OpenIndex, counts: list[int], token_budget: int) -> dict[int, float]:
    """Time of sketching and encoding rows, by slices, over a forward and backward pass of them."""
    order = np.random.default_rng(0).permutation(len(index.examples))
    sequences = [training_sequence(index.examples, int(row)) for row in order]
    sequences = [sequence for sequence in sequences if len(sequence.tokens) > 1][: 16 * BATCHES]
    problem = Problem(
        name="corpus",
        model=index.loaded.model,
        sequences=sequences,
        batches=list(plan_batches([len(s.tokens) for s in sequences], token_budget)),
        budget=token_budget,
    )
    jobs = {
        count: ShardJob(
            part=Path(),
            loaded=index.loaded,
            sketches=index.sketches.up_to(count),
            codes=index.manifest.codes,
            token_budget=token_budget,
        )
        for count in counts
    }
    floor, taken = [], {count: list[float]() for count in counts}
    for _ in range(REPETITIONS):
        start = time.perf_counter()
        plain(problem)
        floor.append(time.perf_counter() - start)
        for count, job in jobs.items():
            start = time.perf_counter()
            job.encode(sequences)
            taken[count].append(time.perf_counter() - start)
    return {count: min(seconds) / min(floor) for count, seconds in taken.items()}


def measure(
    subject: Subject,
    index: OpenIndex,
    counts: list[int],
    wanted: list[int],
    budget: int,
    token_budget: int,
    ratios: dict[int, float],
) -> list[dict[str, Any]]:
    """Rows of the record, from searches whose exact scores are looked up."""
    retriever = Retriever(index, token_budget)
    asked = [index.loaded.encode_query(*query) for query in subject.queries]
    truth = exact_scores(
        index.loaded,
        {"": index.estimators.own.directions},
        index.examples,
        asked,
        token_budget=token_budget,
        progress=show_progress,
    )[""]
    shards = [estimate_rows(index, retriever.directions(one)[0], "normalised") for one in asked]
    found = []
    for count in counts:
        some = [shard_of(shard, count) for shard in shards if isinstance(shard, CodedShard)]
        for k in wanted:
            outcomes = [
                _searched(shard, scores, k, budget, number)
                for number, (shard, scores) in enumerate(zip(some, truth, strict=True))
            ]
            found.append(
                {
                    "corpus": subject.name,
                    "rows": len(index.examples),
                    "slices": count,
                    "bytes_per_example": bytes_of(index, count),
                    "k": k,
                    **summary(outcomes),
                    "build_ratio": ratios[count],
                    "commit": revision(),
                }
            )
    return found


def bytes_of(index: OpenIndex, slices: int) -> int:
    """Bytes a row of an index of so many slices, its norm included."""
    return index.vectors.code_size + 4 + further_bytes(index.sketches.up_to(slices))


def shard_of(shard: CodedShard, slices: int) -> CodedShard:
    """The same question asked of the first few slices only."""
    if slices == 1 or shard.slices is None:
        return replace(shard, looks=1)
    looks = tuple(look for look in shard.slices.looks if look.slices <= slices)
    if [look.slices for look in looks] != later_looks(slices):
        raise ValueError(f"An index of more slices has no look at {slices} of them; take 4 or 16.")
    return replace(shard, looks=1 + len(looks), slices=replace(shard.slices, looks=looks))


def _searched(
    shard: CodedShard, scores: Float[np.ndarray, "row"], k: int, budget: int, seed: int
) -> dict[str, float]:
    start = time.perf_counter()
    search = Search(Query(k=k, budget=budget, audit_rows=0), shard, seed)
    certificate = search.run(Known(scores), Clock())[0]
    seconds = time.perf_counter() - start
    values = scores / shard.at(slice(None)).divisors
    values[~np.isfinite(values)] = -np.inf
    least = np.sort(values)[-k]
    recall = float(np.mean(values[search.best(k)] >= least))
    bound = certificate.recall_lower_bound
    return {
        "certified": float(certificate.status in ("certified", "exhaustive")),
        "exact": search.rescored,
        "recall": recall,
        "wrong": float(bound is not None and bound > recall + 1e-9),
        "refused": float(bound is None),
        "seconds": seconds,
    }


def summary(outcomes: list[dict[str, float]]) -> dict[str, Any]:
    """Of all queries' searches."""
    each = {name: np.array([outcome[name] for outcome in outcomes]) for name in outcomes[0]}
    return {
        "queries": len(outcomes),
        "certified_share": float(each["certified"].mean()),
        "exact_median": float(np.median(each["exact"])),
        "exact_p95": float(np.quantile(each["exact"], 0.95)),
        "recall_mean": float(each["recall"].mean()),
        "violations": int(each["wrong"].sum()),
        "refused": int(each["refused"].sum()),
        "search_seconds_median": float(np.median(each["seconds"])),
    }


def show(rows: list[dict[str, Any]]) -> None:
    """The table for people."""
    names = (
        *("corpus", "rows", "slices", "k", "certified_share", "exact_median", "exact_p95"),
        *("recall_mean", "violations", "refused", "search_seconds_median", "build_ratio"),
    )
    table = Table(title="Progressive codes", title_justify="left")
    for name in names:
        table.add_column(name.replace("_", " "))
    for row in rows:
        table.add_row(*(f"{v:.3g}" if isinstance(v := row[n], float) else str(v) for n in names))
    stderr.print(table)


if __name__ == "__main__":
    app()
