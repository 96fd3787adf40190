"""Making an index' calibration: queries are scored exactly against every row."""

import time
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from estimators.model.progress import Progress, no_progress
from index.codes.vectors import best_rows
from index.files import sha256_of, write_sealed
from index.manifest import FILE_NAME as MANIFEST
from service.models import BadQuery
from service.scoring.exhaustive import exact_scores
from service.search.asked import read
from service.search.calibration import DEEPEST, FILE_NAME, RANKINGS, CalibrationRecord, TopRecord
from service.search.opening import OpenIndex
from service.search.proxies import CALIBRATION_SLACK, Proxies
from service.search.query import Query, Ranking, Term
from service.search.retrieval import Retriever


def calibrate_index(
    index: OpenIndex,
    queries: Sequence[Term],
    token_budget: int = 1024,
    progress: Progress = no_progress,
) -> CalibrationRecord:
    """Score queries against every row and keep, beside the manifest, how far each had to search.

    Statements from it hold for queries of the same kind. Takes a forward and backward pass over the
    whole corpus, and for each query as many products as the model has attributed weights, a row.

    Args:
        index: opened.
        queries: prompts or conversations, with completions (None: the model's own).
        token_budget: padded tokens in a batch.
        progress: shows the batches.

    Raises:
        BadQuery: there is none, or one cannot be measured.
    """
    start = time.perf_counter()
    if not queries:
        raise BadQuery("There is no calibration query; give one a line.")
    loaded, retriever = index.loaded, Retriever(index, token_budget)
    asked = [read(loaded, Query(batch=(query,)))[0].sequence for query in queries]
    truth = exact_scores(
        loaded,
        {"": index.estimators.own.directions},
        index.examples,
        asked,
        token_budget=token_budget,
        progress=progress,
    )[""]
    tops: dict[Ranking, list[TopRecord]] = {ranking: [] for ranking in RANKINGS}
    for sequence, scores in zip(progress("depths", asked), truth, strict=True):
        directions, _ = retriever.directions(sequence)
        for ranking in RANKINGS:
            proxies = retriever.proxies(directions, ranking)
            tops[ranking].append(best_of(scores, proxies))
    record = CalibrationRecord(
        manifest_sha256=sha256_of(index.folder / MANIFEST),
        relative=max(index.manifest.sketch.noise.relative, CALIBRATION_SLACK),
        tops=tops,
        seconds=time.perf_counter() - start,
    )
    write_sealed(index.folder / FILE_NAME, record.model_dump(mode="json"))
    return record


def best_of(scores: Float[np.ndarray, "row"], proxies: Proxies) -> TopRecord:
    """The best rows by exact value, with their proxies."""
    values = scores / proxies.divisors
    values[~np.isfinite(values)] = -np.inf
    rows = best_rows(values, DEEPEST)
    rows = rows[np.isfinite(values[rows])]
    return TopRecord(
        exact=values[rows].tolist(),
        proxies=proxies.values[rows].tolist(),
        sigmas=proxies.sigmas[rows].tolist(),
    )
