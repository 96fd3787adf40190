"""Measuring the sketch's error on the corpus itself, at the end of a build."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from scipy import stats

from estimators.contracts import Estimator
from estimators.rescoring import query_directions, query_gradients, score_batch_for_queries
from estimators.sketch import Sketch
from estimators.tokens import Sequence1D, collate, plan_batches
from index.examples import Example
from index.manifest import NoiseRecord
from index.vectors import make_index
from service.models import LoadedModel

if TYPE_CHECKING:
    from service.building import BuildOptions

QUERIES = 16
ROWS = 512


def measure_noise(
    loaded: LoadedModel,
    estimator: Estimator,
    sketch: Sketch,
    examples: Sequence[Example],
    options: "BuildOptions",
) -> NoiseRecord:
    """Error of the proxy in cosine units, over pseudo-queries and rows drawn from the corpus.

    A pseudo-query asks for the second half of a training example given its first half. Pairs of an
    example with itself are left out. Needs a forward and backward pass over at most 528 examples.

    Raises:
        ValueError: no example has the four tokens that a pseudo-query needs.
    """
    generator = np.random.default_rng(0)
    long_enough = [i for i, example in enumerate(examples) if len(example.tokens) >= 4]
    if not long_enough:
        raise ValueError("No example has four tokens or more; check the text column.")
    asked = generator.permutation(long_enough)[:QUERIES]
    rows = generator.permutation(len(examples))[:ROWS]
    queries = [
        Sequence1D(tokens=examples[i].tokens, first_target=len(examples[i].tokens) // 2)
        for i in asked
    ]
    layers = loaded.coverage.layers
    gradients, _ = query_gradients(loaded.model, layers, queries)
    directions = query_directions(estimator, gradients, options.damping)
    y, query_norms = sketch.query(directions)
    index = make_index(options.codes, options.dimensions)
    exact = np.zeros((len(queries), len(rows)))
    lengths = np.zeros(len(rows))
    units = np.zeros((len(rows), options.dimensions), dtype=np.float32)
    for positions in plan_batches([len(examples[i].tokens) for i in rows], options.token_budget):
        sequences = [Sequence1D(tokens=examples[rows[p]].tokens) for p in positions]
        batch = collate(sequences).to(loaded.device)
        scores = score_batch_for_queries(loaded.model, layers, directions, batch)
        exact[:, positions] = scores.cpu().numpy()
        x, norms = sketch.training(loaded.model, batch)
        lengths[positions] = norms.cpu().numpy()
        unit = x / torch.linalg.vector_norm(x, dim=1, keepdim=True)
        units[positions] = unit.nan_to_num(0, 0, 0).cpu().numpy()
    index.add(index.encode(units))
    proxies = np.stack([index.inner_products(query) for query in y.cpu().numpy()])
    proxies /= np.linalg.norm(y.cpu().numpy(), axis=1, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):  # rows without a gradient are left out
        cosines = exact / (query_norms.cpu().numpy()[:, None] * lengths)
    keep = (asked[:, None] != rows) & (lengths > 0) & np.isfinite(cosines)
    residuals = (proxies - cosines)[keep]
    return NoiseRecord(
        predicted=sketch.predicted_noise(),
        measured=float(np.sqrt(np.mean(residuals**2))),
        kurtosis=float(stats.kurtosis(residuals, fisher=False)),
        pairs=int(keep.sum()),
    )
