"""The sketch is linear, unbiased and as noisy as it says, for floats and for one bit."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from estimators.curvature.fitting import fit_estimator
from estimators.model.layers import LinearLayer, find_layers
from estimators.model.tokens import Sequence1D, TokenBatch, collate
from estimators.rescoring import query_gradients, score_batch_for_queries
from estimators.sketching.sketch import Sketch, SketchPlan, training_sketches
from estimators.sketching.whitening import LayerWhitening
from tests import dense_reference as dense
from tests.dense_reference import batched_inner_product as inner_product
from tests.directions import query_directions

DAMPING = 0.1
SEEDS = 200
WHOLE = 1000  # a first-stage rank wider than any side here: only the second stage is random
FLOAT32 = 1e-5  # sketches are float32: rounding of 6e-8 through sums of thousands of entries


def free_layer(number: int, rows: int, columns: int) -> LinearLayer:
    """A layer for gradients that are given directly; its module is never run."""
    return LinearLayer(
        name=f"layer{number}",
        module=nn.Linear(rows, columns, bias=False),
        in_features=rows,
        out_features=columns,
    )


def unwhitened(layers: list[LinearLayer]) -> dict[str, LayerWhitening]:
    return {
        layer.name: LayerWhitening(
            left_basis=None,
            right_basis=None,
            left_scale=torch.ones(layer.in_features),
            right_scale=torch.ones(layer.out_features),
        )
        for layer in layers
    }


def free_sketch(layers: list[LinearLayer], plan: SketchPlan) -> Sketch:
    """Without whitening ``query`` sketches any gradients at all, training ones included."""
    return Sketch(layers, unwhitened(layers), plan)


def draw_gradients(layers: list[LinearLayer], count: int, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        layer.name: torch.randn(
            count, layer.in_features, layer.out_features, generator=generator, dtype=torch.float64
        )
        for layer in layers
    }


def inner_products(left: dict[str, Tensor], right: dict[str, Tensor]) -> Tensor:
    """Every pair, [left, right]."""
    return inner_product({n: g[:, None] for n, g in left.items()}, right)


def one_bit(y: Tensor, y_norm: Tensor, x: Tensor, x_norm: Tensor) -> Tensor:
    """``<y, sign(x)> * |psi| / |y| * |phi| * sqrt(pi / (2 k))`` for every pair."""
    bits = torch.where(x >= 0, 1.0, -1.0)
    scale = math.sqrt(math.pi / (2 * x.shape[1]))
    return (y @ bits.T) * (y_norm / y.norm(dim=1))[:, None] * x_norm * scale


def assert_unbiased(estimates: Tensor, exact: Tensor) -> None:
    """The mean over the first axis is ``exact`` within four standard errors, entry by entry.

    For a few dozen entries chance exceeds that in one run of 500; the seeds are fixed.
    """
    estimates = estimates.double()
    error = (estimates.mean(0) - exact).abs()
    standard_error = estimates.std(0) / math.sqrt(len(estimates))
    # The bound must mean something: it has to be small against the spread of the exact values.
    assert float(standard_error.mean()) < 0.2 * float(exact.std())
    assert float((error / standard_error).max()) < 4


def score(model: nn.Module, sequences: list[Sequence1D], queries: list[Sequence1D]):
    narrow = copy.deepcopy(model).float()
    layers = find_layers(narrow).layers
    estimator = fit_estimator("ekfac", narrow, layers, sequences)
    whitening = estimator.whitening(layers, DAMPING)
    gradients, _ = query_gradients(narrow, layers, queries)
    directions = query_directions(estimator, gradients, DAMPING)
    batch = collate(sequences)
    exact = score_batch_for_queries(narrow, layers, directions, batch).double()
    return narrow, layers, whitening, directions, batch, exact


@pytest.fixture(scope="module")
def scored(model, sequences, queries):
    """The model in float32, its layers, their whitening, directions, a batch and exact scores."""
    return score(model, sequences, queries)


@pytest.fixture(scope="module")
def scored_gpt2(gpt2, sequences, queries):
    """The same for one model, for tests that take a pass over the batch for each of many seeds."""
    return score(gpt2, sequences, queries)


def redraw(layers, whitening, **sizes: int) -> list[Sketch]:
    """Sketches that differ in their seeds alone; they share one pass through the model."""
    return [Sketch(layers, whitening, SketchPlan(seed=s, **sizes)) for s in range(SEEDS)]


@pytest.mark.parametrize("rank", [WHOLE, 6])
def test_float_sketch_of_scores_is_unbiased(scored_gpt2, rank):
    model, layers, whitening, directions, batch, exact = scored_gpt2
    sketches = redraw(layers, whitening, dimensions=256, rank=rank)
    trained = training_sketches(sketches, model, batch)
    estimates = [s.query(directions)[0] @ x.T for s, (x, _) in zip(sketches, trained, strict=True)]
    assert_unbiased(torch.stack(estimates), exact)


def test_one_bit_proxy_of_scores_is_unbiased(scored_gpt2):
    model, layers, whitening, directions, batch, exact = scored_gpt2
    sketches = redraw(layers, whitening, dimensions=1024, rank=WHOLE)
    trained = training_sketches(sketches, model, batch)
    estimates = [
        one_bit(*sketch.query(directions), *found)
        for sketch, found in zip(sketches, trained, strict=True)
    ]
    assert_unbiased(torch.stack(estimates), exact)


@pytest.mark.parametrize("rank", [4, 8])
def test_first_stage_alone_is_unbiased(rank):
    # As many dimensions as entries (2 layers of at most 8 x 8): the fold keeps inner products.
    layers = [free_layer(0, 12, 9), free_layer(1, 7, 15)]
    left, right = draw_gradients(layers, 3, seed=1), draw_gradients(layers, 4, seed=2)
    right = {n: g + 0.5 * left[n][:1] for n, g in right.items()}
    estimates = []
    for seed in range(500):
        sketch = free_sketch(layers, SketchPlan(seed=seed, dimensions=128, rank=rank))
        assert sketch.entries == sum(
            min(rank, layer.in_features) * min(rank, layer.out_features) for layer in layers
        )
        estimates.append(sketch.query(left)[0] @ sketch.query(right)[0].T)
    assert_unbiased(torch.stack(estimates), inner_products(left, right))


def test_fold_is_unbiased_for_gradients_of_one_sign():
    # Without random signs every collision of positive entries would raise the estimate.
    layers = [free_layer(0, 20, 16)]
    left, right = ({"layer0": draw_gradients(layers, 4, s)["layer0"].abs()} for s in (1, 2))
    estimates = []
    for seed in range(SEEDS):
        sketch = free_sketch(layers, SketchPlan(seed=seed, dimensions=64, rank=WHOLE))
        estimates.append(sketch.query(left)[0] @ sketch.query(right)[0].T)
    exact = inner_products(left, right)
    estimates = torch.stack(estimates).double()
    standard_error = estimates.std(0) / math.sqrt(SEEDS)
    assert float(((estimates.mean(0) - exact).abs() / standard_error).max()) < 4
    # 320 entries in 64 buckets: the bias would be 4 / 319 of the product of the sums, about 1.6
    # times the score itself.
    assert float((standard_error / exact).max()) < 0.05


@pytest.mark.parametrize("rank", [12, 64])
def test_nothing_is_lost_where_nothing_is_reduced(rank):
    layers = [free_layer(0, 12, 9), free_layer(1, 7, 10)]
    left, right = draw_gradients(layers, 3, seed=1), draw_gradients(layers, 4, seed=2)
    sketch = free_sketch(layers, SketchPlan(seed=0, dimensions=256, rank=rank))
    assert sketch.entries == 12 * 9 + 7 * 10
    found = sketch.query(left)[0] @ sketch.query(right)[0].T
    assert dense.relative_error(found, inner_products(left, right)) < FLOAT32


@pytest.mark.parametrize(
    ("dimensions", "shapes"),
    [
        (1024, ((24, 40),)),  # entries fit: only the bits are noisy, sqrt((pi/2 - 1) / k)
        (512, ((40, 31), (20, 28))),  # 1800 entries: four a bucket
        (256, ((64, 61), (30, 30))),  # 4804 entries: 19 a bucket, nearly sqrt(pi / (2 k))
    ],
)
def test_one_bit_noise_is_the_predicted_one(dimensions, shapes):
    layers = [free_layer(i, *shape) for i, shape in enumerate(shapes)]
    left, right = draw_gradients(layers, 40, seed=3), draw_gradients(layers, 40, seed=4)
    norms = [torch.sqrt(sum(g.square().sum((1, 2)) for g in x.values())) for x in (left, right)]
    exact = inner_products(left, right)
    errors, predicted = [], 0.0
    for seed in range(12):
        plan = SketchPlan(seed=seed, dimensions=dimensions, rank=WHOLE)
        sketch = free_sketch(layers, plan)
        predicted = sketch.predicted_noise()
        estimate = one_bit(*sketch.query(left), *sketch.query(right))
        errors.append((estimate - exact) / torch.outer(*norms))
    measured = float(torch.stack(errors).square().mean().sqrt())
    # 12 x 40 x 40 pairs: a standard deviation of them is known to 1 / sqrt(2 * 19200) = 0.5 %.
    assert measured == pytest.approx(predicted, rel=0.05)


def test_buckets_are_shuffled():
    # Energy in 4 of 64 columns, k = 64: without a permutation each column would be one bucket, and
    # the 40 entries of it would collide always instead of with probability 39 / 2559.
    layers = [free_layer(0, 40, 64)]
    kept = torch.arange(64) < 4
    left, right = ({n: g * kept for n, g in draw_gradients(layers, 40, s).items()} for s in (1, 2))
    norms = torch.outer(left["layer0"].norm(dim=(1, 2)), right["layer0"].norm(dim=(1, 2)))
    errors = []
    for seed in range(12):
        sketch = free_sketch(layers, SketchPlan(seed=seed, dimensions=64, rank=WHOLE))
        estimate = sketch.query(left)[0] @ sketch.query(right)[0].T
        errors.append((estimate - inner_products(left, right)) / norms)
    # 160 entries make about 200 collisions a seed, known to 7 %: 2 % over 12 seeds, half of it in
    # the standard deviation.
    measured = float(torch.stack(errors).square().mean().sqrt())
    assert measured == pytest.approx(math.sqrt(39 / 2559), rel=0.05)


def test_predicted_noise_has_the_familiar_limits():
    one_layer = [free_layer(0, 32, 32)]
    fits = free_sketch(one_layer, SketchPlan(seed=0, dimensions=1024, rank=WHOLE))
    assert fits.predicted_noise() == pytest.approx(math.sqrt((math.pi / 2 - 1) / 1024))
    many = free_sketch([free_layer(0, 256, 512)], SketchPlan(seed=0, dimensions=64, rank=WHOLE))
    assert many.predicted_noise() == pytest.approx(math.sqrt(math.pi / (2 * 64)), rel=1e-3)


def test_linear():
    layers = [free_layer(0, 12, 9), free_layer(1, 7, 15)]
    sketch = free_sketch(layers, SketchPlan(seed=5, dimensions=64, rank=6))
    x = draw_gradients(layers, 2, seed=6)
    mixed = {n: 3 * g[:1] - 0.5 * g[1:] for n, g in x.items()}
    y = sketch.query(x)[0]
    assert dense.relative_error(sketch.query(mixed)[0], 3 * y[:1] - 0.5 * y[1:]) < FLOAT32


@pytest.mark.parametrize("rank", [WHOLE, 6])
def test_training_side_sketches_the_whitened_gradient(scored, rank):
    # The dual of the dual: with inverted scales the query side is the training side.
    model, layers, whitening, _, batch, _ = scored
    inverted = {
        name: LayerWhitening(
            left_basis=white.left_basis,
            right_basis=white.right_basis,
            left_scale=1 / white.left_scale,
            right_scale=1 / white.right_scale,
        )
        for name, white in whitening.items()
    }
    gradients, _ = query_gradients(model, layers, _as_sequences(batch))
    losses = {name: -gradient for name, gradient in gradients.items()}
    plan = SketchPlan(seed=3, dimensions=256, rank=rank)
    found, norms = Sketch(layers, whitening, plan).training(model, batch)
    expected, exact_norms = Sketch(layers, inverted, plan).query(losses)
    assert dense.relative_error(found, expected) < 1e-4  # float32 through the whitening's decades
    # Whole sides: the norm is exact. Rank 6 of 8 to 24: an estimate of it.
    assert dense.relative_error(norms, exact_norms) < (1e-4 if rank == WHOLE else 0.3)


def _as_sequences(batch: TokenBatch) -> list[Sequence1D]:
    lengths = batch.target_mask.sum(1) + 1
    return [
        Sequence1D(tokens=tuple(ids[:length].tolist()))
        for ids, length in zip(batch.input_ids, lengths, strict=True)
    ]


def test_same_seed_same_sketch_and_other_seed_other_sketch(scored):
    model, layers, whitening, directions, batch, _ = scored

    def sketch(seed):
        plan = SketchPlan(seed=seed, dimensions=256, rank=6)
        made = Sketch(layers, whitening, plan)
        return torch.cat([made.query(directions)[0], made.training(model, batch)[0]])

    assert torch.equal(sketch(1), sketch(1))
    ones, twos = sketch(1), sketch(2)
    cosines = nn.functional.cosine_similarity(ones, twos)
    # Independent sketches of one vector: cosines of 1 / sqrt(256) = 0.06.
    assert float(cosines.abs().max()) < 5 / math.sqrt(256)


def test_layers_get_independent_frames():
    # As many dimensions as entries, so that a norm is that of a block after the first stage: the
    # same gradient would have the same norm in both layers if they shared their frames.
    layers = [free_layer(0, 20, 20), free_layer(1, 20, 20)]
    same = draw_gradients(layers[:1], 5, seed=1)["layer0"]
    zero = torch.zeros_like(same)
    sketch = free_sketch(layers, SketchPlan(seed=0, dimensions=32, rank=4))
    first = sketch.query({"layer0": same, "layer1": zero})[0].norm(dim=1)
    second = sketch.query({"layer0": zero, "layer1": same})[0].norm(dim=1)
    assert float((first / second - 1).abs().min()) > 1e-3


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (9, 7), (8, 8)])
def test_fewer_entries_than_dimensions_are_padded(shape):
    layers = [free_layer(0, *shape)]
    x = draw_gradients(layers, 3, seed=8)
    sketch = free_sketch(layers, SketchPlan(seed=1, dimensions=64, rank=WHOLE))
    y, norms = sketch.query(x)
    assert y.shape == (3, 64)
    assert dense.relative_error(y @ y.T, inner_products(x, x)) < FLOAT32
    assert dense.relative_error(norms, inner_products(x, x).diagonal().sqrt()) < FLOAT32


def test_batch_composition_changes_nothing(scored):
    model, layers, whitening, directions, batch, _ = scored
    sketch = Sketch(layers, whitening, SketchPlan(seed=2, dimensions=256, rank=6))
    together, norms = sketch.training(model, batch)
    for i, sequence in enumerate(_as_sequences(batch)):
        alone, norm = sketch.training(model, collate([sequence]))
        assert dense.relative_error(alone[0], together[i]) < 1e-4  # float32, other matrix sizes
        assert float(norm) == pytest.approx(float(norms[i]), rel=1e-4)
    queries, query_norms = sketch.query(directions)
    for i in range(len(queries)):
        alone, norm = sketch.query({n: g[i : i + 1] for n, g in directions.items()})
        assert dense.relative_error(alone[0], queries[i]) < 1e-4
        assert float(norm) == pytest.approx(float(query_norms[i]), rel=1e-4)


def test_norms_are_those_of_the_whitened_vectors(scored):
    model, layers, whitening, directions, batch, _ = scored
    sketch = Sketch(layers, whitening, SketchPlan(seed=2, dimensions=256, rank=WHOLE))
    sides = (
        (
            sketch.training(model, batch)[1],
            False,
            query_gradients(model, layers, _as_sequences(batch))[0],
        ),
        (sketch.query(directions)[1], True, directions),
    )
    for found, dual, gradients in sides:
        squares = sum(
            (white.left_map(dual=dual) @ gradients[n] @ white.right_map(dual=dual).T)
            .double()
            .square()
            .sum((1, 2))
            for n, white in whitening.items()
        )
        assert dense.relative_error(found, squares.sqrt()) < 1e-4


def test_float64_models_are_sketched_too(scored):
    model, layers, whitening, _, batch, _ = scored
    wide = copy.deepcopy(model).double()
    plan = SketchPlan(seed=2, dimensions=256, rank=6)
    expected, norms = Sketch(layers, whitening, plan).training(model, batch)
    found, wide_norms = Sketch(find_layers(wide).layers, whitening, plan).training(wide, batch)
    assert found.dtype == torch.float32
    assert dense.relative_error(found, expected) < 1e-4
    assert dense.relative_error(wide_norms, norms) < 1e-4


def test_sketch_coordinates_are_nearly_gaussian():
    # One-bit codes need it, also for gradients with few large entries: here one in 20 of 1600.
    layers = [free_layer(0, 40, 40)]
    kept = torch.arange(1600).view(40, 40) % 20 == 0
    x = {name: g * kept for name, g in draw_gradients(layers, 200, seed=9).items()}
    y = free_sketch(layers, SketchPlan(seed=0, dimensions=512, rank=WHOLE)).query(x)[0]
    standardised = (y / y.square().mean(1, keepdim=True).sqrt()).double()
    # A Gaussian's fourth moment is 3, known from 200 x 512 numbers to sqrt(96 / 102400) = 0.03;
    # random signs on 80 Gaussian entries lower it by 6 / 80 = 0.075.
    assert float(standardised.pow(4).mean()) == pytest.approx(3 - 6 / 80, abs=0.1)
    assert float(standardised.mean()) == pytest.approx(0, abs=4 / math.sqrt(standardised.numel()))


@pytest.mark.parametrize("dimensions", [0, 4, 100, 1000, -8])
def test_dimensions_must_be_a_power_of_two(dimensions):
    with pytest.raises(ValueError, match=f"power of two, 8 or more, got {dimensions};"):
        SketchPlan(seed=0, dimensions=dimensions)


def test_rank_must_be_positive():
    with pytest.raises(ValueError, match="rank must be at least 1, got 0"):
        SketchPlan(seed=0, rank=0)


@pytest.mark.parametrize("dimensions", [8, 16, 512, 1024])
def test_rotation_keeps_norms_for_odd_and_even_powers(dimensions):
    layers = [free_layer(0, 2, 4)]
    x = draw_gradients(layers, 5, seed=2)
    y = free_sketch(layers, SketchPlan(seed=3, dimensions=dimensions)).query(x)[0]
    expected = np.sqrt([float(g.square().sum()) for g in x["layer0"]])
    assert y.norm(dim=1).numpy() == pytest.approx(expected, rel=FLOAT32)


@pytest.mark.parametrize("lengths", [(1,), (1, 1), (1, 6), (0, 3)])
def test_sequences_that_predict_nothing_have_an_empty_sketch(gpt2_float32, lengths):
    layers = find_layers(gpt2_float32).layers
    sketch = Sketch(layers, unwhitened(list(layers)), SketchPlan(seed=0, dimensions=64, rank=4))
    batch = collate([Sequence1D(tokens=tuple(range(length))) for length in lengths])
    x, norms = sketch.training(gpt2_float32, batch)
    assert x.shape == (len(lengths), 64)
    for row, length in enumerate(lengths):
        assert (float(norms[row]) > 0, bool(x[row].any())) == (length > 1, length > 1)


def test_bfloat16_models_are_sketched_in_float32(gpt2_float32, sequences):
    layers = find_layers(gpt2_float32).layers
    plan = SketchPlan(seed=0, dimensions=256, rank=6)
    batch = collate(sequences)
    expected, norms = Sketch(layers, unwhitened(list(layers)), plan).training(gpt2_float32, batch)
    narrow = copy.deepcopy(gpt2_float32).bfloat16()
    half = find_layers(narrow).layers
    found, half_norms = Sketch(half, unwhitened(list(half)), plan).training(narrow, batch)
    assert found.dtype == half_norms.dtype == torch.float32
    # What eight bits of activations and gradients through two blocks leave.
    assert dense.relative_error(found, expected) < 0.1
    assert dense.relative_error(half_norms, norms) < 0.05


def test_copies_kept_for_one_precision_do_not_reach_another(gpt2_float32, gpt2, sequences):
    layers = find_layers(gpt2_float32).layers
    batch = collate(sequences)
    sketch = Sketch(layers, unwhitened(list(layers)), SketchPlan(seed=0, dimensions=64, rank=6))
    before = sketch.training(gpt2_float32, batch)
    wide = Sketch(find_layers(gpt2).layers, unwhitened(list(layers)), sketch.plan)
    expected = wide.query(draw_gradients(list(layers), 2, seed=1))
    found = sketch.query(draw_gradients(list(layers), 2, seed=1))  # float64
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))
    after = sketch.training(gpt2_float32, batch)
    assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))
