"""Layers that cannot be attributed are found by a trial pass and named; wrong gradients refused."""

import copy

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertLMHeadModel,
    MixtralConfig,
    PhimoeConfig,
    Qwen2MoeConfig,
)

from estimators.curvature.fitting import fit_estimator
from estimators.model.capture import freeze
from estimators.model.layers import find_layers
from estimators.model.recomputation import recompute_blocks
from estimators.model.selection import LayerSelection
from estimators.model.tokens import Sequence1D, collate
from estimators.rescoring import query_gradients, score_batch_for_queries
from tests import dense_reference as dense
from tests.directions import query_directions
from tests.estimators.test_capture import Toy, hook_gradients

SEQUENCES = [Sequence1D(tokens=(1, 2, 3)), Sequence1D(tokens=(4, 0, 1, 3), row=1)]


class Packed(nn.Module):
    """A frozen linear layer of eight-bit integers, as quantisation libraries make them."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        weight = torch.randn(out_features, in_features)
        self.scale = float(weight.abs().max()) / 127
        integers = (weight / self.scale).round().to(torch.int8)
        # Two to a row: packed sizes differ from in x out in real libraries, too.
        self.packed = nn.Parameter(integers.view(-1, 2)[:, :1].clone(), requires_grad=False)
        self.register_buffer("other_half", integers.view(-1, 2)[:, 1:].clone())
        self.bias = nn.Parameter(torch.randn(out_features), requires_grad=False)

    def dense_weight(self) -> Tensor:
        integers = torch.cat([self.packed, self.other_half], dim=1)
        return integers.view(self.out_features, self.in_features) * self.scale

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.dense_weight().to(x), self.bias.to(x))


class Opaque(Packed):
    """One whose kernel has no derivative."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.detach())


class HalfOpaque(Packed):
    """One whose output has a derivative, but not with respect to its input."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.detach()) + (x * 0).detach().requires_grad_()[..., :1]


class Routed(nn.Module):
    """Each token goes to one of two experts, alone."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)])

    def forward(self, x: Tensor) -> Tensor:
        flat, result = x.flatten(0, 1), torch.zeros_like(x).flatten(0, 1)
        for number in (0, 1):  # the third is never chosen
            chosen = (torch.arange(x.shape[1]) % 2 == number).repeat(len(x))
            result[chosen] = self.experts[number](flat[chosen])
        return x + result.view_as(x)


def test_quantised_layers_are_attributed_and_count_with_all_their_weights():
    torch.manual_seed(1)
    model = freeze(Toy(nn.Sequential(Packed(4, 6), nn.Tanh(), nn.Linear(6, 5)))).double()
    coverage = find_layers(model)
    assert [layer.name for layer in coverage.layers] == ["body.0", "body.2"]
    assert coverage.layers[0].parameters == 5 * 6
    # 20 embeddings, 30 packed, 35 dense; the packed tensor itself holds 12 entries and the bias 6.
    assert coverage.attributed_share == 65 / 85
    assert coverage.attributed_share + sum(m.share for m in coverage.skipped) == 1
    plain = Toy(nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5))).double()
    plain.load_state_dict(model.state_dict(), strict=False)
    plain.body[0].weight.data = model.body[0].dense_weight().double()
    found = hook_gradients(model, coverage.layers, collate(SEQUENCES))
    expected = dense.example_gradients(freeze(plain), find_layers(plain).layers, SEQUENCES)
    for i, row in enumerate(expected):
        assert dense.worst_error({n: g[i] for n, g in found.items()}, row) < 1e-11


def test_quantised_layers_are_fitted_and_scored():
    model = freeze(Toy(nn.Sequential(Packed(4, 6), nn.Tanh(), nn.Linear(6, 5))))
    layers = find_layers(model).layers
    ekfac = fit_estimator("ekfac", model, layers, SEQUENCES)
    directions = query_directions(ekfac, query_gradients(model, layers, SEQUENCES)[0], 0.1)
    scores = score_batch_for_queries(model, layers, directions, collate(SEQUENCES))
    # A sequence's own gradient raises it: the diagonal of a positive definite matrix.
    assert (scores.diagonal() > 0).all()
    assert torch.allclose(scores, scores.T, rtol=0, atol=1e-4 * float(scores.abs().max()))


def test_blocks_of_quantised_layers():
    model = freeze(Toy(nn.Sequential(Packed(4, 6), nn.Tanh(), nn.Linear(6, 5))))
    names = [layer.name for layer in find_layers(model, LayerSelection(widest=3)).layers]
    assert names[:4] == [f"body.0[{i},{j}]" for i in ("0:2", "2:4") for j in ("0:3", "3:6")]


@pytest.mark.parametrize("kind", [Opaque, HalfOpaque])
def test_layers_that_gradients_cannot_pass_are_refused_by_name(kind):
    # Also when only other layers are wanted: their gradients would lack a part.
    model = freeze(Toy(nn.Sequential(nn.Linear(4, 4), kind(4, 6), nn.Linear(6, 5))))
    for patterns in (("*",), ("body.0",)):
        with pytest.raises(
            ValueError, match=rf"cannot pass through 1 .* body\.1 \({kind.__name__}\)"
        ):
            find_layers(model, LayerSelection(patterns=patterns))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:torch.quantize_per_tensor")
def test_torchs_own_quantised_layers_are_refused_by_name():
    plain = Toy(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 5)))
    model = torch.ao.quantization.quantize_dynamic(plain, {nn.Linear})
    with pytest.raises(ValueError, match=r"cannot pass through 2 .* body\.0 .*, body\.1 "):
        find_layers(freeze(model))


def test_routed_experts_are_attributed_whether_the_trial_reached_them_or_not():
    model = freeze(Toy(nn.Sequential(Routed(), nn.Linear(4, 5)))).double()
    coverage = find_layers(model)
    names = [f"body.0.experts.{n}" for n in range(3)]
    assert [layer.name for layer in coverage.layers] == [*names, "body.1"]
    assert [layer.family for layer in coverage.layers] == ["body.0.experts.*"] * 3 + [None]
    gradients = hook_gradients(model, coverage.layers, collate(SEQUENCES[:1]))
    assert not gradients["body.0.experts.2"].any()
    reached = [layer for layer in coverage.layers if not layer.name.endswith("2")]
    (expected,) = dense.example_gradients(model, reached, SEQUENCES[:1])
    found = {layer.name: gradients[layer.name][0] for layer in reached}
    assert dense.worst_error(found, expected) < 1e-11


MOE = {
    "vocab_size": 11,
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 16,
}


@pytest.mark.parametrize(
    ("config", "others"),
    [
        (MixtralConfig(**MOE, num_local_experts=4), ["gate"]),
        (
            Qwen2MoeConfig(
                **MOE,
                num_experts=4,
                moe_intermediate_size=8,
                shared_expert_intermediate_size=12,
            ),
            [
                "gate",
                "shared_expert.gate_proj",
                "shared_expert.up_proj",
                "shared_expert.down_proj",
                "shared_expert_gate",
            ],
        ),
        (PhimoeConfig(**MOE, num_local_experts=4), []),
    ],
)
def test_experts_routers_and_shared_experts_are_attributed(config, others):
    torch.manual_seed(0)
    model = freeze(AutoModelForCausalLM.from_config(config))
    coverage = find_layers(model)
    attention = {f"model.layers.0.self_attn.{x}_proj" for x in "qkvo"}
    matrices = {f"mlp.experts.{x}_proj[{n}]" for x in ("gate_up", "down") for n in range(4)}
    expected = attention | {f"model.layers.0.{name}" for name in matrices}
    expected |= {f"model.layers.0.mlp.{name}" for name in others}
    assert {layer.name for layer in coverage.layers} == expected
    held = sum(layer.parameters for layer in coverage.layers)
    assert coverage.attributed_share == held / sum(p.numel() for p in model.parameters())
    assert sum(m.share for m in coverage.skipped) == pytest.approx(1 - coverage.attributed_share)


def test_a_model_that_does_not_run_is_refused_with_the_cause():
    model = freeze(Toy(nn.Sequential(nn.Linear(4, 4), nn.Linear(3, 5))))
    with pytest.raises(
        ValueError, match=r"trial pass on eight tokens failed with RuntimeError: mat1"
    ):
        find_layers(model)


def test_a_trial_leaves_the_model_as_it_was(gpt2_float32):
    model = copy.deepcopy(gpt2_float32).requires_grad_(True)
    assert len(find_layers(model).layers) == 8
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


def test_layers_are_the_same_in_checkpointed_blocks(model):
    checkpointed = copy.deepcopy(model)
    recompute_blocks(checkpointed)
    names = [layer.name for layer in find_layers(model).layers]
    assert [layer.name for layer in find_layers(checkpointed).layers] == names


@pytest.mark.parametrize("decoder", [False, True])
def test_a_model_that_sees_later_tokens_is_refused(decoder):
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=20,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
        initializer_range=0.5,
        is_decoder=decoder,
    )
    model = freeze(BertLMHeadModel(config))
    if decoder:
        assert len(find_layers(model).layers) == 13
        return
    with pytest.raises(ValueError, match="not causal: what it predicts for a token depends on"):
        find_layers(model)


class SeesPadding(nn.Module):
    """Every token sees how many there are, and no token sees a later one."""

    def forward(self, x: Tensor) -> Tensor:
        return x * x.shape[1]


def test_a_model_that_sees_padding_is_refused():
    model = freeze(Toy(nn.Sequential(nn.Linear(4, 5), SeesPadding())))
    with pytest.raises(ValueError, match="depends on the padding after a text"):
        find_layers(model)


class Several(nn.Linear):
    """A linear layer that gives something else besides, as routers do."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logits = super().forward(x)
        return logits, logits.argmax(-1)


class TakesFirst(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.router = Several(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.router(x)[0].softmax(-1)


def test_a_linear_layer_that_gives_several_tensors_is_attributed():
    model = freeze(Toy(nn.Sequential(TakesFirst(), nn.Linear(4, 5)))).double()
    layers = find_layers(model).layers
    assert [layer.name for layer in layers] == ["body.0.router", "body.1"]
    gradients = hook_gradients(model, layers, collate(SEQUENCES))
    for i, row in enumerate(dense.example_gradients(model, layers, SEQUENCES)):
        assert dense.worst_error({n: g[i] for n, g in gradients.items()}, row) < 1e-11


class Scaled(nn.Linear):
    """Not what its class says."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


def test_the_gradient_of_a_changed_linear_layer_is_still_its_own():
    model = freeze(Toy(nn.Sequential(Scaled(4, 4), nn.Linear(4, 5)))).double()
    layers = find_layers(model).layers
    assert [layer.name for layer in layers] == ["body.0", "body.1"]
    gradients = hook_gradients(model, layers, collate(SEQUENCES))
    for i, row in enumerate(dense.example_gradients(model, layers, SEQUENCES)):
        assert dense.worst_error({n: g[i] for n, g in gradients.items()}, row) < 1e-11
