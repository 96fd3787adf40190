"""What judges a retrieval: exhaustive scores, causal effect, the audit's figures, predictions."""

import resource

import numpy as np
import pytest
import torch

from estimators.model.tokens import Sequence1D
from index.certificates.statement import Certificate, Share, no_share
from scripts.audit_recall import summarise, summarise_shares
from scripts.bench.commands import measure
from scripts.demo.tail_patch import TailPatch
from service.indexing.fitting import FitOptions
from service.indexing.prediction import predict_build, predict_fit
from service.scoring import exhaustive
from service.scoring.exhaustive import exact_scores
from service.scoring.rows import GradientScorer
from service.search.answer import Answer, MeasuredTerm, Result
from service.search.opening import open_index
from tests.directions import query_directions

pytest_plugins = ["tests.index_fixtures"]


@pytest.fixture
def opened(built, workshop):
    return open_index(built, workshop.loaded)


@pytest.fixture
def queries(opened):
    asked = [("The market of Porto", " opened in 1835."), ("Kyoto is known for", " its garden")]
    return [opened.loaded.encode_query(prompt, completion) for prompt, completion in asked]


def test_exhaustive_scores_are_those_of_the_scorer_however_queries_are_split(
    opened, queries, monkeypatch
):
    own = {"own": opened.estimators.own.directions}
    together = exact_scores(opened.loaded, own, opened.examples, queries)["own"]
    monkeypatch.setattr(exhaustive, "MOST_BYTES", 1)  # one query at a time
    apart = exact_scores(opened.loaded, own, opened.examples, queries, token_budget=64)["own"]
    rounding = {"rtol": 1e-4, "atol": 1e-4 * np.abs(together).max()}
    np.testing.assert_allclose(apart, together, **rounding)
    some = exact_scores(opened.loaded, own, opened.examples, queries, rows=[7, 3])["own"]
    np.testing.assert_allclose(some, together[:, [7, 3]], **rounding)
    for query, scores in zip(queries, together, strict=True):
        gradients, _ = exhaustive.query_gradients(
            opened.loaded.model, opened.loaded.coverage.layers, [query]
        )
        directions = query_directions(opened.estimators.own.part, gradients, 0.1)
        one = {name: value[0] for name, value in directions.items()}
        scorer = GradientScorer(opened.loaded, opened.examples, token_budget=256)
        (exact,) = scorer.score([(one, np.arange(len(scores)))])
        np.testing.assert_allclose(exact, scores, rtol=1e-3, atol=1e-4 * np.abs(scores).max())


def test_a_step_on_the_answer_itself_makes_it_likelier_and_is_undone(opened, queries):
    model = opened.loaded.model
    before = [parameter.clone() for parameter in model.parameters()]
    patch = TailPatch(model, learning_rate=0.05)
    itself = Sequence1D(tokens=queries[0].tokens)
    assert patch.gain(queries[0], [itself]) > 0
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert patch.gain(queries[0], [itself]) == patch.gain(queries[0], [itself])


def test_a_step_the_other_way_makes_it_less_likely(opened, queries):
    itself = [Sequence1D(tokens=queries[0].tokens)]
    assert TailPatch(opened.loaded.model, learning_rate=-0.05).gain(queries[0], itself) < 0


def test_examples_that_predict_nothing_cannot_be_stepped_on(opened, queries):
    with pytest.raises(ValueError, match="two tokens"):
        TailPatch(opened.loaded.model, 0.1).gain(queries[0], [Sequence1D(tokens=(1,))])


def answer(rows: list[int], bound: float) -> Answer:
    certificate = Certificate(
        type="sketch",
        status="certified",
        recall_lower_bound=bound,
        recall_target=0.5,
        confidence=0.95,
        scope="",
        probability_over="",
        assumptions=(),
        sentence="",
    )
    results = [
        Result(
            rank=i + 1,
            direction="proponents",
            row=row,
            id=str(row),
            document="",
            text="",
            metadata={},
            score=0.0,
            normalised_score=0.0,
            proxy=0.0,
            gradient_norm=1.0,
        )
        for i, row in enumerate(rows)
    ]
    term = MeasuredTerm(
        prompt="p",
        completion="c",
        against=None,
        weight=1.0,
        completed_by_model=False,
        log_probability=-1.0,
        against_log_probability=None,
        completion_tokens=1,
    )
    return Answer(
        terms=(term,),
        estimator="ekfac",
        parameters={"damping": 0.1},
        estimator_sha256="",
        by_gradients=True,
        ranking="normalised",
        partial=False,
        results=results,
        sided_certificates=[("proponents", certificate)],
        sided_shares=[("proponents", no_share("None."))],
        rescored_rows=2,
        sampled_rows=0,
        documents=[],
        rows=5,
        seed=0,
    )


def test_the_audit_counts_recall_and_broken_bounds_by_hand():
    truth = np.array([[5.0, 4.0, 3.0, 2.0, 1.0]] * 3)
    found = [answer([0, 1], 1.0), answer([0, 2], 0.5), answer([3, 4], 0.5)]
    report = summarise(found, truth, [0, 1, 2, 3, 4], k=2, confidence=0.95)
    assert [query["recall"] for query in report["per_query"]] == [1.0, 0.5, 0.0]
    assert report["mean_recall"] == pytest.approx(0.5)
    counts = report["certificates"]["sketch"]
    assert counts["violations"] == 1
    assert counts["allowed_violations"] == 2  # binomial(3, 0.05): P(more than 2) = 0.0001
    assert not report["violations_beyond_chance"]


def test_the_audit_raises_the_alarm_when_bounds_fail_too_often():
    truth = np.array([[5.0, 4.0, 3.0, 2.0, 1.0]] * 3)
    found = [answer([3, 4], 0.5)] * 3
    report = summarise(found, truth, [0, 1, 2, 3, 4], k=2, confidence=0.95)
    assert report["violations_beyond_chance"]


def test_ties_with_the_kth_best_count_as_found():
    truth = np.array([[5.0, 4.0, 4.0, 2.0, 1.0]])
    report = summarise([answer([0, 2], 1.0)], truth, [0, 1, 2, 3, 4], k=2, confidence=0.95)
    assert report["mean_recall"] == 1.0


def test_the_audit_counts_the_intervals_of_shares_that_held_by_hand():
    scores = np.array([[5.0, 4.0, 0.0, -2.0, np.nan], [1.0, 1.0, 1.0, 1.0, -9.0]])
    stated = [answer([0], 1.0), answer([0, 1], 1.0)]  # 5 of 9, 2 of 4
    for one, low, high in zip(stated, (0.5, 0.6), (0.6, 0.9), strict=True):
        share = Share(
            estimate=low, low=low, high=high, confidence=0.95, sampled=40, sentence="So much."
        )
        one.sided_shares[:] = [("proponents", share)]
    found = summarise_shares(stated, scores, [0, 1, 2, 3, 4])
    assert found is not None
    assert found["mean"] == pytest.approx((5 / 9 + 2 / 4) / 2)
    assert (found["intervals"], found["held"]) == (2, 1)
    assert found["median_width"] == pytest.approx(0.2)
    assert summarise_shares(stated, scores[:, :2], [0, 1]) is None  # only a sample was scored
    assert summarise_shares([answer([0], 1.0)], scores[:1], [0, 1, 2, 3, 4]) is None


def test_no_bound_is_judged_by_a_sample():
    truth = np.array([[5.0, 1.0]])
    report = summarise([answer([3, 4], 0.5)], truth, [0, 4], k=2, confidence=0.95)
    assert report["per_query"][0]["certificates"]["sketch"]["held"] is None
    assert report["certificates"]["sketch"]["violations"] == 0


def test_a_prediction_counts_rows_and_comes_near_the_disk_that_a_build_takes(
    built, workshop, tmp_path
):
    prediction = predict_build(
        workshop.loaded, workshop.factors, workshop.source, workshop.options, tmp_path
    )
    opened = open_index(built, workshop.loaded)
    assert prediction.rows == opened.manifest.parts[0].data.rows
    assert prediction.tokens == opened.manifest.parts[0].data.tokens
    actual = sum(path.stat().st_size for path in built.rglob("*") if path.is_file())
    assert prediction.disk_bytes == pytest.approx(actual, rel=0.25)
    assert prediction.seconds > 0
    assert prediction.memory_bytes > prediction.disk_bytes


def test_a_measured_command_gives_its_time_its_memory_and_what_it_said(tmp_path):
    figures, said = measure(["sh", "-c", "echo one; sleep 0.2; echo two"], tmp_path)
    assert said == "one\ntwo\n"
    assert 0.2 < figures["seconds"] < 20
    # Linux counts what a child inherits of its parent's memory before it becomes the command.
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    assert 0 < figures["largest_process_peak_memory_mb"] < own + 100
    with pytest.raises(RuntimeError, match="status 3"):
        measure(["sh", "-c", "exit 3"], tmp_path)


def test_a_fits_prediction_counts_rows_and_names_its_files_size(workshop):
    options = FitOptions(examples=100, token_budget=64)
    prediction = predict_fit(workshop.loaded, workshop.source, options)
    assert prediction.rows == 100
    assert prediction.tokens > 100
    assert prediction.disk_bytes == pytest.approx(workshop.factors.stat().st_size, rel=0.01)
    assert prediction.seconds > 0
    long = predict_fit(workshop.loaded, workshop.source, options, interval=0)
    assert long.memory_bytes > prediction.memory_bytes  # checkpoints
