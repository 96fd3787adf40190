"""What keeps a training from being recorded, at its start and later."""

import logging
import re
import shutil
import warnings
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from transformers import Adafactor, TrainerCallback

from index.errors import DiskFull
from index.files import write_sealed
from service.run.errors import RunCorrupt, RunFault, Unrecordable
from service.run.folder import RecordedRun
from service.run.recorder import RunRecorder, record_run
from tests.run.trainings import (
    adamw,
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


def test_a_folder_that_holds_a_run_is_refused(model_folder: Path, tmp_path: Path) -> None:
    model = load(model_folder)
    optimizer = adamw(model)
    with record_run(tmp_path / "run", model, optimizer, total=5):
        loop(model, optimizer)
    with (
        pytest.raises(Unrecordable, match="holds a run already; choose another folder"),
        record_run(tmp_path / "run", model, adamw(model), total=5),
    ):
        pass
    assert len(RecordedRun.open(tmp_path / "run").steps) == 5


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


def test_the_sentences_that_the_page_explains_are_said() -> None:
    """In the source, whose lines cut sentences and whose values are named between braces."""
    root = Path(__file__).parents[2]
    page = (root / "docs" / "troubleshooting.md").read_text()
    section = page.partition("## Runs")[2].partition("\n## ")[0]
    named = (
        "service/run", "service/tracing", "service/scaling", "estimators/scorers", "scripts/run"
    )  # fmt: skip
    rooms = [root / name for name in named]
    source = "".join(path.read_text() for room in rooms for path in room.glob("*.py"))
    said = re.sub(r'"\s*\n\s*f?"', "", source)
    rows = re.findall(r"^\| (?!it says|---)(.+?) \|", section, flags=re.MULTILINE)
    parts = [part for row in rows for part in row.split(" ... ")]
    assert len(parts) > 30
    assert [part for part in parts if part not in said] == []
