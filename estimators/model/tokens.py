"""Token sequences and the padded batches that a model reads."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

Spans: TypeAlias = tuple[tuple[int, int], ...]
"""Stretches of tokens, each from its first to before its second number; ascending, apart."""


def spans_of(mask: Sequence[int | bool]) -> Spans:
    """The stretches where a mask is true."""
    edges = [0, *(int(bool(m)) for m in mask), 0]
    changes = [i for i in range(len(edges) - 1) if edges[i] != edges[i + 1]]
    return tuple(zip(changes[::2], changes[1::2], strict=True))


@dataclass(frozen=True, kw_only=True)
class Rejected:
    """What was worse than a sequence, and what DPO's loss makes of the two.

    The loss is ``-log sigmoid(margin)`` with ``margin = beta ((log p(chosen) - log p(rejected)) -
    (the same of the reference))`` (Rafailov et al. 2023, eq. 7), where log p is the sum over the
    counted tokens. Its gradient is ``beta sigmoid(-margin)`` times the difference between the
    gradients of the losses of both.

    Attributes:
        tokens: token ids, the prompt's first.
        counted: stretches of them that count.
        beta: of the loss.
        margin: by the model whose gradients are taken.
        won: take the loss that there would be, had this sequence been preferred.
    """

    tokens: tuple[int, ...]
    counted: Spans
    beta: float
    margin: float
    won: bool = False

    @property
    def slope(self) -> float:
        """What multiplies the gradient of the other sequence's loss, and minus that of this one."""
        sign = 1 if self.won else -1
        return -sign * self.beta / (1 + math.exp(-sign * self.margin))


@dataclass(frozen=True, kw_only=True)
class Sequence1D:
    """One token sequence, of which the tokens from ``first_target`` on are predicted and count.

    Attributes:
        tokens: token ids.
        first_target: index of the first token whose log-likelihood counts; at least 1, since
            nothing precedes token 0. A training example has 1, a query the length of its prompt.
        counted: those of them that count; None for all. A trainer counts an assistant's turns, or
            the completion of a prompt.
        weight: times which it counts as a training example.
        rejected: of a pair of which this sequence was preferred.
        row: the example's row number; sampled labels are drawn per row, so that batching cannot
            change them.
    """

    tokens: tuple[int, ...]
    first_target: int = 1
    counted: Spans | None = None
    weight: float = 1.0
    rejected: Rejected | None = None
    row: int = 0

    def __post_init__(self) -> None:
        if self.first_target < 1:
            raise ValueError(
                f"first_target must be at least 1 (nothing precedes token 0), got "
                f"{self.first_target}; begin the prompt with the beginning-of-sequence token."
            )

    @property
    def targets(self) -> int:
        """How many tokens count; 0 for a sequence that is too short to predict anything."""
        return sum(
            stop - start for member, _ in self.members for start, stop in member.target_spans
        )

    @property
    def members(self) -> tuple[tuple["Sequence1D", float], ...]:
        """The sequences whose losses its own is made of, with what multiplies their gradients."""
        if self.rejected is None:
            return ((self, self.weight),)
        other = Sequence1D(tokens=self.rejected.tokens, counted=self.rejected.counted)
        slope = self.weight * self.rejected.slope
        return (replace(self, rejected=None), slope), (other, -slope)

    @property
    def padded(self) -> int:
        """Tokens that it takes in a batch by itself."""
        return len(self.members) * max(len(member.tokens) for member, _ in self.members)

    @property
    def target_spans(self) -> Spans:
        """The tokens that count, of which token 0 is none."""
        length = len(self.tokens)
        cut = [
            (max(start, self.first_target), min(stop, length))
            for start, stop in (((0, length),) if self.counted is None else self.counted)
        ]
        return tuple((start, stop) for start, stop in cut if start < stop)


@dataclass(frozen=True, kw_only=True)
class TokenBatch:
    """Sequences padded on the right.

    There is no attention mask: under causal attention nothing after a token changes what the model
    computes for it, so right padding cannot reach a real token, and target_mask keeps the padding
    out of every loss and gradient.

    Attributes:
        input_ids: token ids; padding holds token 0.
        target_mask: True where the token at that position is predicted and counts.
        rows: row number of each example.
        group: sequences an example has, one after another: 2 where there are pairs.
        weights: what multiplies the gradient of each sequence's loss; None where that is 1.
    """

    input_ids: Int[Tensor, "sequence token"]
    target_mask: Bool[Tensor, "sequence token"]
    rows: tuple[int, ...]
    group: int = 1
    weights: Float[Tensor, "sequence"] | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """Examples, and positions of each: those of its sequences one after another."""
        return len(self.rows), self.group * self.input_ids.shape[1]

    @property
    def position_mask(self) -> Bool[Tensor, "sequence token"]:
        """True at positions whose hidden state some counted token's loss depends on.

        Position t serves the tokens after t; the last token of a sequence serves none.
        """
        later = self.target_mask.flip(1).cumsum(1).flip(1) > 0
        return torch.cat([later[:, 1:], torch.zeros_like(later[:, :1])], dim=1)

    def to(self, device: torch.device) -> "TokenBatch":
        """The same batch on ``device``."""
        return TokenBatch(
            input_ids=self.input_ids.to(device),
            target_mask=self.target_mask.to(device),
            rows=self.rows,
            group=self.group,
            weights=None if self.weights is None else self.weights.to(device),
        )


def collate(sequences: Sequence[Sequence1D]) -> TokenBatch:
    """Pad ``sequences`` on the right to the longest one.

    Raises:
        ValueError: no sequence given.
    """
    if not sequences:
        raise ValueError("Cannot make a batch of no sequences; pass at least one.")
    group = max(len(sequence.members) for sequence in sequences)
    nothing = (Sequence1D(tokens=()), 0.0)
    parts = [
        part
        for sequence in sequences
        for part in (*sequence.members, *[nothing] * (group - len(sequence.members)))
    ]
    width = max(1, max(len(sequence.tokens) for sequence, _ in parts))
    ids = torch.zeros(len(parts), width, dtype=torch.long)
    mask = torch.zeros(len(parts), width, dtype=torch.bool)
    for i, (sequence, _) in enumerate(parts):
        length = len(sequence.tokens)
        ids[i, :length] = torch.tensor(sequence.tokens, dtype=torch.long)
        for start, stop in sequence.target_spans:
            mask[i, start:stop] = True
    weights = None
    if any(weight != 1 for _, weight in parts):
        weights = torch.tensor([weight for _, weight in parts], dtype=torch.float64)
    return TokenBatch(
        input_ids=ids,
        target_mask=mask,
        rows=tuple(sequence.row for sequence in sequences),
        group=group,
        weights=weights,
    )


def plan_batches(lengths: Sequence[int], token_budget: int) -> Iterator[list[int]]:
    """Group sequences of similar length so that a padded batch holds at most ``token_budget``.

    The plan depends on the lengths and the budget alone. Positions come out shortest first (ties in
    their given order); a sequence longer than the budget is a batch by itself.

    Args:
        lengths: tokens of each sequence.
        token_budget: padded tokens a batch may hold.

    Yields:
        Positions in ``lengths``, one list a batch; every position exactly once.
    """
    if token_budget < 1:
        raise ValueError(f"The token budget must be at least 1, got {token_budget}.")
    batch: list[int] = []
    for position in np.argsort(np.asarray(lengths, dtype=np.int64), kind="stable").tolist():
        if batch and (len(batch) + 1) * max(1, lengths[position]) > token_budget:
            yield batch
            batch = []
        batch.append(position)
    if batch:
        yield batch
