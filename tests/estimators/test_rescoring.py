"""Exact scores: one number by every route, with the sign and the unit that the pages promise."""

import copy
import dataclasses

import pytest
import torch
from torch import Tensor, nn

from estimators.curvature.fitting import fit_estimator
from estimators.model.layers import LinearLayer, find_layers
from estimators.model.tokens import Sequence1D, collate
from estimators.registry import FACTORS
from estimators.rescoring import (
    NonFiniteGradientError,
    query_gradients,
    score_batch,
    score_batch_for_queries,
)
from tests import dense_reference as dense
from tests.directions import query_directions

DAMPING = 0.1
EXACT = 1e-9  # float64 rounding through model and preconditioner, with room to spare


@pytest.fixture(scope="module", params=FACTORS)
def scored(request, model, sequences, queries):
    """Layers, estimator and directions of each query."""
    layers = find_layers(model).layers
    estimator = fit_estimator(request.param, model, layers, sequences)
    gradients, _ = query_gradients(model, layers, queries)
    return layers, estimator, query_directions(estimator, gradients, DAMPING)


def one(directions: dict[str, Tensor], i: int) -> dict[str, Tensor]:
    return {name: direction[i] for name, direction in directions.items()}


def test_every_route_gives_the_dense_score(scored, model, sequences, queries):
    layers, estimator, directions = scored
    batch = collate(sequences)
    training = dense.example_gradients(model, layers, sequences)
    expected = torch.tensor(
        [
            [
                dense.inner_product(estimator.precondition(query, DAMPING), example)
                for example in training
            ]
            # grad f = -(gradient of the loss), so the two signs of the definition cancel
            for query in dense.example_gradients(model, layers, queries)
        ],
        dtype=torch.float64,
    )
    many = score_batch_for_queries(model, layers, directions, batch)
    singles = [score_batch(model, layers, one(directions, i), batch) for i in range(len(queries))]
    assert dense.relative_error(many, expected) < EXACT
    assert dense.relative_error(torch.stack([s.total for s in singles]), expected) < EXACT


def test_query_gradients_are_of_log_probabilities(model, queries):
    layers = find_layers(model).layers
    gradients, values = query_gradients(model, layers, queries)
    assert list(gradients) == [layer.name for layer in layers]
    expected = dense.example_gradients(model, layers, queries)
    for i, query in enumerate(queries):
        assert float(values[i]) == pytest.approx(-float(dense.loss(model, query)), rel=1e-12)
        assert dense.worst_error({n: -g[i] for n, g in gradients.items()}, expected[i]) < EXACT


def test_both_splits_sum_to_the_total(scored, model, sequences):
    layers, _, directions = scored
    batch = collate(sequences)
    parts = score_batch(model, layers, one(directions, 1), batch)
    assert parts.by_layer.shape == (len(sequences), len(layers))
    assert parts.by_position.shape == batch.input_ids.shape
    assert dense.relative_error(parts.by_layer.sum(1), parts.total) < EXACT
    assert dense.relative_error(parts.by_position.sum(1), parts.total) < EXACT
    assert (parts.by_position[~batch.position_mask] == 0).all()


def test_splits_are_the_dense_ones(model, sequences, queries):
    layers = find_layers(model).layers
    gradients, _ = query_gradients(model, layers, queries)
    direction = {name: -g[0] for name, g in gradients.items()}
    parts = score_batch(model, layers, direction, collate(sequences))
    examples = dense.example_gradients(model, layers, sequences)
    tokens = dense.example_tokens(model, layers, sequences)
    for i, example in enumerate(examples):
        by_layer = torch.stack([(direction[x.name] * example[x.name]).sum() for x in layers])
        assert dense.relative_error(parts.by_layer[i], by_layer) < EXACT
        by_position = torch.stack(
            [
                sum(
                    (torch.outer(a[t], d[t]) * direction[name]).sum()
                    for name, (a, d) in tokens[i].items()
                )
                for t in range(len(sequences[i].tokens) - 1)
            ]
        )
        assert dense.relative_error(parts.by_position[i, : len(by_position)], by_position) < EXACT


def test_scores_do_not_depend_on_batching(scored, model, sequences):
    layers, _, directions = scored
    together = score_batch_for_queries(model, layers, directions, collate(sequences))
    alone = torch.cat(
        [score_batch_for_queries(model, layers, directions, collate([s])) for s in sequences], 1
    )
    assert dense.relative_error(alone, together) < EXACT


@pytest.mark.parametrize("most_bytes", [1, 8_000])
def test_scores_do_not_depend_on_how_many_gradients_are_formed_at_once(
    scored, model, sequences, monkeypatch, most_bytes
):
    layers, _, directions = scored
    batch = collate(sequences)
    together = score_batch_for_queries(model, layers, directions, batch)
    monkeypatch.setattr("estimators.model.gradients.MOST_CACHED_BYTES", most_bytes)
    parts = score_batch_for_queries(model, layers, directions, batch)
    assert dense.relative_error(parts, together) < EXACT


def test_scores_are_linear_in_the_query(scored, model, sequences, queries):
    layers, estimator, directions = scored
    batch = collate(sequences)
    each = score_batch_for_queries(model, layers, directions, batch)
    gradients, _ = query_gradients(model, layers, queries)
    # A contrast log p(q0) - log p(q2), and a weighted batch of queries.
    for weights in ((1.0, 0.0, -1.0), (0.5, 2.0, 0.25)):
        mixed = {
            name: sum(w * g for w, g in zip(weights, gradient, strict=True))
            for name, gradient in gradients.items()
        }
        found = score_batch(model, layers, query_directions(estimator, mixed, DAMPING), batch).total
        expected = sum(w * scores for w, scores in zip(weights, each, strict=True))
        assert dense.relative_error(found, expected) < EXACT


def nudged(
    model: nn.Module, layers: tuple[LinearLayer, ...], steps: dict[str, Tensor], size: float
) -> nn.Module:
    """A copy of the model with ``size * steps`` added to the weights of ``layers``."""
    moved = copy.deepcopy(model)
    for layer in layers:
        own = dataclasses.replace(layer, module=moved.get_submodule(layer.module_name))
        own.add_to_weights(size * steps[layer.name])
    return moved


def slope(
    model: nn.Module,
    layers: tuple[LinearLayer, ...],
    steps: dict[str, Tensor],
    query: Sequence1D,
) -> float:
    """d/de log p(completion | prompt) in nats as the weights move along ``e * steps``."""
    norm = sum(float(step.square().sum()) for step in steps.values()) ** 0.5
    # Central difference: relative errors of about e^2 and of 1e-16 / e, both below 1e-7 here.
    e = 1e-4 / norm
    up, down = (-dense.loss(nudged(model, layers, steps, size), query) for size in (e, -e))
    return float((up - down) / (2 * e))


def test_score_is_what_a_training_step_does(scored, model, sequences, queries):
    # weights += -eps (H + lambda)^-1 grad L(z): an ordinary descent step where H is the identity.
    layers, estimator, directions = scored
    some = sequences[::2]
    signs = set()
    for i, query in enumerate(queries):
        direction = one(directions, i)
        scores = score_batch(model, layers, direction, collate(some)).total
        for score, example in zip(
            scores.tolist(), dense.example_gradients(model, layers, some), strict=True
        ):
            steps = {n: -g for n, g in estimator.precondition(example, DAMPING).items()}
            change = slope(model, layers, steps, query)
            size = sum(float(g.norm()) ** 2 for g in direction.values()) ** 0.5
            length = sum(float(g.norm()) ** 2 for g in example.values()) ** 0.5
            # Relative to |direction||gradient|, the largest that a score of this pair could be.
            assert change == pytest.approx(score, abs=1e-5 * size * length)
            signs.add(score > 0)
    assert signs == {True, False}


def test_positive_score_means_that_training_raises_the_probability(gpt2, sequences, queries):
    # The same with a real step of gradient descent on the weights, and nothing but its sign.
    layers = find_layers(gpt2).layers
    gradients, values = query_gradients(gpt2, layers, queries[:1])
    direction = {name: -g[0] for name, g in gradients.items()}
    scores = score_batch(gpt2, layers, direction, collate(sequences)).total.tolist()
    for score, sequence in zip(scores, sequences, strict=True):
        trained = dense.trainable(gpt2)
        chosen = [p for layer in layers for p in trained.get_submodule(layer.name).parameters()]
        optimiser = torch.optim.SGD(chosen, lr=1e-6)
        dense.loss(trained, sequence).backward()
        optimiser.step()
        gained = float(-dense.loss(trained, queries[0]).detach() - values[0])
        assert (gained > 0) == (score > 0)
        assert gained == pytest.approx(1e-6 * score, rel=1e-2)


def test_layer_split_is_what_a_step_of_that_layer_does(model, sequences, queries):
    layers = find_layers(model).layers
    gradients, _ = query_gradients(model, layers, queries)
    direction = {name: -g[1] for name, g in gradients.items()}
    parts = score_batch(model, layers, direction, collate(sequences[:2]))
    example = dense.example_gradients(model, layers, sequences[:2])[1]
    for number, layer in enumerate(layers):
        change = slope(model, (layer,), {layer.name: -example[layer.name]}, queries[1])
        size = float(direction[layer.name].norm() * example[layer.name].norm())
        assert change == pytest.approx(float(parts.by_layer[1, number]), abs=1e-5 * size)


def test_own_training_example_is_a_proponent(scored, model, queries):
    layers, _, directions = scored
    scores = score_batch_for_queries(model, layers, directions, collate(queries))
    # The gradient of a loss that is the query itself: score = |grad f|^2 in a positive metric.
    assert (scores.diagonal() > 0).all()


def test_empty_completion_is_refused(gpt2, queries):
    layers = find_layers(gpt2).layers
    for empty in (Sequence1D(tokens=(1, 2), first_target=2), Sequence1D(tokens=())):
        with pytest.raises(ValueError, match="completion has no token; give at least one"):
            query_gradients(gpt2, layers, [*queries, empty])


def test_non_finite_gradients_are_refused_by_name(gpt2, queries):
    broken = copy.deepcopy(gpt2)
    broken.transformer.h[1].mlp.c_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(NonFiniteGradientError, match=r"not finite in layer transformer\.h\."):
        query_gradients(broken, find_layers(broken).layers, queries)
    assert issubclass(NonFiniteGradientError, ValueError)
