"""The contracts of an estimator: an index side, a query side, scorers and proposers.

The score of every gradient estimator is ``<direction, grad L(z)>``. The *index side* (``Factors``)
says in which coordinates the gradients of the training examples are stored; the *query side*
(``Operator``) turns a question's gradient into a direction. They are chosen apart: whatever the
coordinates, the inner product with a direction is exact, so one index answers for every operator.
Estimators without gradients are a ``Scorer``; a ``Proposer`` says which rows to look at first.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar, Protocol, Self, TypeVar

import numpy as np
from jaxtyping import Float, Int
from torch import Tensor

from estimators.grounds import Grounds, Parameter, Questions
from estimators.model.layers import LinearLayer, VocabularyLayer
from estimators.model.terms import VocabularyTerms
from estimators.sketching.whitening import LayerWhitening


class Accumulator(Protocol):
    """Running sums over the fitting examples; a class is built from what its ``tensors()`` gave."""

    def add(self, layer: LinearLayer, a: Tensor, d: Tensor, positions: Tensor) -> None:
        """Add a batch's inputs ``a`` [batch, token, in] and output gradients ``d`` of one layer.

        ``positions`` index the flattened tokens that serve a counted token; elsewhere ``d`` is 0.
        Running out of memory must leave the sums as they were.
        """
        ...

    def add_terms(self, layer: VocabularyLayer, terms: VocabularyTerms) -> None:
        """Add a batch of a vocabulary layer; likewise."""
        ...

    def settle(self) -> None:
        """Called every some thousand tokens: move short sums into long ones."""
        ...

    def tensors(self) -> Mapping[str, Tensor]:
        """Everything that was settled."""
        ...


Sums = TypeVar("Sums", bound=Accumulator)


class RunPass(Protocol):
    """One forward and backward pass over the fitting examples, which can be interrupted."""

    def __call__(
        self, name: str, kind: Callable[[Mapping[str, Tensor]], Sums], begin: Callable[[], Sums]
    ) -> Sums:
        """The sums after the pass.

        Args:
            name: one of ``PASSES``, shown to people.
            kind: rebuilds the sums of an interrupted pass from their tensors.
            begin: empty sums, where no interrupted pass is found; what comes before the pass,
                earlier passes included, belongs in here, so that it is not repeated.
        """
        ...


PASSES = ("covariances", "eigenvalues")
"""Every pass that factors may ask for; each draws labels of its own."""


class Factors(Protocol):
    """The index side: what is fitted beforehand, and the coordinates that it gives."""

    @classmethod
    def fit(cls, layers: Sequence[LinearLayer], run_pass: RunPass) -> Self:
        """Fit with as many passes as needed (none for the identity)."""
        ...

    def whitening(self, layers: Sequence[LinearLayer], damping: float) -> dict[str, LayerWhitening]:
        """The coordinates in which training gradients are best sketched."""
        ...

    def tensors(self) -> Mapping[str, Tensor]:
        """Everything that was fitted, by name; the class rebuilds itself from it (``cls(...)``)."""
        ...


class Operator(Protocol):
    """The query side: from a question's gradient to a direction.

    The first line of the class's docstring is shown to users.
    """

    parameters: ClassVar[Mapping[str, Parameter]]
    """What a query may set, by name."""

    @classmethod
    def open(cls, grounds: Grounds) -> Self:
        """Ready for questions; called once an index.

        Raises:
            Unavailable: the index lacks what the operator needs.
        """
        ...

    def directions(self, questions: Questions, values: Mapping[str, float]) -> dict[str, Tensor]:
        """``-(H + lambda I)^-1 grad f`` or what stands for it, [question, in, out] a layer.

        Its inner product with the loss gradient of a training example is the score: positive for
        examples that raised f.

        Args:
            questions: with their gradients.
            values: one for each of ``parameters``.
        """
        ...


class Scorer(Protocol):
    """An estimator without gradients: exact scores of rows by any means."""

    parameters: ClassVar[Mapping[str, Parameter]]

    @classmethod
    def open(cls, grounds: Grounds) -> Self:
        """Ready for questions; called once an index.

        Raises:
            Unavailable: the index lacks what the scorer needs.
        """
        ...

    def score(
        self, questions: Questions, rows: Int[np.ndarray, "row"], values: Mapping[str, float]
    ) -> Float[np.ndarray, "question row"]:
        """Exact scores, positive = proponent; NaN where there is none."""
        ...


class Proposer(Protocol):
    """Which rows are worth an exact score, for any scorer."""

    @classmethod
    def open(cls, grounds: Grounds) -> Self:
        """Ready for questions; called once an index.

        Raises:
            Unavailable: the index lacks what the proposer needs.
        """
        ...

    def propose(self, questions: Questions) -> Float[np.ndarray, "question row"]:
        """A value for every row of the index; those with the highest are scored first."""
        ...
