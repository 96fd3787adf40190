"""The measurement on a GPU runs whole on a CPU, and no part of it takes another with it."""

import json
import os
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner, Result

from scripts.bench.gpu import __main__ as bench_gpu
from scripts.bench.gpu.agreement import compare
from scripts.bench.gpu.parts import PARTS, Part
from scripts.bench.gpu.running import Failed, run_part


def measures_and_breaks(report):
    report({"a": 1})
    raise ValueError("It broke.\nA second line.")


def measures_and_hangs(report):
    report({"a": 1})
    time.sleep(60)


def dies(report):
    os._exit(3)


def tells_what_is_imported(report):
    report({"modules": sorted({name.split(".")[0] for name in sys.modules})})


def breaks(sizes, device, report):
    measures_and_breaks(report)


def run(out: Path, *arguments: str) -> Result:
    return CliRunner().invoke(bench_gpu.app, [*arguments, "--out", str(out)])


def the_record(out: Path) -> dict:
    (path,) = out.iterdir()
    assert path.name.startswith(f"gpu_small_cpu{os.cpu_count()}_")
    record = json.loads(path.read_text())
    assert isinstance(record, dict)
    return record


@pytest.mark.slow
def test_every_part_runs_and_has_its_floor(tmp_path):
    result = run(tmp_path, "--device", "cpu", "--small")
    assert result.exit_code == 0, result.output
    record = the_record(tmp_path)
    printed = json.loads(result.stdout.splitlines()[-1])
    assert record["rows"] == printed["rows"]
    assert record["errors"] == []
    stages = ["covariances, a pass", "decompositions", "eigenvalues, a pass", "the fit"]
    stages += ["a query's direction"]
    builds = ("sketches", "sketches and codes", "16 slices")
    wanted = [("agreement", "the CPU's"), ("agreement", "its own")]
    load = "codes from the host onto the device"
    scans = [("scan", "matrix products", of) for of in (load, 1, 8, 64)]
    wanted += scans
    for model in ("llama-135m", "llama-1b"):
        wanted += [("build", model, what) for what in builds]
        wanted += [("rescoring", model, queries) for queries in (1, 6)]
        wanted += [("fit", model, stage) for stage in stages]
    wanted += scans
    keys = ("part", "factors", "model", "by", "what", "queries")
    found = [tuple(row[key] for key in keys if key in row) for row in record["rows"]]
    assert [row[:2] if row[0] == "agreement" else row for row in found] == wanted
    for row in record["rows"]:
        assert row["device"] == "cpu"
        if "ratio" in row:
            assert row["seconds"] > 0
            assert row["floor_seconds"] > 0
        if row["part"] == "agreement":
            assert row["largest_relative_difference"] < 1e-4
            assert row["least_rank_correlation"] > 0.999
        if row["part"] == "scan" and "queries" in row:
            assert (row["rows"], row["bytes"]) == (2048, 2048 * (256 // 8 + 4))
        elif row["part"] == "scan":
            assert row["largest_relative_difference"] < 0.02
    fits = [row for row in record["rows"] if row["part"] == "fit"]
    assert fits[0]["layers"] == 14
    assert fits[5]["layers"] > 14  # wide ones in blocks
    assert sum(row["seconds"] for row in fits[:3]) == pytest.approx(fits[3]["seconds"], rel=0.2)


@pytest.mark.slow
def test_a_part_ends_alone():
    assert list(run_part(measures_and_breaks, 60)) == [{"a": 1}, Failed("ValueError: It broke.")]
    start = time.monotonic()
    stopped = Failed("It was stopped after 3 seconds, its limit.")
    assert list(run_part(measures_and_hangs, 3)) == [{"a": 1}, stopped]
    assert time.monotonic() - start < 20
    (failed,) = run_part(dies, 60)
    assert failed == Failed("Its process ended without a word, with exit status 3.")


@pytest.mark.slow
def test_parts_need_no_more_than_the_wheels():
    (row,) = run_part(tells_what_is_imported, 60)
    needless = {"pyarrow", "datasets", "fastapi", "pydantic", "bm25s", "structlog", "uvicorn"}
    assert not needless & set(row["modules"])
    assert {"torch", "transformers"} <= set(row["modules"])


@pytest.mark.slow
def test_a_failed_part_is_recorded_and_the_next_one_runs(tmp_path, monkeypatch):
    parts = {"broken": Part(run=breaks, seconds=60), "agreement": PARTS["agreement"]}
    monkeypatch.setattr(bench_gpu, "PARTS", parts)
    result = run(tmp_path, "--device", "cpu", "--small")
    assert result.exit_code == 1
    record = the_record(tmp_path)
    assert record["errors"] == [{"part": "broken", "error": "ValueError: It broke."}]
    assert [row["part"] for row in record["rows"][1:]] == ["agreement", "agreement"]
    assert record["rows"][0]["a"] == 1


def test_parts_without_time_are_recorded(tmp_path):
    result = run(tmp_path, "--device", "cpu", "--small", "--part", "scan", "--seconds", "0")
    assert result.exit_code == 1
    assert the_record(tmp_path)["errors"] == [{"part": "scan", "error": "No time was left for it."}]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--device", "cpu"], "A CPU would take hours at these sizes; add --small."),
        (["--device", "gpu"], "Unknown device 'gpu'; choose cuda, cuda:N or cpu."),
        (["--device", "meta"], "Unknown device 'meta'; choose cuda, cuda:N or cpu."),
        (["--device", "cpu", "--small", "--part", "all"], "Unknown part 'all'; choose one of"),
    ],
)
def test_what_cannot_be_measured_is_one_sentence(arguments, said, tmp_path):
    result = run(tmp_path, *arguments)
    assert result.exit_code == 1
    assert said in " ".join(result.stderr.split())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("built", "said"), [(False, "without CUDA"), (True, "sees 0 NVIDIA")])
def test_a_machine_without_a_gpu_is_one_sentence(built, said, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: built)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    result = run(tmp_path)
    assert result.exit_code == 1
    assert said in " ".join(result.stderr.split())


def test_agreement_is_by_the_worst_query():
    expected = np.array([[1.0, 2.0, 3.0, 4.0], [4.0, 3.0, 2.0, 0.0]])
    found = np.array([[1.0, 2.0, 3.0, 4.0], [4.0, 3.0, 0.0, 1.0]])
    assert compare(found, expected) == {
        "largest_relative_difference": pytest.approx(0.5),
        "least_rank_correlation": pytest.approx(1 - 6 * 2 / (4 * 15)),  # Spearman's formula
    }
