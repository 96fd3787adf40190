"""Very wide layers split into blocks: the same gradients, curvature of the blocks alone."""

import copy
import dataclasses

import pytest
import torch

from estimators.curvature import eigenbasis
from estimators.curvature.fitting import fit_estimator
from estimators.model.layers import find_layers
from estimators.model.selection import LayerSelection
from estimators.model.tokens import collate
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
SPLIT = LayerSelection(widest=8)
"""The tiny models are 8 wide, so that a side of 12, 16 or 24 is split."""


def test_blocks_tile_the_wide_layers_and_leave_the_others(model):
    whole = {layer.name: layer for layer in find_layers(model).layers}
    coverage = find_layers(model, SPLIT)
    assert coverage.attributed_share == find_layers(model).attributed_share
    assert coverage.skipped == find_layers(model).skipped
    for name, layer in whole.items():
        blocks = [block for block in coverage.layers if block.module_name == name]
        width, out = layer.in_features - int(layer.has_bias), layer.out_features
        if max(width, out) <= 8:
            assert blocks == [layer]
            continue
        covered = torch.zeros(layer.in_features, layer.out_features)
        for block in blocks:
            assert block.in_features - int(block.has_bias) <= 8
            assert block.out_features <= 8
            assert block.name.startswith(f"{name}[")
            covered[dense.rows_of(block), block.outputs] += 1
            assert block.has_bias == (layer.has_bias and block.inputs.stop == width)
        assert (covered == 1).all()
    assert len({block.name for block in coverage.layers}) == len(coverage.layers)


def test_blocks_are_named_by_inputs_and_outputs(gpt2):
    names = [
        x.name for x in find_layers(gpt2, LayerSelection(patterns=("*.0.*",), widest=9)).layers
    ]
    assert names == [
        "transformer.h.0.attn.c_attn[:,0:8]",
        "transformer.h.0.attn.c_attn[:,8:16]",
        "transformer.h.0.attn.c_attn[:,16:24]",
        "transformer.h.0.attn.c_proj",
        "transformer.h.0.mlp.c_fc[:,0:6]",
        "transformer.h.0.mlp.c_fc[:,6:12]",
        "transformer.h.0.mlp.c_proj[0:6,:]",
        "transformer.h.0.mlp.c_proj[6:12,:]",
    ]


def test_gradients_of_blocks_are_pieces_of_the_whole(model, sequences):
    whole = hook_gradients(model, find_layers(model).layers, collate(sequences))
    blocks = find_layers(model, SPLIT).layers
    pieces = hook_gradients(model, blocks, collate(sequences))
    put_together = {name: torch.zeros_like(gradient) for name, gradient in whole.items()}
    for block in blocks:
        target = put_together[block.module_name]
        target[:, dense.rows_of(block), block.outputs] += pieces[block.name]
    assert dense.worst_error(put_together, whole) < 1e-14


def test_ekfac_of_blocks_is_the_dense_block_diagonal(model, sequences, queries):
    blocks = find_layers(model, SPLIT).layers
    ekfac = fit_estimator("ekfac", model, blocks, sequences, labels="empirical")
    tokens = dense.example_tokens(model, blocks, sequences)
    training = dense.example_gradients(model, blocks, sequences)
    asked = dense.example_gradients(model, blocks, queries)
    curvature = {b.name: dense.ekfac_operator(tokens, training, b.name) for b in blocks}
    solved = [
        {n: dense.damped_solve(curvature[n], g, DAMPING) for n, g in gradient.items()}
        for gradient in asked
    ]
    expected = torch.tensor(
        [[dense.inner_product(q, z) for z in training] for q in solved], dtype=torch.float64
    )
    directions = query_directions(ekfac, query_gradients(model, blocks, queries)[0], DAMPING)
    found = score_batch_for_queries(model, blocks, directions, collate(sequences))
    assert dense.relative_error(found, expected) < 1e-6
    # It is another curvature than the unsplit one, not the same by accident.
    layers = find_layers(model).layers
    unsplit = fit_estimator("ekfac", model, layers, sequences, labels="empirical")
    other = query_directions(unsplit, query_gradients(model, layers, queries)[0], DAMPING)
    scores = score_batch_for_queries(model, layers, other, collate(sequences))
    assert dense.relative_error(scores, expected) > 1e-3


def test_scores_sum_over_blocks_and_agree_with_the_sketch(model, sequences, queries):
    blocks = find_layers(model, SPLIT).layers
    ekfac = fit_estimator("ekfac", model, blocks, sequences)
    directions = query_directions(ekfac, query_gradients(model, blocks, queries)[0], DAMPING)
    first = {name: direction[0] for name, direction in directions.items()}
    batch = collate(sequences)
    parts = score_batch(model, blocks, first, batch)
    assert parts.by_layer.shape == (len(sequences), len(blocks))
    together = score_batch_for_queries(model, blocks, directions, batch)[0]
    assert dense.relative_error(parts.total, together) < 1e-10
    # Wide enough to be an isometry up to collisions: the sketch sees blocks as ordinary layers.
    sketch = Sketch(blocks, ekfac.whitening(blocks, DAMPING), SketchPlan(seed=0, dimensions=2**14))
    train, _ = sketch.training(model, batch)
    asked, _ = sketch.query(directions)
    assert dense.relative_error((asked @ train.T)[0], together) < 1e-5


def test_steps_on_blocks_add_to_their_part_of_the_weights(model):
    blocks = find_layers(model, SPLIT).layers
    moved, expected = copy.deepcopy(model), copy.deepcopy(model)
    for block in blocks:
        step = torch.full((block.in_features, block.out_features), 0.5, dtype=torch.float64)
        own = dataclasses.replace(block, module=moved.get_submodule(block.module_name))
        own.add_to_weights(step)
    for layer in find_layers(expected).layers:
        layer.add_to_weights(
            torch.full((layer.in_features, layer.out_features), 0.5, dtype=torch.float64)
        )
    assert all(
        torch.equal(x, y) for x, y in zip(moved.parameters(), expected.parameters(), strict=True)
    )


@pytest.mark.parametrize(
    "selection", [LayerSelection(), LayerSelection(patterns=("a", "b*"), widest=7)]
)
def test_a_selection_survives_being_stored(selection):
    assert LayerSelection.from_facts({**selection.to_facts(), "seed": "0"}) == selection


def test_impossible_selections_are_refused():
    with pytest.raises(ValueError, match="must be 1 or more, got 0"):
        LayerSelection(widest=0)
    with pytest.raises(ValueError, match="No layer pattern"):
        LayerSelection(patterns=())


@pytest.mark.parametrize("selection", [LayerSelection(), SPLIT], ids=["whole", "split"])
def test_equal_covariances_are_decomposed_once_with_the_same_bits(
    llama, sequences, selection, monkeypatch
):
    """Queries, keys and values read the same, and so do gates and what they let pass."""
    layers = find_layers(llama, selection).layers
    decompose, taken = eigenbasis._eigh, []

    def fit():
        taken.clear()
        return fit_estimator("ekfac", llama, layers, sequences).tensors()

    monkeypatch.setattr(eigenbasis, "_eigh", lambda matrix: taken.append(1) or decompose(matrix))
    shared, once = fit(), len(taken)
    with monkeypatch.context() as patch:
        patch.setattr(eigenbasis.torch, "equal", lambda one, other: False)
        apart, twice = fit(), len(taken)
    assert twice == 2 * len(layers)
    assert once <= twice - 3 * len(llama.model.layers)
    assert shared.keys() == apart.keys()
    for name, tensor in shared.items():
        assert torch.equal(tensor, apart[name]), name
    places = {tensor.untyped_storage().data_ptr() for tensor in shared.values()}
    assert len(places) == len(shared)  # a file of tensors takes none that share memory
