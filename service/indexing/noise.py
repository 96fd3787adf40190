"""Measuring the sketch's error on the corpus itself, at the end of a build."""

from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float
from scipy import stats
from torch import Tensor

from estimators.chosen import DirectionsOf
from estimators.grounds import training_sequence
from estimators.model.tokens import Sequence1D
from estimators.sketching.slices import SketchSlices
from index.codes.signs import estimate_signs
from index.codes.vectors import DISTORTIONS
from index.examples import ExampleStore
from index.manifest import NoiseRecord
from service.coding import coded_index, later_looks
from service.indexing.sketching import ShardJob
from service.models import LoadedModel
from service.scoring.exhaustive import exact_scores, queries_at_once

QUERIES = 16
FEWEST_QUERIES = 6
"""For large models, whose query gradients fill the memory: otherwise as many as fit at once."""
ROWS = 512
LARGEST = 5
"""Pairs a query, of the largest cosines, from which the relative noise is estimated."""
SEED = 0
"""Of the pairs; the sketch has a seed of its own, so that the two are independent."""


def measure_noise(
    loaded: LoadedModel,
    directions_of: DirectionsOf,
    sketches: SketchSlices,
    codes: str,
    examples: ExampleStore,
    token_budget: int,
) -> list[NoiseRecord]:
    """Error of the proxy in cosine units, over pseudo-queries and rows drawn from the corpus.

    Of the first slice's, and after each later look at more of the slices.

    A pseudo-query asks for the second half of a training example given its first half. Rows are the
    examples that the pseudo-queries are made of, for large cosines, and others at random. Needs a
    forward and backward pass over at most 528 examples to sketch them, and one to score them (for a
    model so large that not even six query gradients fit into memory, one for each part of them).

    Args:
        loaded: the model with the layers to attribute.
        directions_of: of the estimator that the index is built for.
        sketches: of the index.
        codes: the index' kind of code.
        examples: the corpus, without rows that failed or were deleted.
        token_budget: padded tokens in a batch.

    Raises:
        ValueError: no example has the four tokens that a pseudo-query needs.
    """
    generator = np.random.default_rng(SEED)
    count = min(QUERIES, max(FEWEST_QUERIES, queries_at_once(loaded, estimators=1)))
    asked = generator.permutation(np.flatnonzero(examples.lengths() >= 4))[:count]
    if not len(asked):
        raise ValueError("No example has four tokens or more; check the text column.")
    rows = np.union1d(asked, generator.permutation(len(examples))[:ROWS])
    queries = [_second_half(examples.tokens(int(i))) for i in asked]
    sketched: list[list[tuple[Tensor, Tensor]]] = []
    exact = exact_scores(
        loaded,
        {"": directions_of},
        examples,
        queries,
        rows=rows.tolist(),
        token_budget=token_budget,
        watch=lambda directions: sketched.append(sketches.query(directions)),
    )[""]
    asked_by_slice = [
        torch.cat([parts[number][0] for parts in sketched]).cpu().numpy()
        for number in range(len(sketches))
    ]
    query_norms = torch.cat([parts[0][1] for parts in sketched]).cpu().numpy()
    drawn = [training_sequence(examples, int(row)) for row in rows]
    job = ShardJob(
        part=Path(), loaded=loaded, sketches=sketches, codes=codes, token_budget=token_budget
    )
    coded = job.encode(drawn)
    index = coded_index(codes, sketches.first)
    index.add(index.pack(coded.codes), len(coded.codes))
    proxies = [_cosines(index.scan(asked_by_slice[0]), asked_by_slice[0])]
    for number, y in enumerate(asked_by_slice[1:]):
        proxies.append(_cosines(estimate_signs(coded.further[:, number], y), y))
    cosines = exact / np.where(coded.norms > 0, coded.norms, 1) / query_norms[:, None]
    distortion = DISTORTIONS.get(codes, 0.0)
    return [
        noise_record(
            sketches.predicted_noise(count, distortion),
            np.mean(proxies[:count], axis=0) - cosines,
            cosines,
            coded.norms > 0,
        )
        for count in [1, *later_looks(len(sketches))]
    ]


def _cosines(
    products: Float[np.ndarray, "query row"], y: Float[np.ndarray, "query dimension"]
) -> Float[np.ndarray, "query row"]:
    cosines: np.ndarray = products / np.linalg.norm(y, axis=1, keepdims=True)
    return cosines


def noise_record(
    predicted: float,
    residuals: Float[np.ndarray, "query row"],
    cosines: Float[np.ndarray, "query row"],
    live: Bool[np.ndarray, "row"],
) -> NoiseRecord:
    """Noise from all but each query's ``LARGEST`` cosines, relative noise from these.

    The relative variance is the ratio of the mean of ``residual^2 - noise^2`` to that of
    ``cosine^2``, plus one standard error, so that it is seldom too small. (A least-squares slope
    would let the few largest cosines decide, where the error is relatively smallest.)
    """
    large = np.zeros(cosines.shape, dtype=bool)
    np.put_along_axis(large, np.argsort(-np.abs(cosines), axis=1)[:, :LARGEST], True, axis=1)
    small = residuals[~large & live]
    if len(small) < 2:  # a corpus of a few rows
        return NoiseRecord(predicted=predicted, measured=0.0, relative=0.0, kurtosis=0.0, pairs=0)
    noise = max(predicted, float(np.sqrt(np.mean(small**2))))
    squares = cosines[large & live] ** 2
    excess = residuals[large & live] ** 2 - noise**2
    slope = float(np.mean(excess) / np.mean(squares))
    spread = excess - slope * squares
    error = float(np.std(spread) / np.sqrt(len(spread)) / np.mean(squares))
    return NoiseRecord(
        predicted=predicted,
        measured=float(np.sqrt(np.mean(small**2))),
        relative=float(np.sqrt(max(0.0, slope + error))),
        kurtosis=float(stats.kurtosis(small, fisher=False)),
        pairs=len(small),
    )


def _second_half(tokens: tuple[int, ...]) -> Sequence1D:
    return Sequence1D(tokens=tokens, first_target=len(tokens) // 2)
