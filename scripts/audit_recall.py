"""Audit an index: two-stage answers against exact scores, and whether the certificates held."""

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import typer
from rich.table import Table
from scipy import stats

from estimators.chosen import GradientEstimator, RowEstimator
from estimators.grounds import Questions
from estimators.model.tokens import Sequence1D
from index.certificates.calibration import SHARE
from index.manifest import Manifest
from scripts import options
from scripts.console import (
    one_sentence_errors,
    parse_estimator,
    print_json,
    print_plain,
    show_progress,
    stderr,
)
from service.models import load_model
from service.scoring.exhaustive import exact_scores
from service.search.answer import Answer
from service.search.opening import open_index
from service.search.query import Query, Term
from service.search.retrieval import Retriever

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
TIE = 1e-5
"""Relative difference below which two exact scores count as tied (float32 batches differ so)."""
SLACK = 1e-4
"""By which a share may lie outside its interval for the same reason."""


@app.command()
@one_sentence_errors
def main(
    model: options.Model,
    index: Annotated[Path, typer.Option(help="Folder of the index.")],
    queries: Annotated[
        Path,
        typer.Option(help="JSONL with 'prompt' and 'completion'; without it the model completes."),
    ],
    revision: options.Revision = None,
    tokenizer: options.Tokenizer = None,
    base_model: options.BaseModel = None,
    unused_weights: options.UnusedWeights = False,
    limit: Annotated[int, typer.Option(help="Use the first so many queries.")] = 100,
    k: Annotated[int, typer.Option(help="Training examples an answer.")] = 10,
    ranking: Annotated[
        Literal["normalised", "score"], typer.Option(help="See etymon query --help.")
    ] = "normalised",
    recall: Annotated[float, typer.Option(help="Recall to certify.")] = 0.9,
    confidence: Annotated[float, typer.Option(help="Of each certificate.")] = 0.95,
    budget: Annotated[int, typer.Option(help="Most rows to rescore a query.")] = 1000,
    sample: Annotated[
        int | None,
        typer.Option(
            help="Compare with so many random rows instead of the whole corpus, where exact "
            "scores of everything would take too long. Recall is then over these rows."
        ),
    ] = None,
    until: Annotated[
        Literal["sketch", "calibration"], typer.Option(help="Certificate at which searches stop.")
    ] = "sketch",
    estimator: Annotated[
        list[str] | None,
        typer.Option(
            help="That scores: NAME or NAME:PARAMETER=VALUE,..., e.g. kfac or ekfac:damping=0.01; "
            "may be repeated, each is audited. Left out: the one that the index was built for."
        ),
    ] = None,
    html: Annotated[
        Path | None, typer.Option(help="Write the report as one page with plots, too.")
    ] = None,
    token_budget: options.TokenBudget = 1024,
    seed: Annotated[int, typer.Option(help="Of all random rows.")] = 0,
    device: options.Device = "cpu",
    dtype: options.DType = "auto",
) -> None:
    r"""Measure the recall of an index, and whether its certificates hold.

    For each query it computes the two-stage answer, the exact scores of
    every row (or of a sample), the recall@k of the one against the other,
    and whether each certificate's bound held. Queries must not be those
    that the index was calibrated with. It exits with 2 when more bounds
    failed than their confidence allows.

    Example:
    etymon audit --model runs/demo/model --index runs/demo/index \
      --queries queries.jsonl --html audit.html
    """
    start = time.perf_counter()
    source = options.model_source(model, revision, tokenizer, base_model, unused_weights)
    source = source.completed(Manifest.read(index).model)
    loaded = load_model(source, device=device, dtype=dtype)
    for note in loaded.notes:
        print_plain(note)
    retriever = Retriever(open_index(index, loaded), token_budget)
    asked = options.read_queries(queries, limit)
    rows = _rows_to_compare(len(retriever.index.examples), sample, seed)
    usual = Query(
        k=k, ranking=ranking, recall=recall, confidence=confidence, budget=budget, until=until
    )
    chosen = [replace(usual, **_estimator(text)) for text in estimator or []] or [usual]
    answered = [_answers(retriever, query, asked, seed) for query in chosen]
    scored = _true_scores(retriever, answered, rows, token_budget)
    norms = retriever.index.norms[rows]
    truths = [_ranking_values(a, s, norms) for a, s in zip(answered, scored, strict=True)]
    reports = [
        {
            **summarise(answers, truth, rows, k, confidence),
            "shares": summarise_shares(answers, scores, rows),
        }
        for answers, truth, scores in zip(answered, truths, scored, strict=True)
    ]
    if html is not None:
        first = answered[0], truths[0]
        _write_page(html, reports[0], retriever, *first, rows, confidence, seed)
    report = {**reports[0], "others": reports[1:], "seconds": time.perf_counter() - start}
    _show(report, confidence)
    print_json(report)
    if any(one["violations_beyond_chance"] for one in reports):
        raise typer.Exit(2)


def _estimator(text: str) -> dict[str, Any]:
    name, parameters = parse_estimator(text)
    return {"estimator": name, "parameters": parameters}


def _answers(retriever: Retriever, query: Query, asked: Sequence[Term], seed: int) -> list[Answer]:
    return [
        retriever.answer(replace(query, batch=(term,), seed=seed + number))
        for number, term in enumerate(
            show_progress(f"answers by {query.estimator or 'the index'}", asked)
        )
    ]


def _write_page(
    path: Path,
    report: dict[str, Any],
    retriever: Retriever,
    answers: Sequence[Answer],
    truth: np.ndarray,
    rows: list[int],
    confidence: float,
    seed: int,
) -> None:
    """The page; its curve and its errors of proxies need the exact scores of every row.

    Raises:
        ValueError: the libraries that draw it are not installed.
    """
    try:
        from scripts.report.audit import RESIDUALS, residuals, rows_needed, write_report
    except ModuleNotFoundError as error:
        raise ValueError(
            f"The report needs the package {error.name}; install the extra 'report'."
        ) from error
    needed, errors = [], []
    first = answers[0]
    estimator = retriever.index.estimators.choose_gradients(first.estimator, first.parameters)
    if len(rows) == first.rows:
        for number, (answer, values) in enumerate(zip(answers, truth, strict=True)):
            directions, _ = retriever.directions(_sequence(answer), estimator)
            proxies = retriever.proxies(directions, first.ranking)
            needed.append(rows_needed(values, proxies, report["k"]))
            errors += residuals(values, proxies, RESIDUALS // len(answers) + 1, seed + number)
    write_report(path, report, answers, needed, errors, confidence)
    stderr.print(f"The report is in {path}.", highlight=False)


def _sequence(answer: Answer) -> Sequence1D:
    (term,) = answer.terms
    assert term.sequence is not None  # of every answer of a search
    return term.sequence


def _rows_to_compare(total: int, sample: int | None, seed: int) -> list[int]:
    if sample is None or sample >= total:
        return list(range(total))
    drawn = np.random.default_rng(seed).choice(total, size=sample, replace=False)
    return sorted(drawn.tolist())


def _true_scores(
    retriever: Retriever, answered: Sequence[Sequence[Answer]], rows: list[int], budget: int
) -> list[np.ndarray]:
    """For each estimator, exact scores [query, row] of ``rows``; NaN where there is none.

    Every training gradient is formed once, however many estimators ask for it.
    """
    index, first = retriever.index, answered[0]
    sequences = [_sequence(answer) for answer in first]
    texts = [[(a.prompt + a.completion, 1.0)] for a in first]
    questions = Questions(sequences=[[(sequence, 1.0)] for sequence in sequences], texts=texts)
    chosen = [index.estimators.choose(a[0].estimator, a[0].parameters) for a in answered]
    scores = exact_scores(
        retriever.loaded,
        {e.fingerprint: e.directions for e in chosen if isinstance(e, GradientEstimator)},
        index.examples,
        sequences,
        rows=rows,
        token_budget=budget,
        progress=show_progress,
    )
    for one in chosen:
        if isinstance(one, RowEstimator):
            scores[one.fingerprint] = one.part.score(questions, np.array(rows), one.values)
    return [scores[one.fingerprint] for one in chosen]


def _ranking_values(answers: Sequence[Answer], scores: np.ndarray, norms: np.ndarray) -> np.ndarray:
    """What the answers are ranked by; -inf where there is no score."""
    values = scores
    if answers[0].ranking == "normalised":
        values = np.divide(values, norms, out=np.zeros_like(values), where=norms > 0)
    return np.where(np.isfinite(values), values, -np.inf)


def summarise(
    answers: Sequence[Answer], truth: np.ndarray, rows: list[int], k: int, confidence: float
) -> dict[str, Any]:
    """Recall of each answer and of the certificates, as the JSON report.

    With a sample of rows, an answer's recall is over the sample's own best ``k * sample / corpus``
    rows: a noisy view, by which no bound is judged.
    """
    whole = answers[0].rows
    depth = max(1, round(k * len(rows) / whole))
    position = {row: i for i, row in enumerate(rows)}
    per_query = []
    for answer, values in zip(answers, truth, strict=True):
        top = np.sort(values)[-depth:]
        threshold = top[0] - TIE * abs(top[0])
        found = [position[r.row] for r in answer.results if r.row in position]
        hits = int(np.sum(values[found] >= threshold)) if found else 0
        bounds = {c.type: (c.recall_lower_bound, c.status) for c in answer.certificates}
        true_recall = min(1.0, hits / depth)
        per_query.append(
            {
                "prompt": answer.prompt,
                "completion": answer.completion,
                "recall": true_recall,
                "rescored_rows": answer.rescored_rows,
                "sampled_rows": answer.sampled_rows,
                "certificates": {
                    kind: {
                        "bound": bound,
                        "status": status,
                        "held": None
                        if len(rows) < whole
                        else bound is None or true_recall >= bound - 1e-9,
                    }
                    for kind, (bound, status) in bounds.items()
                },
            }
        )
    return _totals(per_query, answers, len(rows), k, confidence)


def summarise_shares(
    answers: Sequence[Answer], scores: np.ndarray, rows: list[int]
) -> dict[str, Any] | None:
    """The share of all positive influence that results carry, and how many intervals held it.

    None where only a sample of the rows was scored, or no answer states a share.
    """
    stated, true, held = [], [], []
    for answer, exact in zip(answers, scores, strict=True):
        ((_, share),) = answer.sided_shares
        if len(rows) == answer.rows and share.low is not None and share.high is not None:
            positive = np.maximum(np.nan_to_num(exact), 0).astype(np.float64)
            carried = positive[[result.row for result in answer.results]].sum() / positive.sum()
            stated.append(share.high - share.low)
            true.append(float(carried))
            held.append(share.low - SLACK <= carried <= share.high + SLACK)
    if not stated:
        return None
    return {
        "mean": float(np.mean(true)),
        "intervals": len(stated),
        "held": int(np.sum(held)),
        "median_width": float(np.median(stated)),
    }


def _totals(
    per_query: list[dict[str, Any]],
    answers: Sequence[Answer],
    compared: int,
    k: int,
    confidence: float,
) -> dict[str, Any]:
    certificates = {}
    beyond = False
    for certificate in answers[0].certificates:
        entries = [query["certificates"][certificate.type] for query in per_query]
        violations = sum(entry["held"] is False for entry in entries)
        rate = 1 - SHARE if certificate.type == "calibration" else 1 - confidence
        allowed = _allowed_violations(len(entries), rate)
        beyond = beyond or violations > allowed
        certificates[certificate.type] = {
            "certified": sum(e["status"] in ("certified", "exhaustive") for e in entries),
            "refused": sum(e["status"] == "refused" for e in entries),
            "violations": violations,
            "allowed_violations": allowed,
            "beyond_chance": violations > allowed,
        }
    return {
        "estimator": answers[0].estimator,
        "parameters": answers[0].parameters,
        "queries": len(per_query),
        "rows": answers[0].rows,
        "compared_rows": compared,
        "k": k,
        "mean_recall": float(np.mean([query["recall"] for query in per_query])),
        "lowest_recall": min(query["recall"] for query in per_query),
        "median_rescored_rows": float(np.median([q["rescored_rows"] for q in per_query])),
        "certificates": certificates,
        "violations_beyond_chance": beyond,
        "per_query": per_query,
    }


def _allowed_violations(trials: int, rate: float) -> int:
    """What 99.9 % of audits stay within if each statement fails as often as it may."""
    return int(stats.binom.ppf(0.999, trials, rate))


def _show(report: dict[str, Any], confidence: float) -> None:
    title = f"Recall audit of {report['queries']} queries by {_named(report)}"
    table = Table(title=title, title_justify="left")
    for heading in ("certificate", "certified", "refused", "bounds that failed", "may fail"):
        table.add_column(heading)
    for kind, counts in report["certificates"].items():
        table.add_row(
            kind,
            f"{counts['certified']} of {report['queries']}",
            str(counts["refused"]),
            str(counts["violations"]),
            str(counts["allowed_violations"]),
        )
    stderr.print(table)
    scope = (
        "every row"
        if report["compared_rows"] == report["rows"]
        else f"a sample of {report['compared_rows']:,} rows"
    )
    stderr.print(
        f"Recall@{report['k']} against exact scores of {scope}: mean {report['mean_recall']:.3f}, "
        f"lowest {report['lowest_recall']:.2f}; rescored {report['median_rescored_rows']:.0f} of "
        f"{report['rows']:,} rows a query (median). Each certificate states its bound at "
        f"{confidence:.0%} confidence.",
        highlight=False,
        soft_wrap=True,
    )
    if report["shares"] is not None:
        stderr.print(_shares_line(report["shares"], confidence), highlight=False, soft_wrap=True)
    for other in report["others"]:
        stderr.print(_line(other), highlight=False, soft_wrap=True)


def _shares_line(shares: dict[str, Any], confidence: float) -> str:
    return (
        f"The results carry {shares['mean']:.1%} of all positive influence (mean); "
        f"{shares['held']} of {shares['intervals']} intervals, stated at {confidence:.0%} "
        f"confidence, held the truth (median width {100 * shares['median_width']:.1f} points)."
    )


def _named(report: dict[str, Any]) -> str:
    """The estimator with its parameters."""
    values = ", ".join(f"{key} {value:g}" for key, value in report["parameters"].items())
    return f"{report['estimator']} ({values})" if values else str(report["estimator"])


def _line(report: dict[str, Any]) -> str:
    """One more estimator's audit in a line."""
    sketch = report["certificates"]["sketch"]
    broken = sum(counts["violations"] for counts in report["certificates"].values())
    return (
        f"{_named(report)}: recall@{report['k']} mean {report['mean_recall']:.3f}, lowest "
        f"{report['lowest_recall']:.2f}; {sketch['certified']} of {report['queries']} certified by "
        f"the sketch, {broken} bounds broken; rescored {report['median_rescored_rows']:.0f} rows."
    )


if __name__ == "__main__":
    app()
