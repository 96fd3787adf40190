"""Questions traced through recorded runs: right, resumable, refused where they cannot be."""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from typer.testing import CliRunner

from estimators.model.tokens import Sequence1D
from scripts.run import trace_run as command
from service.models import BadQuery
from service.run.errors import RunMismatch
from service.run.folder import RecordedRun
from service.run.loading import load_first_model
from service.run.recorder import RunRecorder, record_run
from service.run.replay import retrain
from service.tracing.directions import read_directions
from service.tracing.questions import read_questions
from service.tracing.trace import PARTIAL, measured_values, read_trace, trace_run
from tests.model_cases import Bench
from tests.run.trainings import load, make_model, train

QUESTIONS = [
    [(Sequence1D(tokens=(5, 9, 2, 7), first_target=2), 1.0)],
    [(Sequence1D(tokens=(5, 9, 3), first_target=2), 1.0), (Sequence1D(tokens=(5, 9, 4)), -1.0)],
]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RecordedRun:
    """Six steps of a Trainer with AdamW, two passes each, clipped."""
    root = tmp_path_factory.mktemp("traced")
    model = load(make_model(root / "model", "gpt2"))
    settings = {"gradient_accumulation_steps": 2, "num_train_epochs": 3, "adam_epsilon": 1e-4}
    train(model, root / "out", [RunRecorder(root / "run")], max_grad_norm=0.5, **settings)
    return RecordedRun.open(root / "run")


def test_a_trace_predicts_what_a_run_with_other_weights_does(
    run: RecordedRun, tmp_path: Path
) -> None:
    model = load_first_model(run)
    found = trace_run(run, model, QUESTIONS, tmp_path, {}, smallest=0.0)
    totals = found.totals
    assert found.values == measured_values(run, model, QUESTIONS, run.state(len(run.steps)))
    assert len(found.rows) == sum(len(b.rows) for step in run.steps for b in step.batches)
    small = 0.002
    for row in range(len(run.rows)):
        values = []
        for sign in (1, -1):
            weights = [1.0] * len(run.rows)
            weights[row] += sign * small
            state = retrain(run, model, weights)
            values.append(measured_values(run, model, QUESTIONS, state))
        expected = (np.array(values[0]) - np.array(values[1])) / (2 * small)
        assert totals[:, row] == pytest.approx(expected, abs=0.02 * np.abs(totals).max())
    assert found.norms.shape == (2, len(run.steps) + 1)
    again = read_trace(tmp_path)
    assert np.array_equal(again.influences, found.influences)
    assert again.values == found.values


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
def test_a_run_of_an_adapter_is_traced_through_its_own_weights(tmp_path: Path) -> None:
    base = make_model(tmp_path / "base")
    torch.manual_seed(1)
    settings = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(load(base), settings)
    train(model, tmp_path / "out", [RunRecorder(tmp_path / "run")], adam_epsilon=1e-2)
    run = RecordedRun.open(tmp_path / "run")
    again = load_first_model(run)
    totals = trace_run(run, again, QUESTIONS, tmp_path / "trace", {}, smallest=0.0).totals
    small, values = 0.01, []
    for sign in (1, -1):
        weights = [1.0 + sign * small, *[1.0] * (len(run.rows) - 1)]
        values.append(measured_values(run, again, QUESTIONS, retrain(run, again, weights)))
    expected = (np.array(values[0]) - np.array(values[1])) / (2 * small)
    assert totals[:, 0] == pytest.approx(expected, abs=0.03 * np.abs(totals).max())


def interrupted(after: int) -> Any:
    def progress(description: str, items: Iterable[Any]) -> Iterator[Any]:
        for number, item in enumerate(items):
            if number == after:
                raise KeyboardInterrupt
            yield item

    return progress


@pytest.mark.parametrize("after", [1, 3, 5])
def test_an_interrupted_trace_ends_with_the_same_bits(
    run: RecordedRun, tmp_path: Path, after: int
) -> None:
    model = load_first_model(run)
    whole = trace_run(run, model, QUESTIONS, tmp_path / "whole", {})
    with pytest.raises(KeyboardInterrupt):
        trace_run(run, model, QUESTIONS, tmp_path / "cut", {}, interrupted(after), interval=0.0)
    kept = (tmp_path / "cut" / PARTIAL).is_file()
    assert kept == (after > len(run.steps) - run.state_steps[-2])
    seen: list[int] = []

    def watching(description: str, items: Sequence[int]) -> Iterator[int]:
        seen.extend(items)
        yield from items

    found = trace_run(run, model, QUESTIONS, tmp_path / "cut", {}, watching)
    assert (len(seen) < len(run.steps)) == kept
    assert np.array_equal(found.influences, whole.influences)
    assert np.array_equal(found.norms, whole.norms)
    assert found.values == whole.values
    assert not (tmp_path / "cut" / PARTIAL).exists()


def test_another_question_needs_another_folder(run: RecordedRun, tmp_path: Path) -> None:
    model = load_first_model(run)
    trace_run(run, model, QUESTIONS[:1], tmp_path, {})
    with pytest.raises(RunMismatch, match=r"trace of another run or of other questions \(questio"):
        trace_run(run, model, QUESTIONS, tmp_path, {})
    with pytest.raises(RunMismatch, match="no whole trace"):
        read_trace(tmp_path / "nothing")


def test_a_run_in_low_precision_is_refused(run: RecordedRun, tmp_path: Path) -> None:
    low = replace(run, facts=replace(run.facts, autocast="bfloat16"))
    with pytest.raises(RunMismatch, match="computed in bfloat16, whose rounding has no derivative"):
        trace_run(low, load_first_model(run), QUESTIONS, tmp_path, {})


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("{", "Line 1 of .* is not JSON"),
        ('["a"]', "is no question: .* it has list"),
        ('{"prompt": "a"}', "is no question: .* it has prompt"),
        ("", "holds no question"),
        ('{"messages": []}', "got an empty list"),
        ('{"messages": [{"role": "user", "content": "a"}]}', "in line 1 of .* has no answer"),
        ('{"prompt": "a", "messages": [{"role": "user", "content": "a"}]}', "Both prompt and"),
    ],
)
def test_lines_that_are_no_question_are_refused(tmp_path: Path, line: str, told: str) -> None:
    path = tmp_path / "questions.jsonl"
    path.write_text(line)
    with pytest.raises(BadQuery, match=told):
        read_questions(path)
    with pytest.raises(BadQuery, match="There is no file"):
        read_questions(tmp_path / "none")


def test_a_conversation_is_traced_as_its_template_writes_it(tmp_path: Path) -> None:
    tokenizer = Bench(tmp_path).tokenizer
    tokenizer.chat_template = "{% for m in messages %} {{ m.content }}{% endfor %}"
    user, said = {"role": "user", "content": "aaa"}, {"role": "assistant", "content": "bbb"}
    path = tmp_path / "questions.jsonl"
    lines = [
        {"messages": [user, said], "against": "ccc"},
        {"messages": [user], "completion": " bbb", "against": " ccc"},
        {"prompt": " aaa", "completion": " bbb", "against": " ccc"},
    ]
    path.write_text("\n".join(json.dumps(line) for line in lines))
    first, second, third = (one.encode(tokenizer, 99) for one in read_questions(path))
    assert first == second == third


def test_the_command_prints_rows_and_checks_itself(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    folder = bench.save("model")
    texts = [f"The capital of {name} is {name[::-1]}." for name in ("Peru", "Mali", "Oman", "Iran")]
    rows = [bench.tokenizer(text)["input_ids"] for text in texts]
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    labels = torch.tensor([row + [-100] * (width - len(row)) for row in rows])
    model = load(folder).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    facts = {"model_source": str(folder), "total": 4, "padding": 0}
    with record_run(tmp_path / "run", model, optimizer, **facts):
        for _ in range(4):
            optimizer.zero_grad()
            model(input_ids=ids, labels=labels).loss.backward()
            optimizer.step()
    questions = tmp_path / "questions.jsonl"
    questions.write_text(json.dumps({"prompt": "The capital of Peru is", "completion": " ureP"}))
    places = [str(tmp_path / "run"), str(questions), "--out", str(tmp_path / "trace")]
    priced = CliRunner().invoke(command.app, [*places, "--dry-run"])
    assert priced.exit_code == 0, priced.stderr
    assert "Tracing 1 questions will take about" in priced.stderr
    assert json.loads(priced.stdout.splitlines()[-1])["trainings_a_question"] > 1
    assert not (tmp_path / "trace").exists()
    ended = CliRunner().invoke(command.app, [*places, "--k", "1", "--check", "2"])
    assert ended.exit_code == 0, ended.stderr
    assert "The capital of Peru is | ureP" in ended.stderr
    first = ended.stderr.split("influence, nats")[1].strip().splitlines()[1]
    assert "The capital of Peru is ureP." in first
    assert "+" in first
    report = json.loads(ended.stdout.splitlines()[-1])
    assert report["rows"] == 4
    assert 0.5 < report["check"]["slope"] < 1.5
    more = ["--k", "1", "--epochs", "--tokens", "--readings", str(tmp_path / "readings.csv")]
    places[-1] = str(tmp_path / "more")
    ended = CliRunner().invoke(command.app, [*places, *more])
    assert ended.exit_code == 0, ended.stderr
    assert "epoch 4" in ended.stderr
    assert "ureP" in ended.stderr.split("epoch 4")[1]
    lines = (tmp_path / "readings.csv").read_text().splitlines()
    assert lines[0] == "question,step,row,nats"
    assert len(lines) == 1 + 4 * 4
    total = sum(float(line.split(",")[3]) for line in lines[1:])
    read = read_trace(tmp_path / "more")
    assert total == pytest.approx(float(read.totals.sum()))
    ranked = CliRunner().invoke(command.app, [*places[:-1], str(tmp_path / "rank"), "--rank", "1"])
    assert ranked.exit_code == 0, ranked.stderr
    assert "Directions traced: 1. They leave out 0 %" in ranked.stderr.replace("%", " %")
    assert json.loads(ranked.stdout.splitlines()[-1])["left_out"] == pytest.approx([0.0], abs=1e-3)
    directed = CliRunner().invoke(command.app, [*places, "--direction", "--exact"])
    assert directed.exit_code == 0, directed.stderr
    assert json.loads(directed.stdout.splitlines()[-1])["segments"] == 4
    assert read_directions(tmp_path / "more").values == read.values
    refused = CliRunner().invoke(command.app, [*places, "--direction", "--tokens", "--check", "1"])
    assert refused.exit_code == 1
    assert "--check and --tokens need the influence" in refused.stderr
    other = CliRunner().invoke(command.app, [*places, "--tokens", "--exact"])
    assert other.exit_code == 1
    assert "(smallest_moment)" in other.stderr
    wrong = CliRunner().invoke(command.app, [*places[:1], str(tmp_path / "none"), *places[2:]])
    assert wrong.exit_code == 1
    assert "There is no file" in wrong.stderr
