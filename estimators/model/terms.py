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
    states: Float[Tensor, "batch token feature"]
    labels: Int[Tensor, "batch token"]


@dataclass(frozen=True, kw_only=True)
class VocabularyTerms:
    """The gradients of one vocabulary layer for each sequence of a batch, as sums of terms.

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
    read: Float[Tensor, "batch token feature"] | None
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
            found += (direction[ids.flatten()] * self._read_rows()).sum(1)
        for places, x, y in self._predicted():
            found[places] += (x @ direction).mul_(y).sum(1)
        return found.view(ids.shape)

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
        for places, x, y in self._predicted():
            runs = list(self._runs(places))
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
        """Add ``weight * G`` of each sequence to its target; several may have the same one."""
        if self.read is not None:
            rows = self._read_rows().view(*self.batch.input_ids.shape, -1)
            for target, ids, own, weight in zip(
                targets, self.batch.input_ids, rows, weights, strict=True
            ):
                target.index_add_(0, ids, own, alpha=weight)
        for places, x, y in self._predicted():
            for number, run in self._runs(places):
                targets[number].addmm_(x[run].T, y[run], alpha=weights[number])

    def projected(
        self, left: Float[Tensor, "rows vocabulary"], right: Float[Tensor, "columns feature"]
    ) -> Float[Tensor, "batch rows columns"]:
        """``left G right^T``."""
        ids = self.batch.input_ids
        found = right.new_zeros(len(ids), len(left), len(right))
        turned = replace(self, turn=right.T)
        if turned.read is not None:
            inputs = left[:, ids.flatten()].view(len(left), *ids.shape).transpose(0, 1)
            found += torch.bmm(inputs, turned._read_rows().view(*ids.shape, -1))
        for places, x, y in turned._predicted():
            inputs = x @ left.T
            for number, run in turned._runs(places):
                found[number].addmm_(inputs[run].T, y[run])
        return found

    def turned(self, turn: Float[Tensor, "feature turned"]) -> "VocabularyTerms":
        """Of ``G turn``."""
        return replace(self, turn=turn)

    def of(self, number: int) -> "VocabularyTerms":
        """Of one sequence."""
        one = slice(number, number + 1)
        batch = TokenBatch(
            input_ids=self.batch.input_ids[one],
            target_mask=self.batch.target_mask[one],
            rows=self.batch.rows[one],
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
            rows = self._read_rows()[places]
            found.append((counts.to(rows), rows))
        if self.predicted is not None:
            rows = widen(self.predicted.states.flatten(0, 1)[predicting(self.batch)])
            squares = rows.new_zeros(self.vocabulary)
            for _, x, _ in self._predicted():
                squares += x.square().sum(0)
            found.append((squares, rows))
        return found

    def _read_rows(self) -> Float[Tensor, "position turned"]:
        assert self.read is not None
        return self._turn(widen(self.read.flatten(0, 1)))

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

    def _runs(self, places: Int[Tensor, "position"]) -> Iterator[tuple[int, slice]]:
        """Each sequence's own among some positions."""
        owners = places // self.batch.input_ids.shape[1]
        numbers, counts = torch.unique_consecutive(owners, return_counts=True)
        start = 0
        for number, count in zip(numbers.tolist(), counts.tolist(), strict=True):
            yield number, slice(start, start + count)
            start += count

    def _cached_entries(self, count: int, rows: Tensor) -> Iterator[slice]:
        """Entries of the vocabulary for which ``count`` gradients fit into the caches."""
        each = count * rows.shape[1] * rows.element_size()
        size = max(1, gradients.MOST_CACHED_BYTES // each)
        for start in range(0, self.vocabulary, size):
            yield slice(start, start + size)
