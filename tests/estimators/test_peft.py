"""Models with LoRA adapters: the adapters or the base are attributed, exactly."""

import copy
import json
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

from estimators.curvature.fitting import fit_estimator
from estimators.model.layers import find_layers
from estimators.model.selection import LayerSelection
from estimators.model.tokens import Sequence1D, collate
from estimators.rescoring import query_gradients, score_batch_for_queries
from service.models import load_model
from tests import dense_reference as dense
from tests.directions import query_directions
from tests.estimators.test_capture import hook_gradients
from tests.service_fixtures import Workspace, make_model

peft = pytest.importorskip("peft")

ADAPTERS = LayerSelection(patterns=("*lora_*",))
BASE = LayerSelection(patterns=("*.base_layer",))
DAMPING = 0.1


def with_adapters(model: nn.Module, targets: list[str], *, trained: bool = True) -> nn.Module:
    """A copy with LoRA of rank 3 on the layers named; B is 0 until it is trained."""
    config = peft.LoraConfig(
        r=3, lora_alpha=8, lora_dropout=0.3, target_modules=targets, task_type="CAUSAL_LM"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Conv1D wants fan_in_fan_out, which PEFT then sets itself
        adapted = peft.get_peft_model(copy.deepcopy(model), config)
    generator = torch.Generator().manual_seed(5)
    for name, parameter in adapted.named_parameters():
        if "lora_A" in name or ("lora_B" in name and trained):
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    return adapted


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def adapted(request: pytest.FixtureRequest) -> nn.Module:
    """LoRA on Conv1D and on nn.Linear layers, some of them untouched; float64, frozen."""
    targets = {"gpt2": ["c_attn", "c_proj"], "llama": ["q_proj", "v_proj", "down_proj"]}
    model = request.getfixturevalue(request.param)
    wrapped = with_adapters(model, targets[request.param])
    return wrapped.get_base_model().double().eval().requires_grad_(False)


@pytest.mark.parametrize("selection", [ADAPTERS, BASE, LayerSelection()])
def test_gradients_of_adapters_and_base_are_autograds(adapted, sequences, selection):
    layers = find_layers(adapted, selection).layers
    gradients = hook_gradients(adapted, layers, collate(sequences))
    for i, row in enumerate(dense.example_gradients(adapted, layers, sequences)):
        assert dense.worst_error({n: g[i] for n, g in gradients.items()}, row) < 1e-11


def test_every_part_is_named_once(adapted):
    everything = find_layers(adapted)
    names = {layer.name for layer in everything.layers}
    assert {n for n in names if "lora_" in n} == {
        x.name for x in find_layers(adapted, ADAPTERS).layers
    }
    assert {n for n in names if n.endswith("base_layer")} == {
        x.name for x in find_layers(adapted, BASE).layers
    }
    for coverage in (everything, find_layers(adapted, ADAPTERS)):
        shares = coverage.attributed_share + sum(m.share for m in coverage.skipped)
        assert shares == pytest.approx(1, abs=1e-12)
    owners = {n.rpartition(".")[0] for n, _ in adapted.named_parameters()}
    assert owners <= names | {m.name for m in everything.skipped}


@pytest.mark.parametrize("selection", [ADAPTERS, BASE])
def test_ekfac_scores_equal_the_dense_reference(adapted, sequences, queries, selection):
    layers = find_layers(adapted, selection).layers
    ekfac = fit_estimator("ekfac", adapted, layers, sequences, labels="empirical")
    tokens = dense.example_tokens(adapted, layers, sequences)
    training = dense.example_gradients(adapted, layers, sequences)
    curvature = {x.name: dense.ekfac_operator(tokens, training, x.name) for x in layers}
    asked = dense.example_gradients(adapted, layers, queries)
    solved = [
        {n: dense.damped_solve(curvature[n], g, DAMPING) for n, g in gradient.items()}
        for gradient in asked
    ]
    expected = torch.tensor(
        [[dense.inner_product(q, z) for z in training] for q in solved], dtype=torch.float64
    )
    directions = query_directions(ekfac, query_gradients(adapted, layers, queries)[0], DAMPING)
    found = score_batch_for_queries(adapted, layers, directions, collate(sequences))
    assert dense.relative_error(found, expected) < 1e-6


def test_adapters_that_were_never_trained_are_refused(gpt2_float32, sequences):
    model = with_adapters(gpt2_float32, ["c_attn"], trained=False).get_base_model()
    layers = find_layers(model.eval().requires_grad_(False), ADAPTERS).layers
    with pytest.raises(ValueError, match=r"No gradient reached layer .*lora_A\.default.*B = 0"):
        fit_estimator("ekfac", model, layers, sequences)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return make_model(tmp_path_factory.mktemp("peft"))


@pytest.fixture(scope="module")
def adapter_folder(workspace: Workspace) -> Path:
    base = load_model(str(workspace.model))
    folder = workspace.model.parent / "adapter"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with_adapters(base.model, ["c_attn", "c_fc"]).save_pretrained(folder)
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
    return folder


def test_an_adapter_folder_is_loaded_with_the_base_models_tokenizer(workspace, adapter_folder):
    base, loaded = (
        load_model(str(workspace.model)),
        load_model(str(adapter_folder), layers=ADAPTERS),
    )
    assert loaded.tokenizer_sha256 == base.tokenizer_sha256
    assert loaded.context == base.context
    assert all("lora_" in layer.name for layer in loaded.coverage.layers)
    assert len(loaded.coverage.layers) == 2 * 2 * 2  # A and B, two targets, two blocks
    prompt = Sequence1D(tokens=tuple(loaded.encode("The capital of France is Paris.")))
    values = [query_gradients(x.model, x.coverage.layers, [prompt])[1] for x in (base, loaded)]
    assert abs(float(values[0] - values[1])) > 1e-3  # the adapters do act


def test_the_fingerprint_is_that_of_base_and_adapters(workspace, adapter_folder, tmp_path):
    base, loaded = load_model(str(workspace.model)), load_model(str(adapter_folder))
    assert load_model(str(adapter_folder)).model_sha256 == loaded.model_sha256
    other = with_adapters(base.model, ["c_attn", "c_fc"])
    next(p for n, p in other.named_parameters() if "lora_B" in n).data += 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        other.save_pretrained(tmp_path / "other")
    fingerprints = {base.model_sha256, loaded.model_sha256}
    fingerprints.add(load_model(str(tmp_path / "other")).model_sha256)
    assert len(fingerprints) == 3


def test_weight_decomposed_adapters_are_named_and_the_rest_is_exact(llama_float32, sequences):
    # DoRA runs A and B a second time, on the identity matrix, for the norm of their product.
    config = peft.LoraConfig(r=3, target_modules=["q_proj"], use_dora=True, task_type="CAUSAL_LM")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = peft.get_peft_model(copy.deepcopy(llama_float32), config)
    model = wrapped.get_base_model().double().eval().requires_grad_(False)
    coverage = find_layers(model)
    reasons = {module.name: module.reason for module in coverage.skipped}
    adapters = [n.rpartition(".")[0] for n, _ in model.named_parameters() if ".lora_" in n]
    assert len(adapters) == 2 * 3  # A, B and the magnitudes of two blocks
    assert set(adapters) <= set(reasons)
    assert "more than once" in reasons["model.layers.0.self_attn.q_proj.lora_A.default"]
    gradients = hook_gradients(model, coverage.layers, collate(sequences))
    for i, row in enumerate(dense.example_gradients(model, coverage.layers, sequences)):
        # Llama's norms round to float32 here.
        assert dense.worst_error({n: g[i] for n, g in gradients.items()}, row) < 1e-5
