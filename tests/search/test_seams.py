"""One file and one line add an estimator of any kind: toys, each against an obvious reference.

A toy is a class here and one line in a table of the registry (set by ``monkeypatch``); what answers
queries, certifies, batches and lists estimators is the product's, untouched.
"""

from dataclasses import replace
from typing import ClassVar

import numpy as np
import pytest
import torch

from estimators import registry
from estimators.chosen import settle_values
from estimators.grounds import (
    DAMPING,
    Grounds,
    Parameter,
    Questions,
    Unavailable,
    training_sequence,
)
from estimators.model.capture import visit_gradients
from estimators.model.gradients import sum_over_tokens
from estimators.model.layers import at_checkpoint
from estimators.model.tokens import Sequence1D, collate
from estimators.operators.identity import Identity
from estimators.rescoring import measure_queries, score_batch_for_queries
from estimators.scorers.bm25 import BM25
from estimators.sketching.sketch import Sketch, SketchPlan
from service.models import BadQuery
from service.search.opening import open_index
from service.search.query import Query, Term
from service.search.retrieval import Retriever
from tests import dense_reference as dense

pytest_plugins = ["tests.index_fixtures"]

ASKED = Query(
    prompt="The market of Porto", completion=" opened in 1835.", k=120, budget=120, seed=1
)
HERE = __name__


@pytest.fixture
def retriever(workshop, built) -> Retriever:
    return Retriever(open_index(built, workshop.loaded))


@pytest.fixture
def gradients(workshop, retriever) -> list[dense.Gradient]:
    examples = retriever.index.examples
    sequences = [training_sequence(examples, row) for row in range(len(examples))]
    layers = workshop.loaded.coverage.layers
    return dense.example_gradients(workshop.loaded.model, layers, sequences)


def query_gradient(retriever: Retriever) -> dense.Gradient:
    loaded = retriever.loaded
    sequence = loaded.encode_query(ASKED.prompt, ASKED.completion)
    copied = dense.trainable(loaded.model)
    return dense.weight_gradients(copied, loaded.coverage.layers, -dense.loss(copied, sequence))


def scores_by_row(retriever: Retriever, query: Query) -> np.ndarray:
    answer = retriever.answer(query)
    scores = np.empty(len(answer.results))
    for result in answer.results:
        scores[result.row] = result.score
    return scores


def agree(found: np.ndarray, expected: np.ndarray) -> bool:
    return np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()


# --- an operator that runs passes over training data, and caches what it fitted ----------------


class SecondMoment:
    """Divides by the mean square of the training gradients, entry by entry (like Adam's)."""

    parameters: ClassVar = {
        "damping": DAMPING,
        "rows": Parameter(summary="", default=50.0, least=1.0, most=1e6),
    }
    passes = 0

    def __init__(self, grounds: Grounds) -> None:
        self._grounds = grounds

    @classmethod
    def open(cls, grounds: Grounds) -> "SecondMoment":
        return cls(grounds)

    def directions(self, questions: Questions, values):
        squares = self._squares(int(values["rows"]))
        return {
            name: -gradient / (squares[name] + values["damping"] * squares[name].mean())
            for name, gradient in questions.gradients.items()
        }

    def _squares(self, rows: int):
        grounds, key = self._grounds, f"second-moment-{rows}-{self._grounds.sha256[:16]}"
        if (found := grounds.cache.load(key)) is not None:
            return found
        type(self).passes += 1
        sums = {x.name: torch.zeros(x.in_features, x.out_features) for x in grounds.layers}
        for row in range(rows):
            batch = collate([training_sequence(grounds.examples, row)])

            def visit(layer, a, d):
                sums[layer.name] += sum_over_tokens(a, d)[0].square()

            visit_gradients(grounds.model, grounds.layers, batch, visit)
        grounds.cache.keep(key, {name: value / rows for name, value in sums.items()})
        return grounds.cache.load(key)


def test_an_operator_that_passes_over_training_data_and_keeps_what_it_fitted(
    workshop, tmp_path, monkeypatch
):
    monkeypatch.setitem(registry.OPERATORS, "toy", f"{HERE}:SecondMoment")
    workshop.build(tmp_path / "index")
    retriever = Retriever(open_index(tmp_path / "index", workshop.loaded))
    monkeypatch.setattr(SecondMoment, "passes", 0)
    query = replace(ASKED, estimator="toy", parameters={"damping": 0.5}, ranking="score")
    found = scores_by_row(retriever, query)
    examples = retriever.index.examples
    sequences = [training_sequence(examples, row) for row in range(len(examples))]
    layers = workshop.loaded.coverage.layers
    rows = dense.example_gradients(workshop.loaded.model, layers, sequences)
    f = query_gradient(retriever)
    expected = np.zeros(len(rows))
    for layer in layers:
        squares = torch.stack([row[layer.name].square() for row in rows[:50]]).mean(0)
        direction = f[layer.name] / (squares + 0.5 * squares.mean())
        expected += [float((direction * row[layer.name]).sum()) for row in rows]
    assert agree(found, -expected)
    again = Retriever(open_index(tmp_path / "index", workshop.loaded))
    assert agree(scores_by_row(again, query), -expected)
    assert SecondMoment.passes == 1  # the second index found it beside the manifest
    assert len(list((tmp_path / "index" / "operators").glob("second-moment-50-*"))) == 1


# --- an operator whose directions a job computed beforehand -------------------------------------


class Stored:
    """Directions that were computed beforehand, found by the question's fingerprint."""

    parameters: ClassVar = {}

    def __init__(self, grounds: Grounds) -> None:
        self._cache = grounds.cache

    @classmethod
    def open(cls, grounds: Grounds) -> "Stored":
        return cls(grounds)

    def directions(self, questions: Questions, values):
        found = []
        for number in range(len(questions)):
            stored = self._cache.load(f"stored-{questions.fingerprint(number)}")
            if stored is None:
                raise Unavailable("No direction was computed for this question; run the job.")
            found.append(stored)
        return {name: torch.stack([one[name] for one in found]) for name in found[0]}


def test_an_operator_whose_directions_a_job_computed(retriever, gradients, monkeypatch, tmp_path):
    monkeypatch.setitem(registry.OPERATORS, "toy", f"{HERE}:Stored")
    sequence = retriever.loaded.encode_query(ASKED.prompt, ASKED.completion)
    generator = torch.Generator().manual_seed(0)
    direction = {n: torch.randn(g.shape, generator=generator) for n, g in gradients[0].items()}
    questions = Questions(sequences=[[(sequence, 1.0)]])
    cache = retriever.index.estimators._grounds.cache
    monkeypatch.setattr(cache, "_folder", tmp_path)
    cache.keep(f"stored-{questions.fingerprint(0)}", direction)
    found = scores_by_row(retriever, replace(ASKED, estimator="toy", ranking="score"))
    expected = [sum(float((direction[n] * g).sum()) for n, g in row.items()) for row in gradients]
    assert agree(found, np.array(expected))
    with pytest.raises(BadQuery, match="No direction was computed"):
        retriever.answer(replace(ASKED, estimator="toy", completion=" closed"))


# --- a scorer without gradients, and a table of scores of all rows ------------------------------


class Table:
    """Scores of all rows from a table, here how often a row holds the prompt's last token."""

    parameters: ClassVar = {"power": Parameter(summary="", default=1.0, least=1.0, most=3.0)}

    def __init__(self, grounds: Grounds) -> None:
        self._examples = grounds.examples

    @classmethod
    def open(cls, grounds: Grounds) -> "Table":
        return cls(grounds)

    def score(self, questions: Questions, rows, values):
        last = [sequences[0][0].tokens[-1] for sequences in questions.sequences]
        counts = [[self._examples.tokens(int(r)).count(t) for r in rows] for t in last]
        return np.array(counts, dtype=float) ** values["power"]

    def propose(self, questions: Questions):
        return self.score(questions, range(len(self._examples)), {"power": 1})


@pytest.mark.parametrize("proposer", [None, "codes", "bm25", "table"])
def test_a_scorer_without_gradients_pairs_with_any_proposer(retriever, monkeypatch, proposer):
    monkeypatch.setitem(registry.SCORERS, "table", f"{HERE}:Table")
    monkeypatch.setitem(registry.PROPOSERS, "table", f"{HERE}:Table")
    query = replace(
        ASKED, estimator="table", proposer=proposer, parameters={"power": 2.0}, k=5, audit_rows=0
    )
    answer = retriever.answer(replace(query, budget=120, recall=1.0))
    tokens = retriever.loaded.encode_query(ASKED.prompt, ASKED.completion).tokens
    examples = retriever.index.examples
    truth = np.array([examples.tokens(row).count(tokens[-1]) ** 2 for row in range(120)])
    assert [r.score for r in answer.results] == sorted(truth, reverse=True)[:5]
    assert (answer.estimator, answer.ranking) == ("table", "score")
    assert answer.parameters == {"power": 2.0}
    sketch = next(c for c in answer.certificates if c.type == "sketch")
    assert sketch.status in ("refused", "exhaustive")
    audited = retriever.answer(replace(query, k=5, budget=5, audit_rows=115, calibration_rows=0))
    assert [r.score for r in audited.results] == sorted(truth, reverse=True)[:5]
    with pytest.raises(BadQuery, match="cannot be split"):
        retriever.answer(replace(query, tokens=True))


# --- another order of the rows under a gradient estimator ---------------------------------------


class Backwards:
    """Looks at the last rows first."""

    def __init__(self, rows: int) -> None:
        self._rows = rows

    @classmethod
    def open(cls, grounds: Grounds) -> "Backwards":
        return cls(len(grounds.examples))

    def propose(self, questions: Questions):
        return np.tile(np.arange(self._rows, dtype=float), (len(questions), 1))


def test_any_proposer_under_the_same_exact_scores(retriever, monkeypatch):
    monkeypatch.setitem(registry.PROPOSERS, "toy", f"{HERE}:Backwards")
    few = replace(ASKED, k=3, budget=32, calibration_rows=0, audit_rows=0)
    answer = retriever.answer(replace(few, proposer="toy"))
    assert all(result.row >= 120 - 32 for result in answer.results)
    everything = replace(ASKED, k=3, audit_rows=120)
    usual = [(r.row, r.score) for r in retriever.answer(everything).results]
    other = [
        (r.row, r.score) for r in retriever.answer(replace(everything, proposer="toy")).results
    ]
    assert [row for row, _ in usual] == [row for row, _ in other]
    np.testing.assert_allclose([s for _, s in usual], [s for _, s in other], rtol=1e-5)


# --- several checkpoints --------------------------------------------------------------------------


def test_scores_are_sums_over_checkpoints(workshop, other_model):
    first, second = workshop.loaded, other_model
    layers = (
        *first.coverage.layers,
        *at_checkpoint(second.coverage.layers, "step100", second.model),
    )
    sequences = [
        Sequence1D(tokens=tuple(first.encode(text))) for text in ("Porto is", "The bridge")
    ]
    asked = first.encode_query(ASKED.prompt, ASKED.completion)
    measured = measure_queries(first.model, layers, [[(asked, 1.0)]], 1024)
    directions = Identity().directions(
        Questions(sequences=[[(asked, 1.0)]], gradients=measured.gradients), {}
    )
    found = score_batch_for_queries(first.model, layers, directions, collate(sequences))[0]
    expected = torch.zeros(2, dtype=torch.float64)
    for loaded in (first, second):
        own = loaded.coverage.layers
        f = dense.example_gradients(loaded.model, own, [asked])[0]
        rows = dense.example_gradients(loaded.model, own, sequences)
        expected += torch.tensor([dense.inner_product(f, row) for row in rows])
    assert dense.relative_error(found.double(), expected) < 1e-4
    alone = measure_queries(first.model, first.coverage.layers, [[(asked, 1.0)]], 1024)
    assert measured.values == alone.values
    plan = SketchPlan(seed=3, dimensions=8192, rank=64)
    sketch = Sketch(layers, Identity().whitening(layers, 0.1), plan)
    x, _ = sketch.training(first.model, collate(sequences))
    y, _ = sketch.query(directions)
    lengths = torch.linalg.vector_norm(x, dim=1) * torch.linalg.vector_norm(y)
    assert (((x @ y[0]) - found).abs() / lengths < 5 / np.sqrt(8192)).all()


def test_values_of_parameters_are_checked():
    known = {"damping": DAMPING}
    assert settle_values("toy", known, {}) == {"damping": 0.1}
    with pytest.raises(ValueError, match="no parameter 'dampng'; its parameters: damping"):
        settle_values("toy", known, {"dampng": 1.0})
    for value in (0, -1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="'damping' of 'toy' must be from 1e-06"):
            settle_values("toy", known, {"damping": float(value)})


# --- the one scorer that the product has ----------------------------------------------------------


def test_bm25_answers_as_any_estimator_and_sums_over_a_question(retriever):
    index = retriever.index
    lexical = BM25(index.examples.texts)
    terms = (Term(prompt="The market", completion=" of Porto", weight=2.0),)
    terms += (Term(prompt="Every", completion=" spring", against=" autumn"),)
    query = Query(batch=terms, estimator="bm25", k=5, budget=120, seed=2)
    texts = ("The market of Porto", "Every spring", "Every autumn")
    weighted = [w * lexical.scores(t) for t, w in zip(texts, (2.0, 1.0, -1.0), strict=True)]
    expected = np.sum(weighted, axis=0)
    answer = retriever.answer(query)
    best = np.sort(expected)[::-1][:5]
    np.testing.assert_allclose([r.score for r in answer.results], best, rtol=1e-5)
    assert answer.rescored_rows <= 32  # its own order is the exact one
    audit = next(c for c in answer.certificates if c.type == "audit")
    assert audit.observed["sampled_above_threshold"] == 0
