"""Exact scores of training rows for queries, from the model's gradients."""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, Int

from estimators.gradients import Gradients
from estimators.rescoring import ScoreParts, score_batch, score_batch_where_wanted
from estimators.tokens import Sequence1D, collate, plan_batches
from index.examples import ExampleStore
from service.models import LoadedModel


class GradientScorer:
    """Scores rows by one directional derivative each, in batches of similar length.

    Args:
        loaded: the model with the layers to attribute.
        examples: the corpus.
        token_budget: padded tokens in a batch.
    """

    def __init__(self, loaded: LoadedModel, examples: ExampleStore, token_budget: int) -> None:
        self._loaded = loaded
        self._examples = examples
        self._token_budget = token_budget

    def score(
        self, wanted: Sequence[tuple[Gradients, Int[np.ndarray, "row"]]]
    ) -> list[Float[np.ndarray, "row"]]:
        """Exact scores in nats, positive = proponent; NaN where not finite.

        A row that several queries want goes through the model once.

        Args:
            wanted: of each query its direction ([in, out] a layer, from ``query_directions``) and
                the rows, each at most once.
        """
        union = np.unique(np.concatenate([rows for _, rows in wanted]))
        places = [np.searchsorted(union, rows) for _, rows in wanted]
        table = np.zeros((len(wanted), len(union)), dtype=bool)
        for number, place in enumerate(places):
            table[number, place] = True
        scores = np.full(table.shape, np.nan)
        sequences = [Sequence1D(tokens=self._examples.tokens(int(row))) for row in union]
        for positions in plan_batches([len(s.tokens) for s in sequences], self._token_budget):
            asking = np.flatnonzero(table[:, positions].any(1))
            places_in_table = np.ix_(asking, np.array(positions))
            found = score_batch_where_wanted(
                self._loaded.model,
                self._loaded.coverage.layers,
                [wanted[number][0] for number in asking.tolist()],
                torch.from_numpy(table[places_in_table]),
                collate([sequences[p] for p in positions]).to(self._loaded.device),
            )
            scores[places_in_table] = found.double().cpu().numpy()
        scores[~np.isfinite(scores)] = np.nan
        return [scores[number, place] for number, place in enumerate(places)]

    def parts(self, directions: Gradients, row: int) -> ScoreParts:
        """The exact score of one row, split over layers and positions."""
        batch = collate([Sequence1D(tokens=self._examples.tokens(row))]).to(self._loaded.device)
        return score_batch(self._loaded.model, self._loaded.coverage.layers, directions, batch)
