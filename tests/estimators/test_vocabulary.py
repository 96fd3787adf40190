"""Embeddings and output head: every figure against autograd's dense gradient of the weight."""

import copy
import dataclasses

import pytest
import torch
from torch import Tensor, nn

from estimators.model.capture import visit_gradients
from estimators.model.layers import (
    Coverage,
    LayerSelection,
    LinearLayer,
    VocabularyLayer,
    find_layers,
)
from estimators.model.tokens import Sequence1D, collate
from estimators.rescoring import (
    measure_queries,
    query_gradients,
    score_batch,
    score_batch_for_queries,
)
from tests import dense_reference as dense

WITH_EMBEDDINGS = LayerSelection(embeddings=True)
EXACT = 1e-9  # float64 rounding, with room to spare
TIED = ("gpt2", "qwen2")


def vocabulary_layers(coverage: Coverage) -> list[VocabularyLayer]:
    return [layer for layer in coverage.layers if isinstance(layer, VocabularyLayer)]


def dense_gradient(
    model: nn.Module,
    layers: tuple[LinearLayer, ...],
    sequence: Sequence1D,
    labels: list[int] | None = None,
) -> dense.Gradient:
    """Autograd's gradient of one example's loss, [vocabulary, feature] of the weights with rows."""
    copied = dense.trainable(model)
    loss = dense.loss(copied, sequence, labels)
    linear = [layer for layer in layers if not isinstance(layer, VocabularyLayer)]
    found = dense.weight_gradients(copied, linear, loss) if linear else {}
    for layer in layers:
        if isinstance(layer, VocabularyLayer):
            weight = copied.get_submodule(layer.name).weight
            (found[layer.name],) = torch.autograd.grad(loss, weight, retain_graph=True)
    return {layer.name: found[layer.name] for layer in layers}


@pytest.fixture(scope="module")
def coverage(model) -> Coverage:
    return find_layers(model, WITH_EMBEDDINGS)


@pytest.fixture(scope="module")
def gradients(model, coverage, sequences) -> list[dense.Gradient]:
    return [dense_gradient(model, coverage.layers, sequence) for sequence in sequences]


@pytest.fixture(scope="module")
def directions(coverage) -> dict[str, Tensor]:
    """Three for each layer, of no particular kind."""
    generator = torch.Generator().manual_seed(7)
    shapes = {x.name: (3, x.in_features, x.out_features) for x in coverage.layers}
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float64)
        for name, shape in shapes.items()
    }


def test_a_tied_weight_is_one_layer_and_others_are_two(request, model, coverage):
    plain = find_layers(model)
    tied = request.node.callspec.params["model"] in TIED
    layers = vocabulary_layers(coverage)
    assert len(layers) == (1 if tied else 2)
    assert [x for x in coverage.layers if x not in layers] == list(plain.layers)
    held = sum(p.numel() for x in layers for p in [x.module.weight])
    total = sum(p.numel() for p in model.parameters())
    assert coverage.attributed_share == pytest.approx(plain.attributed_share + held / total)
    shares = [module.share for module in coverage.skipped]
    assert coverage.attributed_share + sum(shares) == pytest.approx(1)
    names = {module.name for module in coverage.skipped}
    assert not names & {x.name for x in layers}
    assert not any("head" in module.reason for module in coverage.skipped)


def test_gradients_of_questions_are_autograds(model, coverage, queries):
    layers = coverage.layers
    found, _ = query_gradients(model, layers, queries)
    for i, query in enumerate(queries):
        expected = dense_gradient(model, layers, query)
        assert dense.worst_error({n: -g[i] for n, g in found.items()}, expected) < EXACT


def test_weighted_questions_add_up(model, coverage, queries):
    layers = coverage.layers
    asked = [[(queries[0], 1.0), (queries[1], -0.5)], [(queries[2], 2.0)]]
    found = measure_queries(model, layers, asked, token_budget=6).gradients
    for i, parts in enumerate(asked):
        each = [(w, dense_gradient(model, layers, sequence)) for sequence, w in parts]
        expected = {x.name: -sum(w * g[x.name] for w, g in each) for x in layers}
        assert dense.worst_error({n: g[i] for n, g in found.items()}, expected) < EXACT


def test_every_route_gives_the_dense_score(model, coverage, sequences, directions, gradients):
    layers, batch = coverage.layers, collate(sequences)
    expected = torch.tensor(
        [
            [
                dense.inner_product({n: d[i] for n, d in directions.items()}, gradient)
                for gradient in gradients
            ]
            for i in range(3)
        ],
        dtype=torch.float64,
    )
    many = score_batch_for_queries(model, layers, directions, batch)
    single = score_batch(model, layers, {n: d[1] for n, d in directions.items()}, batch)
    assert dense.relative_error(many, expected) < EXACT
    assert dense.relative_error(single.total, expected[1]) < EXACT
    assert dense.relative_error(single.by_position.sum(1), single.total) < EXACT
    assert (single.by_position[~batch.position_mask] == 0).all()


def test_splits_by_layer_are_the_dense_ones(model, coverage, sequences, directions, gradients):
    direction = {name: d[0] for name, d in directions.items()}
    parts = score_batch(model, coverage.layers, direction, collate(sequences))
    for i, gradient in enumerate(gradients):
        expected = [(direction[x.name] * gradient[x.name]).sum() for x in coverage.layers]
        assert dense.relative_error(parts.by_layer[i], torch.stack(expected)) < EXACT


def test_a_position_has_its_own_token_and_its_own_prediction(llama, sequences, directions):
    """Of an embedding alone: ``<D[token_t], delta_t>``; of a head alone ``<h_t D, p_t - y_t>``."""
    coverage = find_layers(llama, WITH_EMBEDDINGS)
    reading, predicting = vocabulary_layers(coverage)
    generator = torch.Generator().manual_seed(7)
    direction = torch.randn(
        reading.in_features, reading.out_features, generator=generator, dtype=torch.float64
    )
    sequence = max(sequences, key=lambda s: len(s.tokens))
    copied = dense.trainable(llama)
    outputs: dict[str, Tensor] = {}
    copied.get_submodule(reading.name).register_forward_hook(
        lambda _, __, output: outputs.update(read=output)
    )
    copied.get_submodule(predicting.name).register_forward_hook(
        lambda _, inputs, output: outputs.update(states=inputs[0], logits=output)
    )
    loss = dense.loss(copied, sequence)
    delta, residual = torch.autograd.grad(loss, [outputs["read"], outputs["logits"]])
    tokens = torch.tensor(sequence.tokens)
    by_reading = (direction[tokens] * delta[0]).sum(1)
    by_predicting = ((residual[0] @ direction) * outputs["states"][0]).sum(1)
    for layer, expected in ((reading, by_reading), (predicting, by_predicting)):
        parts = score_batch(llama, [layer], {layer.name: direction}, collate([sequence]))
        assert dense.relative_error(parts.by_position[0], expected.detach()) < EXACT


@pytest.mark.parametrize("most", [1, 40])
def test_parts_of_positions_and_of_the_vocabulary_change_nothing(
    model, coverage, sequences, directions, monkeypatch, most
):
    batch = collate(sequences)
    one = {name: d[0] for name, d in directions.items()}

    def results() -> list[Tensor]:
        gradients, _ = query_gradients(model, coverage.layers, sequences[:3])
        return [
            score_batch(model, coverage.layers, one, batch).by_position,
            score_batch_for_queries(model, coverage.layers, directions, batch),
            *gradients.values(),
        ]

    whole = results()
    monkeypatch.setattr("estimators.model.output_head.LOGITS_AT_ONCE", most)
    monkeypatch.setattr("estimators.model.output_head.FEWEST_POSITIONS", 3)
    monkeypatch.setattr("estimators.model.gradients.MOST_CACHED_BYTES", 50 * most)
    scale = max(float(torch.linalg.vector_norm(x)) for x in whole)
    for found, expected in zip(results(), whole, strict=True):
        assert float((found - expected).abs().max()) < EXACT * scale


def test_batch_composition_changes_nothing(model, coverage, sequences, directions):
    together = score_batch_for_queries(model, coverage.layers, directions, collate(sequences))
    alone = [
        score_batch_for_queries(model, coverage.layers, directions, collate([sequence]))
        for sequence in sequences
    ]
    assert dense.relative_error(torch.cat(alone, 1), together) < EXACT


def test_the_score_is_a_directional_derivative(model, coverage, sequences, directions):
    layers = coverage.layers
    direction = {name: d[2] for name, d in directions.items()}
    score = score_batch(model, layers, direction, collate(sequences[:2])).total

    def losses(size: float) -> Tensor:
        moved = copy.deepcopy(model)
        for layer in layers:
            own = dataclasses.replace(layer, module=moved.get_submodule(layer.module_name))
            own.add_to_weights(size * direction[layer.name])
        return torch.stack([dense.loss(moved, s) for s in sequences[:2]])

    step = 1e-5  # central differences err by its square, rounding by 1e-16 over it
    slope = (losses(step) - losses(-step)) / (2 * step)
    assert dense.relative_error(slope.detach(), score) < 1e-6


def test_the_row_of_padding_gets_no_gradient_from_reading(llama, sequences):
    padded = copy.deepcopy(llama)
    padded.get_input_embeddings().padding_idx = 3
    layers = find_layers(padded, WITH_EMBEDDINGS).layers
    assert any(3 in sequence.tokens[:-1] for sequence in sequences)
    found, _ = query_gradients(padded, layers, sequences)
    for i, sequence in enumerate(sequences):
        expected = dense_gradient(padded, layers, sequence)
        assert dense.worst_error({n: -g[i] for n, g in found.items()}, expected) < EXACT


def test_code_without_a_place_for_them_is_told(gpt2, sequences):
    layers = find_layers(gpt2, WITH_EMBEDDINGS).layers
    with pytest.raises(ValueError, match=r"transformer.wte; fit without --embeddings"):
        visit_gradients(gpt2, layers, collate(sequences), lambda *_: None)
