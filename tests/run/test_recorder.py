"""What a recorded run holds, that recording changes nothing, and what is refused."""

import json
import logging
import re
import shutil
import warnings
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Adafactor, TrainerCallback

from index.errors import DiskFull
from index.files import read_sealed, write_sealed
from service.run.batches import ReadBatch, read_batch
from service.run.errors import RunCorrupt, RunFault, RunMissing, Unrecordable
from service.run.folder import RecordedRun
from service.run.recorder import RunRecorder, record_run
from service.run.recording import exact_divisor
from tests.run.trainings import (
    ROWS,
    batches,
    collate,
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


def adamw(model: Any, **options: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2, **options)


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


def test_the_best_checkpoint_does_not_take_the_last_states_place(
    model_folder: Path, tmp_path: Path
) -> None:
    """The first evaluation is the best one of a training that goes astray."""
    model = load(model_folder)
    trainer = train(
        model,
        tmp_path,
        [RunRecorder(tmp_path / "run", every=100)],
        learning_rate=1.0,
        num_train_epochs=3,
        eval_strategy="epoch",
        save_strategy="epoch",
        load_best_model_at_end=True,
    )
    losses = [line["eval_loss"] for line in trainer.state.log_history if "eval_loss" in line]
    assert min(losses) < losses[-1]
    last = RecordedRun.open(tmp_path / "run").state(9)
    weights = dict(model.named_parameters())
    assert any(not torch.equal(value, weights[name]) for name, value in last.parameters.items())


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


# What is refused at the start


class Odd(torch.optim.AdamW):
    """Not one of torch.optim's own."""


OPTIMIZERS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "another": (
        lambda model: Adafactor(model.parameters(), lr=1e-3, relative_step=False),
        "The optimizer is a transformers.optimization.Adafactor",
    ),
    "a subclass": (lambda model: Odd(model.parameters()), "SGD, Adam or AdamW only"),
    "amsgrad": (lambda model: adamw(model, amsgrad=True), "has amsgrad on"),
    "maximize": (lambda model: adamw(model, maximize=True), "has maximize on"),
    "differentiable": (lambda model: adamw(model, differentiable=True), "has differentiable on"),
    "a tensor": (
        lambda model: torch.optim.AdamW(model.parameters(), lr=torch.tensor(0.1)),
        "The learning rate is a tensor",
    ),
    "strangers": (
        lambda model: torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))]),
        "has 1 parameters that are not the model's",
    ),
}


@pytest.mark.parametrize("case", OPTIMIZERS)
def test_other_optimizers_are_refused(case: str, model_folder: Path, tmp_path: Path) -> None:
    make, says = OPTIMIZERS[case]
    model = load(model_folder)
    with (
        pytest.raises(Unrecordable, match=says),
        record_run(tmp_path / "run", model, make(model), total=5),
    ):
        pass
    assert not (tmp_path / "run").exists()


def test_an_optimizer_that_made_steps_is_refused(model_folder: Path, tmp_path: Path) -> None:
    model = load(model_folder)
    optimizer = adamw(model)
    loop(model, optimizer)
    with (
        pytest.raises(Unrecordable, match="has made steps already"),
        record_run(tmp_path / "run", model, optimizer, total=5),
    ):
        pass


@pytest.mark.parametrize(
    ("kind", "changes", "names"),
    [
        ("gpt2", {"resid_pdrop": 0.1}, "transformer.h.0.attn.resid_dropout.p"),
        ("llama", {"attention_dropout": 0.1}, "model.layers.0.self_attn.attention_dropout"),
    ],
)
def test_dropout_is_refused(kind: str, changes: Any, names: str, tmp_path: Path) -> None:
    model = load(make_model(tmp_path / "model", kind, **changes))
    with pytest.raises(Unrecordable, match=f"Dropout is on in .*{names}"):
        train(model, tmp_path / "out", [RunRecorder(tmp_path / "run")])


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor on: another loss"),
        ({"optim": "adafactor"}, "Adafactor"),
        ({"neftune_noise_alpha": 5.0}, "neftune_noise_alpha on"),
    ],
)
def test_a_trainers_arguments_are_refused(
    changes: Any, says: str, model_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(Unrecordable, match=says):
        train(load(model_folder), tmp_path / "out", [RunRecorder(tmp_path / "run")], **changes)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"world_size": 2}, "runs in 2 processes on 1 devices each"),
        ({"n_gpu": 4}, "runs in 1 processes on 4 devices each"),
        ({"fp16": True}, "fp16 on: scaled gradients are not recorded"),
        ({"torch_compile": True}, "torch_compile on: a compiled model is not watched"),
    ],
)
def test_arguments_for_other_machines_are_refused(changes: Any, says: str, tmp_path: Path) -> None:
    arguments = SimpleNamespace(**{"world_size": 1, "n_gpu": 1, **changes})
    with pytest.raises(Unrecordable, match=says):
        RunRecorder(tmp_path / "run").on_train_begin(arguments, None, None)


def test_dropout_that_a_loop_turns_on_is_refused(tmp_path: Path) -> None:
    model = load(make_model(tmp_path / "model", "gpt2", resid_pdrop=0.1)).eval()
    optimizer = adamw(model)
    with (
        pytest.raises(Unrecordable, match=r"Dropout is on in 4 places"),
        record_run(tmp_path / "run", model, optimizer, total=5),
    ):
        loop(model, optimizer)


def test_adapters_that_put_tokens_before_the_text_are_refused(
    model_folder: Path, tmp_path: Path
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of PEFT's use of transformers
        config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
        model = peft.get_peft_model(load(model_folder), config)
    with pytest.raises(Unrecordable, match="puts tokens of its own before the text"):
        train(model, tmp_path / "out", [RunRecorder(tmp_path / "run")])


def test_several_adapters_are_refused(model_folder: Path, tmp_path: Path) -> None:
    config = peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        model = peft.get_peft_model(load(model_folder), config)
        model.add_adapter("second", config)
    with pytest.raises(Unrecordable, match=r"has 2 adapters \(default, second\)"):
        train(model, tmp_path / "out", [RunRecorder(tmp_path / "run")])


def test_a_folder_that_holds_a_run_is_refused(
    recorded: tuple[Path, Any], model_folder: Path
) -> None:
    model = load(model_folder)
    with (
        pytest.raises(Unrecordable, match="holds a run already; choose another folder"),
        record_run(recorded[0], model, adamw(model), total=5),
    ):
        pass
    assert RecordedRun.open(recorded[0]).steps


def test_states_that_do_not_fit_are_refused(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(model_folder)
    size = 3 * sum(parameter.numel() * 4 for parameter in model.parameters())
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(0, 0, 4 * size))
    with record_run(tmp_path / "small", model, adamw(model), total=9):  # 0, 3, 6, 9
        pass
    with (
        pytest.raises(RunFault, match=r"6 states take .* has room for"),
        record_run(tmp_path / "large", model, adamw(model), total=9, every=2),
    ):
        pass


PASSES: dict[str, tuple[Callable[[Any, dict[str, torch.Tensor]], Any], str]] = {
    "left padding": (
        lambda model, b: model(**{k: v.flip(1) for k, v in b.items()}),
        "padded on the left",
    ),
    "other labels": (
        lambda model, b: model(**{**b, "labels": (b["labels"] + 1).clamp(min=1)}),
        "Labels differ from the tokens",
    ),
    "padding counts": (
        lambda model, b: model(**{**b, "labels": b["input_ids"]}),
        "Padding counts in the loss",
    ),
    "no labels": (
        lambda model, b: model(input_ids=b["input_ids"]),
        "given no labels in training",
    ),
    "positions": (
        lambda model, b: model(**b, position_ids=torch.arange(b["labels"].shape[1])[None]),
        "given position_ids, which",
    ),
    "float16": (
        lambda model, b: _in_float16(model, b),
        "in float16 with scaled gradients",
    ),
}


def _in_float16(model: Any, batch: dict[str, torch.Tensor]) -> Any:
    with torch.autocast("cpu", dtype=torch.float16):
        return model(**batch)


@pytest.mark.parametrize("case", PASSES)
def test_passes_that_no_record_holds_are_refused(
    case: str, model_folder: Path, tmp_path: Path
) -> None:
    run, says = PASSES[case]
    model = load(model_folder).train()
    batch = collate([{"input_ids": row} for row in texts()[:2]])
    with (
        pytest.raises(Unrecordable, match=says),
        record_run(tmp_path / "run", model, adamw(model), total=5),
    ):
        run(model, batch)
    with record_run(tmp_path / "run", model, adamw(model), total=5):
        pass  # nothing was left behind that would keep another run away


def test_another_loss_is_refused(model_folder: Path, tmp_path: Path) -> None:
    model = load(model_folder).train()
    usual = model.loss_function
    model.loss_function = lambda *args, **options: 1.1 * usual(*args, **options)
    with (
        pytest.raises(Unrecordable, match=r"a further part .* or is scaled"),
        record_run(tmp_path / "run", model, adamw(model), total=5),
    ):
        model(**next(batches()))


def test_a_step_without_a_pass_is_refused(model_folder: Path, tmp_path: Path) -> None:
    model = load(model_folder).eval()
    optimizer = adamw(model)
    with (
        pytest.raises(Unrecordable, match=r"call model.train\(\), or tell the passes"),
        record_run(tmp_path / "run", model, optimizer, total=5),
    ):
        model(**next(batches())).loss.backward()
        optimizer.step()


def test_neither_steps_nor_interval_is_refused(model_folder: Path, tmp_path: Path) -> None:
    model = load(model_folder)
    with (
        pytest.raises(Unrecordable, match="Neither 'total'"),
        record_run(tmp_path / "run", model, adamw(model)),
    ):
        pass


def test_what_is_met_later_ends_the_recording_and_not_the_training(
    model_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plain, watched = load(model_folder), load(model_folder)

    def go(model: Any, optimizer: torch.optim.Optimizer) -> None:
        loop(model, optimizer)
        optimizer.param_groups[0]["weight_decay"] = 0.5
        loop(model, optimizer)

    go(plain, adamw(plain))
    optimizer = adamw(watched)
    with (
        caplog.at_level(logging.WARNING),
        record_run(tmp_path / "run", watched, optimizer, total=10),
    ):
        go(watched, optimizer)
    assert same_weights(plain, watched)
    assert "recorded no longer, after 5 steps: A constant of the optimizer" in caplog.text
    with pytest.raises(RunCorrupt, match=r"ended after 5 steps, .*: A constant of the optimizer"):
        RecordedRun.open(tmp_path / "run")


def test_a_full_disk_ends_the_recording_and_not_the_training(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even the reason can be written down."""
    plain, watched = load(model_folder), load(model_folder)
    loop(plain, adamw(plain))

    def full(path: Path, *_: Any) -> str:
        raise DiskFull(f"No room for {path}")

    optimizer = adamw(watched)
    with record_run(tmp_path / "run", watched, optimizer, total=100, every=2):
        optimizer.register_step_post_hook(
            lambda *_: monkeypatch.setattr("service.run.writing.write_state", full)
        )
        monkeypatch.setattr("service.run.writing.write_sealed", _only_run(full))
        loop(watched, optimizer)
    assert same_weights(plain, watched)
    with pytest.raises(RunCorrupt, match=r"finished.json is missing"):
        RecordedRun.open(tmp_path / "run")


def _only_run(full: Callable[..., Any]) -> Callable[[Path, dict[str, Any]], None]:
    return lambda path, content: (write_sealed if path.name == "run.json" else full)(path, content)


def test_a_trainer_whose_training_failed_may_be_recorded_again(
    model_folder: Path, tmp_path: Path
) -> None:
    """It failed before its first step, and left nothing."""
    recorder = RunRecorder(tmp_path / "run")
    model = load(model_folder)

    class Fails(TrainerCallback):
        def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        train(model, tmp_path / "out", [recorder, Fails()])
    train(model, tmp_path / "out", [recorder])
    assert len(RecordedRun.open(tmp_path / "run").steps) == 6


def test_a_training_that_fails_leaves_no_whole_run(model_folder: Path, tmp_path: Path) -> None:
    model = load(model_folder)
    optimizer = adamw(model)
    with (
        pytest.raises(ZeroDivisionError),
        record_run(tmp_path / "run", model, optimizer, total=10),
    ):
        loop(model, optimizer)
        raise ZeroDivisionError
    with pytest.raises(RunCorrupt, match=r"after 5 steps, .*ZeroDivisionError"):
        RecordedRun.open(tmp_path / "run")


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


def test_the_sentences_that_the_page_explains_are_said() -> None:
    """In the source, whose lines cut sentences and whose values are named between braces."""
    root = Path(__file__).parents[2]
    page = (root / "docs" / "troubleshooting.md").read_text()
    section = page.partition("## Runs")[2].partition("\n## ")[0]
    source = "".join(path.read_text() for path in (root / "service" / "run").glob("*.py"))
    said = re.sub(r'"\s*\n\s*f?"', "", source)
    rows = re.findall(r"^\| (?!it says|---)(.+?) \|", section, flags=re.MULTILINE)
    parts = [part for row in rows for part in row.split(" ... ")]
    assert len(parts) > 30
    assert [part for part in parts if part not in said] == []
