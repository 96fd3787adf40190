"""The terms that a batch adds to the gradient of a weight with a row for each vocabulary entry.

Such a gradient is ``G = sum_t x_t y_t^T``, [vocabulary, feature], with

    embeddings: x_t the token read, as a one-hot vector, y_t the gradient of the embeddings' output
    head:       x_t = p_t - y_t, the gradient of the logits, y_t the head's input

and of a tied weight the sum over both. It is nearly everywhere nonzero, and larger than all else
that an example has; so it is never formed but where a caller gives the room for one. Residuals of
a head are computed anew, some positions at a time, whenever they are asked for.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from estimators.model import gradients
from estimators.model.gradients import widen
from estimators.model.output_head import predicting, residuals
from estimators.model.tokens import TokenBatch


@dataclass(frozen=True, kw_only=True)
class HeadRun:
    """What a head did in a batch.

    Attributes:
        head: turns states into logits.
        states: its inputs.
        labels: of each position that predicts a counted token.
    """

    head: nn.Module
    states: Float[Tensor, "sequence token feature"]
    labels: Int[Tensor, "sequence token"]


@dataclass(frozen=True, kw_only=True)
class VocabularyTerms:
    """The gradients of one vocabulary layer for each example of a batch, as sums of terms.

    Attributes:
        batch: the sequences.
        vocabulary: entries of it.
        read: gradients of the embeddings' outputs, 0 where a token's row gets none; None if the
            weight is not the embeddings'.
        predicted: None if the weight is not the head's.
        padding: the token whose row gets none.
        turn: multiplies the gradients from the right; None for the identity.
    """

    batch: TokenBatch
    vocabulary: int
    read: Float[Tensor, "sequence token feature"] | None
    predicted: HeadRun | None
    padding: int | None = None
    turn: Float[Tensor, "feature turned"] | None = None

    def products(
        self, direction: Float[Tensor, "vocabulary feature"]
    ) -> Float[Tensor, "batch token"]:
        """``<direction, G>``, split over the positions that read a token."""
        ids = self.batch.input_ids
        found = direction.new_zeros(ids.numel())
        if self.read is not None:
            found += (direction[ids.flatten()] * self.read_rows().flatten(0, 1)).sum(1)
        for places, x, y in self._predicted():
            found[places] += (x @ direction).mul_(y).sum(1)
        return found.view(self.batch.shape)

    def scores(
        self, directions: Float[Tensor, "query vocabulary feature"]
    ) -> Float[Tensor, "query batch"]:
        """``<direction, G>`` for many directions at once.

        The head's part of the gradients is formed for some entries of the vocabulary at a time.
        """
        found = directions.new_zeros(len(directions), len(self.batch.rows))
        if self.read is not None:
            reading = replace(self, predicted=None)
            found += torch.stack([reading.products(one).sum(1) for one in directions])
        for x, y, runs in self.predicted_parts():
            numbers = [number for number, _ in runs]
            for entries in self._cached_entries(len(runs), y):
                part = [x[run, entries].T @ y[run] for _, run in runs]
                gradient = torch.stack(part).flatten(1)
                found[:, numbers] += directions[:, entries].flatten(1) @ gradient.T
        return found

    def empty(self, count: int) -> Float[Tensor, "count vocabulary feature"]:
        """Room for gradients, 0 everywhere."""
        like = self.read if self.predicted is None else self.predicted.states
        assert like is not None
        return widen(like.new_zeros(0)).new_zeros(count, self.vocabulary, like.shape[-1])

    def add_to(
        self,
        targets: Sequence[Float[Tensor, "vocabulary turned"]],
        weights: Sequence[float],
    ) -> None:
        """Add ``weight * G`` of each example to its target; several may have the same one."""
        if self.read is not None:
            rows = self.read_rows()
            for target, ids, own, weight in zip(targets, self.ids, rows, weights, strict=True):
                target.index_add_(0, ids, own, alpha=weight)
        for x, y, runs in self.predicted_parts():
            for number, run in runs:
                targets[number].addmm_(x[run].T, y[run], alpha=weights[number])

    def turned(self, turn: Float[Tensor, "feature turned"]) -> "VocabularyTerms":
        """Of ``G turn``."""
        return replace(self, turn=turn)

    def of(self, number: int) -> "VocabularyTerms":
        """Of one example."""
        group, weights = self.batch.group, self.batch.weights
        one = slice(number * group, (number + 1) * group)
        batch = TokenBatch(
            input_ids=self.batch.input_ids[one],
            target_mask=self.batch.target_mask[one],
            rows=self.batch.rows[number : number + 1],
            group=group,
            weights=None if weights is None else weights[one],
        )
        run = self.predicted
        if run is not None:
            run = HeadRun(head=run.head, states=run.states[one], labels=run.labels[one])
        read = None if self.read is None else self.read[one]
        return replace(self, batch=batch, read=read, predicted=run)

    def moments(
        self,
    ) -> list[tuple[Float[Tensor, "vocabulary"], Float[Tensor, "position feature"]]]:
        """Of each use: ``sum_t x_t^2``, and ``y_t`` of its positions."""
        found = []
        if self.read is not None:
            ids = self.batch.input_ids.flatten()
            counted = self.batch.position_mask.flatten()
            if self.padding is not None:
                counted = counted & (ids != self.padding)
            places = counted.nonzero()[:, 0]
            counts = torch.bincount(ids[places], minlength=self.vocabulary)
            rows = self.read_rows().flatten(0, 1)[places]
            found.append((counts.to(rows), rows))
        if self.predicted is not None:
            rows = widen(self.predicted.states.flatten(0, 1)[predicting(self.batch)])
            squares = rows.new_zeros(self.vocabulary)
            for _, x, _ in self._predicted():
                squares += x.square().sum(0)
            found.append((squares, rows))
        return found

    def read_rows(self) -> Float[Tensor, "batch token turned"]:
        """``y_t`` of the embeddings, whose ``x_t`` are the tokens ``ids``."""
        assert self.read is not None
        return self._turn(widen(self.read)).view(*self.batch.shape, -1)

    @property
    def ids(self) -> Int[Tensor, "batch token"]:
        """The tokens of each example."""
        return self.batch.input_ids.view(self.batch.shape)

    def predicted_parts(
        self,
    ) -> Iterator[
        tuple[
            Float[Tensor, "position vocabulary"],
            Float[Tensor, "position turned"],
            list[tuple[int, slice]],
        ]
    ]:
        """``x_t`` and ``y_t`` of the head for some positions, and which are whose example's."""
        for places, x, y in self._predicted():
            yield x, y, self._runs(places)

    def _predicted(
        self,
    ) -> Iterator[
        tuple[
            Int[Tensor, "position"],
            Float[Tensor, "position vocabulary"],
            Float[Tensor, "position turned"],
        ]
    ]:
        if self.predicted is None:
            return
        run = self.predicted
        flat = run.states.flatten(0, 1)
        for places, x in residuals(run.head, run.states, self.batch, run.labels):
            yield places, x, self._turn(widen(flat[places]))

    def _turn(self, rows: Tensor) -> Tensor:
        return rows if self.turn is None else rows @ self.turn

    def _runs(self, places: Int[Tensor, "position"]) -> list[tuple[int, slice]]:
        """Each example's own among some positions."""
        owners = places // self.batch.shape[1]
        numbers, counts = torch.unique_consecutive(owners, return_counts=True)
        ends = counts.cumsum(0)
        pairs = zip((ends - counts).tolist(), ends.tolist(), strict=True)
        return list(zip(numbers.tolist(), (slice(*pair) for pair in pairs), strict=True))

    def _cached_entries(self, count: int, rows: Tensor) -> Iterator[slice]:
        """Entries of the vocabulary for which ``count`` gradients fit into the caches."""
        each = count * rows.shape[1] * rows.element_size()
        size = max(1, gradients.MOST_CACHED_BYTES // each)
        for start in range(0, self.vocabulary, size):
            yield slice(start, start + size)
