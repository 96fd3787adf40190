"""The output head runs on some positions at a time, and only where its outputs are the logits."""

import pytest
import torch
from torch import nn
from transformers import Gemma2Config, Gemma2ForCausalLM, GraniteConfig, GraniteForCausalLM

from estimators.model import output_head
from estimators.model.capture import freeze, visit_gradients
from estimators.model.gradients import sum_over_tokens
from estimators.model.layers import find_layers
from estimators.model.output_head import final_states, losses_and_gradient
from estimators.model.tokens import Sequence1D, collate
from tests import dense_reference as dense

EXACT = 1e-11


def small(**more):
    sizes = {"vocab_size": 48, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    return {**sizes, **heads, "max_position_embeddings": 32, **more}


def capped():
    config = Gemma2Config(**small(head_dim=4, pad_token_id=None, final_logit_softcapping=30.0))
    return Gemma2ForCausalLM(config)


def scaled():
    return GraniteForCausalLM(GraniteConfig(**small(logits_scaling=8.0)))


def gradients_of(model, sequences, label_seed=None):
    layers = find_layers(model).layers
    found = {}

    def visit(layer, a, d):
        found[layer.name] = sum_over_tokens(a, d)

    losses = visit_gradients(model, layers, collate(sequences), visit, label_seed)
    return layers, found, losses


def assert_same(model, sequences, found, losses, tolerance=EXACT):
    layers = find_layers(model).layers
    for i, row in enumerate(dense.example_gradients(model, layers, sequences)):
        assert dense.worst_error({n: g[i] for n, g in found.items()}, row) < tolerance
    expected = torch.stack([dense.loss(model, s) for s in sequences])
    assert dense.relative_error(losses, expected) < tolerance


def test_the_head_is_found_and_given_its_inputs(model, sequences):
    batch = collate(sequences)
    head, states = final_states(model, batch)
    assert head is model.get_output_embeddings()
    torch.testing.assert_close(head(states), model(input_ids=batch.input_ids).logits)


@pytest.mark.parametrize("make", [capped, scaled])
def test_logits_that_are_changed_after_the_head_are_taken_whole(make, sequences):
    torch.manual_seed(0)
    model = freeze(make()).double()
    model.get_input_embeddings().weight.mul_(50)  # logits that a cap changes; it is the head's too
    head, states = final_states(model, collate(sequences))
    assert isinstance(head, nn.Identity)
    assert states.shape[-1] == 48
    _, found, losses = gradients_of(model, sequences)
    assert_same(model, sequences, found, losses, 1e-6)  # some norms are taken in float32


@pytest.mark.parametrize("at_once", [1, 48 * 3])
def test_positions_at_once_change_nothing(model, sequences, monkeypatch, at_once):
    _, expected, drawn = gradients_of(model, sequences, label_seed=2)
    monkeypatch.setattr(output_head, "LOGITS_AT_ONCE", at_once)
    monkeypatch.setattr(output_head, "FEWEST_POSITIONS", 1)
    _, found, losses = gradients_of(model, sequences)
    assert_same(model, sequences, found, losses)
    _, found, losses = gradients_of(model, sequences, label_seed=2)
    assert dense.worst_error(found, expected) < EXACT
    assert dense.relative_error(losses, drawn) < EXACT


def test_only_positions_that_predict_something_pass_through_the_head(model, queries, monkeypatch):
    monkeypatch.setattr(output_head, "FEWEST_POSITIONS", 2)
    monkeypatch.setattr(output_head, "LOGITS_AT_ONCE", 1)
    batch = collate(queries)
    head, states = final_states(model, batch)
    seen = []
    handle = head.register_forward_hook(lambda _, inputs, output: seen.append(output.shape[1]))
    losses_and_gradient(head, states, batch)
    handle.remove()
    assert sum(seen) == sum(query.targets for query in queries)
    assert max(seen) == 2


def test_without_gradients_there_are_only_losses(model, sequences):
    batch = collate(sequences)
    with torch.no_grad():
        losses, gradient = losses_and_gradient(*final_states(model, batch), batch)
    assert gradient is None
    expected = torch.stack([dense.loss(model, s) for s in sequences])
    assert dense.relative_error(losses, expected) < EXACT


def test_a_head_that_runs_twice_is_not_cut(sequences, gpt2):
    class Twice(type(gpt2)):
        def forward(self, **given):
            out = super().forward(**given)
            self.lm_head(self.transformer(given["input_ids"]).last_hidden_state)
            return out

    torch.manual_seed(0)
    model = freeze(Twice(gpt2.config)).double()
    assert isinstance(final_states(model, collate(sequences))[0], nn.Identity)


def test_a_label_of_no_probability_costs_what_its_logit_says():
    logits = torch.zeros(1, 4, 5)
    logits[..., 1] = 300.0  # the others' probabilities are 0 in float32
    batch = collate([Sequence1D(tokens=(0, 1, 2, 1))])
    losses, gradient = losses_and_gradient(nn.Identity(), logits.requires_grad_(), batch)
    assert losses.tolist() == [300.0]
    assert gradient[0, 1].tolist() == [0.0, 1.0, -1.0, 0.0, 0.0]
