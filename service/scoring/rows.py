"""Exact scores of training rows for questions, from the model's gradients or by other means."""

from collections.abc import Sequence
from typing import Any, Protocol, TypeAlias

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from estimators.chosen import RowEstimator
from estimators.grounds import Questions, training_sequence
from estimators.model.gradients import Gradients
from estimators.model.tokens import TokenBatch, collate, plan_batches
from estimators.rescoring import ScoreParts, score_batch, score_batch_for_queries
from index.examples import ExampleStore
from service.models import LoadedModel

Target: TypeAlias = Gradients | Questions
"""What rows are scored for: a direction ([in, out] a layer), or a question itself."""


class Scoring(Protocol):
    """Scores rows for one or several questions."""

    def score(
        self, wanted: Sequence[tuple[Any, Int[np.ndarray, "row"]]]
    ) -> list[Float[np.ndarray, "row"]]:
        """Exact scores of the rows that each question wants; NaN where there is none."""
        ...

    def parts(self, target: Any, rows: Sequence[int]) -> list[ScoreParts]:
        """The exact score of each row, split over layers and over the row's own positions."""
        ...


class RowScoring:
    """Scores by an estimator without gradients, which have no parts."""

    def __init__(self, estimator: RowEstimator) -> None:
        self._estimator = estimator

    def score(
        self, wanted: Sequence[tuple[Questions, Int[np.ndarray, "row"]]]
    ) -> list[Float[np.ndarray, "row"]]:
        """Exact scores of the rows that each question wants; NaN where not finite."""
        found = []
        for questions, rows in wanted:
            scores = self._estimator.part.score(questions, rows, self._estimator.values)[0]
            found.append(np.where(np.isfinite(scores), scores.astype(np.float64), np.nan))
        return found

    def parts(self, target: Questions, rows: Sequence[int]) -> list[ScoreParts]:
        """None: whoever asks for them is refused beforehand."""
        raise ValueError(f"The estimator '{self._estimator.name}' has no gradients to split.")


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
        """Exact scores, positive = proponent; NaN where not finite.

        A row that several queries want goes through the model once.

        Args:
            wanted: of each query its direction ([in, out] a layer) and
                the rows, each at most once.
        """
        union = np.unique(np.concatenate([rows for _, rows in wanted]))
        places_of = [np.searchsorted(union, rows) for _, rows in wanted]
        table = np.zeros((len(wanted), len(union)), dtype=bool)
        for number, place in enumerate(places_of):
            table[number, place] = True
        scores = np.full(table.shape, np.nan)
        sequences = [training_sequence(self._examples, int(row)) for row in union]
        lengths = np.array([sequence.padded for sequence in sequences])
        shared = table.sum(0) > 1  # each query's own rows, then those that several want
        for members in [np.flatnonzero(row & ~shared) for row in table] + [np.flatnonzero(shared)]:
            asking = np.flatnonzero(table[:, members].any(1))
            directions = _stacked([wanted[number][0] for number in asking.tolist()])
            for places in plan_batches(lengths[members].tolist(), self._token_budget):
                positions = members[places]
                batch = collate([sequences[p] for p in positions.tolist()])
                found = self._scores(directions, batch.to(self._loaded.device))
                scores[np.ix_(asking, positions)] = found.double().cpu().numpy()
        scores[~np.isfinite(scores)] = np.nan
        return [scores[number, place] for number, place in enumerate(places_of)]

    def _scores(self, directions: Gradients, batch: TokenBatch) -> Tensor:
        """[query, batch]."""
        model, layers = self._loaded.model, self._loaded.coverage.layers
        if next(iter(directions.values())).ndim == 3:
            return score_batch_for_queries(model, layers, directions, batch)
        return score_batch(model, layers, directions, batch).total[None]

    def parts(self, directions: Gradients, rows: Sequence[int]) -> list[ScoreParts]:
        """The exact score of each row, split over layers and over the row's own positions."""
        sequences = [training_sequence(self._examples, row) for row in rows]
        lengths = [sequence.padded for sequence in sequences]
        layers = self._loaded.coverage.layers
        found: dict[int, ScoreParts] = {}
        for places in plan_batches(lengths, self._token_budget):
            batch = collate([sequences[place] for place in places]).to(self._loaded.device)
            with self._loaded.turn:
                parts = score_batch(self._loaded.model, layers, directions, batch)
            for number, place in enumerate(places):
                one = slice(number, number + 1)
                positions = parts.by_position[number].view(batch.group, -1)
                own = [
                    line[: len(member.tokens)]
                    for line, (member, _) in zip(positions, sequences[place].members, strict=False)
                ]
                found[place] = ScoreParts(
                    by_layer=parts.by_layer[one], by_position=torch.cat(own)[None]
                )
        return [found[place] for place in range(len(sequences))]


def _stacked(directions: Sequence[Gradients]) -> Gradients:
    """[query, in, out] a layer; of a single query [in, out]."""
    if len(directions) == 1:
        return directions[0]
    names = directions[0] if directions else ()
    return {name: torch.stack([own[name] for own in directions]) for name in names}
