"""What a recorded run holds, that recording changes nothing, and what opening one refuses."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

from index.files import read_sealed, write_sealed
from service.run.batches import ReadBatch, read_batch
from service.run.errors import RunCorrupt, RunMissing
from service.run.folder import RecordedRun
from service.run.loading import load_first_model
from service.run.recorder import RunRecorder, record_run
from service.run.recording import exact_divisor
from service.run.replay import retrain
from tests.run.trainings import (
    ROWS,
    adamw,
    batches,
    load,
    loop,
    make_model,
    same_weights,
    texts,
    train,
)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def recorded(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A run of a Trainer that is evaluated in between, and the model at its end."""
    folder = tmp_path_factory.mktemp("recorded")
    model = load(model_folder)
    train(model, folder, [RunRecorder(folder / "run")], eval_strategy="steps", eval_steps=2)
    return folder / "run", model


def test_recording_a_trainer_changes_no_bit(
    recorded: tuple[Path, Any], model_folder: Path, tmp_path: Path
) -> None:
    plain = load(model_folder)
    train(plain, tmp_path, eval_strategy="steps", eval_steps=2)
    assert same_weights(recorded[1], plain)


def test_recording_a_loop_changes_no_bit(model_folder: Path, tmp_path: Path) -> None:
    plain, watched = load(model_folder), load(model_folder)
    loop(plain, adamw(plain))
    optimizer = adamw(watched)
    with record_run(tmp_path / "run", watched, optimizer, total=5):
        loop(watched, optimizer)
    assert same_weights(plain, watched)


def test_each_row_is_kept_once_without_padding(recorded: tuple[Path, Any]) -> None:
    run = RecordedRun.open(recorded[0])
    assert sorted(row.tokens for row in run.rows) == sorted(tuple(row) for row in texts())
    assert all(row.labels == (-100, -100, *row.tokens[2:]) for row in run.rows)
    assert len({row.id for row in run.rows}) == ROWS


def test_each_epoch_reads_each_row_once_and_evaluation_does_not_count(
    recorded: tuple[Path, Any],
) -> None:
    run = RecordedRun.open(recorded[0])
    assert [len(step.batches) for step in run.steps] == [1] * 6
    read = [number for step in run.steps for number in step.batches[0].rows]
    assert sorted(read[:ROWS]) == sorted(read[ROWS:]) == list(range(ROWS))


def test_divisors_and_widths_are_those_of_the_passes(recorded: tuple[Path, Any]) -> None:
    run = RecordedRun.open(recorded[0])
    for step in run.steps:
        (batch,) = step.batches
        assert batch.divisor == sum(run.rows[number].targets for number in batch.rows)
        assert batch.width == max(len(run.rows[number].tokens) for number in batch.rows)


def test_rates_are_those_of_the_schedule(recorded: tuple[Path, Any]) -> None:
    run = RecordedRun.open(recorded[0])
    expected = [1e-2 * (6 - step) / 6 for step in range(6)]
    assert [step.rates for step in run.steps] == [(pytest.approx(e),) * 2 for e in expected]


def test_states_are_kept_at_the_root_of_the_steps(recorded: tuple[Path, Any]) -> None:
    run = RecordedRun.open(recorded[0])
    assert run.state_steps == (0, 2, 4, 6)
    assert not run.state(0).moments
    assert set(run.state(6).moments) == {"exp_avg", "exp_avg_sq"}


def test_the_last_state_is_the_trained_model(recorded: tuple[Path, Any]) -> None:
    last = RecordedRun.open(recorded[0]).state(6)
    weights = dict(recorded[1].named_parameters())
    assert set(last.parameters) == set(weights)
    assert all(torch.equal(value, weights[name]) for name, value in last.parameters.items())


class StopsEarly(TrainerCallback):
    """After two epochs."""

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_training_stop = state.epoch >= 2


@pytest.mark.parametrize(("others", "steps"), [([], 9), ([StopsEarly()], 6)])
def test_the_best_checkpoint_does_not_take_the_last_states_place(
    others: list[Any], steps: int, model_folder: Path, tmp_path: Path
) -> None:
    """The first evaluation, where the largest loss is called the best one."""
    model = load(model_folder)
    trainer = train(
        model,
        tmp_path,
        [RunRecorder(tmp_path / "run", every=100), *others],
        greater_is_better=True,
        num_train_epochs=3,
        eval_strategy="epoch",
        save_strategy="epoch",
        load_best_model_at_end=True,
    )
    losses = [line["eval_loss"] for line in trainer.state.log_history if "eval_loss" in line]
    assert losses[0] == max(losses) > losses[-1]
    run = RecordedRun.open(tmp_path / "run")
    last = run.state(steps).parameters
    weights = dict(model.named_parameters())
    assert any(not torch.equal(value, weights[name]) for name, value in last.items())
    again = retrain(run, load_first_model(run), [1.0] * ROWS).parameters
    assert all(torch.equal(value, again[name]) for name, value in last.items())


def test_the_recipe_is_the_trainers(recorded: tuple[Path, Any], model_folder: Path) -> None:
    run = RecordedRun.open(recorded[0])
    assert run.recipe.optimizer == "adamw"
    assert run.recipe.clipping == 1.0
    assert run.facts.fused is True
    assert run.facts.attention_mask
    assert run.model is not None
    assert run.model.name == str(model_folder)
    assert run.facts.seeds["seed"] == 3


def test_rows_have_the_callers_ids(model_folder: Path, tmp_path: Path) -> None:
    ids = {tuple(row): f"row-{number}" for number, row in enumerate(texts())}
    model = load(model_folder)
    optimizer = adamw(model)
    with record_run(tmp_path / "run", model, optimizer, total=5, ids=ids):
        loop(model, optimizer)
    assert [row.id for row in RecordedRun.open(tmp_path / "run").rows] == list(ids.values())


def test_passes_may_be_told(model_folder: Path, tmp_path: Path) -> None:
    model = load(model_folder)
    optimizer = adamw(model)
    with record_run(tmp_path / "run", model, optimizer, total=1, watch=False) as run:
        for batch in batches():
            run.batch(batch["input_ids"], batch["labels"], divisor=8.0)
        optimizer.step()
    (step,) = RecordedRun.open(tmp_path / "run").steps
    assert [batch.rows for batch in step.batches] == [(0, 1), (2, 3), (4, 5), (6, 7), (8, 9)]
    assert {batch.divisor for batch in step.batches} == {8.0}


def test_padding_without_a_mask_is_known_by_its_token() -> None:
    ids = torch.tensor([[5, 6, 0, 0], [5, 0, 7, 0]])
    labels = torch.tensor([[5, 6, -100, -100], [5, -100, 7, 0]])
    assert read_batch(ids, labels, None, None, padding=0).lengths == (2, 4)
    assert read_batch(ids, labels, None, None, padding=None).lengths == (4, 4)


def test_the_divisor_tells_a_mean_that_is_divided_again_to_the_last_bit() -> None:
    """Where seven means of five tokens are averaged, 35 would be another number."""
    differ = 0
    for passes in range(1, 10):
        for count in range(1, 200):
            batch = ReadBatch(
                tokens=np.zeros((1, 2), dtype=np.int64),
                labels=np.zeros((1, 2), dtype=np.int64),
                lengths=(2,),
                divisor=float(count),
                is_mean=True,
            )
            divisor = exact_divisor(batch, passes)
            loss = torch.ones((), requires_grad=True)
            (loss / count / passes).backward()
            assert np.float32(1 / divisor) == loss.grad.numpy()  # type: ignore[union-attr]
            assert divisor == pytest.approx(passes * count, rel=1e-7)
            differ += divisor != passes * count
    assert differ > 100


# What is refused when a run is opened


def _cut(folder: Path) -> None:
    (folder / "finished.json").unlink()


def _edit(folder: Path) -> None:
    facts = json.loads((folder / "run.json").read_text())
    facts["recipe"]["clipping"] = 2.0
    (folder / "run.json").write_text(json.dumps(facts))


def _exchange(folder: Path) -> None:
    facts = read_sealed(folder / "run.json", "")
    write_sealed(folder / "run.json", {**facts, "threads": facts["threads"] + 1})


def _renumber(folder: Path) -> None:
    facts = read_sealed(folder / "run.json", "")
    write_sealed(folder / "run.json", {**facts, "schema": 99})


def _append(folder: Path) -> None:
    with (folder / "rows.jsonl").open("a") as file:
        file.write('{"id":"new","tokens":[1,2],"counted":[[0,2]]}\n')


def _lose_steps(folder: Path) -> None:
    (folder / "steps.jsonl").unlink()


def _break(folder: Path) -> None:
    (folder / "run.json").write_text("{")


@pytest.mark.parametrize(
    ("harm", "says"),
    [
        (_cut, "finished.json is missing, so it was cut short"),
        (_edit, "run.json was changed after it was written"),
        (_exchange, "run.json was changed after it was written"),
        (_renumber, "has schema 99, this version reads 1"),
        (_append, "rows.jsonl was changed after it was written"),
        (_lose_steps, "steps.jsonl is missing"),
        (_break, "run.json is not a JSON object"),
    ],
)
def test_a_harmed_run_is_refused(
    harm: Callable[[Path], None], says: str, recorded: tuple[Path, Any], tmp_path: Path
) -> None:
    shutil.copytree(recorded[0], tmp_path / "run")
    harm(tmp_path / "run")
    with pytest.raises(RunCorrupt, match=says):
        RecordedRun.open(tmp_path / "run")


def test_a_changed_or_missing_state_is_refused(recorded: tuple[Path, Any], tmp_path: Path) -> None:
    shutil.copytree(recorded[0], tmp_path / "run")
    path = tmp_path / "run" / "states" / "000002.safetensors"
    tensors = load_file(path)
    save_file({**tensors, "parameters/lm_head.weight": torch.zeros(2)}, path, {"step": "2"})
    run = RecordedRun.open(tmp_path / "run")
    with pytest.raises(RunCorrupt, match=r"000002.safetensors was changed"):
        run.state(2)
    path.unlink()
    with pytest.raises(RunCorrupt, match=r"000002.safetensors is missing"):
        run.state(2)
    with pytest.raises(RunMissing, match=r"No state was kept after 3 steps .* after 0, 2, 4, 6"):
        run.state(3)


def test_no_run_at_all(tmp_path: Path) -> None:
    with pytest.raises(RunMissing, match="There is no recorded run"):
        RecordedRun.open(tmp_path)
