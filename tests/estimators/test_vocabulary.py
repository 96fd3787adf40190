"""Embeddings and output head: every figure against autograd's dense gradient of the weight."""

import copy
import dataclasses

import pytest
import torch
from torch import Tensor, nn

from estimators.curvature.fitting import fit_estimator
from estimators.model.capture import visit_gradients
from estimators.model.layers import Coverage, LinearLayer, VocabularyLayer, find_layers
from estimators.model.selection import LayerSelection
from estimators.model.terms import VocabularyTerms
from estimators.model.tokens import Sequence1D, collate
from estimators.operators.identity import Identity
from estimators.operators.kfac import KFac
from estimators.registry import FACTORS
from estimators.rescoring import (
    measure_queries,
    query_gradients,
    score_batch,
    score_batch_for_queries,
)
from estimators.sketching.sketch import Sketch, SketchPlan, training_sketches
from tests import dense_reference as dense
from tests.directions import query_directions

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


def test_a_direction_by_names_of_parameters_meets_every_use(model, coverage, sequences):
    """As the directions of a run are kept: a tied weight has one name."""
    copied = dense.trainable(model)
    parameters = dict(copied.named_parameters())
    generator = torch.Generator().manual_seed(8)
    whole = {name: torch.randn(p.shape, generator=generator) for name, p in parameters.items()}
    direction = {layer.name: layer.part_of(whole).double() for layer in coverage.layers}
    found = score_batch(model, coverage.layers, direction, collate(sequences[:1])).total
    dense.loss(copied, sequences[0]).backward()
    named = {name for layer in coverage.layers for name in layer.parameter_names}
    assert named <= set(parameters)
    parts = [(whole[name] * parameters[name].grad).sum() for name in named]
    assert float(found) == pytest.approx(float(sum(parts)), rel=1e-5)


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


DAMPING = 0.1


def dense_moments(
    model: nn.Module, layer: VocabularyLayer, sequences: list[Sequence1D], seed: int
) -> list[tuple[Tensor, Tensor, float]]:
    """Of each use, over its positions: means of ``x^2`` and of ``y y^T``; positions an example."""
    copied = dense.trainable(model)
    labels = dense.drawn_labels(copied, sequences, seed)
    found: dict[str, list[tuple[Tensor, Tensor]]] = {}
    kept: dict[str, Tensor] = {}
    names = {module: name for name, module in model.named_modules()}
    if layer.uses.embedding is not None:
        copied.get_submodule(names[layer.uses.embedding]).register_forward_hook(
            lambda _, __, output: kept.update(read=output)
        )
    if layer.uses.head is not None:
        copied.get_submodule(names[layer.uses.head]).register_forward_hook(
            lambda _, inputs, output: kept.update(states=inputs[0], predicted=output)
        )
    for sequence, own in zip(sequences, labels, strict=True):
        loss = dense.loss(copied, sequence, own)
        outputs = {what: kept[what] for what in ("read", "predicted") if what in kept}
        slopes = torch.autograd.grad(loss, list(outputs.values()))
        for what, slope in zip(outputs, slopes, strict=True):
            for t in range(len(sequence.tokens) - 1):
                one_hot = torch.eye(layer.in_features).double()[sequence.tokens[t]]
                pair = (
                    (one_hot, slope[0, t])
                    if what == "read"
                    else (slope[0, t], kept["states"][0, t].detach())
                )
                found.setdefault(what, []).append(pair)
    return [
        (
            torch.stack([x**2 for x, _ in pairs]).mean(0),
            torch.stack([torch.outer(y, y) for _, y in pairs]).mean(0),
            len(pairs) / len(sequences),
        )
        for pairs in found.values()
    ]


def dense_kfac(moments: list[tuple[Tensor, Tensor, float]]) -> Tensor:
    """``sum_u T_u diag(M_u) kron C_u``, without its parts off the basis' diagonal."""
    whole = sum(t * x.sum() * y for x, y, t in moments)
    basis = torch.linalg.eigh(whole)[1]
    values = sum(t * torch.outer(x, (basis.T @ y @ basis).diagonal()) for x, y, t in moments)
    return dense.kronecker_operator(torch.eye(len(values)).double(), basis, values)


@pytest.fixture(scope="module")
def ekfac(model, coverage, sequences):
    return fit_estimator("ekfac", model, coverage.layers, sequences, token_budget=25)


def test_kfac_is_the_dense_sum_over_uses(model, coverage, sequences, directions):
    fitted = fit_estimator("kfac", model, coverage.layers, sequences, token_budget=25)
    found = fitted.precondition(directions, DAMPING)
    for layer in vocabulary_layers(coverage):
        curvature = dense_kfac(dense_moments(model, layer, sequences, seed=0))
        for i in range(3):
            solved = dense.damped_solve(curvature, directions[layer.name][i], DAMPING)
            assert dense.relative_error(found[layer.name][i], solved) < EXACT


def test_ekfacs_eigenvalues_are_second_moments_of_whole_gradients(
    model, coverage, sequences, ekfac
):
    seed = 1  # of the second pass
    labels = dense.drawn_labels(model, sequences, seed)
    gradients = [
        dense_gradient(model, coverage.layers, sequence, own)
        for sequence, own in zip(sequences, labels, strict=True)
    ]
    for layer in vocabulary_layers(coverage):
        right = ekfac.tensors()[f"{layer.name}.right"]
        assert f"{layer.name}.left" not in ekfac.tensors()
        assert dense.relative_error(right.T @ right, torch.eye(len(right))) < EXACT
        left = torch.eye(layer.in_features).double()
        expected = dense.corrected_eigenvalues([g[layer.name] for g in gradients], left, right)
        assert dense.relative_error(ekfac.eigenvalues(layer.name), expected) < EXACT


def test_ekfacs_factors_answer_for_kfac(model, coverage, sequences, ekfac, directions):
    kfac = fit_estimator("kfac", model, coverage.layers, sequences)
    expected = kfac.precondition(directions, DAMPING)
    found = KFac(ekfac.tensors()).precondition(directions, DAMPING)
    assert dense.worst_error(found, expected) < EXACT


@pytest.mark.parametrize("name", FACTORS)
def test_whitening_keeps_scores(model, coverage, sequences, directions, gradients, name):
    fitted = fit_estimator(name, model, coverage.layers, sequences)
    for layer in vocabulary_layers(coverage):
        white = fitted.whitening(coverage.layers, DAMPING)[layer.name]
        left = {dual: white.left_map(dual=dual).double() for dual in (False, True)}
        right = {dual: white.right_map(dual=dual).double() for dual in (False, True)}
        gradient, query = gradients[1][layer.name], directions[layer.name][0]
        phi = left[False] @ gradient @ right[False].T
        psi = left[True] @ query @ right[True].T
        scale = float(torch.linalg.vector_norm(gradient) * torch.linalg.vector_norm(query))
        assert abs(float((phi * psi).sum() - (gradient * query).sum())) < 1e-6 * scale


def test_an_interrupted_fit_ends_the_same(gpt2, sequences):
    layers = find_layers(gpt2, WITH_EMBEDDINGS).layers
    whole = fit_estimator("ekfac", gpt2, layers, sequences, token_budget=12).tensors()

    class Interrupted(Exception):
        pass

    class Memory:
        """Fails after each batch in turn; what was offered before is loaded."""

        kept: tuple[str, int, dict[str, Tensor]] | None = None

        def load(self, name):
            found = self.kept
            return found[1:] if found is not None and found[0] == name else None

        def offer(self, name, done, sums):
            if self.kept is not None and (name, done) == self.kept[:2]:
                return
            self.kept = name, done, {k: v.clone() for k, v in sums.tensors().items()}
            raise Interrupted

    memory = Memory()
    for _ in range(100):
        try:
            found = fit_estimator(
                "ekfac", gpt2, layers, sequences, token_budget=12, checkpoint=memory
            ).tensors()
            break
        except Interrupted:
            continue
    assert all(torch.equal(found[key], tensor) for key, tensor in whole.items())


def test_memory_that_runs_out_half_way_counts_nothing_twice(gpt2, sequences, monkeypatch):
    layers = find_layers(gpt2, WITH_EMBEDDINGS).layers
    (layer,) = vocabulary_layers(find_layers(gpt2, WITH_EMBEDDINGS))
    expected = fit_estimator("ekfac", gpt2, [layer], sequences, token_budget=90)
    whole = VocabularyTerms.add_to
    failed = []

    def failing(self, targets, weights):
        if self.batch.rows[0] == 104 and not failed:
            failed.append(True)
            raise MemoryError
        whole(self, targets, weights)

    monkeypatch.setattr(VocabularyTerms, "add_to", failing)
    found = fit_estimator("ekfac", gpt2, layers, sequences, token_budget=90)
    assert failed
    name = layer.name
    assert dense.relative_error(found.eigenvalues(name), expected.eigenvalues(name)) < EXACT


@pytest.fixture(scope="module", params=["ekfac", "identity"])
def sketched(request, gpt2, llama, sequences, queries):
    """For a tied and an untied model in turn: what sketches are drawn for and tried on."""
    found = []
    for model in (gpt2, llama):
        narrow = copy.deepcopy(model).float()
        layers = find_layers(narrow, WITH_EMBEDDINGS).layers
        layers = tuple(x for x in layers if isinstance(x, VocabularyLayer))
        fitted = fit_estimator(request.param, narrow, layers, sequences)
        gradients, _ = query_gradients(narrow, layers, queries)
        asked = query_directions(fitted, gradients, DAMPING)
        exact = score_batch_for_queries(narrow, layers, asked, collate(sequences))
        found.append((narrow, layers, fitted.whitening(layers, DAMPING), asked, exact.double()))
    return found


@pytest.mark.parametrize(
    ("rank", "buckets", "folded"), [(1000, 1, True), (4, 1, True), (2, 3, True), (4, 1, False)]
)
def test_sketches_of_scores_are_unbiased(sketched, sequences, monkeypatch, rank, buckets, folded):
    monkeypatch.setattr("estimators.sketching.hashing.BUCKETS_A_RANK", buckets)
    for model, layers, whitening, asked, exact in sketched:
        plans = [
            SketchPlan(seed=seed, dimensions=256, rank=rank, folded=folded) for seed in range(300)
        ]
        sketches = [Sketch(layers, whitening, plan) for plan in plans]
        trained = training_sketches(sketches, model, collate(sequences))
        estimates = torch.stack(
            [s.query(asked)[0] @ x.T for s, (x, _) in zip(sketches, trained, strict=True)]
        ).double()
        error = (estimates.mean(0) - exact).abs()
        standard_error = estimates.std(0) / len(plans) ** 0.5
        scale = float(exact.abs().max())  # where nothing is reduced there is no spread at all
        assert (error < 4 * standard_error + 1e-4 * scale).all()
        assert float(standard_error.mean()) < 0.2 * float(exact.std())  # else this says nothing


def test_sketches_have_the_whitened_norms(sketched, sequences):
    for model, layers, whitening, _, _ in sketched:
        sketch = Sketch(layers, whitening, SketchPlan(seed=1, dimensions=1024, rank=1000))
        vectors, norms = sketch.training(model, collate(sequences))
        for i, sequence in enumerate(sequences):
            gradient = dense_gradient(model, layers, sequence)
            phi = torch.cat(
                [
                    (
                        whitening[n].left_map(dual=False).double()
                        @ g
                        @ whitening[n].right_map(dual=False).double().T
                    ).flatten()
                    for n, g in gradient.items()
                ]
            )
            length = float(torch.linalg.vector_norm(phi))
            assert float(norms[i]) == pytest.approx(length, rel=1e-4)
            assert float(torch.linalg.vector_norm(vectors[i])) == pytest.approx(length, rel=1e-4)


@pytest.mark.parametrize("buckets", [1, 2, 100])
def test_the_sketch_of_a_row_is_that_of_its_dense_gradient(
    sketched, sequences, monkeypatch, buckets
):
    """What ``training`` does by terms, ``query`` does to whole matrices, whitening aside."""
    monkeypatch.setattr("estimators.sketching.hashing.BUCKETS_A_RANK", buckets)
    for model, layers, _, _, _ in sketched:
        whitening = Identity().whitening(layers, DAMPING)
        sketch = Sketch(layers, whitening, SketchPlan(seed=1, dimensions=64, rank=3))
        assert sketch.shapes == [(min(3 * buckets, 11), 3)] * len(layers)
        vectors, _ = sketch.training(model, collate(sequences))
        dense_ones = [dense_gradient(model, layers, s) for s in sequences]
        stacked = {x.name: torch.stack([g[x.name] for g in dense_ones]) for x in layers}
        expected, _ = sketch.query(stacked)
        assert dense.relative_error(vectors, expected) < 1e-4


def test_batch_composition_changes_no_sketch(sketched, sequences, monkeypatch):
    monkeypatch.setattr("estimators.sketching.hashing.BUCKETS_A_RANK", 2)
    for model, layers, whitening, _, _ in sketched:
        sketch = Sketch(layers, whitening, SketchPlan(seed=1, dimensions=64, rank=3))
        together, norms = sketch.training(model, collate(sequences))
        for i, sequence in enumerate(sequences):
            alone, norm = sketch.training(model, collate([sequence]))
            assert float((alone[0] - together[i]).abs().max()) < 1e-4 * float(norms.max())
            assert float(norm[0]) == pytest.approx(float(norms[i]), rel=1e-4)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_scaled_embeddings_are_attributed_with_their_scale(name, request, sequences):
    class Scaled(nn.Embedding):
        def forward(self, ids: Tensor) -> Tensor:
            return 4 * super().forward(ids)

    model = copy.deepcopy(request.getfixturevalue(name))
    before = model.get_input_embeddings().weight
    embedding = Scaled(*before.shape, _weight=before)
    model.set_input_embeddings(embedding)
    embedding.weight = before  # tied as before
    layers = tuple(x for x in find_layers(model, WITH_EMBEDDINGS).layers if x.in_features == 11)
    assert [layer.uses.scale for layer in layers] == ([4.0, 1.0] if name == "llama" else [4.0])
    gradients, _ = query_gradients(model, layers, sequences)
    warm = dense.trainable(model)
    for i, sequence in enumerate(sequences):
        weights = [warm.get_submodule(layer.name).weight for layer in layers]
        expected = torch.autograd.grad(-dense.loss(warm, sequence), weights)
        for layer, own in zip(layers, expected, strict=True):
            assert dense.relative_error(gradients[layer.name][i], own) < 1e-11


def test_what_cannot_be_attributed_is_named(llama, gpt2):
    class Scaled(nn.Embedding):
        def forward(self, ids: Tensor) -> Tensor:
            rows = super().forward(ids)
            return rows * torch.arange(1, rows.shape[-1] + 1)

    def reasons(model: nn.Module) -> dict[str, str]:
        skipped = find_layers(model, WITH_EMBEDDINGS).skipped
        return {module.name: module.reason for module in skipped if "norm" not in module.name}

    scaled = copy.deepcopy(llama)
    weight = scaled.get_input_embeddings().weight
    scaled.set_input_embeddings(Scaled(*weight.shape, _weight=weight))
    assert reasons(scaled) == {"model.embed_tokens": "its outputs are not rows of its weight"}

    capped = copy.deepcopy(llama)
    plain = capped.forward

    def forward(**arguments):
        found = plain(**arguments)
        found.logits = 30 * torch.tanh(found.logits / 30)
        return found

    capped.forward = forward
    assert reasons(capped) == {
        "lm_head": "output head whose outputs are not the logits as they are"
    }

    biased = copy.deepcopy(llama)
    biased.lm_head.bias = nn.Parameter(torch.ones(11).double(), requires_grad=False)
    assert reasons(biased) == {"lm_head.bias": "bias of the output head"}
    shares = find_layers(biased, WITH_EMBEDDINGS)
    total = shares.attributed_share + sum(module.share for module in shares.skipped)
    assert total == pytest.approx(1)

    tied = copy.deepcopy(gpt2)
    embedding = Scaled(*tied.lm_head.weight.shape, _weight=tied.lm_head.weight)
    tied.set_input_embeddings(embedding)
    embedding.weight = tied.lm_head.weight
    found = reasons(tied)
    assert found["transformer.wte"] == "its outputs are not rows of its weight"
    assert found["lm_head"] == "tied to transformer.wte: its outputs are not rows of its weight"
