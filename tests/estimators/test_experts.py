"""Experts, routers, flattened and four-dimensional inputs: rows are followed to their tokens."""

import copy
import dataclasses
from types import SimpleNamespace

import pytest
import torch
import transformers
from torch import Tensor, nn

from estimators.curvature.fitting import fit_estimator
from estimators.layers.matrix import MatrixLayer
from estimators.model.capture import freeze
from estimators.model.layers import LinearLayer, find_layers
from estimators.model.recomputation import recompute_blocks
from estimators.model.selection import LayerSelection
from estimators.model.tokens import Rejected, Sequence1D, collate
from estimators.rescoring import (
    measure_queries,
    query_gradients,
    score_batch,
    score_batch_for_queries,
)
from estimators.sketching.sketch import Sketch, SketchPlan
from tests import dense_reference as dense
from tests.directions import query_directions

EXACT = 1e-11
WIDTH, INNER, EXPERTS, VOCABULARY = 6, 5, 4, 13


class Experts(nn.Module):
    """Fused experts in transformers' manner, of either orientation, with biases or without."""

    def __init__(self, turned: bool, biases: bool) -> None:
        super().__init__()
        self.turned, self.biases = turned, biases
        for name, (inputs, outputs) in {"up": (WIDTH, INNER), "down": (INNER, WIDTH)}.items():
            sides = (inputs, outputs) if turned else (outputs, inputs)
            setattr(self, name, nn.Parameter(torch.randn(EXPERTS, *sides) / 2))
            if biases:
                setattr(self, f"{name}_bias", nn.Parameter(torch.randn(EXPERTS, outputs)))
        self.seen: list[tuple[str, int, int, Tensor, Tensor]] | None = None

    def product(self, name: str, number: int, x: Tensor) -> Tensor:
        weight = getattr(self, name)[number]
        y = x @ weight if self.turned else nn.functional.linear(x, weight)
        return y + getattr(self, f"{name}_bias")[number] if self.biases else y

    def forward(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        if self.seen is not None:
            return self.slowly(x, chosen, weights)
        result = torch.zeros_like(x)
        for number in chosen.unique().tolist():
            tokens, ranks = torch.where(chosen == number)
            y = torch.tanh(self.product("up", number, x[tokens]))
            y = self.product("down", number, y) * weights[tokens, ranks, None]
            result.index_add_(0, tokens, y)
        return result

    def slowly(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """One token and one expert at a time, written down."""
        rows = []
        for token in range(len(x)):
            total = torch.zeros_like(x[token])
            for rank, number in enumerate(chosen[token].tolist()):
                up = self.product("up", number, x[token])
                hidden = torch.tanh(up)
                down = self.product("down", number, hidden)
                self.seen.append(("up", number, token, x[token], up))
                self.seen.append(("down", number, token, hidden, down))
                total = total + down * weights[token, rank]
            rows.append(total)
        return torch.stack(rows)


class Mixture(nn.Module):
    """A router, two of four experts for each token, and something before and after them."""

    def __init__(self, turned: bool = False, biases: bool = False) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.block = Block(turned, biases)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, input_ids: Tensor, **_: object) -> SimpleNamespace:
        x = self.embed(input_ids)
        earlier = x.cumsum(1) / torch.arange(1, x.shape[1] + 1)[:, None].to(x)
        return SimpleNamespace(logits=self.head(self.block(x + earlier)))


class Block(nn.Module):
    def __init__(self, turned: bool, biases: bool) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, EXPERTS)
        self.experts = Experts(turned, biases)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, WIDTH)
        weights, chosen = self.router(flat).softmax(-1).topk(2)
        return x + self.experts(flat, chosen, weights).view_as(x)


def mixture(turned: bool = False, biases: bool = False) -> nn.Module:
    return freeze(Mixture(turned, biases)).double()


def sequences(count: int = 12, longest: int = 9, seed: int = 1) -> list[Sequence1D]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, longest + 1, (count,), generator=generator).tolist()
    return [
        Sequence1D(
            tokens=tuple(torch.randint(VOCABULARY, (n,), generator=generator).tolist()), row=i
        )
        for i, n in enumerate(lengths)
    ]


def autograd(model: nn.Module, layers: tuple[LinearLayer, ...], value: Tensor) -> dict[str, Tensor]:
    """Autograd's gradients of the weights, taken apart by hand."""
    names, parameters = zip(*model.named_parameters(), strict=True)
    found = torch.autograd.grad(value, parameters, allow_unused=True)
    whole = {
        name: torch.zeros_like(p) if g is None else g
        for name, p, g in zip(names, parameters, found, strict=True)
    }
    result = {}
    for layer in layers:
        if not isinstance(layer, MatrixLayer):
            parts = [whole[f"{layer.module_name}.weight"].T]
            if f"{layer.module_name}.bias" in whole:
                parts.append(whole[f"{layer.module_name}.bias"][None])
        else:
            stored = layer.stored
            base = f"{layer.module_name}."
            matrix = whole[base + stored.parameter]
            matrix = matrix.reshape(stored.count, *stored.shape)[stored.number]
            parts = [matrix if stored.inputs_first else matrix.T]
            if stored.bias is not None:
                parts.append(
                    whole[base + stored.bias].reshape(stored.count, -1)[stored.number][None]
                )
        gradient = torch.cat(parts)
        result[layer.name] = gradient[dense.rows_of(layer), layer.outputs]
    return result


def autograd_gradients(
    model: nn.Module, layers: tuple[LinearLayer, ...], given: list[Sequence1D]
) -> list[dict[str, Tensor]]:
    warm = copy.deepcopy(model).requires_grad_(True)
    return [autograd(warm, layers, dense.loss(warm, sequence)) for sequence in given]


def reference_tokens(model: nn.Module, given: list[Sequence1D]) -> dense.Tokens:
    """Inputs and output gradients of each expert's matrix, each sequence and token by itself."""
    warm = dense.trainable(model)
    result: dense.Tokens = []
    for sequence in given:
        warm.block.experts.seen = seen = []
        value = dense.loss(warm, sequence)
        gradients = torch.autograd.grad(value, [out for *_, out in seen])
        example: dict[str, tuple[Tensor, Tensor]] = {}
        for name, width, outputs in (("up", WIDTH, INNER), ("down", INNER, WIDTH)):
            for number in range(EXPERTS):
                rows = [
                    (torch.cat([a, a.new_ones(1)]) if warm.block.experts.biases else a, d)
                    for (what, expert, token, a, _), d in zip(seen, gradients, strict=True)
                    if (what, expert) == (name, number) and token < len(sequence.tokens) - 1
                ]
                width_whole = width + warm.block.experts.biases
                example[f"block.experts.{name}[{number}]"] = (
                    torch.stack([a for a, _ in rows]).detach()
                    if rows
                    else torch.zeros(0, width_whole).double(),
                    torch.stack([d for _, d in rows]) if rows else torch.zeros(0, outputs).double(),
                )
        result.append(example)
    return result


KINDS = [(False, False), (True, True)]


@pytest.mark.parametrize(("turned", "biases"), KINDS)
def test_each_experts_matrix_is_a_layer(turned, biases):
    coverage = find_layers(mixture(turned, biases))
    names = [layer.name for layer in coverage.layers]
    matrices = [f"block.experts.{side}[{n}]" for side in ("up", "down") for n in range(EXPERTS)]
    assert names == ["block.router", *matrices]
    assert {layer.name for layer in coverage.layers if layer.family} == set(matrices)
    assert all(layer.has_bias == biases for layer in coverage.layers[1:])
    total = sum(p.numel() for p in mixture(turned, biases).parameters())
    assert coverage.attributed_share == pytest.approx(1 - 2 * VOCABULARY * WIDTH / total)
    assert {m.name for m in coverage.skipped} == {"embed", "head"}


@pytest.mark.parametrize("widest", [None, 3])
@pytest.mark.parametrize(("turned", "biases"), KINDS)
def test_every_route_gives_autograds_gradients_and_scores(turned, biases, widest):
    model, examples, asked = mixture(turned, biases), sequences(), sequences(3, 6, seed=5)
    layers = find_layers(model, LayerSelection(widest=widest)).layers
    queries, _ = query_gradients(model, layers, asked)
    expected = autograd_gradients(model, layers, asked)
    for i, row in enumerate(expected):
        own = {name: -g[i] for name, g in queries.items()}
        assert dense.worst_error(own, row) < EXACT
    measured = measure_queries(model, layers, [[(s, 1.0)] for s in asked], token_budget=7)
    assert measured.faults == [None] * 3
    assert dense.worst_error(measured.gradients, queries) < EXACT
    training = autograd_gradients(model, layers, examples)
    scores = torch.tensor(
        [
            [dense.inner_product({n: g[q] for n, g in queries.items()}, z) for z in training]
            for q in range(3)
        ],
        dtype=torch.float64,
    )
    batch = collate(examples)
    assert (
        dense.relative_error(score_batch_for_queries(model, layers, queries, batch), scores) < EXACT
    )
    parts = score_batch(model, layers, {n: g[0] for n, g in queries.items()}, batch)
    assert dense.relative_error(parts.total, scores[0]) < EXACT
    assert dense.relative_error(parts.by_position.sum(1), scores[0]) < EXACT


@pytest.mark.parametrize(("turned", "biases"), KINDS)
def test_positions_are_those_of_the_tokens_that_were_routed(turned, biases):
    model, examples = mixture(turned, biases), sequences()
    layers = tuple(layer for layer in find_layers(model).layers if layer.family)
    generator = torch.Generator().manual_seed(0)
    directions = {
        x.name: torch.randn(x.in_features, x.out_features, generator=generator).double()
        for x in layers
    }
    found = score_batch(model, layers, directions, collate(examples)).by_position
    warm = dense.trainable(model)
    expected = torch.zeros_like(found)
    for i, sequence in enumerate(examples):
        warm.block.experts.seen = seen = []
        gradients = torch.autograd.grad(dense.loss(warm, sequence), [out for *_, out in seen])
        for (what, number, token, a, _), d in zip(seen, gradients, strict=True):
            a = torch.cat([a, a.new_ones(1)]) if biases else a
            expected[i, token] += a @ directions[f"block.experts.{what}[{number}]"] @ d
    assert dense.relative_error(found, expected.detach()) < EXACT


@pytest.mark.parametrize("name", ["kfac", "ekfac"])
@pytest.mark.parametrize(("turned", "biases"), KINDS)
def test_fits_equal_the_dense_reference(name, turned, biases):
    model, examples = mixture(turned, biases), sequences(30)
    layers = tuple(layer for layer in find_layers(model).layers if layer.family)
    fitted = fit_estimator(name, model, layers, examples, token_budget=40, labels="empirical")
    assert not [key for key in fitted.tensors() if key.endswith(".shared")]
    tokens = reference_tokens(model, examples)
    gradients = autograd_gradients(model, layers, examples)
    operator = {"kfac": dense.kfac_operator, "ekfac": dense.ekfac_operator}[name]
    question = {
        x.name: torch.randn(x.in_features, x.out_features, dtype=torch.float64) for x in layers
    }
    found = fitted.precondition(question, 0.1)
    for layer in layers:
        curvature = operator(tokens, gradients, layer.name)
        expected = dense.damped_solve(curvature, question[layer.name], 0.1)
        assert dense.relative_error(found[layer.name], expected) < 1e-6


@pytest.mark.parametrize("name", ["kfac", "ekfac"])
def test_experts_that_saw_few_tokens_have_the_curvature_of_all(name):
    model = mixture()
    examples = sequences(40)
    with torch.no_grad():  # expert 3 is hardly chosen
        model.block.router.bias[3] -= 1.6
    layers = tuple(layer for layer in find_layers(model).layers if layer.family)
    fitted = fit_estimator(name, model, layers, examples, token_budget=40, labels="empirical")
    shared = {k.removesuffix(".shared"): int(v) for k, v in fitted.tensors().items() if ".sh" in k}
    tokens = reference_tokens(model, examples)
    few = {f"block.experts.{side}[3]" for side in ("up", "down")}
    assert set(shared) == few
    for side in ("up", "down"):
        own = f"block.experts.{side}[3]"
        assert shared[own] == sum(len(example[own][0]) for example in tokens) < WIDTH
        a, d = (
            torch.cat([e[f"block.experts.{side}[{n}]"][i] for e in tokens for n in range(EXPERTS)])
            for i in (0, 1)
        )
        rate = len(a) / len(examples) / EXPERTS
        curvature = rate * torch.kron(a.T @ a / len(a), d.T @ d / len(a))
        question = torch.randn(a.shape[1], d.shape[1], dtype=torch.float64)
        expected = dense.damped_solve(curvature, question, 0.1)
        assert dense.relative_error(fitted.precondition({own: question}, 0.1)[own], expected) < 1e-6


def test_an_expert_that_no_token_reaches_is_no_error():
    model = mixture()
    with torch.no_grad():
        model.block.router.bias[3] -= 100
    layers = find_layers(model).layers
    examples = sequences()
    fitted = fit_estimator("ekfac", model, layers, examples, labels="empirical")
    gradients, _ = query_gradients(model, layers, examples[:2])
    assert not gradients["block.experts.up[3]"].any()
    directions = query_directions(fitted, gradients, 0.1)
    scores = score_batch_for_queries(model, layers, directions, collate(examples))
    assert torch.isfinite(scores).all()
    sketch = Sketch(layers, fitted.whitening(layers, 0.1), SketchPlan(seed=1, folded=False))
    codes, _ = sketch.training(model, collate(examples))
    asked, _ = sketch.query(directions)
    assert dense.relative_error(asked.double() @ codes.double().T, scores) < 1e-5


def mixtral() -> nn.Module:
    config = transformers.MixtralConfig(
        vocab_size=VOCABULARY,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=3,
        max_position_embeddings=16,
    )
    torch.manual_seed(0)
    return freeze(transformers.AutoModelForCausalLM.from_config(config))


def test_experts_of_checkpointed_blocks_are_the_same():
    model = mixtral()
    layers = find_layers(model).layers
    expected, _ = query_gradients(model, layers, sequences(3))
    recompute_blocks(model)
    again = find_layers(model).layers
    assert [layer.name for layer in again] == [layer.name for layer in layers]
    found, _ = query_gradients(model, again, sequences(3))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_pairs_of_which_one_was_preferred_pass_through_experts():
    """Their gradient is the slope times the difference of both losses' gradients."""
    model = mixtral().double()
    layers = find_layers(model).layers
    good, bad = sequences(2)
    worse = Rejected(tokens=bad.tokens, counted=((2, len(bad.tokens)),), beta=0.5, margin=0.3)
    pair = dataclasses.replace(good, counted=((2, len(good.tokens)),), rejected=worse)
    apart, _ = query_gradients(model, layers, [member for member, _ in pair.members])
    generator = torch.Generator().manual_seed(0)
    directions = {
        name: torch.randn(value.shape[1:], generator=generator, dtype=value.dtype)
        for name, value in apart.items()
    }
    products = [
        sum(float((apart[name][i] * d).sum()) for name, d in directions.items()) for i in (0, 1)
    ]
    expected = worse.slope * (products[1] - products[0])  # these are gradients of log p
    for batch in (collate([pair]), collate([pair, good])):
        parts = score_batch(model, layers, directions, batch)
        assert float(parts.total[0]) == pytest.approx(expected, rel=1e-5)
        assert float(parts.by_position[0].sum()) == pytest.approx(expected, rel=1e-5)
    chosen = parts.by_position[0, : len(good.tokens)].sum()
    assert float(chosen) == pytest.approx(-worse.slope * products[0], rel=1e-5)
    together, apart = (
        fit_estimator("ekfac", model, layers, [pair, good], token_budget=budget).tensors()
        for budget in (1024, 1)
    )
    for name in [name for name in together if name.endswith(".eigenvalues")]:
        assert float(together[name].sum()) == pytest.approx(float(apart[name].sum()), rel=1e-4)


class Shaped(nn.Module):
    """A linear layer in a block that shows it its tokens in another shape."""

    def __init__(self, shape: str) -> None:
        super().__init__()
        self.shape = shape
        self.mix = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        if self.shape == "heads":  # [batch, token, head, feature]
            return x + self.mix(x.view(batch, tokens, -1, 3)).reshape(x.shape)
        if self.shape == "transposed":  # [batch, head, token, feature]
            heads = x.view(batch, tokens, -1, 3).transpose(1, 2)
            return x + self.mix(heads).transpose(1, 2).reshape(x.shape)
        if self.shape == "time first":  # [token, batch, feature]
            return x + self.mix(x[..., :3].transpose(0, 1)).transpose(0, 1).repeat(1, 1, 2)
        if self.shape == "reversed":  # followed, but only by indexing
            back = torch.arange(tokens - 1, -1, -1)
            return x + self.mix(x[:, back, :3].flatten(0, 1)).view(batch, tokens, 3)[
                :, back
            ].repeat(1, 1, 2)
        assert self.shape == "flat"
        return x + self.mix(x.flatten(0, 1)[:, :3]).view(batch, tokens, 3).repeat(1, 1, 2)


class Small(nn.Module):
    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.block = block
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    get_input_embeddings = Mixture.get_input_embeddings
    get_output_embeddings = Mixture.get_output_embeddings
    forward = Mixture.forward


@pytest.mark.parametrize("shape", ["flat", "heads", "transposed", "time first", "reversed"])
def test_other_shapes_are_mapped_back_to_tokens(shape):
    model = freeze(Small(Shaped(shape))).double()
    (layer,) = layers = find_layers(model).layers
    assert layer.name == "block.mix"
    assert layer.family is None
    given = sequences()
    gradients, _ = query_gradients(model, layers, given)
    for i, row in enumerate(autograd_gradients(model, layers, given)):
        assert dense.relative_error(-gradients["block.mix"][i], row["block.mix"]) < EXACT
    direction = {"block.mix": torch.randn(4, 3, dtype=torch.float64)}
    parts = score_batch(model, layers, direction, collate(given))
    # Position by position: what the layer's output gradient is if only that token's rows count.
    alone = [score_batch(model, layers, direction, collate([s])).by_position[0] for s in given]
    for row, own in zip(parts.by_position, alone, strict=True):
        assert dense.relative_error(row[: len(own)], own) < EXACT
    assert dense.relative_error(parts.by_position.sum(1), parts.total) < EXACT


class Shuffled(nn.Module):
    """Rows are put in another order by a product, which cannot be followed."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        count = x.shape[0] * x.shape[1]
        order = torch.eye(count, dtype=x.dtype).flip(0)
        mixed = self.mix(torch.matmul(order, x.flatten(0, 1)))
        return x + torch.matmul(order, mixed).view_as(x)


class UsedElsewhere(nn.Module):
    """A matrix that more is done with than a product."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.matrix + x * self.matrix.diagonal()


@pytest.mark.parametrize(
    ("block", "name", "reason"),
    [
        (Shuffled(), "block.mix", "its rows do not belong to the tokens"),
        (UsedElsewhere(), "block", "its gradient is not that of the products that were seen"),
    ],
)
def test_what_cannot_be_followed_is_left_out_with_a_reason(block, name, reason):
    model = Small(nn.Sequential(nn.Linear(WIDTH, WIDTH), block))
    coverage = find_layers(freeze(model).double())
    assert [layer.name for layer in coverage.layers] == ["block.0"]
    name = name.replace("block", "block.1", 1)
    assert reason in {m.name: m.reason for m in coverage.skipped}[name]


def test_steps_on_experts_add_to_their_part_of_the_weights():
    model = mixture(turned=True, biases=True)
    layers = find_layers(model, LayerSelection(widest=3)).layers
    moved = copy.deepcopy(model)
    for layer in layers:
        own = dataclasses.replace(layer, module=moved.get_submodule(layer.module_name))
        own.add_to_weights(torch.ones(layer.in_features, layer.out_features).double())
    for (name, before), after in zip(model.named_parameters(), moved.parameters(), strict=True):
        expected = 0 if name in ("embed.weight", "head.weight") else 1
        assert torch.allclose(after - before, torch.full_like(before, expected))
    whole = dict(model.named_parameters())
    for layer in layers:
        if isinstance(layer, MatrixLayer):
            assert layer.parameter_names <= set(whole)
            ones = {name: torch.ones_like(value) for name, value in whole.items()}
            assert bool((layer.part_of(ones) == 1).all())
