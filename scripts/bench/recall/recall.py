"""Recall per byte: how many of the best examples a shortlist by proxy holds, at each index size."""

import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from jaxtyping import Float
from rich.table import Table

from estimators.grounds import training_sequence
from estimators.model.tokens import Sequence1D
from estimators.operators.ekfac import EKFac
from estimators.storage import load_factors
from scripts import options
from scripts.bench.corpora import TEXTS, Subject, factbook, trained
from scripts.bench.recall.bergson import bergson_installed, bergson_proxies
from scripts.bench.recall.layouts import Proxies, other_layouts
from scripts.bench.record import write_record
from scripts.console import one_sentence_errors, print_json, show_progress, stderr
from scripts.demo.steps import Steps
from service.corpus.source import CorpusSource
from service.indexing.building import BuildOptions, build_index
from service.models import load_model
from service.scoring.exhaustive import exact_scores
from service.search.opening import OpenIndex, open_index
from service.search.query import Ranking
from service.search.retrieval import Retriever
from service.versions import revision

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
DIMENSIONS = (4096, 8192, 16384, 32768, 65536)
"""512 bytes to 8 KB of one-bit codes."""
DEPTHS = {"r10_at_50": (10, 50), "r50_at_250": (50, 250), "r100_at_1000": (100, 1000)}
ID_BYTES = 8
"""Counted for a row's id, though rows are found by their position."""
BUDGET = 2150
"""2.1 KB: the size at which the targets are judged."""
TARGETS = {"r10_at_50": 0.99, "r50_at_250": 0.96}
OURS = ("one-bit", "low-rank")
"""Kinds of code that are measured, each at all sizes."""
SKETCH_SEED = 1
DAMPING = 0.1


@dataclass(frozen=True, kw_only=True)
class Row:
    """One layout at one size on one corpus.

    Attributes:
        corpus: name.
        layout: "etymon" or what the others store.
        codes: our kind of code; empty for the others.
        ranking: "score" or "normalised", the exact ranking that is looked for.
        bytes_per_example: stored, everything counted for ours (codes, their factors, norm, id);
            the projections or factors alone for the others.
        r10_at_50: share of the exact top 10 within the best 50 by proxy, mean over queries.
        r50_at_250: of the top 50 within the best 250.
        r100_at_1000: of the top 100 within the best 1,000.
        queries: how many.
        examples: of the corpus.
        commit: of this code.
    """

    corpus: str
    layout: str
    codes: str
    ranking: Ranking
    bytes_per_example: int
    r10_at_50: float
    r50_at_250: float
    r100_at_1000: float
    queries: int
    examples: int
    commit: str


@app.command()
@one_sentence_errors
def main(
    out: Annotated[Path, typer.Option(help="Folder for models and indexes.")] = Path(
        "runs/bench-recall"
    ),
    demo: Annotated[
        Path, typer.Option(help="Where `make demo` left its model, used if it is there.")
    ] = Path("runs/demo"),
    corpora: Annotated[str, typer.Option(help="Of factbook, profiles, foldoc, speeches.")] = (
        "factbook,profiles,foldoc"
    ),
    queries: Annotated[int, typer.Option(min=1, help="Of each corpus.")] = 100,
    rows: Annotated[int, typer.Option(min=100, help="Texts of the other corpora.")] = 8000,
    epochs: Annotated[int, typer.Option(min=1, help="Over these texts.")] = 3,
    limit: options.Limit = None,
    dimensions: Annotated[str, typer.Option(help="Sizes of our index, in bits.")] = ",".join(
        map(str, DIMENSIONS)
    ),
    codes: Annotated[str, typer.Option(help="Our kinds of code.")] = ",".join(OURS),
    fit_examples: Annotated[int, typer.Option(help="Fit EK-FAC on so many.")] = 4096,
    token_budget: options.TokenBudget = 1024,
    record: Annotated[bool, typer.Option(help="Write docs/benchmarks/recall_*.json.")] = True,
) -> None:
    """Measure recall against exact EK-FAC scores of every example, beside other systems' layouts.

    Our rows come from indexes as `etymon build` builds them (separable whitening, two-sided
    first stage, then codes), opened and scanned as a query does.
    """
    start = time.perf_counter()
    names = corpora.split(",")
    unknown = sorted(set(names) - {"factbook", *TEXTS})
    if unknown:
        raise ValueError(
            f"Unknown corpus '{unknown[0]}'; choose of factbook, {', '.join(sorted(TEXTS))}."
        )
    ours = [(kind, int(size)) for kind in codes.split(",") for size in dimensions.split(",")]
    if not bergson_installed():
        stderr.print(
            "Bergson is not installed here, so its own rows are left out "
            "(the extra 'peers', in an environment of its own; see make bench-build).",
            markup=False,
            soft_wrap=True,
        )
    found: list[Row] = []
    described = {}
    for name in names:
        if name == "factbook":
            subject = factbook(out / name, demo, queries)
        else:
            subject = trained(name, out / name, queries, rows, epochs)
        described[name] = subject.description
        found += Measurement(subject, out / name, limit, fit_examples, token_budget).run(ours)
    report = {
        "rows": [asdict(row) for row in found],
        "corpora": described,
        "targets": judged(found),
        "better_at_a_quarter": quarters(found),
        "counted": "codes with their factor, norm (4 bytes), id (8 bytes)",
        "bergson": bergson_installed(),
        "seconds": time.perf_counter() - start,
    }
    show(found)
    if record:
        stderr.print(f"Recorded in {write_record('recall', report)}.")
    print_json(report)


class Measurement:
    """All layouts on one corpus.

    Args:
        subject: corpus, model and queries.
        out: folder for factors and indexes.
        limit: use the first so many examples only.
        fit_examples: fit the curvature on so many.
        token_budget: padded tokens in a batch.
    """

    def __init__(
        self, subject: Subject, out: Path, limit: int | None, fit_examples: int, token_budget: int
    ) -> None:
        self._subject = subject
        self._out = out
        self._source = CorpusSource(data=str(subject.corpus), id_column="id", limit=limit)
        self._budget = token_budget
        self._factors = out / "ekfac.safetensors"
        self._loaded = load_model(str(subject.model))
        arguments = ["--limit", str(limit)] if limit else []
        Steps().command(
            "fit",
            *("--model", str(subject.model), "--data", str(subject.corpus)),
            *("--out", str(self._factors), "--examples", str(fit_examples), *arguments),
        )

    def run(self, kinds: Sequence[tuple[str, int]]) -> list[Row]:
        """Rows of our codes, each a kind and a size in bits, and of the others."""
        asked = [self._loaded.encode_query(*query) for query in self._subject.queries]
        ours: dict[Ranking, Proxies] = {"score": {}, "normalised": {}}
        for codes, size in kinds:
            index = self._index(codes, size)
            retriever = Retriever(index, self._budget)
            directions = [retriever.directions(query)[0] for query in asked]
            stored = index.vectors.code_size + index.norms.itemsize + ID_BYTES
            name, live = f"etymon {codes} {size}", np.where(index.norms > 0, index.norms, np.inf)
            values = np.stack([retriever.proxies(d, "score").values for d in directions])
            ours["score"][name] = stored, values
            ours["normalised"][name] = stored, values / live
        examples = [training_sequence(index.examples, row) for row in range(len(index.examples))]
        truth = exact_scores(
            self._loaded,
            {"own": index.estimators.own.directions},
            index.examples,
            asked,
            token_budget=self._budget,
            progress=show_progress,
        )["own"]
        others = self._others(examples, asked)
        norms = np.where(index.norms > 0, index.norms, np.inf)
        rows = self._rows("score", truth, {**ours["score"], **others})
        # The others are given our exact norms, which they do not store.
        divided = {name: (size, values / norms) for name, (size, values) in others.items()}
        return rows + self._rows("normalised", truth / norms, {**ours["normalised"], **divided})

    def _index(self, codes: str, size: int) -> OpenIndex:
        folder = self._out / f"index-{codes}-{size}"
        shutil.rmtree(folder, ignore_errors=True)
        chosen = BuildOptions(
            dimensions=size,
            codes=codes,
            damping=DAMPING,
            seed=SKETCH_SEED,
            token_budget=self._budget,
            slices=1,
        )
        build_index(folder, self._loaded, self._factors, self._source, chosen, show_progress)
        return open_index(folder, self._loaded)

    def _others(self, examples: Sequence[Sequence1D], asked: Sequence[Sequence1D]) -> Proxies:
        ekfac = EKFac(load_factors(self._factors)[1].tensors())
        found = other_layouts(
            self._loaded, ekfac, DAMPING, examples, asked, self._budget, show_progress
        )
        if bergson_installed():
            model = self._subject.model
            found |= bergson_proxies(model, examples, asked, DAMPING, self._budget)
        return found

    def _rows(
        self, ranking: Ranking, truth: Float[np.ndarray, "query row"], layouts: Proxies
    ) -> list[Row]:
        commit = revision()
        return [
            Row(
                corpus=self._subject.name,
                layout="etymon" if name.startswith("etymon ") else name,
                codes=name.split()[1] if name.startswith("etymon ") else "",
                ranking=ranking,
                bytes_per_example=size,
                queries=len(truth),
                examples=truth.shape[1],
                commit=commit,
                **{depth: recall(truth, values, *DEPTHS[depth]) for depth in DEPTHS},
            )
            for name, (size, values) in layouts.items()
        ]


def recall(
    truth: Float[np.ndarray, "query row"], proxies: Float[np.ndarray, "query row"], k: int, m: int
) -> float:
    """Share of the top ``k`` by ``truth`` within the best ``m`` by ``proxies``, mean over queries.

    NaN counts as the worst; ties go to the lower row.
    """
    shares = []
    for exact, proxy in zip(truth, proxies, strict=True):
        best, listed = (
            np.argsort(-np.where(np.isnan(values), -np.inf, values), kind="stable")[:count]
            for values, count in ((exact, k), (proxy, m))
        )
        shares.append(np.isin(best, listed).mean())
    return float(np.mean(shares))


def judged(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """For each corpus, ranking and kind of code, our recall at most ``BUDGET`` bytes."""
    found = []
    ours = (row for row in rows if row.layout == "etymon")
    for corpus, ranking, codes in dict.fromkeys((r.corpus, r.ranking, r.codes) for r in ours):
        fitting = [r for r in _ours(rows, corpus, ranking, codes) if r.bytes_per_example <= BUDGET]
        if not fitting:
            continue
        best = max(fitting, key=lambda row: row.bytes_per_example)
        reached = {name: asdict(best)[name] for name in TARGETS}
        found.append(
            {
                "corpus": corpus,
                "ranking": ranking,
                "codes": codes,
                "bytes_per_example": best.bytes_per_example,
                **reached,
                "met": all(reached[name] >= TARGETS[name] for name in TARGETS),
            }
        )
    return found


def quarters(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """For each other layout and kind of code, whether ours at a quarter of its bytes recalls more.

    Sizes do not match exactly: side data of up to 32 bytes is let pass.
    """
    found = []
    kinds = dict.fromkeys(row.codes for row in rows if row.codes)
    for other, codes in product(rows, kinds):
        if other.layout == "etymon":
            continue
        limit = other.bytes_per_example / 4 + 32
        fitting = [
            r
            for r in _ours(rows, other.corpus, other.ranking, codes)
            if r.bytes_per_example <= limit
        ]
        if fitting:
            best = max(fitting, key=lambda row: row.bytes_per_example)
            found.append(
                {
                    "corpus": other.corpus,
                    "ranking": other.ranking,
                    "layout": other.layout,
                    "codes": codes,
                    "bytes_per_example": other.bytes_per_example,
                    "ours_bytes_per_example": best.bytes_per_example,
                    "better": {
                        depth: getattr(best, depth) >= getattr(other, depth) for depth in DEPTHS
                    },
                }
            )
    return found


def _ours(rows: Sequence[Row], corpus: str, ranking: str, codes: str) -> list[Row]:
    wanted = ("etymon", corpus, ranking, codes)
    return [r for r in rows if (r.layout, r.corpus, r.ranking, r.codes) == wanted]


def show(rows: Sequence[Row]) -> None:
    """Print a table for each corpus and ranking."""
    for corpus, ranking in dict.fromkeys((row.corpus, row.ranking) for row in rows):
        chosen = [row for row in rows if (row.corpus, row.ranking) == (corpus, ranking)]
        table = Table(
            title=f"{corpus}: {chosen[0].examples:,} examples, {chosen[0].queries} queries, "
            f"ranking by {ranking}",
            title_justify="left",
        )
        for heading in ("layout", "bytes", "R10@50", "R50@250", "R100@1000"):
            table.add_column(heading, justify="left" if heading == "layout" else "right")
        for row in chosen:
            values = (f"{getattr(row, depth):.3f}" for depth in DEPTHS)
            layout = f"{row.layout}, {row.codes}" if row.codes else row.layout
            table.add_row(layout, f"{row.bytes_per_example:,}", *values)
        stderr.print(table)
