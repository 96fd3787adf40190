"""Gradients from hooks are autograd's own, and nothing is left out silently."""

import copy
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from jaxtyping import TypeCheckError
from torch import Tensor, nn

from estimators.model.capture import freeze, visit_gradients
from estimators.model.gradients import find_non_finite, sum_over_tokens
from estimators.model.layers import LinearLayer, find_layers
from estimators.model.selection import LayerSelection
from estimators.model.tokens import Sequence1D, TokenBatch, collate, plan_batches
from tests import dense_reference as dense
from tests.dense_reference import batched_inner_product as inner_product

EXACT = 1e-11  # float64 rounding (2e-16) through a two-block model, with room to spare


def hook_gradients(
    model: nn.Module,
    layers: tuple[LinearLayer, ...],
    batch: TokenBatch,
    label_seed: int | None = None,
) -> dict[str, Tensor]:
    gradients = {}

    def visit(layer: LinearLayer, a: Tensor, d: Tensor) -> None:
        gradients[layer.name] = sum_over_tokens(a, d)

    visit_gradients(model, layers, batch, visit, label_seed)
    return gradients


def assert_rows_equal(gradients: dict[str, Tensor], expected: list[dict[str, Tensor]]) -> None:
    for i, row in enumerate(expected):
        assert dense.worst_error({n: g[i] for n, g in gradients.items()}, row) < EXACT


class Toy(nn.Module):
    """Embeddings, then whatever ``body`` does, as logits."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(5, 4)
        self.body = body

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def forward(self, input_ids: Tensor, **_: object) -> SimpleNamespace:
        return SimpleNamespace(logits=self.body(self.embed(input_ids)))


class RunsTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.shared(torch.tanh(self.shared(x)))


class Flattens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.flat = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.flat(x.flatten(0, 1)).view(*x.shape[:2], 5)


TOY_BATCH = collate([Sequence1D(tokens=(1, 2, 3)), Sequence1D(tokens=(4, 0, 1), row=1)])


def test_shapes_are_checked_under_pytest():
    with pytest.raises(TypeCheckError):
        sum_over_tokens(torch.zeros(2, 3, 4), torch.zeros(2, 5, 4))  # 3 tokens against 5


def test_hook_gradients_are_autograds(model, sequences):
    layers = find_layers(model).layers
    gradients = hook_gradients(model, layers, collate(sequences))
    assert_rows_equal(gradients, dense.example_gradients(model, layers, sequences))


LAYERS = {
    "gpt2": ("Conv1D", 8, "attn.c_attn attn.c_proj mlp.c_fc mlp.c_proj"),
    "llama": ("Linear", 0, "self_attn.[qkvo]_proj mlp.gate_proj mlp.up_proj mlp.down_proj"),
    "qwen2": ("Linear", 6, "self_attn.[qkvo]_proj mlp.gate_proj mlp.up_proj mlp.down_proj"),
    "gpt_neox": (
        "Linear",
        8,
        "attention.query_key_value attention.dense mlp.dense_h_to_4h mlp.dense_4h_to_h",
    ),
}


@pytest.mark.parametrize("name", LAYERS)
def test_every_linear_layer_but_the_head_is_attributed(name, request):
    model = request.getfixturevalue(name)
    kind, biases, ends = LAYERS[name]
    layers = find_layers(model).layers
    linear = {n for n, m in model.named_modules() if type(m).__name__ in ("Linear", "Conv1D")}
    head = next(n for n, m in model.named_modules() if m is model.get_output_embeddings())
    assert {layer.name for layer in layers} == linear - {head}
    assert {type(layer.module).__name__ for layer in layers} == {kind}
    assert sum(layer.has_bias for layer in layers) == biases
    for end in ends.split():
        assert len(find_layers(model, LayerSelection(patterns=(f"*.{end}",))).layers) in (2, 8)


def test_linear_with_bias():
    model = freeze(Toy(nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5)))).double()
    layers = find_layers(model).layers
    sequences = [Sequence1D(tokens=(1, 2, 3)), Sequence1D(tokens=(4, 0))]
    gradients = hook_gradients(model, layers, collate(sequences))
    assert [tuple(gradients[layer.name].shape) for layer in layers] == [(2, 5, 6), (2, 7, 5)]
    assert_rows_equal(gradients, dense.example_gradients(model, layers, sequences))


def test_frozen_weights_work_and_stay_frozen(model, sequences):
    layers = find_layers(model).layers
    assert not any(p.requires_grad for p in model.parameters())
    frozen = hook_gradients(model, layers, collate(sequences))
    assert all(p.grad is None for p in model.parameters())
    warm = copy.deepcopy(model).requires_grad_(True)
    unfrozen = hook_gradients(warm, find_layers(warm).layers, collate(sequences))
    assert dense.worst_error(frozen, unfrozen) < EXACT


def test_layers_come_last_first(gpt2, sequences):
    layers = find_layers(gpt2).layers
    order = list(hook_gradients(gpt2, layers, collate(sequences)))
    assert order == [layer.name for layer in reversed(layers)]


def test_losses_are_sums_over_counted_tokens(model, sequences, queries):
    everything = [*sequences, *queries]
    layers = find_layers(model).layers
    losses = visit_gradients(model, layers, collate(everything), lambda *_: None)
    expected = torch.stack([dense.loss(model, s) for s in everything])
    assert dense.relative_error(losses, expected) < EXACT


def test_prompt_tokens_do_not_count(model, queries):
    layers = find_layers(model).layers
    gradients = hook_gradients(model, layers, collate(queries))
    assert_rows_equal(gradients, dense.example_gradients(model, layers, queries))


def test_padding_changes_nothing(model, sequences):
    layers = find_layers(model).layers
    batch = collate(sequences)
    extra = torch.full((len(sequences), 4), 7)
    lengths = torch.tensor([len(s.tokens) for s in sequences])
    ids = torch.cat([batch.input_ids, extra], dim=1)
    ids[torch.arange(ids.shape[1]) >= lengths[:, None]] = 7  # any token, not the usual 0
    padded = TokenBatch(
        input_ids=ids,
        target_mask=torch.cat([batch.target_mask, torch.zeros_like(extra, dtype=torch.bool)], 1),
        rows=batch.rows,
    )
    expected = hook_gradients(model, layers, batch)
    assert dense.worst_error(hook_gradients(model, layers, padded), expected) < EXACT


def test_output_gradients_of_padding_are_exactly_zero(model, sequences):
    batch = collate(sequences)
    layers = find_layers(model).layers
    unmasked = []

    def visit(layer: LinearLayer, a: Tensor, d: Tensor) -> None:
        unmasked.append(float(d[~batch.position_mask].abs().max()))

    visit_gradients(model, layers, batch, visit)
    assert unmasked == [0.0] * len(layers)


def test_batch_composition_changes_nothing(model, sequences):
    layers = find_layers(model).layers
    together = hook_gradients(model, layers, collate(sequences))
    reverse = hook_gradients(model, layers, collate(sequences[::-1]))
    assert dense.worst_error({n: g.flip(0) for n, g in reverse.items()}, together) < EXACT
    for i, sequence in enumerate(sequences):
        alone = hook_gradients(model, layers, collate([sequence]))
        row = {name: gradient[i : i + 1] for name, gradient in together.items()}
        assert dense.worst_error(alone, row) < EXACT


def test_sampled_labels_replace_the_text(model, sequences):
    layers = find_layers(model).layers
    labels = dense.drawn_labels(model, sequences, 5)
    assert any(drawn != list(s.tokens[1:]) for drawn, s in zip(labels, sequences, strict=True))
    gradients = hook_gradients(model, layers, collate(sequences), label_seed=5)
    assert_rows_equal(gradients, dense.example_gradients(model, layers, sequences, labels))


@pytest.mark.parametrize("tokens", [(), (3,)])
def test_sequences_that_predict_nothing_have_no_gradient(gpt2, sequences, tokens):
    layers = find_layers(gpt2).layers
    with_empty = hook_gradients(
        gpt2, layers, collate([Sequence1D(tokens=tokens), *sequences]), label_seed=1
    )
    assert all(gradient[0].abs().max() == 0 for gradient in with_empty.values())
    without = hook_gradients(gpt2, layers, collate(sequences), label_seed=1)
    assert dense.worst_error({n: g[1:] for n, g in with_empty.items()}, without) < EXACT


def test_bfloat16_model_keeps_its_precision_in_the_loss(model_float32, sequences):
    model = copy.deepcopy(model_float32).bfloat16()
    layers = find_layers(model).layers
    losses = visit_gradients(model, layers, collate(sequences), lambda *_: None)
    assert losses.dtype == torch.float32
    expected = torch.stack([dense.loss(model_float32, s) for s in sequences])
    assert dense.relative_error(losses, expected) < 0.02  # bfloat16 has 8 bits: 0.004 an operation


def own_parameters(model: nn.Module) -> dict[str, int]:
    """Parameters that each module holds itself; tied ones belong to the first that holds them."""
    owner = {}
    for name, parameter in model.named_parameters():  # names a tied parameter once
        module = name.rpartition(".")[0]
        owner[module] = owner.get(module, 0) + parameter.numel()
    return owner


@pytest.mark.parametrize("patterns", [("*",), ("*mlp*",), ("*.0.*", "*o_proj", "*attn.c_proj")])
def test_every_skipped_module_is_named_with_its_share(model, patterns):
    coverage = find_layers(model, LayerSelection(patterns=patterns))
    owner = own_parameters(model)
    total = sum(owner.values())
    attributed = {layer.name for layer in coverage.layers}
    skipped = {module.name: module for module in coverage.skipped}
    assert attributed.isdisjoint(skipped)
    assert set(owner) <= attributed | set(skipped)
    for name, module in skipped.items():
        assert module.parameters == owner.get(name, 0)
        assert module.share == module.parameters / total
        assert module.kind == type(model.get_submodule(name)).__name__
    assert sum(layer.parameters for layer in coverage.layers) == sum(owner[n] for n in attributed)
    shares = coverage.attributed_share + sum(module.share for module in coverage.skipped)
    assert shares == pytest.approx(1, abs=1e-12)


def test_reasons_to_skip(gpt2):
    coverage = find_layers(gpt2, LayerSelection(patterns=("*mlp*",)))
    reasons = {module.name: module.reason for module in coverage.skipped}
    assert reasons["lm_head"] == "output head"
    assert reasons["transformer.wte"] == "not a linear layer"
    assert "*mlp*" in reasons["transformer.h.0.attn.c_attn"]


def test_tied_output_head_is_named_but_counted_once(gpt2):
    skipped = {module.name: module for module in find_layers(gpt2).skipped}
    assert skipped["lm_head"].parameters == 0
    assert skipped["transformer.wte"].parameters == gpt2.transformer.wte.weight.numel()


def test_layers_with_tied_weights_are_left_out():
    first, second, own = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 5)
    second.weight = first.weight
    coverage = find_layers(Toy(nn.Sequential(first, second, own)))
    assert [layer.name for layer in coverage.layers] == ["body.2"]
    reasons = {module.name: module.reason for module in coverage.skipped}
    assert "shared" in reasons["body.0"]
    assert "shared" in reasons["body.1"]
    shares = coverage.attributed_share + sum(module.share for module in coverage.skipped)
    assert shares == pytest.approx(1, abs=1e-12)


def test_patterns_choose_layers(llama):
    names = [
        layer.name
        for layer in find_layers(llama, LayerSelection(patterns=("*.1.mlp.*", "*q_proj"))).layers
    ]
    assert names == [
        "model.layers.0.self_attn.q_proj",
        "model.layers.1.self_attn.q_proj",
        "model.layers.1.mlp.gate_proj",
        "model.layers.1.mlp.up_proj",
        "model.layers.1.mlp.down_proj",
    ]


def test_no_matching_pattern_is_refused_with_names_that_would_match(llama):
    with pytest.raises(ValueError, match=r"\['\*\.nothing'\].*self_attn\.q_proj"):
        find_layers(llama, LayerSelection(patterns=("*.nothing",)))


def whole_layer(model: nn.Module, name: str) -> LinearLayer:
    """A layer that nobody has tried out."""
    module = model.get_submodule(name)
    return LinearLayer(
        name=name,
        module=module,
        in_features=module.in_features + 1,
        out_features=module.out_features,
    )


def test_layer_that_runs_twice_is_left_out_with_a_reason():
    model = freeze(Toy(nn.Sequential(RunsTwice(), nn.Linear(4, 5))))
    coverage = find_layers(model)
    assert [layer.name for layer in coverage.layers] == ["body.1"]
    skipped = {module.name: module for module in coverage.skipped}
    assert skipped["body.0.shared"].reason == "runs more than once in a forward pass"
    assert skipped["body.0.shared"].parameters == 20
    assert list(hook_gradients(model, coverage.layers, TOY_BATCH)) == ["body.1"]


def test_layer_that_runs_twice_is_refused():
    model = freeze(Toy(nn.Sequential(RunsTwice(), nn.Linear(4, 5))))
    with pytest.raises(ValueError, match=r"body\.0\.shared ran twice.*pattern"):
        hook_gradients(model, (whole_layer(model, "body.0.shared"),), TOY_BATCH)


def test_wrong_input_rank_is_refused():
    model = freeze(Toy(Flattens()))
    with pytest.raises(ValueError, match=r"body\.flat saw inputs of shape \(6, 4\).*\[batch"):
        hook_gradients(model, (whole_layer(model, "body.flat"),), TOY_BATCH)


def test_hooks_are_removed_even_after_an_error():
    model = freeze(Toy(nn.Sequential(RunsTwice(), nn.Linear(4, 5))))
    with pytest.raises(ValueError, match="ran twice"):
        hook_gradients(model, (whole_layer(model, "body.0.shared"),), TOY_BATCH)
    assert not any(module._forward_hooks for module in model.modules())
    assert not model(TOY_BATCH.input_ids).logits.requires_grad


def test_gradient_values():
    left = {"x": torch.ones(2, 3, 4), "y": torch.full((2, 1, 2), 2.0)}
    right = {"x": torch.full((3, 4), 0.5), "y": torch.tensor([[1.0, -3.0]])}
    assert inner_product(left, right).tolist() == [2.0, 2.0]  # 12 * 0.5 + 2 * (1 - 3)
    assert find_non_finite(left) is None
    assert find_non_finite({**left, "y": torch.tensor([[float("inf")]])}) == "y"


def test_batch_layout():
    batch = collate(
        [
            Sequence1D(tokens=(5, 6, 7, 8), first_target=2, row=3),
            Sequence1D(tokens=(9, 1), row=4),
        ]
    )
    assert batch.input_ids.tolist() == [[5, 6, 7, 8], [9, 1, 0, 0]]
    assert batch.target_mask.int().tolist() == [[0, 0, 1, 1], [0, 1, 0, 0]]
    assert batch.position_mask.int().tolist() == [[1, 1, 1, 0], [1, 0, 0, 0]]
    assert batch.rows == (3, 4)


def test_boundaries_of_batches():
    with pytest.raises(ValueError, match="at least one"):
        collate([])
    with pytest.raises(ValueError, match=r"at least 1.*got 0"):
        Sequence1D(tokens=(1, 2), first_target=0)
    with pytest.raises(ValueError, match="at least 1, got 0"):
        list(plan_batches([3], 0))


@given(lengths=st.lists(st.integers(0, 40), max_size=30), budget=st.integers(1, 100))
def test_batch_plan(lengths, budget):
    batches = list(plan_batches(lengths, budget))
    order = [position for batch in batches for position in batch]
    assert sorted(order) == list(range(len(lengths)))
    assert [lengths[p] for p in order] == sorted(lengths)
    for batch in batches:
        padded = len(batch) * max(1, *(lengths[p] for p in batch))
        assert padded <= budget or len(batch) == 1
