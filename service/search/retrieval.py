"""Answering a query: propose by sketch, rescore exactly, certify. Knows no HTTP.

Two rankings are offered. "score" is the influence itself (nats for a change of weight 1 in the sum
of training losses). "normalised" divides it by the whitened norm of the training gradient, the one
that the index stores, so that long or odd examples do not crowd the top; its unit is nats per unit
of whitened norm.
"""

import math
import secrets
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int
from torch import Tensor

from estimators.model.gradients import Gradients
from estimators.model.tokens import Sequence1D
from estimators.rescoring import (
    Measured,
    NonFiniteGradientError,
    measure_queries,
    query_directions,
    query_gradients,
)
from index.certificates.sketch import Tail, plan_levels
from index.codes.vectors import LAWFUL, LOW_RANK
from service.models import BadQuery
from service.scoring.rows import GradientScorer
from service.search.answer import Answer, MeasuredTerm
from service.search.opening import OpenIndex
from service.search.proxies import Proxies
from service.search.query import Query, Ranking, Term
from service.search.run import Run
from service.search.search import Clock


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
                rows = steps.send(self.scorer.score([(run.directions, rows)])[0])
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
            [_weighted(one.asked) for one in sound],
            self._token_budget,
        )
        seed = secrets.randbits(62)
        runs = iter([self._run(one, found, place, seed) for place, one in enumerate(sound)])
        return [next(runs) if isinstance(one, _Prepared) else one for one in prepared]

    def _prepare(self, query: Query) -> "_Prepared | BadQuery":
        clock = Clock()
        try:
            kept = self._check(query)
            asked = [self._asked(term) for term in query.terms]
        except BadQuery as error:
            return error
        if any(term.completion is None for term in query.terms):
            clock.stop("complete")
        return _Prepared(query=query, kept=kept, asked=asked, clock=clock)

    def _run(
        self, prepared: "_Prepared", found: Measured, place: int, seed: int
    ) -> Run | Exception:
        fault = found.faults[place]
        if fault is not None:
            return NonFiniteGradientError(fault)
        query, clock = prepared.query, prepared.clock
        gradients = {name: value[place] for name, value in found.gradients.items()}
        directions = self._preconditioned(gradients, query.damping)
        clock.stop("gradient")
        proxies = self.proxies(directions, query.ranking, query.tail)
        clock.stop("scan")
        return Run(
            query=query,
            index=self.index,
            scorer=self.scorer,
            terms=_measured(prepared.asked, found.values[place]),
            directions=directions,
            proxies=proxies,
            kept=prepared.kept,
            seed=seed if query.seed is None else query.seed,
            clock=clock,
        )

    def directions(
        self, sequence: Sequence1D, damping: float | None = None
    ) -> tuple[dict[str, Tensor], float]:
        """``-(H + lambda I)^-1 grad f`` ([in, out] a layer) and ``f = log p`` in nats."""
        layers = self.loaded.coverage.layers
        gradients, values = query_gradients(self.loaded.model, layers, [sequence])
        alone = {name: value[0] for name, value in gradients.items()}
        return self._preconditioned(alone, damping), float(values[0])

    def _preconditioned(self, gradients: Gradients, damping: float | None) -> dict[str, Tensor]:
        chosen = self.index.manifest.estimator.damping if damping is None else damping
        batch = {name: value[None] for name, value in gradients.items()}
        directions = query_directions(self.index.estimator, batch, chosen)
        return {name: value[0] for name, value in directions.items()}

    def _asked(self, term: Term) -> "_Asked":
        completion = term.completion
        if completion is None:
            completion = self.loaded.complete(term.prompt)
        if completion == term.against:
            raise BadQuery(
                "The completion and what it is contrasted with are the same; nothing sets them "
                "apart. Give another completion to contrast it with."
            )
        against = None
        if term.against is not None:
            against = self.loaded.encode_query(term.prompt, term.against)
        return _Asked(
            term=term,
            completion=completion,
            sequence=self.loaded.encode_query(term.prompt, completion),
            against=against,
        )

    def proxies(
        self, directions: dict[str, Tensor], ranking: Ranking, tail: Tail = "gaussian"
    ) -> Proxies:
        """Sketch estimates of every row's ranking value, with their error scales."""
        sketch, norm = self.index.sketch.query({n: d[None] for n, d in directions.items()})
        y = sketch[0].cpu().numpy()
        length = float(np.linalg.norm(y))
        psi = float(norm[0])
        cosines = self.index.inner_products(y) / length if length else 0 * self.index.norms
        norms = self.index.norms.astype(np.float64)
        noise = self.index.manifest.sketch.noise
        scale = max(noise.predicted, noise.measured)
        if tail == "hoeffding":
            scale = max(scale, math.sqrt(math.pi / (2 * self.index.manifest.sketch.dimensions)))
        live = norms > 0
        weights = norms if ranking == "score" else live.astype(np.float64)
        values = cosines * psi * weights
        values[self.index.failed] = -np.inf
        return Proxies(
            values=values,
            sigmas=scale * psi * weights,
            relative=noise.relative,
            divisors=np.ones_like(norms) if ranking == "score" else np.where(live, norms, np.inf),
            failed=self.index.failed,
            lawful=self.index.manifest.codes in LAWFUL,
        )

    def _check(self, query: Query) -> Int[np.ndarray, "kept"] | None:
        """The rows that its filters leave; None for all.

        Raises:
            BadQuery: something about the query is out of range.
        """
        built_for = self.index.manifest.estimator.name
        if query.estimator not in (None, built_for):
            raise BadQuery(
                f"The index was built for the estimator '{built_for}', not '{query.estimator}'; "
                f"leave the estimator out, or name an index that was built for it."
            )
        kept = self._filtered(query)
        rows = len(self.index.examples) if kept is None else len(kept)
        if not 1 <= query.k <= rows:
            left = "the rows of the index" if kept is None else "the rows that the filters leave"
            raise BadQuery(f"k must be from 1 to {rows:,}, {left}; got {query.k}.")
        codes = self.index.manifest.codes
        if query.tail == "hoeffding" and codes in ("biorthogonal", LOW_RANK):
            raise BadQuery(
                f"Hoeffding's tail is known for signs of a sketch; this index has {codes} codes."
            )
        if query.budget < query.k:
            raise BadQuery(
                f"The rescoring budget must be at least k = {query.k}, got {query.budget}."
            )
        if query.damping is not None and not 0 < query.damping < math.inf:
            raise BadQuery(f"Damping must be positive and finite, got {query.damping}.")
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
class _Asked:
    """A term with its texts as tokens."""

    term: Term
    completion: str
    sequence: Sequence1D
    against: Sequence1D | None


@dataclass(frozen=True, kw_only=True)
class _Prepared:
    """A query that is in order, with the rows that its filters leave."""

    query: Query
    kept: Int[np.ndarray, "kept"] | None
    asked: Sequence[_Asked]
    clock: Clock


def _weighted(asked: Sequence[_Asked]) -> list[tuple[Sequence1D, float]]:
    parts = []
    for one in asked:
        parts.append((one.sequence, one.term.weight))
        if one.against is not None:
            parts.append((one.against, -one.term.weight))
    return parts


def _measured(asked: Sequence[_Asked], values: Sequence[float]) -> tuple[MeasuredTerm, ...]:
    rest = iter(values)
    return tuple(
        MeasuredTerm(
            prompt=one.term.prompt,
            completion=one.completion,
            against=one.term.against,
            weight=one.term.weight,
            completed_by_model=one.term.completion is None,
            log_probability=next(rest),
            against_log_probability=None if one.against is None else next(rest),
            completion_tokens=one.sequence.targets,
        )
        for one in asked
    )
