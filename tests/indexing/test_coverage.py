"""The commands from fit to answer on every kind of model: the answer is the exact top k."""

import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPTNeoXConfig,
    LlamaConfig,
    MixtralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
)

from estimators.model.selection import LayerSelection
from estimators.storage import load_factors
from index.manifest import Manifest
from scripts import build_index, fit_estimator
from service.models import LoadedModel, load_model
from service.scoring.exhaustive import exact_scores
from service.search.opening import OpenIndex, only, open_index
from service.search.query import Query
from service.search.retrieval import Retriever
from tests.estimators.test_peft import with_adapters
from tests.rankings import assert_best_first
from tests.scripts.test_scripts import invoke, json_line
from tests.service_fixtures import CONTEXT, Workspace, make_model

GROUPED_QUERIES = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
}
CONFIGS: dict[str, Callable[[int], PreTrainedConfig]] = {
    "llama": lambda size: LlamaConfig(**GROUPED_QUERIES, vocab_size=size, tie_word_embeddings=True),
    "qwen2": lambda size: Qwen2Config(**GROUPED_QUERIES, vocab_size=size, tie_word_embeddings=True),
    "gpt_neox": lambda size: GPTNeoXConfig(
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=CONTEXT,
        vocab_size=size,
    ),
    "mixtral": lambda size: MixtralConfig(
        **GROUPED_QUERIES, vocab_size=size, num_local_experts=4, num_experts_per_tok=2
    ),
}


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return make_model(tmp_path_factory.mktemp("coverage"))


@pytest.fixture(scope="module")
def folders(workspace: Workspace) -> dict[str, Path]:
    """A folder for each model: the trained GPT-2, random ones of other kinds, adapters."""
    tokenizer = AutoTokenizer.from_pretrained(workspace.model)
    found = {"gpt2": workspace.model}
    for name, config in CONFIGS.items():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config(len(tokenizer)))
        found[name] = _save(workspace, name, model)
        tokenizer.save_pretrained(found[name])
    base = AutoModelForCausalLM.from_pretrained(workspace.model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found["lora"] = _save(workspace, "lora", with_adapters(base, ["c_attn", "c_fc"]))
    return found


def _save(workspace: Workspace, name: str, model: PreTrainedModel) -> Path:
    folder = workspace.model.parent / name
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("name", "fitting", "both"),
    [
        ("gpt2", [], []),
        ("gpt2", ["--widest", "24"], []),
        ("gpt2", ["--layers", "*mlp*", "--widest", "30"], ["--gradient-checkpointing"]),
        ("gpt2", [], ["--dtype", "bfloat16"]),
        ("gpt2", ["--embeddings"], []),
        ("gpt2", ["--embeddings", "--estimator", "kfac"], ["--gradient-checkpointing"]),
        ("gpt2", ["--embeddings", "--estimator", "identity"], []),
        ("gpt2", ["--norms"], ["--gradient-checkpointing"]),
        ("llama", [], []),
        ("llama", ["--widest", "20"], ["--dtype", "bfloat16", "--gradient-checkpointing"]),
        ("qwen2", [], []),
        ("gpt_neox", [], []),
        ("gpt_neox", ["--embeddings", "--widest", "30"], ["--dtype", "bfloat16"]),
        ("mixtral", [], []),
        ("mixtral", ["--embeddings", "--norms", "--widest", "20"], ["--gradient-checkpointing"]),
        ("mixtral", ["--layers", "*experts*"], ["--dtype", "bfloat16"]),
        ("lora", ["--layers", "*lora_*"], []),
        ("lora", ["--layers", "*lora_*"], ["--dtype", "bfloat16"]),
        ("lora", ["--layers", "*.base_layer"], ["--gradient-checkpointing"]),
    ],
)
def test_from_fit_to_answer(name, fitting, both, folders, workspace, tmp_path):
    common = ("--model", folders[name], "--data", workspace.corpus, *both)
    factors, index = tmp_path / "ekfac.safetensors", tmp_path / "index"
    fitted = invoke(fit_estimator, *common, "--out", factors, *fitting)
    assert fitted.code == 0, fitted.stderr
    built = invoke(
        build_index,
        *("--factors", factors, "--out", index, "--dimensions", 4096, "--seed", 1),
        *("--id-column", "id", *common),
    )
    assert built.code == 0, built.stderr
    manifest = Manifest.read(index)
    assert json_line(fitted.stdout)["layers"] == len(manifest.estimator.layers)
    assert (manifest.estimator.widest is not None) == ("--widest" in fitting)
    assert manifest.estimator.embeddings == ("--embeddings" in fitting)
    assert manifest.estimator.norms == ("--norms" in fitting)
    split = [layer for layer in manifest.estimator.layers if layer.endswith("]") and "," in layer]
    assert bool(split) == ("--widest" in fitting)

    loaded = load_model(str(folders[name]), dtype="bfloat16" if "bfloat16" in both else "auto")
    opened = open_index(index, loaded)
    assert [layer.name for layer in opened.loaded.coverage.layers] == manifest.estimator.layers
    query = Query(
        prompt="The capital of France is", completion=" Paris", k=5, ranking="score", budget=99
    )
    answer = Retriever(opened).answer(query)
    exact = _exact(opened.loaded, opened, query)
    rows = [result.row for result in answer.results]
    assert len(rows) == 5
    assert_best_first(rows, exact, 1e-3)
    assert [r.score for r in answer.results] == pytest.approx(exact[rows].tolist(), rel=1e-3)


def _exact(loaded: LoadedModel, opened: OpenIndex, query: Query) -> np.ndarray:
    sequence = loaded.encode_query(query.prompt, query.completion)
    estimators = {"own": opened.estimators.own.directions}
    return exact_scores(loaded, estimators, opened.examples, [sequence])["own"][0]


def test_the_choice_of_layers_is_stored_with_the_factors(folders, workspace, tmp_path):
    factors = tmp_path / "factors.safetensors"
    fitted = invoke(
        fit_estimator,
        *("--model", folders["gpt2"], "--data", workspace.corpus, "--out", factors),
        *("--layers", "*.1.mlp.*", "--widest", 50, "--embeddings"),
    )
    assert fitted.code == 0, fitted.stderr
    assert "attributed: 5 layers, 4 of them blocks of wider ones" in fitted.stderr
    assert "transformer.h.*.ln_1 (LayerNorm, 2 modules, " in fitted.stderr
    _, _, facts = load_factors(factors)
    wanted = LayerSelection(patterns=("*.1.mlp.*",), widest=50, embeddings=True)
    assert LayerSelection.from_facts(facts) == wanted


def test_an_index_keeps_the_layers_that_it_was_built_with(folders):
    coverage = load_model(str(folders["mixtral"])).coverage
    before = [layer.name for layer in coverage.layers if ".self_attn." in layer.name]
    assert [layer.name for layer in only(coverage, before).layers] == before
    assert only(coverage, [*before, "model.layers.9"]) is coverage
    every = [layer.name for layer in coverage.layers]
    assert only(coverage, every) == coverage
