"""What a unit of score is worth: recovered where it is known, refused where it is not."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from transformers import GPT2LMHeadModel
from typer.testing import CliRunner

from estimators.chosen import GradientEstimator
from index.editing import delete_rows
from index.errors import IndexCorrupt
from index.examples import ExampleStore
from scripts import answers, serve_mcp
from scripts.run import learn_scale as command
from service.corpus.reading import read_examples
from service.indexing.building import BuildOptions
from service.models import load_model
from service.run.errors import RunMismatch
from service.run.folder import RecordedRun
from service.run.loading import load_first_model
from service.run.recorder import record_run
from service.run.replay import retrain
from service.scaling import retraining
from service.scaling.evidence import Common, TracedRun, common_rows
from service.scaling.fitting import (
    Retraining,
    factor,
    fit_scale,
    for_another,
    scales_by_size,
    sign_test,
    spread_of_results,
)
from service.scaling.kept import FILE_NAME as KEPT
from service.scaling.kept import MeasuredValues
from service.scaling.learning import Learner
from service.scaling.retraining import Plan, measure_retrainings, plan_retrainings
from service.schemas.answers import QueryResponse
from service.schemas.queries import QueryRequest
from service.scoring.effect import Effect
from service.scoring.scale import FILE_NAME, NO_SCALE, Scale, ScaleRecord, find_scales
from service.search.opening import open_index
from service.search.query import Query
from service.search.retrieval import Retriever
from service.tracing.trace import measured_values, trace_run
from tests.index_fixtures import CONTEXT, Workshop, save_model, sentences, train_tokenizer
from tests.index_fixtures import write_jsonl as write

ROWS, QUESTIONS, WORTH = 200, 8, 2e-5


# --- the arithmetic -----------------------------------------------------------------------------


def world(
    seed: int, questions: int = QUESTIONS, differ: float = 0.3, noise: float = 0.5, rows: int = ROWS
) -> tuple[np.ndarray, np.ndarray]:
    """Heavy-tailed scores; influences ``c s`` with c log-normal over questions, and noise."""
    generator = np.random.default_rng(seed)
    scores = 1e4 * stats.t(2).rvs((questions, rows), random_state=generator)
    worth = WORTH * np.exp(differ * generator.standard_normal((questions, 1)))
    kinds = 1 + noise * stats.t(3).rvs((questions, rows), random_state=generator)
    return scores, worth * scores * kinds


def chosen(name: str = "ekfac", **values: float) -> GradientEstimator:
    part: Any = None
    return GradientEstimator(name=name, part=part, values=values, grounds_sha256="00")


def test_a_known_factor_is_found_and_a_row_that_is_far_off_changes_little() -> None:
    scores, influences = world(0, differ=0.0, noise=0.0)
    assert [factor(*one) for one in zip(scores, influences, strict=True)] == pytest.approx(
        [WORTH] * QUESTIONS
    )
    scores, influences = world(1, differ=0.0)
    strongest = np.argmax(np.abs(scores[0]))
    influences[0, strongest] *= -1000
    least_squares = (scores[0] @ influences[0]) / (scores[0] @ scores[0])
    assert factor(scores[0], influences[0]) == pytest.approx(WORTH, rel=0.2)
    assert abs(least_squares / WORTH - 1) > 10
    weak = np.argsort(np.abs(scores[0]))[: ROWS // 2]  # half of the rows, and little of the score
    influences[0, weak] = 1e3
    assert factor(scores[0], influences[0]) == pytest.approx(WORTH, rel=0.4)


@pytest.mark.parametrize("questions", [4, 8, 16])
def test_the_interval_holds_the_factor_of_another_question_as_often_as_it_says(
    questions: int,
) -> None:
    held = 0
    for seed in range(400):
        factors = [factor(*one) for one in zip(*world(seed, questions + 1), strict=True)]
        interval = for_another(np.array(factors[1:]))
        held += interval.low <= factors[0] <= interval.high
    assert stats.binom.cdf(held, 400, 0.95) > 1e-3
    assert held < 400  # it is no wider than it must be


def test_factors_of_both_signs_have_an_interval_too() -> None:
    interval = for_another(np.array([1.0, -1.0, 2.0, 0.5]))
    assert interval.low < 0 < interval.value == 0.75 < interval.high


@pytest.mark.parametrize(("questions", "level"), [(5, 0.8), (12, 0.9), (20, 0.95)])
def test_the_spread_holds_a_strong_row_of_another_question_as_often_as_it_says(
    questions: int, level: float
) -> None:
    generator = np.random.default_rng(questions)
    held = 0
    for seed in range(300):
        scores, influences = world(1000 + seed, questions + 1, noise=0.3)
        pairs = zip(scores[1:], influences[1:], strict=True)
        factors = np.array([factor(*one) for one in pairs])
        spread, confidence = spread_of_results(scores[1:], influences[1:], factors)
        assert confidence == level
        row = generator.choice(np.argsort(-np.abs(scores[0]))[:20])
        effect = Effect(
            nats_per_unit=float(np.median(factors)), low=0, high=0, confidence=0.95,
            measured_by="", spread=spread, spread_confidence=confidence,
        )  # fmt: skip
        removal = effect.of_removal(float(scores[0, row]), float(np.abs(scores[0]).max()))
        held += removal.low <= -influences[0, row] <= removal.high
    assert stats.binom.cdf(held, 300, level) > 1e-3


def test_scores_that_say_nothing_fail_the_sign_test_as_seldom_as_chance_allows() -> None:
    generator = np.random.default_rng(5)
    passed = 0
    for seed in range(300):
        scores, influences = world(seed, questions=4)
        influences = np.abs(generator.permuted(influences, axis=1))  # skewed, and unrelated
        passed += sign_test(np.abs(scores), influences, seed).p_value <= 0.05
    assert stats.binom.sf(passed - 1, 300, 0.05) > 1e-3
    scores, influences = world(3, questions=4)
    assert sign_test(scores, influences, 0).p_value < 0.01


def test_a_scale_is_the_same_for_the_same_seed() -> None:
    scores, influences = world(4)
    one = fit_scale(chosen(damping=0.1), scores, influences, (), 3)
    assert one == fit_scale(chosen(damping=0.1), scores, influences, (), 3)
    other = fit_scale(chosen(damping=0.1), scores, influences, (), 4)
    assert one.sign_test != other.sign_test or one.held_out_slope != other.held_out_slope
    assert one.nats_per_unit == other.nats_per_unit
    assert one.refused is None
    assert one.nats_per_unit.low < WORTH < one.nats_per_unit.high
    assert one.held_out_slope.low < 1 < one.held_out_slope.high
    assert one.rank_correlation.value > 0.7
    assert 0.3 < one.shared_top.value < 1


def test_scores_by_which_nothing_can_be_said_are_refused() -> None:
    scores, influences = world(6)
    unrelated = np.random.default_rng(0).permuted(influences, axis=1)
    assert "no more of the run than chance" in str(fit_scale(chosen(), scores, unrelated).refused)
    influences[0] *= -3
    assert "not even its sign is known" in str(fit_scale(chosen(), scores, influences).refused)
    with pytest.raises(ValueError, match=r"at least 4 traced questions.*the trace has 3"):
        fit_scale(chosen(), scores[:3], influences[:3])
    scores[1] = 0
    with pytest.raises(ValueError, match="All scores of traced question 2 by 'ekfac' are 0"):
        fit_scale(chosen(), scores, influences)


def retrained(scores: np.ndarray, part: Callable[[int], float], size: int) -> list[Retraining]:
    """Of each question its strongest rows, which do about ``part(size)`` of their sum."""
    found = []
    differ = np.exp(np.linspace(-0.2, 0.2, len(scores)))
    for question, row in enumerate(scores):
        rows = np.argsort(-row)[:size]
        changes = np.zeros(len(scores))
        changes[question] = -part(size) * WORTH * differ[question] * row[rows].sum()
        found.append(Retraining(rows=rows, question=question, changes=changes))
    return found


def scale_of(scores: np.ndarray, influences: np.ndarray, *retrainings: Retraining) -> Scale:
    return fit_scale(chosen(damping=0.1), scores, influences, retrainings)


def test_sets_are_worth_what_retrainings_showed_and_no_size_beyond() -> None:
    scores, influences = world(7)
    made = [one for size in (1, 4, 16) for one in retrained(scores, lambda m: m**-0.5, size)]
    scale = scale_of(scores, influences, *made)
    assert [one.rows for one in scale.by_size] == [1, 4, 16]
    for rows, part in ((1, 1.0), (2, 0.75), (4, 0.5), (8, 0.375), (16, 0.25)):
        interval = scale.of_set(rows)
        assert interval is not None
        assert interval.value == pytest.approx(part * WORTH, rel=0.01)
        assert interval.low < 0.8 * interval.value
        assert interval.high > 1.2 * interval.value
    assert scale.of_set(17) is None
    assert scales_by_size(scores, made[:3]) == []  # three questions give no interval
    assert scale_of(scores, influences).of_set(1) is None


def test_answers_say_what_a_set_does_or_that_it_was_not_measured() -> None:
    scores, influences = world(7)
    made = [one for size in (4, 16) for one in retrained(scores, lambda m: 0.5, size)]
    record = record_of(scale_of(scores, influences, *made), retrainings=16)
    joint = Effect.of(record.scales[0], record).of_joint_removal([1e4] * 5)
    assert joint.nats == pytest.approx(-5e4 * 0.5 * WORTH, rel=0.01)
    assert joint.low is not None and joint.high is not None
    assert joint.low < joint.nats < joint.high < 0
    assert "all 5 results out of the training together: -0.5 nats" in joint.sentence
    beyond = Effect.of(record.scales[0], record).of_joint_removal([1e4] * 17)
    assert (beyond.nats, beyond.confidence) == (None, 0)
    assert "sets of 4 to 16 rows were" in beyond.sentence
    single = record_of(scale_of(scores, influences))
    assert "to first order, one row at a time" in single.measured_by
    unknown = Effect.of(single.scales[0], single).of_joint_removal([1e4] * 5)
    assert unknown.nats is None
    assert "--retrainings measures it" in unknown.sentence
    needs_none = Effect(nats_per_unit=1, low=1, high=1, confidence=1, measured_by="")
    assert needs_none.of_removal(0.5, 2.0).low == -0.5


def record_of(*scales: Scale, **changes: Any) -> ScaleRecord:
    usual = {
        "model_sha256": "", "grounds_sha256": "00", "run_sha256": "", "trace_sha256": "",
        "questions": QUESTIONS, "rows": ROWS, "run_rows": ROWS, "partly_counted": 0, "top": 20,
        "retrainings": 0, "confidence": 0.95, "scales": scales, "seconds": 1.0,
    }  # fmt: skip
    return ScaleRecord.model_validate({**usual, **changes})


def test_retrainings_are_planned_for_each_size_and_question() -> None:
    scores = world(8)[0]
    plans = plan_retrainings(scores, 18, 0)
    strong = [plan for plan in plans if plan.question is not None]
    assert len(plans) == 18
    assert sorted(len(plan.rows) for plan in strong) == [1] * 4 + [5] * 4 + [20] * 4
    assert all(len(plan.rows) == ROWS // 20 for plan in plans if plan.question is None)
    for plan in strong:
        assert plan.question is not None
        own = scores[plan.question]
        assert own[plan.rows].min() >= np.delete(own, plan.rows).max()
    with pytest.raises(RunMismatch, match="15 retrainings are too few: 16 are needed, for 4"):
        plan_retrainings(scores, 15, 0)


# --- of a recorded run ----------------------------------------------------------------------------

COUNT, ASKED = 60, 6


@dataclass(frozen=True, kw_only=True)
class Recorded:
    """A recorded run of 60 rows, its index and a trace of six questions."""

    workshop: Workshop
    run: Path
    index: Path
    trace: Path
    asked: list[tuple[str, str]]

    def learner(self, **changes: Any) -> Learner:
        index = open_index(self.index, self.workshop.loaded)
        traced = TracedRun.read(self.run, self.trace)
        usual = Learner(index=index, traced=traced, estimators=[index.estimators.own])
        return replace(usual, **changes)

    def copied(self, to: Path) -> "Recorded":
        return replace(self, index=Path(shutil.copytree(self.index, to / "index")))

    def retriever(self) -> Retriever:
        return Retriever(open_index(self.index, self.workshop.loaded))


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Recorded:
    root = tmp_path_factory.mktemp("scaled")
    texts = sentences(COUNT)
    tokenizer = train_tokenizer(texts)
    first = save_model(root / "first", tokenizer, seed=1)
    quiet = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    model = GPT2LMHeadModel.from_pretrained(first, **quiet)
    model.save_pretrained(first)
    rows = [{"id": f"fact-{i}", "text": text, "page": i} for i, text in enumerate(texts)]
    corpus = write(root / "corpus.jsonl", rows)
    before = Workshop(
        folder=root,
        model_folder=first,
        loaded=load_model(str(first)),
        corpus=corpus,
        factors=root,
        options=BuildOptions(dimensions=1024, rank=16, rows_per_shard=32, seed=11, slices=1),
    )
    read = list(read_examples(before.source, before.loaded, CONTEXT))
    train(model, root / "run", [e.tokens for e in read], {e.tokens: e.id for e in read}, first)
    model.save_pretrained(root / "last")
    tokenizer.save_pretrained(root / "last")
    workshop = replace(before, model_folder=root / "last", loaded=load_model(str(root / "last")))
    workshop.build(root / "index", factors=workshop.fit("ekfac"))
    run = RecordedRun.open(root / "run")
    asked = [(" ".join(t.split()[:3]), f" {' '.join(t.split()[3:5])}") for t in texts[::10]]
    questions = [[(workshop.loaded.encode_query(*one), 1.0)] for one in asked]
    trace_run(run, load_first_model(run), questions, root / "trace", {})
    return Recorded(
        workshop=workshop,
        run=root / "run",
        index=root / "index",
        trace=root / "trace",
        asked=asked,
    )


def train(
    model: Any, folder: Path, rows: list[tuple[int, ...]], ids: dict[tuple[int, ...], str], at: Path
) -> None:
    """Two epochs of SGD in batches of six."""
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.5)
    order = np.random.default_rng(0).permutation(2 * COUNT).reshape(-1, 6) % COUNT
    facts: Any = {"total": len(order), "padding": 0, "model_source": str(at), "ids": ids}
    with record_run(folder, model, optimizer, **facts):
        for batch in order.tolist():
            width = max(len(rows[i]) for i in batch)
            tokens = [[*rows[i], *[0] * (width - len(rows[i]))] for i in batch]
            labels = [[*rows[i], *[-100] * (width - len(rows[i]))] for i in batch]
            optimizer.zero_grad()
            model(input_ids=torch.tensor(tokens), labels=torch.tensor(labels)).loss.backward()
            optimizer.step()


@pytest.fixture(scope="module")
def learnt(recorded: Recorded, tmp_path_factory: pytest.TempPathFactory) -> Recorded:
    """With what the command learnt by 16 retrainings."""
    own = recorded.copied(tmp_path_factory.mktemp("learnt"))
    given = [own.index, own.trace, "--run", own.run]
    more = ["--estimators", "ekfac,kfac", "--dampings", "0.1,1", "--retrainings", "12"]
    wide = {"COLUMNS": "250"}
    priced = CliRunner().invoke(command.app, [*map(str, given), *more, "--dry-run"], env=wide)
    assert priced.exit_code == 0, priced.stderr
    assert "Scoring 60 rows takes 1 pass over them, and the run is repeated 13" in priced.stderr
    assert json.loads(priced.stdout)["seconds"] > 0
    assert not (own.index / FILE_NAME).exists()
    ended = CliRunner().invoke(command.app, [*map(str, given), *more], env=wide)
    assert ended.exit_code == 0, ended.stderr
    assert "6 traced questions, 60 of the run's 60 rows" in ended.stderr
    assert "sets of rows by 12 retrainings" in ended.stderr
    assert "nearest to the run by rank correlation: " in ended.stderr
    report = json.loads(ended.stdout.splitlines()[-1])
    kept = find_scales(own.index).record
    assert kept is not None
    assert [scale["estimator"] for scale in report["scales"]] == ["ekfac"] * 2 + ["kfac"] * 2
    assert report["scales"] == [scale.model_dump() for scale in kept.scales]
    return own


def ask(own: Recorded, **changes: Any) -> Any:
    prompt, completion = own.asked[0]
    usual = {"prompt": prompt, "completion": completion, "k": 5, "calibration_rows": 40}
    return own.retriever().answer(Query(**{**usual, **changes}))


def test_answers_of_a_learnt_index_carry_its_scale(learnt: Recorded) -> None:
    answer = ask(learnt, direction="both", ranking="score")
    assert answer.effect is not None
    assert answer.effect_reason is None
    assert "to first order, one row at a time; sets of rows by 12" in answer.effect.measured_by
    worth = answer.effect.nats_per_unit
    assert 0 < answer.effect.low < worth < answer.effect.high
    for result in answer.results:
        removal = result.effect_of_removal
        assert removal.nats == pytest.approx(-worth * result.score)
        assert removal.low < removal.nats < removal.high
        assert removal.confidence == 0.8  # six questions allow no more
    assert answer.results[0].effect_of_removal.nats < 0
    (side, joint), _ = answer.sided_removals
    assert (side, joint.rows) == ("proponents", 5)
    assert joint.nats < 0


def test_predictions_are_those_of_the_trace_within_their_intervals(learnt: Recorded) -> None:
    """Learnt on all six; the interval of a strong row holds in all but a few."""
    totals = TracedRun.read(learnt.run, learnt.trace).trace.totals
    numbers = {row.id: n for n, row in enumerate(RecordedRun.open(learnt.run).rows)}
    held = total = 0
    for number, (prompt, completion) in enumerate(learnt.asked):
        answer = ask(learnt, prompt=prompt, completion=completion, k=10, ranking="score")
        for result in answer.results:
            removal = result.effect_of_removal
            change = -totals[number, numbers[result.id]]
            held += removal.low <= change <= removal.high
            total += 1
    assert held / total > 0.75


def test_what_was_not_measured_has_no_nats_and_says_what_to_do(
    learnt: Recorded, recorded: Recorded
) -> None:
    for changes, told in (
        ({"parameters": {"damping": 0.5}}, "not for ekfac (damping 0.5); run etymon scale"),
        ({"estimator": "identity"}, "for ekfac (damping 0.1); ekfac (damping 1); kfac"),
    ):
        answer = ask(learnt, **changes)
        assert answer.effect is None
        assert answer.sided_removals == []
        assert told in answer.effect_reason
        assert {result.effect_of_removal for result in answer.results} == {None}
    assert ask(learnt, parameters={"damping": 1.0}).effect is not None
    assert "etymon scale measures it" in ask(recorded).effect_reason


def test_a_changed_index_makes_its_scale_stale(learnt: Recorded, tmp_path: Path) -> None:
    own = learnt.copied(tmp_path)
    delete_rows(own.index, {"fact-3"})
    answer = ask(own)
    assert answer.effect is None
    assert "other rows than the index has now; run etymon scale again" in answer.effect_reason
    content = json.loads((own.index / FILE_NAME).read_text())
    content["scales"][0]["nats_per_unit"]["value"] = 1.0
    (own.index / FILE_NAME).write_text(json.dumps(content))
    with pytest.raises(IndexCorrupt, match="run etymon scale again"):
        own.retriever()


def test_a_refused_scale_is_the_reason(recorded: Recorded, tmp_path: Path) -> None:
    own = recorded.copied(tmp_path)
    learner = own.learner()
    learner.traced.trace.influences[:] = np.random.default_rng(0).permuted(
        learner.traced.trace.influences, axis=1
    )
    record = learner.learn()
    assert record.scales[0].refused is not None
    answer = ask(own)
    assert (answer.effect, answer.effect_reason) == (None, record.scales[0].refused)


def response(own: Recorded, **changes: Any) -> QueryResponse:
    prompt, completion = own.asked[0]
    request = QueryRequest(prompt=prompt, completion=completion)
    return QueryResponse.from_answer(ask(own, **changes), request)


def test_the_api_the_terminal_and_assistants_show_it(
    learnt: Recorded, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    answer = response(learnt)
    document = answer.model_dump(mode="json")
    removal = document["results"][0]["effect_of_removal"]
    assert set(removal) == {"nats", "low", "high", "confidence"}
    assert document["removals"][0]["direction"] == "proponents"
    monkeypatch.setattr(answers.stderr, "width", 200, raising=False)
    answers.show(document)
    shown = " ".join(capsys.readouterr().err.split())
    assert "without it, nats" in shown
    assert f"{removal['nats']:+.2g}" in shown
    assert f"one unit of score: {document['effect']['nats_per_unit']:.3g} nats" in shown
    assert "out of the training together" in shown
    told = serve_mcp.as_text(answer)
    assert f"without it {removal['nats']:+.2g} nats" in told
    assert "One unit of score is worth" in told
    none = response(learnt, parameters={"damping": 0.5})
    assert "nats_per_unit" not in none.model_dump_json()
    assert "not for ekfac (damping 0.5)" in serve_mcp.as_text(none)
    answers.show(none.model_dump(mode="json"))
    shown = " ".join(capsys.readouterr().err.split())
    assert "without it, nats" not in shown
    assert "run etymon scale" in shown
    unmeasured = {**none.model_dump(mode="json"), "effect_reason": NO_SCALE}
    answers.show(unmeasured)  # the line about ranks suffices where nobody measured anything
    assert "etymon scale" not in capsys.readouterr().err


def test_a_retraining_is_kept_and_not_made_again(
    recorded: Recorded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted after the second, it goes on with the third; a cut line counts for nothing."""
    folder = shutil.copytree(
        recorded.trace, tmp_path / "trace", ignore=shutil.ignore_patterns(KEPT)
    )
    traced = TracedRun.read(recorded.run, folder)
    rows = np.arange(len(traced.run.rows))
    common = Common(
        index_rows=rows, index_place=rows, run_rows=rows, run_place=rows, count=len(rows),
        partly_counted=0,
    )  # fmt: skip
    plans = [Plan(rows=np.array([3, 1]), question=0), Plan(rows=np.array([2]), question=None)]
    model = load_first_model(traced.run)
    made: list[list[int]] = []

    def counted(run: RecordedRun, model: Any, weights: list[float]) -> Any:
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append([row for row, weight in enumerate(weights) if weight == 0])
        return retrain(run, model, weights)

    monkeypatch.setattr(retraining, "retrain", counted)
    with pytest.raises(KeyboardInterrupt):
        measure_retrainings(traced, common, model, plans)
    assert made == [[], [1, 3]]
    with (folder / KEPT).open("a") as file:
        file.write('{"trace": "')
    made.clear()
    found = measure_retrainings(traced, common, model, plans)
    assert made == [[2]]
    whole, without = (
        measured_values(traced.run, model, traced.questions, retrain(traced.run, model, weights))
        for weights in ([1.0] * len(rows), [float(row not in (1, 3)) for row in rows])
    )
    assert found[0].changes.tolist() == (np.array(without) - np.array(whole)).tolist()
    assert len(MeasuredValues(folder, "another")._known) == 0
    made.clear()
    again = measure_retrainings(traced, common, model, plans)
    assert made == []
    assert again[1].changes.tolist() == found[1].changes.tolist()


# --- what does not belong together ----------------------------------------------------------------


def refusal(own: Recorded, *more: str, **changes: Path) -> str:
    places = {"index": own.index, "trace": own.trace, "run": own.run, **changes}
    given = [str(places["index"]), str(places["trace"]), "--run", str(places["run"]), *more]
    ended = CliRunner().invoke(command.app, given, env={"COLUMNS": "500"})
    assert ended.exit_code == 1
    return " ".join(ended.stderr.split())


def test_what_does_not_belong_together_is_one_sentence(recorded: Recorded, tmp_path: Path) -> None:
    own = recorded.copied(tmp_path)
    few, run = tmp_path / "few", RecordedRun.open(own.run)
    model = load_first_model(run)
    questions = TracedRun.read(own.run, own.trace).questions
    trace_run(run, model, questions[:3], few, {})
    assert "at least 4 traced questions" in refusal(own, trace=few)
    again = tmp_path / "again"
    rows = [row.tokens for row in run.rows]
    train(load_last(own), again, rows, {row.tokens: row.id for row in run.rows}, own.run)
    assert "is of another run than the one in" in refusal(own, run=again)
    assert "too few: 12 are needed" in refusal(own, "--retrainings", "5")
    assert "must be numbers" in refusal(own, "--dampings", "a")
    assert "no estimator 'x'" in refusal(own, "--estimators", "x")
    assert "has no gradients" in refusal(own, "--estimators", "bm25")
    assert "no whole trace" in refusal(own, trace=tmp_path / "none")
    assert not (own.index / FILE_NAME).exists()


def load_last(own: Recorded) -> Any:
    return GPT2LMHeadModel.from_pretrained(own.workshop.model_folder)


def test_another_model_is_told_by_what_it_says(recorded: Recorded) -> None:
    learner = recorded.learner()
    learner.traced.trace.values[2] += 0.5
    with pytest.raises(RunMismatch, match="not the one at the end of the run: it gives traced q"):
        learner.learn()


def test_rows_that_no_run_read_are_refused(recorded: Recorded) -> None:
    run = RecordedRun.open(recorded.run)
    examples: ExampleStore = open_index(recorded.index, recorded.workshop.loaded).examples
    common = common_rows(run, examples)
    assert (common.count, common.partly_counted) == (COUNT, 0)
    for row, place in zip(common.index_rows, common.index_place, strict=True):
        number = common.run_rows[common.run_place == place]
        assert [run.rows[n].id for n in number] == [examples[int(row)].id]
    other = replace(run, rows=[replace(row, tokens=(*row.tokens, 5)) for row in run.rows])
    with pytest.raises(RunMismatch, match=r"None of the 60 rows .* though 60 have the same id"):
        common_rows(other, examples)
