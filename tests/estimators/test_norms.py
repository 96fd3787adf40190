"""Norms' own vectors: layers [1, feature] with the gradients that autograd has."""

import copy
import dataclasses

import pytest
import torch
from torch import Tensor, nn

from estimators.curvature.fitting import fit_estimator
from estimators.layers.scale import ScaleLayer
from estimators.model.capture import freeze
from estimators.model.layers import find_layers
from estimators.model.selection import LayerSelection
from estimators.model.tokens import collate
from estimators.rescoring import query_gradients, score_batch, score_batch_for_queries
from estimators.sketching.sketch import Sketch, SketchPlan
from tests import dense_reference as dense
from tests.directions import query_directions
from tests.estimators.test_capture import TOY_BATCH, Toy

WITH_NORMS = LayerSelection(norms=True)


def scales(model: nn.Module, selection: LayerSelection = WITH_NORMS) -> tuple[ScaleLayer, ...]:
    return tuple(x for x in find_layers(model, selection).layers if isinstance(x, ScaleLayer))


def test_every_vector_of_a_norm_is_a_layer_if_asked_for(model):
    plain, coverage = find_layers(model), find_layers(model, WITH_NORMS)
    own = {
        f"{name}.{parameter}"
        for name, module in model.named_modules()
        if "norm" in type(module).__name__.lower()
        for parameter, _ in module.named_parameters(recurse=False)
    }
    assert own
    assert {x.name for x in coverage.layers} == {x.name for x in plain.layers} | own
    assert not any(isinstance(x, ScaleLayer) for x in plain.layers)
    total = coverage.attributed_share + sum(m.share for m in coverage.skipped)
    assert total == pytest.approx(1)


def test_patterns_and_blocks_hold_for_norms(gpt2):
    selection = LayerSelection(patterns=("*.ln_1.*",), norms=True, widest=5)
    layers = find_layers(gpt2, selection).layers
    names = [layer.name for layer in layers]
    expected = [
        f"transformer.h.0.ln_1.{x}[:,{c}]" for x in ("weight", "bias") for c in ("0:4", "4:8")
    ]
    assert names[:4] == expected
    assert all(layer.is_block for layer in layers)


@pytest.mark.parametrize("widest", [None, 3])
def test_gradients_and_scores_are_autograds(model, sequences, queries, widest):
    layers = scales(model, LayerSelection(norms=True, widest=widest))
    gradients, _ = query_gradients(model, layers, queries)
    warm = dense.trainable(model)

    def slowly(sequence):
        names = {layer.name.partition("[")[0] for layer in layers}
        whole = {name: warm.get_parameter(name) for name in names}
        found = torch.autograd.grad(dense.loss(warm, sequence), list(whole.values()))
        by_name = dict(zip(whole, found, strict=True))
        return {x.name: by_name[x.name.partition("[")[0]][x.outputs][None] for x in layers}

    for i, query in enumerate(queries):
        own = {name: -g[i] for name, g in gradients.items()}
        assert dense.worst_error(own, slowly(query)) < 1e-11
    expected = torch.tensor(
        [
            [
                dense.inner_product({n: g[q] for n, g in gradients.items()}, slowly(z))
                for z in sequences
            ]
            for q in range(len(queries))
        ],
        dtype=torch.float64,
    )
    batch = collate(sequences)
    scores = score_batch_for_queries(model, layers, gradients, batch)
    assert dense.relative_error(scores, expected) < 1e-11
    parts = score_batch(model, layers, {n: g[0] for n, g in gradients.items()}, batch)
    assert dense.relative_error(parts.total, expected[0]) < 1e-11
    assert dense.relative_error(parts.by_position.sum(1), expected[0]) < 1e-11


@pytest.mark.parametrize("name", ["kfac", "ekfac"])
def test_fits_equal_the_dense_reference(name, gpt2, sequences):
    layers = scales(gpt2)
    fitted = fit_estimator(name, gpt2, layers, sequences, token_budget=25, labels="empirical")
    tokens = layer_norm_tokens(gpt2, sequences)
    gradients = [{n: (a.T @ d) for n, (a, d) in example.items()} for example in tokens]
    operator = {"kfac": dense.kfac_operator, "ekfac": dense.ekfac_operator}[name]
    for layer in layers:
        question = torch.randn(1, layer.out_features, dtype=torch.float64)
        curvature = operator(tokens, gradients, layer.name)
        expected = dense.damped_solve(curvature, question, 0.1)
        found = fitted.precondition({layer.name: question}, 0.1)[layer.name]
        assert dense.relative_error(found, expected) < 1e-6


def layer_norm_tokens(model: nn.Module, sequences) -> dense.Tokens:
    """``d_t (x_t - mean) / deviation`` and ``d_t``, each sequence by itself."""
    copied = dense.trainable(model)
    norms = {n: m for n, m in copied.named_modules() if isinstance(m, nn.LayerNorm)}
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    for name, module in norms.items():
        module.register_forward_hook(
            lambda _, inputs, output, name=name: seen.update({name: (inputs[0][0], output)})
        )
    result: dense.Tokens = []
    for sequence in sequences:
        value = dense.loss(copied, sequence)
        found = torch.autograd.grad(value, [output for _, output in seen.values()])
        example = {}
        for (name, (x, _)), d in zip(seen.items(), found, strict=True):
            x, d = x[:-1].detach(), d[0, :-1]
            spread = (x.var(1, unbiased=False, keepdim=True) + norms[name].eps).sqrt()
            ones = torch.ones(len(d), 1, dtype=d.dtype)
            example[f"{name}.weight"] = ones, d * (x - x.mean(1, keepdim=True)) / spread
            example[f"{name}.bias"] = ones, d
        result.append(example)
    return result


def test_sketches_of_all_layers_keep_scores(gpt2, sequences, queries):
    layers = find_layers(gpt2, LayerSelection(norms=True, embeddings=True)).layers
    fitted = fit_estimator("ekfac", gpt2, layers, sequences)
    gradients, _ = query_gradients(gpt2, layers, queries)
    directions = query_directions(fitted, gradients, 0.1)
    batch = collate(sequences)
    scores = score_batch_for_queries(gpt2, layers, directions, batch)
    sketch = Sketch(layers, fitted.whitening(layers, 0.1), SketchPlan(seed=1, folded=False))
    codes, _ = sketch.training(gpt2, batch)
    asked, _ = sketch.query(directions)
    assert dense.relative_error(asked.double() @ codes.double().T, scores) < 1e-5


def test_steps_on_norms_add_to_their_vectors(gpt2):
    layers = scales(gpt2, LayerSelection(norms=True, widest=3))
    moved = copy.deepcopy(gpt2)
    for layer in layers:
        own = dataclasses.replace(layer, module=moved.get_submodule(layer.module_name))
        own.add_to_weights(torch.ones(1, layer.out_features).double())
    whole = dict(gpt2.named_parameters())
    for layer in layers:
        (name,) = layer.parameter_names
        assert torch.allclose(moved.get_parameter(name) - whole[name], torch.ones(8).double())
        assert torch.equal(layer.part_of(whole)[0], whole[name][layer.outputs])


class Squared(nn.Module):
    """A vector that the output does not depend on linearly."""

    def __init__(self) -> None:
        super().__init__()
        self.vector = nn.Parameter(torch.tensor([1.0, 2.0, 3.0, 4.0]))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.vector**2


def test_other_vectors_are_left_out_with_a_reason():
    model = freeze(Toy(nn.Sequential(Squared(), nn.Linear(4, 5))))
    coverage = find_layers(model, WITH_NORMS)
    assert [layer.name for layer in coverage.layers] == ["body.1"]
    reasons = {m.name: m.reason for m in coverage.skipped}
    assert reasons["body.0"] == "its output does not depend on it linearly, feature by feature"
    assert torch.isfinite(
        score_batch(model, coverage.layers, {"body.1": torch.ones(5, 5)}, TOY_BATCH).total
    ).all()


class Normed(nn.Embedding):
    """Embeddings with a norm of their own, before anything that gradients are taken of."""

    def __init__(self) -> None:
        super().__init__(5, 4)
        self.norm = nn.LayerNorm(4)

    def forward(self, ids: Tensor) -> Tensor:
        return self.norm(super().forward(ids))


def test_norms_within_the_embeddings_are_left_out():
    model = Toy(nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 5)))
    model.embed = Normed()
    coverage = find_layers(freeze(model), WITH_NORMS)
    names = [layer.name for layer in coverage.layers]
    assert names == ["body.0.weight", "body.0.bias", "body.1"]
    reasons = {m.name: m.reason for m in coverage.skipped}
    assert reasons["embed.norm"] == "no gradient reaches it"
