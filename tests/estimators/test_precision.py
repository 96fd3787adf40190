"""bfloat16 models: near the float32 model, with every sum in float32 or wider."""

import copy

import pytest
import torch

from estimators.curvature.fitting import fit_estimator
from estimators.curvature.kronecker import Covariances
from estimators.model.layers import LinearLayer, find_layers
from estimators.model.tokens import collate
from estimators.registry import FACTORS
from estimators.rescoring import (
    query_gradients,
    score_batch,
    score_batch_for_queries,
)
from estimators.sketching.sketch import Sketch, SketchPlan
from tests import dense_reference as dense
from tests.directions import query_directions
from tests.estimators.test_capture import hook_gradients

DAMPING = 0.1
# bfloat16 rounds to 1 part in 256 at each operation; through two blocks, forward and backward.
NEAR = 0.05


@pytest.fixture(scope="module")
def rounded(model_float32):
    """The float32 model with weights rounded to bfloat16, and the same model in bfloat16."""
    low = copy.deepcopy(model_float32).bfloat16()
    return copy.deepcopy(low).float(), low


def test_gradients_are_near_those_in_float32(rounded, sequences):
    high, low = (hook_gradients(m, find_layers(m).layers, collate(sequences)) for m in rounded)
    assert dense.worst_error(low, high) < NEAR


@pytest.mark.parametrize("name", FACTORS)
def test_scores_and_sketches_are_near_those_in_float32(rounded, name, sequences, queries):
    # One estimator, fitted in float32, so that only passes over examples and queries differ.
    high, low = rounded
    layers = find_layers(high).layers
    estimator = fit_estimator(name, high, layers, sequences)
    plan = SketchPlan(seed=0, rank=4, dimensions=1024)
    scores, sketches = [], []
    for model in (high, low):
        own = find_layers(model).layers
        directions = query_directions(estimator, query_gradients(model, own, queries)[0], DAMPING)
        scores.append(score_batch_for_queries(model, own, directions, collate(sequences)))
        sketch = Sketch(own, estimator.whitening(own, DAMPING), plan)
        sketches.append(sketch.training(model, collate(sequences))[0])
    assert {x.dtype for x in (*scores, *sketches)} == {torch.float32}
    assert dense.relative_error(scores[1], scores[0]) < 2 * NEAR  # two gradients, both rounded
    assert torch.corrcoef(torch.stack([x.flatten() for x in scores]))[0, 1] > 0.995
    assert dense.relative_error(sketches[1], sketches[0]) < NEAR


@pytest.mark.parametrize("name", FACTORS)
def test_every_route_agrees_on_a_bfloat16_model(rounded, name, sequences, queries):
    # No sum is rounded to bfloat16: two orders of summation agree to float32's precision.
    _, low = rounded
    layers = find_layers(low).layers
    estimator = fit_estimator(name, low, layers, sequences)
    gradients, values = query_gradients(low, layers, queries)
    assert {g.dtype for g in gradients.values()} == {torch.float32}
    assert values.dtype == torch.float32
    directions = query_directions(estimator, gradients, DAMPING)
    together = score_batch_for_queries(low, layers, directions, collate(sequences))
    parts = score_batch(low, layers, {n: d[0] for n, d in directions.items()}, collate(sequences))
    assert dense.relative_error(parts.total, together[0]) < 1e-5
    assert dense.relative_error(parts.by_position.sum(1), together[0]) < 1e-5


def test_sums_of_many_bfloat16_batches_do_not_stagnate():
    # A bfloat16 sum of ones stops at 256, a float32 one of 0.01 is off by percents at 1e7.
    layer = LinearLayer(name="x", module=torch.nn.Linear(2, 2), in_features=2, out_features=2)
    a = torch.tensor([[[0.1, 0.3]]]).bfloat16()
    covariances = Covariances.begin([layer])
    for batch in range(3000):
        covariances.add(layer, a, a, torch.tensor([0]))
        if batch % 16 == 15:  # as often as a fit does with batches of 1,024 tokens
            covariances.settle()
    covariances.settle()
    basis = covariances.eigenbases([layer])["x"]
    exact = torch.outer(a[0, 0].double(), a[0, 0].double())
    rebuilt = basis.left.double() @ torch.diag(basis.left_values.double()) @ basis.left.double().T
    assert dense.relative_error(rebuilt, exact) < 1e-6


def test_a_fit_in_bfloat16_is_near_that_in_float32(rounded, sequences, queries):
    scores = []
    for model in rounded:
        layers = find_layers(model).layers
        ekfac = fit_estimator("ekfac", model, layers, sequences, labels="empirical")
        directions = query_directions(ekfac, query_gradients(model, layers, queries)[0], DAMPING)
        scores.append(score_batch_for_queries(model, layers, directions, collate(sequences)))
    # The eigenbasis turns where eigenvalues are near each other; the operator hardly does.
    assert dense.relative_error(scores[1], scores[0]) < 2 * NEAR
