"""One query under way: its search in each direction, then what explains the results."""

import itertools
from collections import Counter
from dataclasses import replace

import numpy as np
from jaxtyping import Float, Int

from estimators.chosen import GradientEstimator, RowEstimator, TracedEstimator
from estimators.grounds import Questions
from estimators.names import RUN_DIRECTION
from estimators.rescoring import ScoreParts
from index.certificates.statement import Certificate, Share, no_share
from service.scoring.effect import (
    OF_A_DIRECTION,
    OF_THE_RUN,
    Effect,
    JointRemoval,
    effect_of,
    removal_of,
)
from service.scoring.explaining import cluster, token_texts
from service.scoring.rows import Scoring, Target
from service.search.answer import Answer, Clock, DocumentScore, MeasuredTerm, Result
from service.search.opening import OpenIndex
from service.search.query import Query, Side
from service.search.search import Search, Steps
from service.search.shards import Shard
from service.tracing.served import told_of_layers

BOTH: tuple[Side, ...] = ("proponents", "opponents")


class Run:
    """One query under way; knows what it has scored, in both directions.

    ``steps`` yields rows of the index whose exact scores it needs and is sent them, so that several
    runs can share the passes through the model.

    Args:
        query: what to find.
        index: opened.
        scoring: gives exact scores.
        terms: what was measured.
        target: what ``scoring`` scores rows for.
        estimator: that scores.
        shard: estimates of every row, for proponents.
        kept: rows that the filters leave; None for all.
        seed: of the random rows.
        clock: started when the query's turn came.
    """

    def __init__(
        self,
        query: Query,
        index: OpenIndex,
        scoring: Scoring,
        terms: tuple[MeasuredTerm, ...],
        target: Target,
        estimator: GradientEstimator | RowEstimator,
        shard: Shard,
        kept: Int[np.ndarray, "kept"] | None,
        seed: int,
        clock: Clock,
    ) -> None:
        self.query = query
        self.index = index
        self.terms = terms
        self.target = target
        self.fingerprint = estimator.fingerprint
        self.traced = isinstance(estimator, TracedEstimator)
        self._effect, self._effect_reason = _effect(index, estimator)
        self.searches: dict[Side, Search] = {}
        self.partial = False
        self.rows = np.arange(len(index.examples)) if kept is None else kept
        self.scoring = scoring
        self._shard = shard if kept is None else shard.among(kept)
        self._seed = seed
        self._clock = clock
        self._exact: dict[int, float] = {}

    @property
    def scored_rows(self) -> int:
        """Rows scored exactly so far, for whatever reason."""
        return len(self._exact)

    @property
    def by_gradients(self) -> bool:
        """Whether scores are influences by gradients."""
        return not isinstance(self.target, Questions)

    @property
    def stage(self) -> str:
        """What it wants rows for: "calibrate" and "audit" are random, "rescore" its own."""
        return list(self.searches.values())[-1].stage if self.searches else "rescore"

    def end(self) -> None:
        """Ask for no more rows: answer with what was found so far."""
        self.partial = True
        for search in self.searches.values():
            search.end()

    def steps(self) -> Steps[Answer]:
        """Search, certify, explain."""
        query = self.query
        sides = BOTH if query.direction == "both" else (query.direction,)
        certificates: list[tuple[Side, Certificate]] = []
        shares: list[tuple[Side, Share]] = []
        removals: list[tuple[Side, JointRemoval]] = []
        results: list[Result] = []
        for side in sides:
            search = self._search(side)
            certificates += [(side, found) for found in (yield from self._side(side, search))]
            found = self.best(side)
            results += found
            if self._effect is not None and found:
                scores = [result.score for result in found]
                removals.append((side, self._effect.of_joint_removal(scores)))
            shares.append((side, self._share(search)))
        documents = (yield from self._documents(results)) if query.documents else []
        if not self.partial:
            results = self._explained(results)
        self._clock.stop("explain")
        rescored = sum(search.rescored for search in self.searches.values())
        if self.traced:  # none of them at random
            rescored = self.scored_rows
        return Answer(
            terms=self.terms,
            estimator=query.estimator or self.index.manifest.estimator.name,
            parameters=dict(query.parameters),
            estimator_sha256=self.fingerprint,
            by_gradients=self.by_gradients,
            ranking=query.ranking,
            results=results,
            documents=documents,
            sided_certificates=certificates,
            sided_shares=shares,
            partial=self.partial,
            rescored_rows=rescored,
            sampled_rows=max(self.scored_rows - rescored, 0),
            rows=len(self.rows),
            seed=self._seed,
            seconds=self._clock.seconds,
            effect=self._effect,
            effect_reason=self._effect_reason,
            sided_removals=removals,
            traced=self.traced,
            notes=self._notes(),
        )

    def best(self, side: Side) -> list[Result]:
        """The best of the rows that were scored in this direction so far, best first."""
        search, sign = self.searches[side], _sign(side)
        largest = max((abs(score) for score in self._exact.values() if score == score), default=0.0)
        best = search.best(self.query.k)
        proxies = search.estimates(best)
        results = []
        for rank, (local, proxy) in enumerate(zip(best, proxies, strict=True), start=1):
            row = int(self.rows[local])
            example = self.index.examples[row]
            norm = float(self.index.norms[row])
            score = self._exact[row]
            results.append(
                Result(
                    rank=rank,
                    direction=side,
                    row=row,
                    id=example.id,
                    document=example.document,
                    text=example.text,
                    metadata=example.metadata,
                    score=score,
                    normalised_score=(score / norm if norm else 0.0) if self.by_gradients else None,
                    proxy=sign * float(proxy),
                    gradient_norm=norm,
                    effect_of_removal=removal_of(self._effect, score, largest),
                )
            )
        return results

    def _notes(self) -> tuple[str, ...]:
        trace = self.index.trace
        if trace is None:
            return ()
        if self.query.estimator == RUN_DIRECTION:
            return told_of_layers(trace, self.index.loaded.coverage.layers)
        if not self.traced or not isinstance(self.target, Questions):
            return ()
        return trace.notes(self.target.fingerprint(0))

    def _share(self, search: Search) -> Share:
        if not (self.by_gradients or self.traced):
            return no_share("scores of an estimator without gradients are no influences")
        return search.share()

    def _search(self, side: Side) -> Search:
        shard = self._shard if side == "proponents" else self._shard.negated()
        asked = replace(self.query, direction=side)
        search = Search(asked, shard, self._seed, self.index.calibration)
        if self.partial:
            search.end()
        self.searches[side] = search
        return search

    def _side(self, side: Side, search: Search) -> Steps[list[Certificate]]:
        steps = search.steps(self._clock)
        scores: Float[np.ndarray, scored] | None = None
        while True:
            try:
                wanted = next(steps) if scores is None else steps.send(scores)
            except StopIteration as ended:
                found: list[Certificate] = ended.value
                return found
            scores = _sign(side) * (yield from self._ask(self.rows[wanted]))

    def _ask(self, rows: Int[np.ndarray, "row"]) -> Steps[Float[np.ndarray, "row"]]:
        """Exact scores of the first rows (all, unless it was ended), each computed only once."""
        asked: list[int] = rows.tolist()
        fresh = np.array([row for row in asked if row not in self._exact], dtype=np.int64)
        if len(fresh) and not self.partial:
            scores = yield fresh
            self._exact.update(zip(fresh.tolist(), scores.tolist(), strict=False))
        known = itertools.takewhile(lambda row: row in self._exact, asked)
        return np.array([self._exact[row] for row in known])

    def _documents(self, results: list[Result]) -> Steps[list[DocumentScore]]:
        found = Counter(result.document for result in results)
        documents = []
        for document, count in found.items():
            rows = np.array(self.index.examples.rows_of_document(document))
            score = None
            if len(rows) <= self.query.budget:
                scores = yield from self._ask(rows)
                if len(scores) == len(rows) and np.isfinite(scores).all():
                    score = float(scores.sum())
            documents.append(
                DocumentScore(document=document, rows=len(rows), found=count, score=score)
            )
        return documents

    def _explained(self, results: list[Result]) -> list[Result]:
        query = self.query
        tokens = [self.index.examples.read(result.row) for result in results]
        if query.tokens or query.layers:
            split = self.scoring.parts(self.target, [result.row for result in results])
            each = zip(results, tokens, split, strict=True)
            results = [self._split(*one) for one in each]
        if query.clusters and results:
            numbers = cluster(tokens)
            results = [replace(r, cluster=n) for r, n in zip(results, numbers, strict=True)]
        return results

    def _split(self, result: Result, ids: tuple[int, ...], parts: ScoreParts) -> Result:
        if self.query.layers:
            names = [layer.name for layer in self.index.loaded.coverage.layers]
            shares = parts.by_layer[0].double().tolist()
            result = replace(result, layers=dict(zip(names, shares, strict=True)))
        if self.query.tokens:
            texts = token_texts(self.index.loaded.tokenizer, ids)
            positions = parts.by_position[0].double().tolist()
            result = replace(result, tokens=tuple(zip(texts, positions, strict=True)))
        return result


def _effect(
    index: OpenIndex, estimator: GradientEstimator | RowEstimator
) -> tuple[Effect | None, str | None]:
    if estimator.name == RUN_DIRECTION:
        return None, OF_A_DIRECTION
    if isinstance(estimator, TracedEstimator):
        return OF_THE_RUN, None
    return effect_of(index.scales, estimator)


def _sign(side: Side) -> float:
    return 1.0 if side == "proponents" else -1.0
