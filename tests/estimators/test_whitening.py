"""Whitening never changes a score, and the chosen weights are the least noisy separable ones."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from estimators.curvature.fitting import fit_estimator
from estimators.model.layers import find_layers
from estimators.registry import FACTORS
from estimators.sketching.whitening import LayerWhitening, noise_optimal_weights
from tests import dense_reference as dense

DAMPING = 0.1


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def curvature_like(seed: int, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Second moments over eight decades, like measured ones, and the damped inverse of them."""
    moment = torch.exp(3 * draw(seed, rows, columns) + draw(seed + 1, rows, 1))
    return moment, 1 / (moment + DAMPING * moment.mean())


def noise(moment: Tensor, inverse: Tensor, weights: Tensor) -> float:
    """``sum h^2 L / w * sum L w``, written out."""
    return float((inverse**2 * moment / weights).sum() * (moment * weights).sum())


def log_fit(inverse: Tensor) -> Tensor:
    """The separable least-squares fit of log w = log h, h being the best weight of all."""
    log = inverse.log()
    return (log.mean(1, keepdim=True) + log.mean(0, keepdim=True) - log.mean()).exp()


@settings(deadline=None)
@given(
    rows=st.integers(1, 5),
    columns=st.integers(1, 5),
    powers=st.lists(st.floats(-3, 3), min_size=10, max_size=10),
    seed=st.integers(0, 2**31),
    rotate=st.booleans(),
)
def test_inner_products_are_kept_for_any_positive_weights(rows, columns, powers, seed, rotate):
    scale = 10.0 ** torch.tensor(powers, dtype=torch.float64)
    left, right = (
        torch.linalg.qr(draw(seed + n, n, n))[0] if rotate else None for n in (rows, columns)
    )
    white = LayerWhitening(
        left_basis=left,
        right_basis=right,
        left_scale=scale[:rows],
        right_scale=scale[5 : 5 + columns],
    )
    gradient, query = draw(seed + 7, rows, columns), draw(seed + 8, rows, columns)
    phi = white.left_map(dual=False) @ gradient @ white.right_map(dual=False).T
    psi = white.left_map(dual=True) @ query @ white.right_map(dual=True).T
    # Rounding is relative to the largest terms of the sum, |psi||phi|, not to the sum itself.
    assert abs(float((psi * phi).sum() - (query * gradient).sum())) <= 1e-13 * float(
        psi.norm() * phi.norm()
    )


def test_maps_are_the_formula():
    basis = torch.linalg.qr(draw(0, 3, 3))[0]
    scale = torch.tensor([0.5, 2.0, 3.0], dtype=torch.float64)
    white = LayerWhitening(
        left_basis=basis, right_basis=None, left_scale=scale, right_scale=scale[:2]
    )
    assert torch.allclose(white.left_map(dual=False), torch.diag(scale) @ basis.T)
    assert torch.allclose(white.left_map(dual=True), torch.linalg.inv(white.left_map(dual=False)).T)
    assert torch.equal(white.right_map(dual=False), torch.diag(scale[:2]))
    assert torch.equal(white.right_map(dual=True), torch.diag(1 / scale[:2]))


@pytest.mark.parametrize("seed", range(10))
def test_weights_are_never_worse_than_ones_or_a_log_fit(seed):
    moment, inverse = curvature_like(seed, 9, 7)
    best = noise(moment, inverse, torch.outer(*noise_optimal_weights(moment, inverse)))
    assert best <= noise(moment, inverse, torch.ones_like(moment))
    assert best <= noise(moment, inverse, log_fit(inverse))
    # Full, inseparable whitening w = h is the Cauchy-Schwarz bound on any weights.
    assert best >= noise(moment, inverse, inverse)


@pytest.mark.parametrize("seed", range(5))
def test_separable_case_reaches_the_bound(seed):
    moment = torch.outer(draw(seed, 6).exp(), draw(seed + 1, 4).exp())
    inverse = torch.outer(draw(seed + 2, 6).exp(), draw(seed + 3, 4).exp())
    u, v = noise_optimal_weights(moment, inverse)
    assert dense.relative_error(torch.outer(u, v), inverse) < 1e-12


@pytest.mark.parametrize("seed", range(10))
def test_weights_are_a_minimum_over_u_and_v(seed):
    moment, inverse = curvature_like(seed, 9, 7)
    u, v = noise_optimal_weights(moment, inverse)
    best = noise(moment, inverse, torch.outer(u, v))
    for trial in range(50):
        size = 10.0 ** -(trial % 5)
        up = u * (size * draw(1000 + trial, 9)).exp()
        vp = v * (size * draw(2000 + trial, 7)).exp()
        # 1e-12: rounding, where a perturbation of 1e-4 changes the noise by 1e-8 or less.
        assert noise(moment, inverse, torch.outer(up, vp)) >= best * (1 - 1e-12)
    # The logarithm of the noise is convex in (log u, log v): a stationary point is the minimum.
    log_u, log_v = u.log().requires_grad_(True), v.log().requires_grad_(True)
    weights = (log_u[:, None] + log_v).exp()
    value = (inverse**2 * moment / weights).sum().log() + (moment * weights).sum().log()
    slopes = torch.cat(torch.autograd.grad(value, [log_u, log_v]))
    # What 50 rounds leave, on the hardest of these seeds, of slopes of order 1. The noise exceeds
    # its minimum by about the square of it, 1e-9: "no measurable change".
    assert float(slopes.abs().max()) < 1e-4


def test_layer_scales_are_a_minimum():
    layers = [curvature_like(seed, 8 - seed % 3, 5 + seed % 2) for seed in range(6)]
    layers = [(m * 100.0**i, h / 100.0**i) for i, (m, h) in enumerate(layers)]
    weights = [torch.outer(*noise_optimal_weights(m, h)) for m, h in layers]

    def total(scales: Tensor) -> float:
        triples = list(zip(layers, weights, scales, strict=True))
        query = sum((h**2 * m / (c * w)).sum() for (m, h), w, c in triples)
        train = sum((m * c * w).sum() for (m, _), w, c in triples)
        return float(query * train)

    ones = torch.ones(len(layers), dtype=torch.float64)
    for trial in range(100):
        scales = (10.0 ** -(trial % 4) * draw(trial, len(layers))).exp()
        assert total(scales) >= total(ones) * (1 - 1e-12)
    for (moment, inverse), w in zip(layers, weights, strict=True):
        query, train = (inverse**2 * moment / w).sum(), (moment * w).sum()
        assert float(query) == pytest.approx(float(train), rel=1e-12)


def test_directions_never_seen_keep_a_finite_weight():
    moment = torch.tensor([[2.0, 0.0, 1.0], [0.0, 0.0, 0.0]], dtype=torch.float64)
    u, v = noise_optimal_weights(moment, 1 / (moment + 0.1))
    assert torch.isfinite(torch.cat([u, v])).all()
    assert (torch.cat([u, v]) > 0).all()


@pytest.mark.parametrize("name", FACTORS)
def test_whitening_of_every_estimator_keeps_scores(name, model, sequences):
    layers = find_layers(model).layers
    estimator = fit_estimator(name, model, layers, sequences)
    whitening = estimator.whitening(layers, DAMPING)
    assert set(whitening) == {layer.name for layer in layers}
    gradients = dense.example_gradients(model, layers, sequences[:2])
    query = estimator.precondition(gradients[0], DAMPING)
    for layer in layers:
        white = whitening[layer.name]
        maps = {
            dual: (white.left_map(dual=dual).double(), white.right_map(dual=dual).double())
            for dual in (True, False)
        }
        gradient, direction = gradients[1][layer.name], query[layer.name]
        phi = maps[False][0] @ gradient @ maps[False][1].T
        psi = maps[True][0] @ direction @ maps[True][1].T
        error = abs(float((psi * phi).sum() - (gradient * direction).sum()))
        assert error <= 1e-12 * float(psi.norm() * phi.norm())


@pytest.mark.parametrize("name", ["kfac", "ekfac"])
def test_eigenbasis_estimators_use_the_optimal_weights(name, gpt2, sequences):
    layers = find_layers(gpt2).layers
    estimator = fit_estimator(name, gpt2, layers, sequences)
    tensors = estimator.tensors()
    for layer in layers:
        white = estimator.whitening(layers, DAMPING)[layer.name]
        eigenvalues = estimator.eigenvalues(layer.name)
        inverse = 1 / (eigenvalues + DAMPING * eigenvalues.mean())
        u, v = noise_optimal_weights(eigenvalues, inverse)
        assert torch.allclose(white.left_scale, u.sqrt(), rtol=1e-12)
        assert torch.allclose(white.right_scale, v.sqrt(), rtol=1e-12)
        assert torch.equal(white.left_basis, tensors[f"{layer.name}.left"])
        assert torch.equal(white.right_basis, tensors[f"{layer.name}.right"])
