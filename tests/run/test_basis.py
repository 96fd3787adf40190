"""Many questions through the directions that their gradients have in common."""

from pathlib import Path

import numpy as np
import pytest
import torch

from estimators.model.tokens import Sequence1D
from estimators.run.adjoint import final_adjoint
from estimators.run.passes import trainable
from index.files import read_sealed
from service.run.errors import RunMismatch
from service.run.folder import RecordedRun
from service.run.loading import load_first_model
from service.run.optimizers import named_parameters
from service.run.recorder import RunRecorder
from service.tracing import basis
from service.tracing.basis import Basis, gram_matrix, trace_by_basis
from service.tracing.trace import MANIFEST, read_trace, trace_run
from service.tracing.walk import Question
from tests.run.trainings import load, make_model, train

QUESTIONS: list[Question] = [
    [(Sequence1D(tokens=(5, 9, 2, 7), first_target=2), 1.0)],
    [(Sequence1D(tokens=(5, 9, 3), first_target=2), 1.0), (Sequence1D(tokens=(5, 9, 4)), -1.0)],
    [(Sequence1D(tokens=(8, 2, 3, 3), first_target=1), 1.0)],
    [(Sequence1D(tokens=(5, 9, 2, 7), first_target=2), 2.0)],
    [(Sequence1D(tokens=(6, 1, 7), first_target=2), 0.5)],
]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RecordedRun:
    root = tmp_path_factory.mktemp("traced")
    model = load(make_model(root / "model", "gpt2"))
    train(model, root / "out", [RunRecorder(root / "run")], num_train_epochs=2)
    return RecordedRun.open(root / "run")


def gradients(run: RecordedRun) -> np.ndarray:
    model = load_first_model(run)
    found = []
    with trainable(model, run.recipe, named_parameters(model)) as parameters:
        for question in QUESTIONS:
            adjoint, _ = final_adjoint(model, parameters, run.state(len(run.steps)), question)
            found.append(torch.cat([v.flatten() for v in adjoint.parameters.values()]))
    flat: np.ndarray = torch.stack(found).double().numpy()
    return flat


def test_the_gram_matrix_is_that_of_the_gradients_whatever_is_held_at_once(
    run: RecordedRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    flat = gradients(run)
    monkeypatch.setattr(basis, "TOGETHER", 2)
    found = gram_matrix(run, load_first_model(run), QUESTIONS)
    np.testing.assert_allclose(found, flat @ flat.T, rtol=1e-5, atol=1e-7 * found.max())


def test_directions_are_orthonormal_and_hold_all_but_what_they_say(run: RecordedRun) -> None:
    flat = gradients(run)
    for rank in (1, 2, 3):
        found = Basis.of(flat @ flat.T, rank)
        directions = found.weights @ flat
        np.testing.assert_allclose(directions @ directions.T, np.eye(rank), atol=1e-9)
        rest = flat - found.parts @ directions
        norms = np.linalg.norm(flat, axis=1)
        np.testing.assert_allclose(np.linalg.norm(rest, axis=1) / norms, found.left_out, atol=1e-6)
        scaled = np.linalg.svd(flat / norms[:, None], compute_uv=False)
        np.testing.assert_allclose(np.square(found.left_out).sum(), np.square(scaled[rank:]).sum())


def test_all_directions_give_each_questions_own_trace(run: RecordedRun, tmp_path: Path) -> None:
    """Two questions are multiples of each other, so that four directions span all five."""
    model = load_first_model(run)
    exact = trace_run(run, model, QUESTIONS, tmp_path / "exact", {}, by_token=True)
    found = trace_by_basis(run, model, QUESTIONS, tmp_path / "all", {}, rank=5, by_token=True)
    near = {"rtol": 1e-3, "atol": 1e-4 * float(np.abs(exact.influences).max())}
    np.testing.assert_allclose(found.influences, exact.influences, **near)
    np.testing.assert_allclose(found.totals[3], 2 * found.totals[0], **near)
    assert found.tokens is not None
    np.testing.assert_allclose(found.tokens, exact.tokens, **near)
    assert found.values == exact.values
    np.testing.assert_allclose(found.norms[:, -1], exact.norms[:, -1], rtol=1e-4)
    manifest = read_sealed(tmp_path / "all" / MANIFEST, "again")
    assert max(manifest["left_out"]) < 1e-3
    assert not (tmp_path / "all" / basis.FOLDER).exists()
    again = read_trace(tmp_path / "all")
    assert np.array_equal(again.influences, found.influences)


def test_fewer_directions_are_off_by_about_what_they_say(run: RecordedRun, tmp_path: Path) -> None:
    model = load_first_model(run)
    exact = trace_run(run, model, QUESTIONS, tmp_path / "exact", {})
    found = trace_by_basis(run, model, QUESTIONS, tmp_path / "two", {}, rank=2)
    manifest = read_sealed(tmp_path / "two" / MANIFEST, "again")
    error = np.sqrt(np.square(found.totals - exact.totals).mean(1))
    said = np.array(manifest["left_out_nats"])
    assert (error > 1e-6).any()
    assert (error < 5 * said + 1e-5).all()
    with pytest.raises(RunMismatch, match=r"\(rank\)"):
        trace_by_basis(run, model, QUESTIONS, tmp_path / "two", {}, rank=3)


@pytest.mark.parametrize("rank", [0, 6])
def test_a_rank_beyond_the_questions_is_refused(
    rank: int, run: RecordedRun, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="give one from 1 to the number of questions, 5"):
        trace_by_basis(run, load_first_model(run), QUESTIONS, tmp_path / "out", {}, rank=rank)
    assert not (tmp_path / "out").exists()
