"""A recorded run made again: identical bit for bit, or with other weights of its rows."""

import json
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from estimators.run.recorded import State
from scripts import main
from service.adapters import read_model
from service.checkpoints import ModelSource
from service.run.errors import RunCorrupt, RunMismatch
from service.run.folder import RecordedRun
from service.run.loading import load_first_model
from service.run.recorder import RunRecorder, record_run
from service.run.replay import Comparison, record_without, replay, retrain
from service.run.weights import read_weights
from tests.run.trainings import ROWS, batches, load, loop, make_model, train


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {
        "llama": make_model(root / "llama"),
        "tied": make_model(root / "tied", tie_word_embeddings=True),
        "gpt2": make_model(root / "gpt2", "gpt2"),
    }


@pytest.fixture(scope="module")
def run(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> RecordedRun:
    """A run of ten passes and five steps of AdamW, clipped."""
    folder = tmp_path_factory.mktemp("run") / "run"
    model = load(folders["llama"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    with record_run(folder, model, optimizer, total=5, clipping=0.5):
        loop(model, optimizer, clip=0.5)
    return RecordedRun.open(folder)


def identical(comparison: Comparison, states: int) -> bool:
    return comparison == Comparison(states=states, first_difference=None, largest_difference=0.0)


def same(state: State, other: State) -> bool:
    return state.parameters.keys() == other.parameters.keys() and all(
        torch.equal(value, other.parameters[name]) for name, value in state.parameters.items()
    )


TRAINERS: dict[str, tuple[str, dict[str, Any]]] = {
    "fused, as by default": ("llama", {}),
    "plain": ("llama", {"optim": "adamw_torch"}),
    "decay": ("llama", {"optim": "adamw_torch", "weight_decay": 0.3}),
    "not clipped": ("llama", {"max_grad_norm": 0.0}),
    "much clipped": ("llama", {"max_grad_norm": 0.05}),
    "accumulated": ("llama", {"gradient_accumulation_steps": 3, "max_grad_norm": 0.3}),
    "momentum": ("llama", {"optim": "sgd", "optim_args": "momentum=0.9,nesterov=true"}),
    "bfloat16 by autocast": ("llama", {"bf16": True}),
    "tied embeddings": ("tied", {}),
    "gpt2": ("gpt2", {"lr_scheduler_type": "cosine", "warmup_steps": 2}),
    "recomputed": ("gpt2", {"gradient_checkpointing": True}),
}


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("case", TRAINERS)
def test_a_trainers_run_is_made_again_bit_for_bit(
    case: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    kind, changes = TRAINERS[case]
    train(load(folders[kind]), tmp_path / "out", [RunRecorder(tmp_path / "run")], **changes)
    run = RecordedRun.open(tmp_path / "run")
    state, comparison = replay(run, load_first_model(run))
    assert identical(comparison, len(run.state_steps))
    assert state.step == len(run.steps)
    assert not same(state, run.state(0))


OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "sgd": lambda model: torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.01),
    "momentum": lambda model: torch.optim.SGD(
        model.parameters(), lr=0.1, momentum=0.9, dampening=0.1
    ),
    "adam": lambda model: torch.optim.Adam(model.parameters(), lr=1e-2, weight_decay=0.01),
    "groups": lambda model: torch.optim.AdamW(
        [
            {"params": [p for p in model.parameters() if p.ndim > 1], "lr": 1e-2},
            {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},
        ],
        lr=1e-3,
        betas=(0.8, 0.95),
        eps=1e-6,
        foreach=True,
    ),
}


@pytest.mark.parametrize("case", OPTIMIZERS)
@pytest.mark.parametrize("passes", [1, 7])
def test_a_loops_run_is_made_again_bit_for_bit(
    case: str, passes: int, folders: dict[str, Path], tmp_path: Path
) -> None:
    """Means that are divided by seven are rounded in between, which the divisor must tell."""
    model = load(folders["llama"])
    optimizer = OPTIMIZERS[case](model)
    with record_run(tmp_path / "run", model, optimizer, every=2, clipping=0.3, accumulation=passes):
        loop(model, optimizer, passes, clip=0.3)
    run = RecordedRun.open(tmp_path / "run")
    _, comparison = replay(run, load_first_model(run))
    assert identical(comparison, len(run.state_steps))


def adapted(folder: Path, **changes: Any) -> Any:
    """The model in ``folder`` with a new LoRA adapter, neither of whose factors is zero."""
    usual = {"r": 2, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
    config = peft.LoraConfig(**{**usual, "init_lora_weights": False, **changes})
    torch.manual_seed(11)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of PEFT's use of transformers
        return peft.get_peft_model(load(folder), config)


@pytest.mark.parametrize("changes", [{}, {"modules_to_save": ["lm_head"], "lora_alpha": 3}])
def test_an_adapters_run_is_made_again_bit_for_bit(
    changes: Any, folders: dict[str, Path], tmp_path: Path
) -> None:
    model = adapted(folders["llama"], **changes)
    train(model, tmp_path / "out", [RunRecorder(tmp_path / "run")])
    run = RecordedRun.open(tmp_path / "run")
    assert run.model is not None
    assert run.model.name == str(folders["llama"])
    assert len(run.state(0).parameters) == 8 + len(changes.get("modules_to_save", []))
    _, comparison = replay(run, load_first_model(run))
    assert identical(comparison, len(run.state_steps))


def test_an_adapter_that_was_saved_and_read_trains_again(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    """Its parameters are called otherwise inside of PEFT's own model than without it."""
    model = adapted(folders["llama"])
    train(model, tmp_path / "out", [RunRecorder(tmp_path / "run")])
    model.save_pretrained(tmp_path / "adapter")
    run = RecordedRun.open(tmp_path / "run")
    source = ModelSource.of(str(tmp_path / "adapter"))
    read = read_model(source, dtype="float32", trust_remote_code=False).model
    state = retrain(run, read, [1.0] * ROWS)
    assert same(state, run.state(run.state_steps[-1]))


def reference(model: Any, run: RecordedRun, weights: list[float]) -> dict[str, torch.Tensor]:
    """The run's loop with weights, written out: each row alone, its loss over the batch' tokens."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    for number, batch in enumerate(batches()):
        counted = (batch["labels"][:, 1:] != -100).sum()
        for place in range(2):
            one = {name: value[place : place + 1] for name, value in batch.items()}
            own = (one["labels"][:, 1:] != -100).sum()
            (weights[2 * number + place] * model(**one).loss * own / counted).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
    return dict(model.named_parameters())


def assert_trained_alike(
    run: RecordedRun, found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]
) -> None:
    """Within a hundredth of the way that each tensor went.

    Not entry by entry: where a gradient is rounding alone, Adam moves its weight by a whole rate.
    """
    for name, first in run.state(0).parameters.items():
        way = float((expected[name] - first).detach().norm())
        assert float((found[name] - expected[name]).detach().norm()) < 0.01 * way, name


def test_weights_are_those_of_the_rows_losses(run: RecordedRun, folders: dict[str, Path]) -> None:
    weights = [1.0, 0.0, 0.5, 1.0, 2.0, 1.0, 0.0, 0.0, 1.0, -1.0]
    expected = reference(load(folders["llama"]), run, weights)
    found = retrain(run, load_first_model(run), weights).parameters
    recorded = run.state(5).parameters
    assert_trained_alike(run, found, expected)
    assert max(float((found[n] - recorded[n]).abs().max()) for n in found) > 1e-2


def test_one_model_is_trained_again_and_again(run: RecordedRun, folders: dict[str, Path]) -> None:
    """Whatever became of it in between, and left frozen as it was."""
    model: Any = load(folders["llama"]).eval().requires_grad_(False)
    without = [0.0] * 2 + [1.0] * (ROWS - 2)
    first = retrain(run, model, without)
    whole = retrain(run, model, [1.0] * ROWS)
    again = retrain(run, model, without)
    assert same(first, again)
    assert same(whole, run.state(5))
    assert not same(first, whole)
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_a_training_without_rows_is_a_run_of_its_own(run: RecordedRun, tmp_path: Path) -> None:
    """Steps, widths and divisors stay; it is what weights of 0 give, and is made again alike."""
    left_out = {1, 6}
    state = record_without(run, load_first_model(run), left_out, tmp_path / "rest")
    expected = retrain(run, load_first_model(run), [float(r not in left_out) for r in range(ROWS)])
    assert_trained_alike(run, state.parameters, expected.parameters)
    rest = RecordedRun.open(tmp_path / "rest")
    assert [row.id for row in rest.rows] == [
        row.id for number, row in enumerate(run.rows) if number not in left_out
    ]
    assert rest.state_steps == run.state_steps
    for step, before in zip(rest.steps, run.steps, strict=True):
        assert step.rates == before.rates
        assert [b.divisor for b in step.batches] == [b.divisor for b in before.batches]
        assert [b.width for b in step.batches] == [b.width for b in before.batches]
    last, comparison = replay(rest, load_first_model(rest))
    assert identical(comparison, len(rest.state_steps))
    assert same(last, state)


def test_a_step_that_would_read_no_row_is_refused(run: RecordedRun, tmp_path: Path) -> None:
    with pytest.raises(RunMismatch, match="Step 2 would read no row"):
        record_without(run, load_first_model(run), {2, 3}, tmp_path / "rest")
    assert not (tmp_path / "rest").exists()


def test_a_recording_that_is_interrupted_says_so(run: RecordedRun, tmp_path: Path) -> None:
    def stops(name: str, items: Any) -> Any:
        yield from list(items)[:3]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        record_without(run, load_first_model(run), {1}, tmp_path / "rest", stops)
    with pytest.raises(RunCorrupt, match="ended after 3 steps"):
        RecordedRun.open(tmp_path / "rest")


def test_a_difference_is_told_with_its_step(
    run: RecordedRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Were the record's third state another one."""
    true = RecordedRun.state

    def state(self: RecordedRun, step: int) -> State:
        found = true(self, step)
        if step == 4:
            found.parameters["lm_head.weight"][0, 0] += 1.0  # type: ignore[index]
        return found

    monkeypatch.setattr(RecordedRun, "state", state)
    _, comparison = replay(run, load_first_model(run))
    assert comparison.first_difference == 4
    assert 0.5 < comparison.largest_difference < 2.0


def test_dropout_that_the_training_had_off_is_off_again(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", "gpt2", resid_pdrop=0.5)
    model = load(folder)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    train(model, tmp_path / "out", [RunRecorder(tmp_path / "run")])
    run = RecordedRun.open(tmp_path / "run")
    _, comparison = replay(run, load_first_model(run))
    assert identical(comparison, len(run.state_steps))


# Other models


def test_a_model_of_another_shape_is_refused(run: RecordedRun, tmp_path: Path) -> None:
    other = ModelSource.of(str(make_model(tmp_path / "other", intermediate_size=40)))
    with pytest.raises(RunMismatch, match=r"mlp.down_proj.weight of \[32, 48\], the model has one"):
        load_first_model(run, other)
    other = ModelSource.of(str(make_model(tmp_path / "gpt2", "gpt2")))
    with pytest.raises(RunMismatch, match="the model has none of this name"):
        load_first_model(run, other)


def test_an_adapter_on_another_base_model_is_refused(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    train(adapted(folders["llama"]), tmp_path / "out", [RunRecorder(tmp_path / "run")])
    run = RecordedRun.open(tmp_path / "run")
    other = load(folders["llama"])
    with torch.no_grad():
        other.model.norm.weight[0] += 1e-3
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(RunMismatch, match=r"another model than the run's: .* hash of its weights"):
        load_first_model(run, ModelSource.of(str(tmp_path / "other")))


def test_a_model_that_was_made_up_must_be_named(folders: dict[str, Path], tmp_path: Path) -> None:
    model = load(folders["llama"])
    model.config._name_or_path = ""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with record_run(tmp_path / "run", model, optimizer, total=5):
        loop(model, optimizer)
    run = RecordedRun.open(tmp_path / "run")
    with pytest.raises(RunMismatch, match="does not say where its model comes from"):
        load_first_model(run)
    _, comparison = replay(run, load_first_model(run, ModelSource.of(str(folders["llama"]))))
    assert identical(comparison, len(run.state_steps))


def test_weights_for_other_rows_are_refused(run: RecordedRun) -> None:
    with pytest.raises(RunMismatch, match="a weight for each of 10 rows, got 3"):
        retrain(run, load_first_model(run), [1.0] * 3)


# Files of weights


def test_rows_are_named_by_id_or_number(run: RecordedRun, tmp_path: Path) -> None:
    path = tmp_path / "weights.jsonl"
    lines = [{"id": run.rows[4].id, "weight": 0}, {"row": 2, "weight": 0.5}]
    path.write_text("\n\n".join(json.dumps(line) for line in lines))
    assert read_weights(path, run.rows) == [1, 1, 0.5, 1, 0, 1, 1, 1, 1, 1]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('{"id": "nobody", "weight": 0}', "names rows that the run did not read: nobody; its 10"),
        ('{"row": 10, "weight": 0}', "names rows that the run did not read: 10"),
        ('{"row": true, "weight": 0}', "names rows that the run did not read: True"),
        ('{"row": 1}', "Line 1 of .* is not an object with 'weight'"),
        ('{"row": 1, "id": "a", "weight": 0}', "either 'id' or 'row'"),
        ('{"row": 1, "weight": "no"}', "has the weight no; give a finite number"),
        ('{"row": 1, "weight": NaN}', "has the weight nan"),
        ("weights", "Line 1 of .* is not JSON"),
    ],
)
def test_other_lines_are_refused(line: str, says: str, run: RecordedRun, tmp_path: Path) -> None:
    path = tmp_path / "weights.jsonl"
    path.write_text(line)
    with pytest.raises(ValueError, match=says):
        read_weights(path, run.rows)


# The command


def invoke(*arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(main.app, ["replay", *arguments], prog_name="etymon")
    return result.exit_code, result.stdout, result.stderr


def test_the_command_makes_a_run_again(run: RecordedRun) -> None:
    code, said, told = invoke(str(run.folder))
    facts = json.loads(said)
    assert code == 0
    assert "identical, bit for bit, in all 4 states" in told
    assert facts["identical"] is True
    assert (facts["steps"], facts["rows"], facts["left_out_rows"]) == (5, ROWS, 0)
    assert facts["trained_sha256"] == run.finished.trained_sha256


def test_the_command_trains_without_rows_and_saves_the_model(
    run: RecordedRun, tmp_path: Path
) -> None:
    weights = tmp_path / "weights.jsonl"
    weights.write_text('{"row": 0, "weight": 0}\n{"row": 1, "weight": 0.5}\n')
    code, said, told = invoke(
        str(run.folder), "--weights", str(weights), "--out", str(tmp_path / "without")
    )
    facts = json.loads(said)
    assert code == 0
    assert (facts["identical"], facts["reweighted_rows"], facts["left_out_rows"]) == (None, 2, 1)
    assert "no tokenizer is saved with it" in told
    expected = retrain(run, load_first_model(run), read_weights(weights, run.rows))
    saved = dict(load(tmp_path / "without").named_parameters())
    assert all(torch.equal(saved[n], value) for n, value in expected.parameters.items())


def test_the_command_saves_an_adapter(folders: dict[str, Path], tmp_path: Path) -> None:
    train(adapted(folders["llama"]), tmp_path / "o", [RunRecorder(tmp_path / "run")])
    code, _, _ = invoke(str(tmp_path / "run"), "--out", str(tmp_path / "again"))
    assert code == 0
    source = ModelSource.of(str(tmp_path / "again"))
    read = read_model(source, dtype="float32", trust_remote_code=False).model
    last = RecordedRun.open(tmp_path / "run").state(6).parameters
    found = dict(read.named_parameters())
    assert all(torch.equal(found[name], value) for name, value in last.items())


def test_the_command_refuses_in_a_sentence(tmp_path: Path) -> None:
    code, said, told = invoke(str(tmp_path))
    assert (code, said) == (1, "")
    assert told.startswith("error: There is no recorded run in")


def test_the_command_records_a_training_without_rows(run: RecordedRun, tmp_path: Path) -> None:
    weights, rest = tmp_path / "weights.jsonl", tmp_path / "rest"
    weights.write_text('{"row": 0, "weight": 0}\n')
    code, said, _ = invoke(str(run.folder), "--weights", str(weights), "--record", str(rest))
    assert code == 0
    assert json.loads(said)["record"] == str(rest)
    assert len(RecordedRun.open(rest).rows) == ROWS - 1


@pytest.mark.parametrize("lines", [None, '{"row": 0, "weight": 0.5}\n'])
def test_a_record_of_part_of_a_row_is_refused(
    lines: str | None, run: RecordedRun, tmp_path: Path
) -> None:
    arguments = [str(run.folder), "--record", str(tmp_path / "rest")]
    if lines is not None:
        (tmp_path / "weights.jsonl").write_text(lines)
        arguments += ["--weights", str(tmp_path / "weights.jsonl")]
    code, _, told = invoke(*arguments)
    assert code != 0
    assert "--record needs --weights that are 0 or 1" in told
