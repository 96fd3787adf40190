"""Further slices of a sketch: their fold, their law, and that none depends on the others."""

import math

import numpy as np
import pytest
import torch

from estimators.model.layers import find_layers
from estimators.model.tokens import collate
from estimators.operators.identity import Identity
from estimators.sketching.folding import TILE, TiledFold, hadamard
from estimators.sketching.sketch import Sketch, SketchPlan
from estimators.sketching.slices import TOGETHER, WIDER, SketchSlices, further_rank

DRAWS = 150
ROWS = 12


def pairs(layers) -> dict[str, torch.Tensor]:
    """Gradients of rows that have something in common, so that some cosines are large."""
    generator = torch.Generator().manual_seed(3)
    shapes = {layer.name: (layer.in_features, layer.out_features) for layer in layers}
    return {
        name: torch.randn(1, *shape, generator=generator)
        + torch.randn(ROWS, *shape, generator=generator)
        for name, shape in shapes.items()
    }


@pytest.fixture(scope="module")
def layers(gpt2):
    return find_layers(gpt2).layers


# --- the fold -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("entries", "dimensions", "slices"), [(1000, 64, 16), (60, 16, 4), (3000, 64, 4), (7, 8, 2)]
)
def test_a_tiled_fold_is_the_matrix_that_it_says(entries, dimensions, slices):
    fold = TiledFold(entries, seed=5, dimensions=dimensions, slices=slices)
    buckets = dimensions * slices
    generator = np.random.Generator(np.random.Philox(key=[5, 2**32]))
    tile = min(TILE, buckets)
    order = generator.permutation(fold.padded // tile)
    signs = generator.integers(0, 2, fold.padded) * 2.0 - 1
    into = np.zeros((fold.padded, buckets))
    for place, source in enumerate(order):
        for lane in range(tile):
            position = place * tile + lane
            into[source * tile + lane, position % buckets] = signs[position]
    runs = hadamard(int(math.log2(slices))).double().numpy()
    within = np.ones((1, 1))
    for _ in range(int(math.log2(dimensions))):
        within = np.kron(within, np.array([[1.0, 1.0], [1.0, -1.0]]) / math.sqrt(2))
    matrix = into @ np.kron(runs, within)
    found = fold(torch.eye(entries)).double().numpy()
    np.testing.assert_allclose(found, matrix[:entries], atol=1e-6)
    assert (into != 0).sum(0).min() == (into != 0).sum(0).max()  # buckets of one size


def test_a_rows_fold_does_not_depend_on_the_others():
    fold = TiledFold(500, seed=1, dimensions=64, slices=4)
    rows = torch.randn(5, 500, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(fold(rows)[2:3], fold(rows[2:3]), rtol=0, atol=1e-6)


# --- the law ------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [4, 64])
def test_wide_sketches_are_unbiased(layers, rank):
    gradients = pairs(layers)
    exact = sum((g.flatten(1) @ g.flatten(1).T for g in gradients.values()), torch.zeros(()))
    estimates = []
    for seed in range(DRAWS):
        plan = SketchPlan(seed=seed, dimensions=32, rank=rank, slices=8)
        x = Sketch(layers, Identity().whitening(layers, 0.1), plan).query(gradients)[0]
        estimates.append(x @ x.T)
    found = torch.stack(estimates)
    error = (found.mean(0) - exact).abs() / (found.std(0) / DRAWS**0.5)
    assert float(error.max()) < 4.5
    assert float((found.std(0) / exact.diag().mean()).mean()) < 0.3


@pytest.mark.parametrize("used", [1, 3, 15, 16])
def test_the_mean_over_slices_errs_as_predicted(layers, used):
    """Without codes: what the fold alone does, for rows that have nothing in common."""
    generator = torch.Generator().manual_seed(1)
    gradients = {
        layer.name: torch.randn(ROWS, layer.in_features, layer.out_features, generator=generator)
        for layer in layers
    }
    flat = torch.cat([g.flatten(1) for g in gradients.values()], dim=1)
    flat = flat / flat.norm(dim=1, keepdim=True)
    others = ~torch.eye(ROWS, dtype=torch.bool)
    exact = (flat @ flat.T)[others]
    errors = []
    for seed in range(60):
        plan = SketchPlan(seed=seed, dimensions=32, rank=1000, slices=16)
        sketch = Sketch(layers, Identity().whitening(layers, 0.1), plan)
        x = sketch.query(gradients)[0].view(ROWS, 16, -1)[:, :used].flatten(1)
        x = x / x.norm(dim=1, keepdim=True)
        errors.append((x @ x.T)[others] - exact)
    found = float(torch.stack(errors).square().mean().sqrt())
    assert found == pytest.approx(sketch.predicted_noise(0.0, used), rel=0.1)


def test_noise_of_several_wide_sketches_adds_up(layers):
    slices = SketchSlices(
        layers, Identity().whitening(layers, 0.1), SketchPlan(seed=0, dimensions=64, rank=4), 40
    )
    assert slices.predicted_noise(1) == slices.first.predicted_noise()
    falling = [slices.predicted_noise(count) for count in (1, 4, 16, 17, 33, 40)]
    assert falling == sorted(falling, reverse=True)
    assert falling[3] < falling[0] / 3.5


# --- slices -------------------------------------------------------------------------------------


def test_a_slice_does_not_depend_on_how_many_there_are(gpt2_float32, sequences):
    layers = find_layers(gpt2_float32).layers
    plan, batch = SketchPlan(seed=2, dimensions=64, rank=4), collate(sequences)
    model, white = gpt2_float32, Identity().whitening(layers, 0.1)
    many = SketchSlices(layers, white, plan, 2 + 2 * TOGETHER)
    trained = many.training(model, batch)
    assert len(trained) == len(many) == 2 + 2 * TOGETHER
    asked = many.query({name: g.float() for name, g in pairs(layers).items()})
    for count in (1, 2, 5, 1 + TOGETHER, 2 + TOGETHER):
        fewer = SketchSlices(layers, white, plan, count)
        for one, other in zip(fewer.training(model, batch), trained, strict=False):
            assert torch.equal(one[0], other[0])
            assert torch.equal(one[1], other[1])
        found = fewer.query({name: g.float() for name, g in pairs(layers).items()})
        assert len(found) == count
        assert all(torch.equal(a[0], b[0]) for a, b in zip(found, asked, strict=False))
        some = many.up_to(count)
        assert len(some.training(model, batch)) == len(some) == count
        assert some.predicted_noise(count) == fewer.predicted_noise(count)
    for start in (1, 3, TOGETHER, TOGETHER + 1, TOGETHER + 2, 2 * TOGETHER + 1):
        later = many.training(model, batch, start)
        assert len(later) == len(many) - start
        for one, other in zip(later, trained[start:], strict=True):
            assert torch.equal(one[0], other[0])


def test_the_first_slice_is_the_sketch_that_an_index_of_one_has(gpt2_float32, sequences):
    layers = find_layers(gpt2_float32).layers
    plan, batch = SketchPlan(seed=2, dimensions=64, rank=4), collate(sequences)
    alone = Sketch(layers, Identity().whitening(layers, 0.1), plan).training(gpt2_float32, batch)
    first = SketchSlices(layers, Identity().whitening(layers, 0.1), plan, 5).training(
        gpt2_float32, batch
    )[0]
    assert torch.equal(alone[0], first[0])
    assert torch.equal(alone[1], first[1])


def test_wide_sketches_share_neither_frames_nor_folds(layers):
    plan = SketchPlan(seed=2, dimensions=64, rank=4)
    seeds = {plan.further(n, TOGETHER, 16).seed for n in range(16)} | {plan.seed}
    assert len(seeds) == 17


def test_many_layers_get_a_smaller_rank_but_none_below_the_first_slices():
    plan = SketchPlan(seed=2, dimensions=16384, rank=64)
    assert [further_rank(plan, layers) for layers in (1, 16, 64)] == [WIDER * 64] * 3
    assert further_rank(plan, 210) == 141
    assert 210 * further_rank(plan, 210) ** 2 <= 16 * TOGETHER * 16384
    assert further_rank(plan, 100_000) == 64
