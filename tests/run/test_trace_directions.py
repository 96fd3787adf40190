"""Directions traced through recorded runs: resumable, checked, and worth what they claim."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

from estimators.run.direction import DirectionPlan
from estimators.run.passes import batch_losses, put, trainable
from estimators.run.recorded import Batch
from service.run.errors import RunMismatch
from service.run.folder import RecordedRun
from service.run.loading import load_first_model
from service.run.optimizers import named_parameters
from service.run.recorder import RunRecorder
from service.tracing.directions import (
    PARTIAL,
    RunDirections,
    read_directions,
    trace_directions,
)
from service.tracing.price import predict_trace
from service.tracing.trace import trace_run
from tests.run.test_trace import QUESTIONS, interrupted
from tests.run.trainings import load, make_model, train

WHOLE = DirectionPlan(curvature="hessian")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RecordedRun:
    """Nine steps of a Trainer in three epochs; the scaling of SGD is no approximation."""
    root = tmp_path_factory.mktemp("directed")
    model = load(make_model(root / "model", "gpt2"))
    settings = {"num_train_epochs": 3, "optim": "sgd", "learning_rate": 0.02}
    train(model, root / "out", [RunRecorder(root / "run")], max_grad_norm=1e3, **settings)
    return RecordedRun.open(root / "run")


def scores(run: RecordedRun, found: RunDirections, question: int) -> Sequence[float]:
    """Each row's readings in each segment times the final model's gradient along its direction."""
    model = load_first_model(run)
    parts = found.segments(question)
    values = []
    with trainable(model, run.recipe, named_parameters(model)) as parameters:
        put(parameters, run.state(len(run.steps)))
        for number, row in enumerate(run.rows):
            batch = Batch(rows=(number,), divisor=1.0, width=len(row.tokens))
            loss = batch_losses(model, run.rows, batch, torch.device("cpu")).sum()
            got = torch.autograd.grad(loss, list(parameters.values()), materialize_grads=True)
            total = 0.0
            for segment, part in enumerate(parts):
                pairs = zip(parameters, got, strict=True)
                along = sum(float((part[name] * value).sum()) for name, value in pairs)
                total += float(found.weights[segment, number]) * along
            values.append(total)
    return values


@pytest.mark.parametrize(("plan", "within"), [(WHOLE, 1.25), (DirectionPlan(), 2.0)])
def test_a_direction_gives_the_influences_of_the_run_in_nats(
    run: RecordedRun, tmp_path: Path, plan: DirectionPlan, within: float
) -> None:
    model = load_first_model(run)
    exact = trace_run(run, model, QUESTIONS, tmp_path / "exact", {})
    found = trace_directions(run, model, QUESTIONS, tmp_path / "directions", {}, plan)
    assert found.values == exact.values
    assert found.weights.shape == (3, len(run.rows))
    torch.testing.assert_close(
        found.weights, torch.ones(3, len(run.rows), dtype=torch.float64), rtol=0, atol=0.7
    )
    for question in range(len(QUESTIONS)):
        mine, true = scores(run, found, question), exact.totals[question]
        assert stats.pearsonr(mine, true).statistic > 0.9
        assert 1 / within < np.dot(mine, true) / np.dot(true, true) < within
    whole, parts = found.whole(0), found.segments(0)
    for name, value in whole.items():
        torch.testing.assert_close(value, parts[0][name] + parts[1][name] + parts[2][name])


@pytest.mark.parametrize("after", [2, 6])
def test_an_interrupted_walk_ends_with_the_same_bits(
    run: RecordedRun, tmp_path: Path, after: int
) -> None:
    model = load_first_model(run)
    whole = trace_directions(run, model, QUESTIONS, tmp_path / "whole", {})
    with pytest.raises(KeyboardInterrupt):
        trace_directions(
            run, model, QUESTIONS, tmp_path / "cut", {},
            progress=interrupted(after), interval=0.0,
        )  # fmt: skip
    assert (tmp_path / "cut" / PARTIAL).is_file() == (after > len(run.steps) - run.state_steps[-2])
    found = trace_directions(run, model, QUESTIONS, tmp_path / "cut", {})
    assert found.norms == whole.norms
    assert [sha256 for _, sha256 in found.files] == [sha256 for _, sha256 in whole.files]
    assert not (tmp_path / "cut" / PARTIAL).exists()


def test_directions_stand_beside_a_trace_and_are_checked(run: RecordedRun, tmp_path: Path) -> None:
    model = load_first_model(run)
    with pytest.raises(RunMismatch, match=r"no directions in .* run etymon trace with --direction"):
        read_directions(tmp_path)
    trace_run(run, model, QUESTIONS[:1], tmp_path, {})
    found = trace_directions(run, model, QUESTIONS[:1], tmp_path, {})
    with pytest.raises(RunMismatch, match=r"trace of another run or of other questions \(plan\)"):
        trace_directions(run, model, QUESTIONS[:1], tmp_path, {}, WHOLE)
    path = tmp_path / found.files[0][0]
    path.write_bytes(path.read_bytes()[:-1])
    found = read_directions(tmp_path)
    with pytest.raises(RunMismatch, match=r"direction-0000.safetensors is missing or was changed"):
        found.segments(0)


def test_prices_are_measured_for_both_kinds(run: RecordedRun) -> None:
    model = load_first_model(run)
    for plan in (None, DirectionPlan()):
        price = predict_trace(run, model, QUESTIONS, plan)
        assert price.seconds > 0
        assert price.peak_mb >= price.training_peak_mb > 0


def test_parts_of_epochs_and_tokens_sum_to_the_influence(run: RecordedRun, tmp_path: Path) -> None:
    model = load_first_model(run)
    plain = trace_run(run, model, QUESTIONS, tmp_path / "plain", {})
    found = trace_run(run, model, QUESTIONS, tmp_path / "tokens", {}, by_token=True)
    np.testing.assert_array_equal(found.influences, plain.influences)
    scale = np.abs(plain.totals).max()
    parts = found.by_segment(3)
    np.testing.assert_allclose(parts.sum(1), found.totals, rtol=0, atol=1e-12 * scale)
    assert (np.abs(parts).max(axis=(0, 2)) > 0).all()
    assert found.tokens is not None
    start = 0
    for number, row in enumerate(run.rows):
        own = found.tokens[:, start : start + len(row.tokens)]
        assert not own[:, :2].any()  # the prompt does not count
        np.testing.assert_allclose(own.sum(1), found.totals[:, number], rtol=0, atol=1e-5 * scale)
        start += len(row.tokens)
    with pytest.raises(RunMismatch, match="another run or of other questions"):
        trace_run(run, model, QUESTIONS, tmp_path / "plain", {}, by_token=True)
