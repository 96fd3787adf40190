"""Measuring the sketch's error on the corpus itself, at the end of a build."""

from collections.abc import Collection, Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float
from scipy import stats
from torch import Tensor

from estimators.contracts import Estimator
from estimators.rescoring import query_directions, query_gradients, score_batch_for_queries
from estimators.sketch import Sketch
from estimators.tokens import Sequence1D, collate, plan_batches
from index.examples import Example
from index.manifest import NoiseRecord
from index.vectors import VectorIndex
from service.models import LoadedModel

QUERIES = 16
ROWS = 512
LARGEST = 5
"""Pairs a query, of the largest cosines, from which the relative noise is estimated."""
SEED = 0
"""Of the pairs; the sketch has a seed of its own, so that the two are independent."""


def measure_noise(
    loaded: LoadedModel,
    estimator: Estimator,
    damping: float,
    sketch: Sketch,
    index: VectorIndex,
    examples: Sequence[Example],
    failed: Collection[int],
    token_budget: int,
) -> NoiseRecord:
    """Error of the proxy in cosine units, over pseudo-queries and rows drawn from the corpus.

    A pseudo-query asks for the second half of a training example given its first half. Rows are the
    examples that the pseudo-queries are made of, for large cosines, and others at random;
    ``failed`` rows are left out. Needs a forward and backward pass over at most 528 examples.

    Args:
        loaded: the model with the layers to attribute.
        estimator: fitted.
        damping: relative.
        sketch: of the index.
        index: empty, of the index' kind of code; it is filled with the drawn rows.
        examples: the corpus.
        failed: rows without a finite gradient.
        token_budget: padded tokens in a batch.

    Raises:
        ValueError: no example has the four tokens that a pseudo-query needs.
    """
    generator = np.random.default_rng(SEED)
    sound = [i for i in range(len(examples)) if i not in failed]
    asked = generator.permutation([i for i in sound if len(examples[i].tokens) >= 4])[:QUERIES]
    if not len(asked):
        raise ValueError("No example has four tokens or more; check the text column.")
    rows = np.union1d(asked, generator.permutation(sound)[:ROWS])
    queries = [_second_half(examples[i]) for i in asked]
    gradients, _ = query_gradients(loaded.model, loaded.coverage.layers, queries)
    directions = query_directions(estimator, gradients, damping)
    y, query_norms = (part.cpu().numpy() for part in sketch.query(directions))
    drawn = [examples[i] for i in rows]
    exact, units, norms = _score_and_sketch(loaded, directions, sketch, drawn, token_budget)
    index.add(index.encode(units))
    proxies = np.stack([index.inner_products(query) for query in y])
    proxies /= np.linalg.norm(y, axis=1, keepdims=True)
    cosines = exact / np.where(norms > 0, norms, 1) / query_norms[:, None]
    return _summarise(sketch.predicted_noise(), proxies - cosines, cosines, norms > 0)


def _summarise(
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


def _second_half(example: Example) -> Sequence1D:
    return Sequence1D(tokens=example.tokens, first_target=len(example.tokens) // 2)


def _score_and_sketch(
    loaded: LoadedModel,
    directions: dict[str, Tensor],
    sketch: Sketch,
    examples: Sequence[Example],
    token_budget: int,
) -> tuple[
    Float[np.ndarray, "query row"], Float[np.ndarray, "row dimension"], Float[np.ndarray, "row"]
]:
    """Exact scores, unit sketches and whitened norms of ``examples``."""
    exact, units, norms = [], [], []
    order: list[int] = []
    for positions in plan_batches([len(example.tokens) for example in examples], token_budget):
        sequences = [Sequence1D(tokens=examples[p].tokens) for p in positions]
        batch = collate(sequences).to(loaded.device)
        layers = loaded.coverage.layers
        exact.append(score_batch_for_queries(loaded.model, layers, directions, batch))
        x, norm = sketch.training(loaded.model, batch)
        length = torch.linalg.vector_norm(x, dim=1, keepdim=True)
        units.append(torch.where(length > 0, x / length, 0))
        norms.append(norm)
        order += positions
    back = np.argsort(order)
    return (
        torch.cat(exact, dim=1).cpu().numpy()[:, back],
        torch.cat(units).cpu().numpy()[back],
        torch.cat(norms).cpu().numpy()[back],
    )
