"""Answering a query: propose by sketch, rescore exactly, certify. Knows no HTTP.

Two rankings are offered. "score" is the influence itself (nats for a change of weight 1 in the sum
of training losses). "normalised" divides it by the whitened norm of the training gradient, the one
that the index stores, so that long or odd examples do not crowd the top; its unit is nats per unit
of whitened norm.
"""

import math
import secrets
from collections import Counter
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from estimators.rescoring import query_directions, query_gradients
from estimators.tokens import Sequence1D
from index.certificates.sketch import Tail, plan_levels
from index.certificates.statement import Certificate
from index.vectors import LAWFUL, LOW_RANK
from service.models import BadQuery
from service.opening import OpenIndex
from service.query import Query, Ranking
from service.scoring import GradientScorer
from service.search import Clock, Proxies, Search


@dataclass(frozen=True, kw_only=True)
class Result:
    """One training example of an answer.

    Attributes:
        rank: 1 is best.
        row: in the index.
        id: of the example.
        document: that it belongs to.
        text: of the example.
        metadata: further columns of the corpus.
        score: exact influence in nats, positive = training on it raised log p(completion).
        normalised_score: score divided by ``gradient_norm`` (0 where that is 0).
        proxy: the sketch's estimate of the value that the answer is ranked by.
        gradient_norm: whitened norm of the example's gradient.
    """

    rank: int
    row: int
    id: str
    document: str
    text: str
    metadata: dict[str, object]
    score: float
    normalised_score: float
    proxy: float
    gradient_norm: float


@dataclass(frozen=True, kw_only=True)
class DocumentScore:
    """The influence of a whole document: the sum over all its rows.

    Attributes:
        document: that some of the answer's examples belong to.
        rows: that it has in the index, windows of long texts counted singly.
        found: how many of them are among the answer's examples.
        score: sum of their exact scores in nats, positive = proponent; None if it has more rows
            than the query's budget, or a row that cannot be scored.
    """

    document: str
    rows: int
    found: int
    score: float | None


@dataclass(frozen=True, kw_only=True)
class Answer:
    """Ranked training examples and what is known about those that were not looked at.

    Attributes:
        prompt: as asked.
        completion: as asked, or the model's own.
        completed_by_model: whether it is the model's own.
        log_probability: ``log p(completion | prompt)`` in nats.
        completion_tokens: how many tokens count.
        results: best first.
        documents: those of the results in order of their best one; empty unless asked for.
        certificates: "sketch", "audit" and, if the index is calibrated, "calibration"; each a
            statement by itself at its own confidence.
        rescored_rows: rows rescored because of their proxies.
        sampled_rows: further rows scored exactly for the checks.
        rows: rows of the index.
        seed: of the samples.
        seconds: by stage.
    """

    prompt: str
    completion: str
    completed_by_model: bool
    log_probability: float
    completion_tokens: int
    results: list[Result]
    documents: list[DocumentScore]
    certificates: list[Certificate]
    rescored_rows: int
    sampled_rows: int
    rows: int
    seed: int
    seconds: dict[str, float] = field(default_factory=dict)


class Retriever:
    """Answers queries about one model from one index.

    Args:
        index: opened, with its model.
        token_budget: padded tokens in a rescoring batch.
    """

    def __init__(self, index: OpenIndex, token_budget: int = 1024) -> None:
        self.loaded = index.loaded
        self.index = index
        self._token_budget = token_budget

    def answer(self, query: Query) -> Answer:
        """Find the top k training examples for a query and certify their recall.

        Raises:
            BadQuery: the query cannot be measured, or its numbers are out of range.
            NonFiniteGradientError: the model gives NaN or infinite gradients for it.
        """
        self._check(query)
        clock = Clock()
        completion = query.completion
        if completion is None:
            completion = self.loaded.complete(query.prompt)
            clock.stop("complete")
        sequence = self.loaded.encode_query(query.prompt, completion)
        directions, log_probability = self.directions(sequence, query.damping)
        clock.stop("gradient")
        proxies = self.proxies(directions, query.ranking, query.tail)
        clock.stop("scan")
        seed = secrets.randbits(62) if query.seed is None else query.seed
        scorer = GradientScorer(self.loaded, self.index.examples, directions, self._token_budget)
        search = Search(query, proxies, scorer, seed, self.index.calibration)
        certificates = search.run(clock)
        results = self._results(search, query.k)
        documents = self._documents(search, results) if query.documents else []
        clock.stop("documents")
        return Answer(
            prompt=query.prompt,
            completion=completion,
            completed_by_model=query.completion is None,
            log_probability=log_probability,
            completion_tokens=sequence.targets,
            results=results,
            documents=documents,
            certificates=certificates,
            rescored_rows=search.rescored,
            sampled_rows=int(search.scored.sum()) - search.rescored,
            rows=len(self.index.examples),
            seed=seed,
            seconds=clock.seconds,
        )

    def directions(
        self, sequence: Sequence1D, damping: float | None = None
    ) -> tuple[dict[str, Tensor], float]:
        """``-(H + lambda I)^-1 grad f`` ([in, out] a layer) and ``f = log p`` in nats."""
        layers = self.loaded.coverage.layers
        gradients, values = query_gradients(self.loaded.model, layers, [sequence])
        chosen = self.index.manifest.estimator.damping if damping is None else damping
        directions = query_directions(self.index.estimator, gradients, chosen)
        return {name: value[0] for name, value in directions.items()}, float(values[0])

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

    def _check(self, query: Query) -> None:
        rows = len(self.index.examples)
        if not 1 <= query.k <= rows:
            raise BadQuery(f"k must be from 1 to {rows:,}, the rows of the index; got {query.k}.")
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

    def _results(self, search: Search, k: int) -> list[Result]:
        results = []
        for rank, row in enumerate(search.best(k), start=1):
            example = self.index.examples[int(row)]
            norm = float(self.index.norms[row])
            score = float(search.exact[row])
            results.append(
                Result(
                    rank=rank,
                    row=int(row),
                    id=example.id,
                    document=example.document,
                    text=example.text,
                    metadata=example.metadata,
                    score=score,
                    normalised_score=score / norm if norm else 0.0,
                    proxy=float(search.proxies.values[row]),
                    gradient_norm=norm,
                )
            )
        return results

    def _documents(self, search: Search, results: list[Result]) -> list[DocumentScore]:
        found = Counter(result.document for result in results)
        scores = []
        for document, count in found.items():
            rows = np.array(self.index.examples.rows_of_document(document))
            score = search.total(rows) if len(rows) <= search.query.budget else None
            scores.append(
                DocumentScore(document=document, rows=len(rows), found=count, score=score)
            )
        return scores
