"""The benchmark of fit and build runs, on a model too small to measure anything."""

import json

import pytest
from typer.testing import CliRunner

from scripts.bench import build as bench_build

TINY = {"n_embd": 16, "n_head": 2, "n_layer": 1, "vocab_size": 30}
SMALL = ["--examples", "3", "--length", "6", "--token-budget", "12", "--repetitions", "2"]


def test_rows_of_every_phase(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_build, "SHAPES", {"tiny": TINY})
    result = CliRunner().invoke(bench_build.app, [*SMALL, "--no-record", "--no-peers"])
    assert result.exit_code == 0, result.stderr
    rows = json.loads(result.stdout.splitlines()[-1])["rows"]
    assert [(row["phase"], row["system"]) for row in rows] == [
        ("fit", "etymon"),
        ("build", "etymon"),
        ("build", "etymon, 16 slices"),
        ("rescore", "etymon"),
    ]
    for row in rows:
        assert row["examples"] == 3
        assert row["training_seconds"] > 0
        # seconds and floor are rounded to 0.1 ms
        assert row["ratio"] == pytest.approx(row["seconds"] / row["floor_seconds"], rel=0.2)


def test_training_leaves_the_model_frozen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_build, "SHAPES", {"tiny": TINY})
    problem = bench_build.make_problem("tiny", 2, 6, 12, "cpu", "float32")
    bench_build.training(problem)
    assert not any(p.requires_grad or p.grad is not None for p in problem.model.parameters())


def test_an_unknown_model_is_one_sentence() -> None:
    result = CliRunner().invoke(bench_build.app, ["--model", "huge", "--no-record"])
    assert result.exit_code == 1
    assert "Unknown model 'huge'; choose one of gpt2-small-shapes, demo." in " ".join(
        result.stderr.split()
    )
