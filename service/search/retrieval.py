"""Answering a query: propose by sketch, rescore exactly, certify. Knows no HTTP.

Two rankings are offered. "score" is the estimate of influence itself. "normalised" divides it by
the whitened norm of the training gradient, the one that the index stores, so that long or odd
examples do not crowd the top. Both rank examples within one question; neither is a change of log p.
"""

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Int
from torch import Tensor

from estimators.chosen import GradientEstimator, RowEstimator, TracedEstimator
from estimators.grounds import Questions, Unavailable, Untraced
from estimators.model.tokens import Sequence1D
from estimators.registry import CODES, PROPOSERS, TRACED
from estimators.rescoring import (
    Measured,
    NonFiniteGradientError,
    measure_queries,
    query_gradients,
)
from index.certificates.sketch import Tail, plan_levels
from index.codes.vectors import LOW_RANK
from service.errors import UnknownEstimator
from service.models import BadQuery
from service.scoring.rows import GradientScorer, RowScoring, Scoring, Target
from service.search.answer import Answer, Clock
from service.search.asked import Asked, measured, read, texts, weighted
from service.search.opening import OpenIndex
from service.search.proposing import estimate_rows, order_rows
from service.search.proxies import Proxies
from service.search.query import Query, Ranking
from service.search.run import Run
from service.search.shards import Shard


class Retriever:
    """Answers queries about one model from one index.

    Args:
        index: opened, with its model.
        token_budget: padded tokens in a rescoring batch.
    """

    def __init__(self, index: OpenIndex, token_budget: int = 1024) -> None:
        self.loaded = index.loaded
        self.index = index
        self.scorer = GradientScorer(index.loaded, index.examples, token_budget)
        self._token_budget = token_budget

    def answer(self, query: Query) -> Answer:
        """Find the top k training examples for a query and certify their recall.

        Raises:
            BadQuery: the query cannot be measured, or its numbers are out of range.
            NonFiniteGradientError: the model gives NaN or infinite gradients for it.
        """
        run = self.begin([query])[0]
        if isinstance(run, Exception):
            raise run
        steps = run.steps()
        try:
            rows = next(steps)
            while True:
                rows = steps.send(run.scoring.score([(run.target, rows)])[0])
        except StopIteration as ended:
            answer: Answer = ended.value
            return answer

    def begin(self, queries: Sequence[Query]) -> list[Run | Exception]:
        """Measure and differentiate queries together and estimate every row for each.

        Queries that leave their seed open share one, and so their random rows, which go through
        the model once for all of them; each one's certificates hold all the same.

        Returns:
            For each query its run, or why it cannot be answered.
        """
        prepared = [self._prepare(query) for query in queries]
        sound = [one for one in prepared if isinstance(one, _Prepared)]
        found = measure_queries(
            self.loaded.model,
            self.loaded.coverage.layers,
            [weighted(one.asked) for one in sound],
            self._token_budget,
        )
        seed = secrets.randbits(62)
        runs = iter([self._begun(one, found, place, seed) for place, one in enumerate(sound)])
        return [next(runs) if isinstance(one, _Prepared) else one for one in prepared]

    def _prepare(self, query: Query) -> "_Prepared | Exception":
        clock = Clock()
        try:
            estimator = self.index.estimators.choose(query.estimator, query.parameters)
            query = _settled(query, estimator)
            kept = self._check(query)
            if isinstance(estimator, TracedEstimator):  # every row is looked up at once
                rows = len(self.index.examples) if kept is None else len(kept)
                query = replace(query, calibration_rows=rows, audit_rows=0)
            asked = read(self.loaded, query)
        except (BadQuery, UnknownEstimator) as error:
            return error
        if any(one.own for one in asked):
            clock.stop("complete")
        return _Prepared(query=query, estimator=estimator, kept=kept, asked=asked, clock=clock)

    def _begun(
        self, prepared: "_Prepared", found: Measured, place: int, seed: int
    ) -> Run | Exception:
        try:
            return self._run(prepared, found, place, seed)
        except Untraced as error:
            return error
        except Unavailable as error:
            return BadQuery(str(error))

    def _run(
        self, prepared: "_Prepared", found: Measured, place: int, seed: int
    ) -> Run | Exception:
        query, clock, fault = prepared.query, prepared.clock, found.faults[place]
        by_gradients = isinstance(prepared.estimator, GradientEstimator)
        if fault is not None and (by_gradients or query.proposer == CODES):
            return NonFiniteGradientError(fault)
        gradients = {n: value[place : place + 1] for n, value in found.gradients.items()}
        questions = Questions(
            sequences=[weighted(prepared.asked)],
            gradients=gradients,
            texts=[texts(prepared.asked)],
        )
        scoring, target = self._scoring(prepared.estimator, questions)
        clock.stop("gradient")
        shard = self._proposed(prepared, questions, target)
        clock.stop("scan")
        return Run(
            query=query,
            index=self.index,
            scoring=scoring,
            terms=measured(prepared.asked, found.values[place], len(self.loaded.tokenizer)),
            target=target,
            estimator=prepared.estimator,
            shard=shard,
            kept=prepared.kept,
            seed=seed if query.seed is None else query.seed,
            clock=clock,
        )

    def measures(self, query: Query) -> list[tuple[Sequence1D, float]]:
        """The sequences of a query with their weights, completed by the model if need be.

        Raises:
            BadQuery: it cannot be measured.
        """
        with self.loaded.turn:
            return weighted(read(self.loaded, query))

    def directions(
        self, sequence: Sequence1D, estimator: GradientEstimator | None = None
    ) -> tuple[dict[str, Tensor], float]:
        """The direction of a question ([in, out] a layer) and ``f = log p`` in nats.

        Args:
            sequence: prompt and completion.
            estimator: None takes the index' own.
        """
        layers = self.loaded.coverage.layers
        gradients, values = query_gradients(self.loaded.model, layers, [sequence])
        questions = Questions(sequences=[[(sequence, 1.0)]], gradients=gradients)
        return _single(estimator or self.index.estimators.own, questions), float(values[0])

    def _scoring(
        self, estimator: GradientEstimator | RowEstimator, questions: Questions
    ) -> tuple[Scoring, Target]:
        if isinstance(estimator, GradientEstimator):
            return self.scorer, _single(estimator, questions)
        return RowScoring(estimator), questions

    def _proposed(self, prepared: "_Prepared", questions: Questions, target: Target) -> Shard:
        """Estimates of every row, or just an order of all rows."""
        query, name = prepared.query, prepared.query.proposer
        by_gradients = isinstance(prepared.estimator, GradientEstimator)
        if name is not None and name != CODES:
            values = self.index.estimators.proposer(name).propose(questions)[0]
        elif isinstance(target, Questions):
            directions = _single(self.index.estimators.own, questions)
            values = self.proxies(directions, "normalised").values
        else:
            return estimate_rows(self.index, target, query.ranking, query.tail)
        return order_rows(self.index, values, query.ranking, by_gradients=by_gradients)

    def proxies(
        self, directions: Mapping[str, Tensor], ranking: Ranking, tail: Tail = "gaussian"
    ) -> Proxies:
        """Estimates of every row's ranking value by the index' codes, with their error scales."""
        return estimate_rows(self.index, directions, ranking, tail).at(slice(None))

    def _check(self, query: Query) -> Int[np.ndarray, "kept"] | None:
        """The rows that its filters leave; None for all.

        Raises:
            BadQuery: something about the query is out of range.
        """
        kept = self._filtered(query)
        rows = len(self.index.examples) if kept is None else len(kept)
        if not 1 <= query.k <= rows:
            left = "the rows of the index" if kept is None else "the rows that the filters leave"
            raise BadQuery(f"k must be from 1 to {rows:,}, {left}; got {query.k}.")
        codes = self.index.manifest.codes
        if query.tail == "hoeffding" and codes == LOW_RANK:
            raise BadQuery(
                f"Hoeffding's tail is known for signs of a sketch; this index has {codes} codes."
            )
        if query.budget < query.k:
            raise BadQuery(
                f"The rescoring budget must be at least k = {query.k}, got {query.budget}."
            )
        try:
            plan_levels(query.k, query.recall, query.confidence, query.tail)
        except ValueError as error:
            raise BadQuery(str(error)) from error
        return kept

    def _filtered(self, query: Query) -> Int[np.ndarray, "kept"] | None:
        if not query.filters:
            return None
        rows = self.index.examples.rows_where({n: c.holds for n, c in query.filters.items()})
        if not len(rows):
            raise BadQuery(
                f"No example meets the conditions on {', '.join(query.filters)}; loosen them, or "
                f"check the names of the columns (GET /v1/examples/ID shows an example's metadata)."
            )
        return rows


@dataclass(frozen=True, kw_only=True)
class _Prepared:
    """A query that is in order, with the rows that its filters leave."""

    query: Query
    estimator: GradientEstimator | RowEstimator
    kept: Int[np.ndarray, "kept"] | None
    asked: Sequence[Asked]
    clock: Clock


def _settled(query: Query, estimator: GradientEstimator | RowEstimator) -> Query:
    """The query with estimator, parameters and proposer filled in where they were left out.

    Raises:
        BadQuery: it asks for what only gradients give.
    """
    by_gradients = isinstance(estimator, GradientEstimator)
    if (query.tokens or query.layers) and not by_gradients:
        raise BadQuery(
            f"The estimator '{estimator.name}' has no gradients, so its scores cannot be split by "
            f"token or layer; leave tokens and layers out."
        )
    usual = estimator.name if estimator.name in PROPOSERS else CODES
    return replace(
        query,
        proposer=query.proposer or usual,
        estimator=estimator.name,
        parameters=estimator.values,
        ranking=query.ranking if by_gradients else "score",
        budget=max(query.budget, query.k) if estimator.name in TRACED else query.budget,
    )


def _single(estimator: GradientEstimator, questions: Questions) -> dict[str, Tensor]:
    """The direction of the one question, [in, out] a layer."""
    return {name: value[0] for name, value in estimator.directions(questions).items()}
