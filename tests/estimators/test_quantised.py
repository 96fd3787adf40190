"""Layers of quantisation libraries, where these are installed: the gradients of their own weights.

tests/estimators/test_trial.py holds what needs no library: packed layers, sizes, refusals.
"""

import copy
import importlib
import warnings
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
)

from estimators.curvature.fitting import fit_estimator
from estimators.model.capture import freeze
from estimators.model.layers import find_layers
from estimators.model.selection import LayerSelection
from estimators.model.tokens import Sequence1D, collate
from estimators.rescoring import query_gradients, score_batch
from estimators.storage import fingerprint_model, fingerprint_tensors
from service.models import load_model
from tests import dense_reference as dense
from tests.directions import query_directions
from tests.estimators.test_capture import hook_gradients
from tests.service_fixtures import CONTEXT, make_model

pytestmark = pytest.mark.filterwarnings("default")  # of these libraries about each other

LINEAR = LayerSelection(patterns=("*_proj",))


def library(name: str) -> ModuleType:
    """The library, or a skipped test."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip(name, exc_type=ImportError)
        return importlib.import_module(name)


@pytest.fixture(scope="module")
def wide() -> nn.Module:
    """One block of width 64, the least that blocks of 64 quantised weights allow."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=11,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=16,
        initializer_range=0.2,
    )
    return freeze(LlamaForCausalLM(config))


def replaced(model: nn.Module, make: object) -> nn.Module:
    """A copy whose inner linear layers are ``make(layer)``."""
    copied = copy.deepcopy(model)
    for layer in find_layers(model, LINEAR).layers:
        copied.set_submodule(layer.name, make(model.get_submodule(layer.name)))  # type: ignore[operator]
    return freeze(copied)


def with_weights(model: nn.Module, weights: dict[str, Tensor]) -> nn.Module:
    copied = copy.deepcopy(model)
    for name, weight in weights.items():
        copied.get_submodule(name).weight.data = weight.float()
    return copied


def check(
    quantised: nn.Module, plain: nn.Module, sequences: list[Sequence1D], error: float
) -> None:
    """Everything is attributed, with the same shares and gradients as by ordinary layers."""
    found, expected = find_layers(quantised), find_layers(plain)
    assert [x.name for x in found.layers] == [x.name for x in expected.layers]
    assert found.attributed_share == expected.attributed_share
    batch = collate(sequences)
    values = hook_gradients(quantised, found.layers, batch)
    reference = hook_gradients(plain, expected.layers, batch)
    assert dense.worst_error(values, reference) < error
    ekfac = fit_estimator("ekfac", quantised, found.layers, sequences)
    directions = query_directions(
        ekfac, query_gradients(quantised, found.layers, sequences[:1])[0], 0.1
    )
    first = {name: direction[0] for name, direction in directions.items()}
    assert torch.isfinite(score_batch(quantised, found.layers, first, batch).total).all()
    assert fingerprint_model(quantised) != fingerprint_model(plain)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_bitsandbytes_four_bits(kind, wide, sequences):
    bnb = library("bitsandbytes")

    def make(linear: nn.Linear) -> nn.Module:
        layer = bnb.nn.Linear4bit(
            linear.in_features,
            linear.out_features,
            bias=False,
            compute_dtype=torch.float32,
            quant_type=kind,
        )
        layer.load_state_dict(linear.state_dict())
        return layer.to("cpu")  # packs the weights

    quantised = replaced(wide, make)
    weights = {}
    for layer in find_layers(quantised, LINEAR).layers:
        packed = layer.module.weight
        assert packed.numel() * 2 == layer.parameters
        weights[layer.name] = bnb.functional.dequantize_4bit(packed.data, packed.quant_state)
    check(quantised, with_weights(wide, weights), sequences, error=1e-4)


def test_bitsandbytes_eight_bits(wide, sequences):
    bnb = library("bitsandbytes")

    def make(linear: nn.Linear) -> nn.Module:
        layer = bnb.nn.Linear8bitLt(
            linear.in_features, linear.out_features, bias=False, has_fp16_weights=False
        )
        layer.load_state_dict(linear.state_dict())
        return layer.to("cpu")

    # Activations are rounded to eight bits as well, one part in 127 of a row's largest.
    check(replaced(wide, make), wide, sequences, error=0.2)


def test_torchao_eight_bits(wide, sequences):
    quantization = library("torchao.quantization")
    quantised = copy.deepcopy(wide)
    quantization.quantize_(
        quantised,
        quantization.Int8WeightOnlyConfig(),
        filter_fn=lambda module, name: name.endswith("_proj"),
    )
    weights = {
        layer.name: layer.module.weight.dequantize() for layer in find_layers(quantised).layers
    }
    check(freeze(quantised), with_weights(wide, weights), sequences, error=1e-4)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_folder_of_a_quantised_model_is_loaded(bits, tmp_path):
    library("bitsandbytes")
    tokenizer = AutoTokenizer.from_pretrained(make_model(tmp_path).model)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=1,
        num_attention_heads=4,
        max_position_embeddings=CONTEXT,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "plain")
    packing = BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8)
    quantised = AutoModelForCausalLM.from_pretrained(
        tmp_path / "plain", quantization_config=packing
    )
    quantised.save_pretrained(tmp_path / "packed")
    for name in ("plain", "packed"):
        tokenizer.save_pretrained(tmp_path / name)
    plain, packed = (load_model(str(tmp_path / name)) for name in ("plain", "packed"))
    kinds = {type(layer.module).__name__ for layer in packed.coverage.layers}
    assert kinds == {"Linear4bit" if bits == 4 else "Linear8bitLt"}
    assert packed.coverage.attributed_share == plain.coverage.attributed_share
    assert packed.model_sha256 == load_model(str(tmp_path / "packed")).model_sha256
    assert packed.model_sha256 != plain.model_sha256
    # Completing without gradients leaves the weights alone, and so does checkpointing.
    packed.complete("The capital of France is", stop=())
    assert fingerprint_model(packed.model) == packed.model_sha256
    checkpointed = load_model(str(tmp_path / "packed"), gradient_checkpointing=True)
    batch = collate([Sequence1D(tokens=tuple(packed.encode("The capital of Peru is Lima.")))])
    gradients = [hook_gradients(x.model, x.coverage.layers, batch) for x in (packed, checkpointed)]
    assert fingerprint_tensors(gradients[0]) == fingerprint_tensors(gradients[1])
