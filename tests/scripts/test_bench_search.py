"""The benchmark of the search, at a size that takes a moment."""

import json

import pytest
from typer.testing import CliRunner

from scripts.bench import search as bench_search

pytest_plugins = ["tests.index_fixtures"]


def run(*arguments: object) -> dict:
    small = ["--rows", 1000, "--bits", 256, "--batch", 3, "--repeats", 1, "--rows-per-shard", 300]
    result = CliRunner().invoke(
        bench_search.app, [str(a) for a in (*small, "--no-write", *arguments)]
    )
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout.splitlines()[-1])
    assert isinstance(document, dict)
    return document


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(bench_search, "_bandwidth", lambda threads, device, repeats: 1e9)
    monkeypatch.setattr(bench_search, "LISTS", (2,))


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_every_row_has_its_floor_and_the_scan_finds_what_brute_force_finds(device, monkeypatch):
    if device == "meta":  # any device but the CPU: products by PyTorch, here on the CPU
        usual = bench_search.make_search_index
        monkeypatch.setattr(bench_search, "make_search_index", lambda c, d, _: usual(c, d, "cpu:0"))
        monkeypatch.setattr(bench_search.torch.cuda, "synchronize", lambda: None)
    document = run("--device", device, "--threads", 2)
    assert document["recall_of_exact_scan"] == 1
    rows = document["rows"]
    assert [(r["index"], r["batch"]) for r in rows] == [
        ("one-bit", 1),
        ("one-bit", 3),
        ("FAISS IndexRaBitQ", 1),
        ("FAISS IndexRaBitQ", 8),
    ]
    for row in rows:
        assert (row["rows"], row["bits"]) == (1000, 256)
        assert row["floor_seconds"] == pytest.approx(row["batch"] * 1000 * 36 / 1e9, abs=1e-5)
        assert row["seconds"] > 0
        assert row["commit"]
    bytes_of_codes_and_norms = 3 * 320 * 36 + 128 * 36 + 4 * 1000
    assert 0 < document["index_bytes"] - bytes_of_codes_and_norms < 4 * 300  # headers


def test_inverted_lists_are_measured_on_an_index(workshop, built, tmp_path):
    queries = tmp_path / "queries.jsonl"
    queries.write_text('{"prompt": "the quick", "completion": " fox"}\n' * 2)
    arguments = ("--index", built, "--model", workshop.model_folder, "--queries", queries)
    rows = run(*arguments)["rows"][4:]
    assert [row["index"] for row in rows] == ["one-bit, real sketches", "IVF, 1 of 2 lists"]
    assert rows[0]["recall"] == 1
    assert 0 <= rows[1]["recall"] <= 1
    assert 0 < rows[0]["rows_by_norm_at_the_largest_cosine"] <= rows[0]["rows_by_norm_surely"] <= 1
