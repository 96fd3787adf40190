"""Exact scores of training rows for one query, from the model's gradients."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from estimators.gradients import Gradients
from estimators.rescoring import score_batch
from estimators.tokens import Sequence1D, collate, plan_batches
from index.examples import ExampleStore
from service.models import LoadedModel


class GradientScorer:
    """A ``Scorer``: one directional derivative a row, in batches of similar length.

    Args:
        loaded: the model with the layers to attribute.
        examples: the corpus.
        directions: of the query, [in, out] a layer, from ``query_directions``.
        token_budget: padded tokens in a batch.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        examples: ExampleStore,
        directions: Gradients,
        token_budget: int,
    ) -> None:
        self._loaded = loaded
        self._examples = examples
        self._directions = directions
        self._token_budget = token_budget

    def score(self, rows: Sequence[int]) -> Float[np.ndarray, "scored"]:
        """Exact scores of ``rows`` in nats, positive = proponent; NaN where not finite."""
        scores = np.zeros(len(rows))
        sequences = [Sequence1D(tokens=self._examples.tokens(row)) for row in rows]
        lengths = [len(sequence.tokens) for sequence in sequences]
        layers, device = self._loaded.coverage.layers, self._loaded.device
        for positions in plan_batches(lengths, self._token_budget):
            batch = collate([sequences[p] for p in positions]).to(device)
            parts = score_batch(self._loaded.model, layers, self._directions, batch)
            scores[positions] = parts.total.double().cpu().numpy()
        scores[~np.isfinite(scores)] = np.nan
        return scores
