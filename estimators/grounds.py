"""What an estimator stands on when it is asked: model, factors, training examples, questions."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from jaxtyping import Float
from torch import Tensor, nn

from estimators.model.gradients import Gradients
from estimators.model.layers import LinearLayer
from estimators.model.tokens import Rejected, Sequence1D, Spans


class Unavailable(ValueError):  # noqa: N818 - named for what is wrong
    """An index lacks what an estimator needs; the message says what, and how to have it."""


class Untraced(Unavailable):
    """A question that was not traced through the run; the message says what tracing it takes."""


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """A number that a query may set.

    Attributes:
        summary: what it does, in one sentence.
        default: where the query leaves it out.
        least: smallest value.
        most: largest value.
    """

    summary: str
    default: float
    least: float
    most: float


DAMPING = Parameter(
    summary="Added to the curvature of each layer, as a multiple of its mean eigenvalue.",
    default=0.1,
    least=1e-6,
    most=1e6,
)
"""Of operators that invert curvature; an index built with another damping has that as default."""


class Preferred(Protocol):
    """What was rejected where a training example was preferred; see ``Rejected``."""

    @property
    def tokens(self) -> tuple[int, ...]:
        """What the model read."""
        ...

    @property
    def counted(self) -> Spans:
        """Which of these tokens count."""
        ...

    @property
    def beta(self) -> float:
        """Of DPO's loss."""
        ...

    @property
    def margin(self) -> float:
        """By the model whose gradients are taken."""
        ...


class Examples(Protocol):
    """The training examples of an index, by row."""

    def __len__(self) -> int:
        """How many there are."""
        ...

    def tokens(self, row: int) -> tuple[int, ...]:
        """What the model read."""
        ...

    def counted(self, row: int) -> Spans | None:
        """Which of these tokens its trainer's loss counted; None for all but the first."""
        ...

    def weight(self, row: int) -> float:
        """Times which its loss counts."""
        ...

    def preference(self, row: int) -> Preferred | None:
        """The other part of a pair whose preferred part it is."""
        ...

    def texts(self) -> list[str]:
        """What a person reads, of all rows in order."""
        ...


def training_sequence(examples: Examples, row: int) -> Sequence1D:
    """A training example as its trainer saw it: what the model reads, and what of it counts."""
    return as_trained(
        examples.tokens(row), examples.counted(row), examples.weight(row), examples.preference(row)
    )


def as_trained(
    tokens: tuple[int, ...],
    counted: Spans | None,
    weight: float,
    other: Preferred | None,
    row: int = 0,
) -> Sequence1D:
    """The same of its parts; ``row`` seeds what is drawn for it."""
    rejected = None
    if other is not None:
        rejected = Rejected(
            tokens=other.tokens, counted=other.counted, beta=other.beta, margin=other.margin
        )
    return Sequence1D(tokens=tokens, counted=counted, weight=weight, rejected=rejected, row=row)


class Cache(Protocol):
    """Tensors that an estimator fitted for an index and finds again, beside it or in memory."""

    def load(self, key: str) -> Mapping[str, Tensor] | None:
        """What was kept under ``key``, if anything was."""
        ...

    def keep(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        """Keep ``tensors`` under ``key`` (letters, digits, dots and hyphens)."""
        ...


class MemoryCache:
    """A cache that ends with the process."""

    def __init__(self) -> None:
        self._kept: dict[str, Mapping[str, Tensor]] = {}

    def load(self, key: str) -> Mapping[str, Tensor] | None:
        """What was kept under ``key``, if anything was."""
        return self._kept.get(key)

    def keep(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        """Keep ``tensors`` under ``key``."""
        self._kept[key] = tensors


class Traced(Protocol):
    """What was traced, question by question, through the run that trained the model."""

    @property
    def sha256(self) -> str:
        """Of the run."""
        ...

    def influences(self, fingerprint: str) -> Float[np.ndarray, "row"]:
        """``df/dw_i`` of every row of the index, in nats of f for a change of weight 1.

        Args:
            fingerprint: of the question (``Questions.fingerprint``).

        Raises:
            Untraced: the question was not traced.
        """
        ...

    def direction(self, fingerprint: str) -> Mapping[str, Tensor]:
        """The run's direction, by name of parameter; see ``estimators.run.direction``.

        Its inner product with the gradient of a row's summed loss is what reading that row once an
        epoch does to f, in nats and to first order.

        Args:
            fingerprint: of the question.

        Raises:
            Untraced: no direction was traced for it.
        """
        ...

    @property
    def directed(self) -> Mapping[str, int]:
        """Sizes of the parameters that directions have, by name; empty where none was traced."""
        ...


@dataclass(frozen=True, kw_only=True)
class Grounds:
    """What estimators may use; passes over training data are theirs to run.

    Attributes:
        model: frozen, in evaluation mode.
        layers: attributed layers, of one checkpoint or of several (``LinearLayer.checkpoint``).
        factors: tensors of the factors that the index was built with.
        examples: the training examples of the index.
        sha256: of model, factors and examples; part of whatever is kept of them.
        cache: of what was fitted for this index.
        token_budget: padded tokens in a batch.
        traced: questions traced through the model's training run; None without a trace.
    """

    model: nn.Module
    layers: Sequence[LinearLayer]
    factors: Mapping[str, Tensor]
    examples: Examples
    sha256: str = ""
    cache: Cache = field(default_factory=MemoryCache)
    token_budget: int = 1024
    traced: Traced | None = None


@dataclass(frozen=True, kw_only=True)
class Questions:
    """Questions as estimators see them.

    Attributes:
        sequences: of each question, its sequences (prompt and completion) with their weights; the
            measured value f is the weighted sum of their log-probabilities, in nats.
        gradients: ``grad f``, [question, in, out] a layer; empty where no gradient was asked for.
        texts: of each question, prompts and completions together, with the same weights.
    """

    sequences: Sequence[Sequence[tuple[Sequence1D, float]]]
    gradients: Gradients = field(default_factory=dict)
    texts: Sequence[Sequence[tuple[str, float]]] = ()

    def __len__(self) -> int:
        """How many there are."""
        return len(self.sequences)

    def fingerprint(self, number: int) -> str:
        """SHA-256 of the tokens and weights of one question, in whatever order its parts are.

        Weights of the same sequence add up, and one that adds up to 0 is no part of it.
        """
        sums: dict[tuple[tuple[int, ...], int], float] = {}
        for sequence, weight in self.sequences[number]:
            key = (tuple(map(int, sequence.tokens)), int(sequence.first_target))
            sums[key] = sums.get(key, 0.0) + float(weight)
        parts = sorted((*key, weight) for key, weight in sums.items() if weight != 0)
        return hashlib.sha256(repr(parts).encode()).hexdigest()
