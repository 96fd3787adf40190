"""Exact scores of every row for many queries: the ground truth that shortlists are judged by."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from estimators.chosen import DirectionsOf
from estimators.grounds import Questions, training_sequence
from estimators.model.progress import Progress, no_progress
from estimators.model.tokens import Sequence1D, collate, plan_batches
from estimators.rescoring import query_gradients, score_batch_for_queries
from index.examples import ExampleStore
from service.models import LoadedModel

MOST_BYTES = 3 * 2**30
"""Memory that the directions of one chunk of queries may take; making them takes it twice."""

Watch = Callable[[dict[str, Tensor]], None]
"""Sees the directions of a chunk of queries, [estimator * query, in, out] a layer."""


def exact_scores(
    loaded: LoadedModel,
    estimators: Mapping[str, DirectionsOf],
    examples: ExampleStore,
    queries: Sequence[Sequence1D],
    *,
    rows: Sequence[int] | None = None,
    token_budget: int = 1024,
    progress: Progress = no_progress,
    watch: Watch | None = None,
) -> dict[str, Float[np.ndarray, "query row"]]:
    """Exact scores for each estimator, positive = proponent; NaN where not finite.

    Each training gradient is formed once a chunk of queries and serves all estimators.

    Args:
        loaded: the model with the layers to attribute.
        estimators: by a name of the caller's choice, what gives their directions.
        examples: the corpus.
        queries: prompts and completions.
        rows: rows to score; None scores all.
        token_budget: padded tokens in a batch.
        progress: shows the batches.
        watch: shown the directions of each chunk, in the order of the queries.
    """
    if not estimators:
        return {}
    chosen = list(range(len(examples))) if rows is None else list(rows)
    sequences = [training_sequence(examples, row) for row in chosen]
    lengths = [sequence.padded for sequence in sequences]
    batches = list(plan_batches(lengths, token_budget))
    names = list(estimators)
    result = {name: np.zeros((len(queries), len(chosen)), dtype=np.float32) for name in names}
    size = queries_at_once(loaded, estimators=len(names))
    for start in range(0, len(queries), size):
        part = queries[start : start + size]
        directions = _stacked_directions(loaded, estimators, part)
        if watch is not None:
            watch(directions)
        for positions in progress(f"exact scores of queries {start + 1}+", batches):
            batch = collate([sequences[p] for p in positions]).to(loaded.device)
            scores = score_batch_for_queries(
                loaded.model, loaded.coverage.layers, directions, batch
            )
            split = scores.view(len(names), len(part), -1).cpu().numpy()
            for name, values in zip(names, split, strict=True):
                result[name][start : start + len(part), positions] = values
    for values in result.values():
        values[~np.isfinite(values)] = np.nan
    return result


def queries_at_once(loaded: LoadedModel, *, estimators: int) -> int:
    """How many queries' gradients are held at a time, so that they stay within ``MOST_BYTES``."""
    parameters = sum(layer.parameters for layer in loaded.coverage.layers)
    return max(1, MOST_BYTES // (4 * parameters * estimators))


def _stacked_directions(
    loaded: LoadedModel,
    estimators: Mapping[str, DirectionsOf],
    queries: Sequence[Sequence1D],
) -> dict[str, Tensor]:
    layers = loaded.coverage.layers
    gradients, _ = query_gradients(loaded.model, layers, queries)
    questions = Questions(sequences=[[(query, 1.0)] for query in queries], gradients=gradients)
    each = [directions_of(questions) for directions_of in estimators.values()]
    if len(each) == 1:
        return each[0]
    return {layer.name: torch.cat([d.pop(layer.name) for d in each]) for layer in layers}
