"""Gradient checkpointing changes memory, never a number."""

import copy

import pytest
import torch
from torch import nn

from estimators.curvature.fitting import fit_estimator
from estimators.model.capture import freeze, visit_gradients
from estimators.model.layers import find_layers
from estimators.model.measurement import next_token_logits
from estimators.model.recomputation import recompute_blocks
from estimators.model.selection import LayerSelection
from estimators.model.tokens import collate
from estimators.rescoring import query_gradients, score_batch
from estimators.sketching.sketch import Sketch, SketchPlan
from estimators.storage import fingerprint_model, fingerprint_tensors
from tests.directions import query_directions
from tests.estimators.test_capture import Toy, hook_gradients

DAMPING = 0.1


def checkpointed(model: nn.Module) -> nn.Module:
    copied = copy.deepcopy(model)
    assert recompute_blocks(copied) == 2
    return copied


def test_fit_sketch_and_scores_are_bitwise_the_same(model_float32, sequences, queries):
    found = []
    for model in (model_float32, checkpointed(model_float32)):
        layers = find_layers(model, LayerSelection(widest=8)).layers
        ekfac = fit_estimator("ekfac", model, layers, sequences, token_budget=20)
        sketch = Sketch(layers, ekfac.whitening(layers, DAMPING), SketchPlan(seed=0, rank=4))
        gradients, values = query_gradients(model, layers, queries)
        directions = query_directions(ekfac, gradients, DAMPING)
        first = {name: direction[0] for name, direction in directions.items()}
        parts = score_batch(model, layers, first, collate(sequences))
        found.append(
            {
                **ekfac.tensors(),
                **gradients,
                "values": values,
                "sketch": sketch.training(model, collate(sequences))[0],
                "scores": parts.by_layer,
                "positions": parts.by_position,
            }
        )
    assert fingerprint_tensors(found[0]) == fingerprint_tensors(found[1])


def test_blocks_run_twice_and_keep_no_activations(gpt2_float32, sequences):
    model = checkpointed(gpt2_float32)
    layers = find_layers(model).layers
    visit_gradients(model, layers, collate(sequences), lambda *_: None)  # also tries the head
    runs = []
    block = model.transformer.h[0]
    block.mlp.c_fc.register_forward_hook(lambda *_: runs.append(torch.is_grad_enabled()))
    visit_gradients(model, layers, collate(sequences), lambda *_: None)
    assert runs == [False, True]  # first without a graph, then again in the backward pass


def test_without_gradients_blocks_run_once(gpt2_float32, sequences):
    model = checkpointed(gpt2_float32)
    with torch.no_grad():
        logits = next_token_logits(model, collate(sequences))
        assert torch.equal(logits, next_token_logits(gpt2_float32, collate(sequences)))


def test_the_fingerprint_and_the_mode_do_not_change(gpt2_float32):
    model = checkpointed(gpt2_float32)
    assert fingerprint_model(model) == fingerprint_model(gpt2_float32)
    assert not any(module.training for module in model.modules())


# Its newer name is not in every version that is supported.
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")
def test_transformers_own_switch_changes_nothing_in_evaluation_mode(model_float32, sequences):
    model = copy.deepcopy(model_float32)
    model.gradient_checkpointing_enable()
    freeze(model)
    batch = collate(sequences)
    expected = hook_gradients(model_float32, find_layers(model_float32).layers, batch)
    found = hook_gradients(model, find_layers(model).layers, batch)
    assert fingerprint_tensors(found) == fingerprint_tensors(expected)


def test_a_model_without_blocks_is_refused():
    with pytest.raises(ValueError, match="Toy has no blocks that can be checkpointed"):
        recompute_blocks(Toy(nn.Linear(4, 5)))
