"""The estimators that an index can answer for."""

import threading
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, Self

from estimators.chosen import (
    GradientEstimator,
    RowEstimator,
    TracedEstimator,
    settle_values,
)
from estimators.contracts import Factors, Proposer
from estimators.grounds import Cache, Grounds, MemoryCache, Parameter, Traced, Unavailable
from estimators.names import THROUGH_RUN
from estimators.registry import (
    OPERATORS,
    SCORERS,
    TRACED,
    estimator_class,
    proposer_class,
)
from index.examples import ExampleStore
from service.errors import UnknownEstimator
from service.models import BadQuery, LoadedModel


@dataclass(frozen=True, kw_only=True)
class Offer:
    """What one estimator needs and takes, for one index.

    Attributes:
        name: in the registry.
        summary: one sentence.
        by_gradients: whether its scores are inner products with gradients, which can be split by
            token and layer, and which the index' codes estimate.
        influences: whether they are influences, by gradients or through the run itself.
        parameters: with this index' defaults.
        unavailable: why the index cannot answer for it; None if it can.
    """

    name: str
    summary: str
    by_gradients: bool
    influences: bool
    parameters: Mapping[str, Parameter]
    unavailable: str | None


class Estimators:
    """Operators, scorers and proposers on the grounds of one index, opened when first asked for.

    Args:
        grounds: model, layers, factors and examples.
        own: name of the estimator whose factors whiten the index; the default of questions.
        damping: that the index was built with; the default of every operator that damps.
    """

    def __init__(self, grounds: Grounds, own: str, damping: float) -> None:
        self._grounds = grounds
        self._own = own
        self._damping = damping
        self._opened: dict[tuple[str, str], Any] = {}
        self._turn = threading.Lock()

    @classmethod
    def of_factors(
        cls,
        loaded: LoadedModel,
        examples: ExampleStore,
        name: str,
        fitted: Factors,
        damping: float,
        *,
        sha256: str = "",
        cache: Cache | None = None,
        traced: Traced | None = None,
    ) -> Self:
        """On the grounds of fitted factors.

        Args:
            loaded: the model with the layers to attribute.
            examples: of the index.
            name: of the factors.
            fitted: the factors.
            damping: that the index is built with.
            sha256: of model, factors and examples.
            cache: of what estimators fit; None keeps it in memory.
            traced: what was traced through the model's training run.
        """
        grounds = Grounds(
            model=loaded.model,
            layers=loaded.coverage.layers,
            factors=fitted.tensors(),
            examples=examples,
            sha256=sha256,
            cache=cache or MemoryCache(),
            traced=traced,
        )
        return cls(grounds, name, damping)

    @property
    def own(self) -> GradientEstimator:
        """The estimator that the index was built for, with its defaults."""
        return self.choose_gradients(self._own)

    def choose_gradients(
        self, name: str, given: Mapping[str, float] | None = None
    ) -> GradientEstimator:
        """As ``choose``, for whoever needs directions.

        Raises:
            BadQuery: the estimator has no gradients; otherwise as ``choose``.
        """
        chosen = self.choose(name, given or {})
        if not isinstance(chosen, GradientEstimator):
            raise BadQuery(
                f"The estimator '{name}' has no gradients; choose one of {', '.join(OPERATORS)}."
            )
        return chosen

    def choose(
        self, name: str | None, given: Mapping[str, float]
    ) -> GradientEstimator | RowEstimator:
        """The estimator of a question.

        Args:
            name: in the registry; None takes the index' own.
            given: values of parameters that are not to be the defaults.

        Raises:
            UnknownEstimator: there is none of this name.
            BadQuery: the index cannot answer for it, or a parameter is wrong.
        """
        chosen = self._own if name is None else name
        if chosen not in OPERATORS and chosen not in SCORERS:
            raise UnknownEstimator(
                f"There is no estimator '{chosen}'; this version has "
                f"{', '.join(sorted([*OPERATORS, *SCORERS]))}."
            )
        try:
            values = settle_values(chosen, self._parameters(chosen), given)
            part = self._open("estimator", chosen)
        except ValueError as error:
            raise BadQuery(str(error)) from error
        sha256, traced = self._grounds.sha256, self._grounds.traced
        kind: type[GradientEstimator | RowEstimator] = RowEstimator
        if chosen in OPERATORS:
            kind = GradientEstimator
            if chosen in THROUGH_RUN and traced is not None:
                sha256 += traced.sha256
        elif chosen in TRACED and traced is not None:
            kind, sha256 = TracedEstimator, traced.sha256
        return kind(name=chosen, part=part, values=values, grounds_sha256=sha256)

    def proposer(self, name: str) -> Proposer:
        """A proposer of the registry.

        Raises:
            BadQuery: there is none of this name, or the index lacks what it needs.
        """
        try:
            found: Proposer = self._open("proposer", name)
        except ValueError as error:
            raise BadQuery(str(error)) from error
        return found

    def offers(self) -> list[Offer]:
        """Every estimator of this version, and whether the index can answer for it."""
        return [self._offer(name) for name in sorted([*OPERATORS, *SCORERS])]

    def _offer(self, name: str) -> Offer:
        unavailable = None
        try:
            self._open("estimator", name)
        except Unavailable as error:
            unavailable = str(error)
        return Offer(
            name=name,
            summary=(estimator_class(name).__doc__ or name).strip().splitlines()[0],
            by_gradients=name in OPERATORS,
            influences=name in OPERATORS or name in TRACED,
            parameters=self._parameters(name),
            unavailable=unavailable,
        )

    def _parameters(self, name: str) -> dict[str, Parameter]:
        parameters = dict(estimator_class(name).parameters)
        if "damping" in parameters:
            parameters["damping"] = replace(parameters["damping"], default=self._damping)
        return parameters

    def _open(self, what: Literal["estimator", "proposer"], name: str) -> Any:
        with self._turn:
            if (what, name) not in self._opened:
                kind = estimator_class(name) if what == "estimator" else proposer_class(name)
                self._opened[what, name] = kind.open(self._grounds)
            return self._opened[what, name]
