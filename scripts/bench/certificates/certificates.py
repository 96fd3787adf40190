"""Certificates: how often they are wrong, how many rows they cost, how long rescoring takes."""

import json
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from jaxtyping import Bool, Float
from rich.table import Table

from estimators.model.tokens import TokenBatch, collate, plan_batches
from estimators.sketching.sketch import SketchPlan
from index.certificates.calibration import SHARE
from scripts.bench.certificates.data import NOISE_QUERIES, TOKEN_BUDGET, Estimates, Ground, Redraws
from scripts.bench.certificates.trials import (
    audit_coverage,
    calibration_coverage,
    depths_needed,
    sketch_coverage,
    usefulness,
)
from scripts.bench.certificates.worlds import EXPECTED_TO_FAIL, HOSTILE, Change, plain, unchanged
from scripts.bench.record import record_path, write_record
from scripts.console import one_sentence_errors, print_json, show_progress, stderr
from service.scoring.rows import GradientScorer
from service.search.query import Query, Until
from service.search.retrieval import Retriever
from service.versions import revision

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
LARGE, SMALL = 20_000, 3_000
"""Rows of the corpora whose sketch is drawn again and again."""
DRAWS, DRAWN_QUERIES = 200, 50
REDRAWN_DIMENSIONS = 4096
AUDITS, AUDITED_QUERIES = 200, 10
SPLITS, CALIBRATING = 500, 100
BUDGETS = {10: 0.01, 100: 0.05}
"""By k, the share of the corpus within which a query must be certified."""
CODES = (
    ("one-bit", 16384),
    ("low-rank", 16384),
    ("one-bit", 65536),
    ("low-rank", 65536),
    ("one-bit", 262144),
)
PARTS = ("coverage", "usefulness", "cost")
SHORT_ANSWER = 12
"""Characters of a short answer; queries with longer ones are of another kind."""


@app.command()
@one_sentence_errors
def main(
    folder: Annotated[Path, typer.Option(help="For model, indexes and kept results.")] = Path(
        "runs/bench-certificates/fields"
    ),
    parts: Annotated[str, typer.Option(help=f"Of {', '.join(PARTS)}.")] = ",".join(PARTS),
    texts: Annotated[int, typer.Option(min=1000, help="Of the corpus.")] = 22_500,
    queries: Annotated[int, typer.Option(min=120, help="Held out of the corpus.")] = 366,
    draws: Annotated[int, typer.Option(min=2, help="Of the sketch.")] = DRAWS,
    redrawn_rows: Annotated[
        int, typer.Option(min=SMALL, help="Rows of the larger corpus that it is drawn for.")
    ] = LARGE,
    record: Annotated[bool, typer.Option(help="Write docs/benchmarks/certificates_*.json.")] = True,
) -> None:
    """Try every certificate against full truth, on fields of the World Factbook.

    The first run trains a model and draws the sketch 200 times for 20,000 rows (about an hour on
    two idle cores); what it made is kept in the folder.
    """
    start = time.perf_counter()
    wanted = parts.split(",")
    unknown = sorted(set(wanted) - set(PARTS))
    if unknown:
        raise ValueError(f"Unknown part '{unknown[0]}'; choose of {', '.join(PARTS)}.")
    ground = Ground(folder, texts, queries)
    rows: list[dict[str, Any]] = []
    if "coverage" in wanted:
        rows += covered(ground, draws, redrawn_rows)
    if "usefulness" in wanted:
        rows += useful(ground)
    if "cost" in wanted:
        rows += costs(ground)
    commit = revision()
    report = {
        "rows": [{**row, "commit": commit} for row in rows],
        "corpus": f"{ground.rows:,} fields of the World Factbook; {ground.subject.description}",
        "command": "python -m scripts.bench.certificates",
        "seconds": time.perf_counter() - start,
    }
    show(rows)
    if record:
        stderr.print(f"Recorded in {recorded(report, set(wanted))}.")
    print_json(report)


def recorded(report: dict[str, Any], parts: set[str]) -> Path:
    """Write the record; rows of other parts that were measured the same day stay."""
    path = record_path("certificates")
    if path.is_file():
        others = [row for row in json.loads(path.read_text())["rows"] if row["part"] not in parts]
        report = {**report, "rows": others + report["rows"]}
    return write_record("certificates", report)


def covered(ground: Ground, draws: int, redrawn_rows: int) -> list[dict[str, Any]]:
    """Coverage of all three certificates."""
    some = np.random.default_rng(3).permutation(ground.rows)[:redrawn_rows]
    few = np.random.default_rng(4).permutation(ground.rows)[:SMALL]
    rank = 32  # half the root of the dimensions, as a build takes
    plans = [
        SketchPlan(seed=1000 + number, dimensions=REDRAWN_DIMENSIONS, rank=rank)
        for number in range(draws)
    ]
    large = ground.redraws("ekfac", np.sort(some).tolist(), plans, DRAWN_QUERIES)
    identity = ground.redraws("identity", np.sort(few).tolist(), plans, DRAWN_QUERIES)
    first = np.zeros(large.exact.shape[1], dtype=bool)
    first[np.random.default_rng(5).permutation(len(first))[:SMALL]] = True
    found = []
    for label, configuration in show_progress(
        "coverage", list(_configurations(large, identity, first))
    ):
        row = configuration()
        stderr.print(f"{label}: {row['violations']:,} of {row['trials']:,}", highlight=False)
        found.append({"part": "coverage", "configuration": label, **row})
    return found + calibrations(ground, identity)


def _configurations(
    large: Redraws, identity: Redraws, first: np.ndarray
) -> Iterator[tuple[str, Any]]:
    """Names of the configurations of the sketch certificate and the audit, and what runs them."""
    everything = np.ones(len(first), dtype=bool)
    everywhere = np.ones(identity.exact.shape[1], dtype=bool)
    whole = [] if first.all() else [("EK-FAC", large, everything, unchanged)]
    cases = [
        ("EK-FAC", large, first, unchanged),
        *whole,
        ("identity", identity, everywhere, unchanged),
        *((f"EK-FAC, {name}", large, first, change) for name, change in HOSTILE.items()),
    ]
    for name, redraws, rows, change in cases:
        fails = {"expected_to_fail": True} if name.split(", ")[-1] in EXPECTED_TO_FAIL else {}
        for k in (10, 100):
            label = f"{name}, {int(rows.sum()):,} rows, k = {k}"
            yield label, partial(_sketch_row, redraws, rows, change, k, fails)
            yield label, partial(_audit_row, redraws, rows, change, k)


def _sketch_row(
    redraws: Redraws, rows: np.ndarray, change: Change, k: int, fails: dict[str, bool]
) -> dict[str, Any]:
    return {**sketch_coverage(redraws, rows, change, k, DRAWN_QUERIES), **fails}


def _audit_row(redraws: Redraws, rows: np.ndarray, change: Change, k: int) -> dict[str, Any]:
    noise = redraws.noise[0]
    scale = max(noise.predicted, noise.measured)
    worlds = []
    for query in range(AUDITED_QUERIES):
        exact, proxies = redraws.exact[query, rows], redraws.proxies[0, query, rows]
        world = plain(exact, proxies, scale, noise.relative)
        worlds.append(change(world, np.random.default_rng([query, 5])))
    return audit_coverage(worlds, k, len(worlds[0].truth) // 4, AUDITS, budget=k + k // 2)


def calibrations(ground: Ground, identity: Redraws) -> list[dict[str, Any]]:
    """Coverage of the calibration: draws of calibration queries, from the kind asked and another.

    The other kinds are queries with short and with long answers.
    """
    everything = np.ones(ground.rows, dtype=bool)
    few = np.zeros(ground.rows, dtype=bool)
    few[np.random.default_rng(4).permutation(ground.rows)[:SMALL]] = True
    noise = identity.noise[0]
    plain_gradients = Estimates(
        cosines=identity.proxies[0],
        noise=max(noise.predicted, noise.measured),
        relative=noise.relative,
        lawful=True,
    )
    cosines = ground.cosines
    cases = [
        ("EK-FAC, one-bit codes", ground.estimates("one-bit", 16384), cosines, everything),
        ("EK-FAC, one-bit codes", ground.estimates("one-bit", 16384), cosines, few),
        (
            "EK-FAC, one-bit codes, 15 % of proxies shuffled",
            shuffled_estimates(ground.estimates("one-bit", 16384)),
            cosines,
            everything,
        ),
        ("EK-FAC, low-rank codes", ground.estimates("low-rank", 16384), cosines, everything),
        ("EK-FAC, BM25 as the proposer", ground.bm25(), cosines, everything),
        (
            "identity, one-bit codes",
            plain_gradients,
            identity.exact,
            np.ones(identity.exact.shape[1], dtype=bool),
        ),
    ]
    long = np.array([len(said.strip()) > SHORT_ANSWER for _, said in ground.subject.queries])
    found = []
    for name, estimates, truth, rows in cases:
        for k in (10, 100):
            needed = depths_needed(estimates, truth, rows, k)
            row = calibration_coverage(needed, needed, SPLITS, CALIBRATING)
            label = f"{name}, {int(rows.sum()):,} rows, k = {k}"
            found.append({"part": "coverage", "configuration": label, **row})
            if name == "EK-FAC, one-bit codes" and rows.all():
                found += _shifted(needed, long, label)
    return found


def shuffled_estimates(estimates: Estimates) -> Estimates:
    """The same with 15 % of every query's values permuted among themselves."""
    cosines = estimates.cosines.copy()
    for number, values in enumerate(cosines):
        generator = np.random.default_rng([number, 6])
        chosen = generator.permutation(len(values))[: len(values) * 15 // 100]
        values[chosen] = values[generator.permutation(chosen)]
    return replace(estimates, cosines=cosines)


def _shifted(
    needed: Float[np.ndarray, "query"], long: Bool[np.ndarray, "query"], label: str
) -> list[dict[str, Any]]:
    """The calibration asked of another kind of query; it fails where that kind needs more."""
    found = []
    for kind, other, told in ((~long, long, "short"), (long, ~long, "long")):
        row = calibration_coverage(needed[kind], needed[other], SPLITS, CALIBRATING)
        harder = bool(np.quantile(needed[other], SHARE) > np.quantile(needed[kind], SHARE))
        asked = "long" if told == "short" else "short"
        found.append(
            {
                "part": "coverage",
                "configuration": f"{label}, calibrated with {told} answers, asked {asked} ones",
                **row,
                **({"expected_to_fail": True} if harder else {}),
            }
        )
    return found


def useful(ground: Ground) -> list[dict[str, Any]]:
    """Shares rescored by bytes, k and rows of the corpus."""
    found = []
    sizes = (SMALL, 10_000, ground.rows)
    order = np.random.default_rng(4).permutation(ground.rows)
    cosines = ground.cosines
    kinds: list[tuple[str, Estimates]] = [
        (codes, ground.estimates(codes, dimensions)) for codes, dimensions in CODES
    ]
    kinds.append(("BM25", ground.bm25()))
    cases = [
        (size, codes, estimates, k, until)
        for size in sizes
        for codes, estimates in kinds
        for k in BUDGETS
        for until in _certificates(estimates)
    ]
    for size, codes, estimates, k, until in show_progress("usefulness", cases):
        rows = np.isin(np.arange(ground.rows), order[:size])
        share = BUDGETS[k] if size == ground.rows else 5 * BUDGETS[k]
        row = usefulness(estimates, cosines, rows, k, share, until, calibrating=150)
        found.append({"part": "usefulness", "codes": codes, **row})
    return found


def _certificates(estimates: Estimates) -> tuple[Until, ...]:
    return ("sketch", "calibration") if estimates.lawful else ("calibration",)


def costs(ground: Ground) -> list[dict[str, Any]]:
    """Rescoring beside plain forward passes of the same batches; a query of 1,000 rows by stage."""
    retriever = Retriever(ground.index, TOKEN_BUDGET)
    directions, _ = retriever.directions(ground.asked[0])
    rows = np.random.default_rng(0).permutation(ground.rows)[:1000]
    scorer = GradientScorer(ground.loaded, ground.index.examples, TOKEN_BUDGET)
    wanted = [(directions, rows)]
    sequences = [ground.sequences[row] for row in rows]
    batches = [
        collate([sequences[p] for p in positions])
        for positions in plan_batches([len(s.tokens) for s in sequences], TOKEN_BUDGET)
    ]
    scorer.score(wanted)
    forward(ground, batches)
    pairs = [
        (_seconds(lambda: scorer.score(wanted)), _seconds(lambda: forward(ground, batches)))
        for _ in range(7)
    ]
    rescoring, plain_forward = (float(np.min(times)) for times in zip(*pairs, strict=True))
    prompt, said = ground.subject.queries[NOISE_QUERIES]
    query = Query(prompt=prompt, completion=said, k=1000, budget=1000, seed=1)
    answers = [retriever.answer(query) for _ in range(3)]
    best = min(answers, key=lambda answer: sum(answer.seconds.values()))
    return [
        {
            "part": "cost",
            "model": "the benchmark's (GPT-2 of 4 layers, width 128)",
            "device": str(ground.loaded.device),
            "threads": torch.get_num_threads(),
            "instructions": torch.backends.cpu.get_cpu_capability(),
            "rows": len(rows),
            "seconds": rescoring,
            "forward_seconds": plain_forward,
            "ratio_to_forward": rescoring / plain_forward,
            "query_rescored_rows": best.rescored_rows,
            "query_seconds": best.seconds,
        }
    ]


def forward(ground: Ground, batches: list[TokenBatch]) -> None:
    """Plain forward passes, the floor of rescoring."""
    with torch.no_grad():
        for batch in batches:
            batch = batch.to(ground.loaded.device)
            ground.loaded.model(input_ids=batch.input_ids, use_cache=False)


def _seconds(work: Any) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def show(rows: list[dict[str, Any]]) -> None:
    """The tables for people."""
    for part, headings in (
        (
            "coverage",
            ("certificate", "configuration", "trials", "violations", "certified", "valid"),
        ),
        (
            "usefulness",
            (
                "corpus_rows",
                "codes",
                "bytes_per_example",
                "k",
                "certificate",
                "rescored_share_max",
                "certified_share",
                "reached_share",
                "rescored_share_median",
                "sufficient_share_median",
            ),
        ),
        ("cost", ("device", "rows", "seconds", "forward_seconds", "ratio_to_forward")),
    ):
        chosen = [row for row in rows if row["part"] == part]
        if not chosen:
            continue
        table = Table(title=part.capitalize(), title_justify="left")
        for heading in headings:
            table.add_column(heading.replace("_", " "))
        for row in chosen:
            table.add_row(*(_cell(row.get(heading)) for heading in headings))
        stderr.print(table)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
