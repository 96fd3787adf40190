"""Shape checks for ``estimators`` and tiny seeded models, none of which is downloaded."""

import copy
import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

os.environ.setdefault("TRITON_INTERPRET", "1")  # kernels run on the CPU; read at the first import

import pytest
import torch
from beartype import beartype
from beartype.roar import BeartypeDecorHintException
from jaxtyping import install_import_hook
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)


def check_types(function: Callable) -> Callable:
    """Beartype, except for signatures that it cannot check and that state no shape.

    Those are methods that return Self and functions that return the class of a Protocol.
    """
    try:
        return beartype(function)
    except BeartypeDecorHintException:
        if "jaxtyping" in str(function.__annotations__):
            raise
        return function


# Before anything imports estimators: every annotated shape and type is checked under pytest.
install_import_hook("estimators", f"{__name__}.check_types")

from estimators.model.capture import freeze  # noqa: E402
from estimators.model.tokens import Sequence1D  # noqa: E402

# Matrices of 10 x 10 gain nothing from a second thread, and threads that wait for each other on a
# busy machine made these tests ten times slower. Commands that tests start are told the same.
# `make test-processors` runs with two as well: they add in another order.
torch.set_num_threads(int(os.environ.setdefault("OMP_NUM_THREADS", "1")))

if TYPE_CHECKING:
    from tests.commands import Nursery
    from tests.service_fixtures import Workspace

VOCABULARY = 11


def _seeded(build: Callable[[], nn.Module], seed: int) -> nn.Module:
    """Build a frozen model with every weight away from its special initial value, norms included.

    0.25 keeps the logits of these tiny models of order 1: neither uniform nor saturated.
    """
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        model = build()
        for parameter in model.parameters():
            parameter.add_(0.25 * torch.randn(parameter.shape))
    return freeze(model)


def _build_gpt2() -> nn.Module:
    config = GPT2Config(
        vocab_size=VOCABULARY, n_positions=16, n_embd=8, n_layer=2, n_head=2, n_inner=12
    )
    return GPT2LMHeadModel(config)


GROUPED_QUERIES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 16,
}


def _build_llama() -> nn.Module:
    return LlamaForCausalLM(LlamaConfig(**GROUPED_QUERIES, tie_word_embeddings=False))


def _build_qwen2() -> nn.Module:
    return Qwen2ForCausalLM(Qwen2Config(**GROUPED_QUERIES, tie_word_embeddings=True))


def _build_gpt_neox() -> nn.Module:
    config = GPTNeoXConfig(
        vocab_size=VOCABULARY,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.5,
        },
    )
    return GPTNeoXForCausalLM(config)


def _in_float64(model: nn.Module) -> nn.Module:
    """A copy in float64, RMS norms included: transformers' own always round to float32."""
    copied = copy.deepcopy(model).double()
    for name, module in list(copied.named_modules()):
        if type(module).__name__.endswith("RMSNorm") and not isinstance(module, nn.RMSNorm):
            norm = nn.RMSNorm(module.weight.shape, module.variance_epsilon)
            norm.weight = module.weight
            copied.set_submodule(name, norm)
    return copied


@pytest.fixture(scope="session")
def gpt2_float32() -> nn.Module:
    """Two blocks of width 8 of Conv1D layers with biases and a tied output head; frozen."""
    return _seeded(_build_gpt2, seed=1)


@pytest.fixture(scope="session")
def gpt2(gpt2_float32: nn.Module) -> nn.Module:
    """The same weights in float64."""
    return copy.deepcopy(gpt2_float32).double()


@pytest.fixture(scope="session")
def llama_float32() -> nn.Module:
    """Two blocks of width 8 of nn.Linear layers without biases, two query heads a key; frozen."""
    return _seeded(_build_llama, seed=2)


@pytest.fixture(scope="session")
def llama(llama_float32: nn.Module) -> nn.Module:
    """The same weights in float64."""
    return _in_float64(llama_float32)


@pytest.fixture(scope="session")
def qwen2_float32() -> nn.Module:
    """Like Llama, with biases on queries, keys and values and a tied output head; frozen."""
    return _seeded(_build_qwen2, seed=4)


@pytest.fixture(scope="session")
def qwen2(qwen2_float32: nn.Module) -> nn.Module:
    """The same weights in float64."""
    return _in_float64(qwen2_float32)


@pytest.fixture(scope="session")
def gpt_neox_float32() -> nn.Module:
    """Two blocks of width 8 of nn.Linear layers with biases, attention and MLP in parallel."""
    return _seeded(_build_gpt_neox, seed=5)


@pytest.fixture(scope="session")
def gpt_neox(gpt_neox_float32: nn.Module) -> nn.Module:
    """The same weights in float64."""
    return _in_float64(gpt_neox_float32)


ARCHITECTURES = ["gpt2", "llama", "qwen2", "gpt_neox"]


@pytest.fixture(scope="session", params=ARCHITECTURES)
def model(request: pytest.FixtureRequest) -> nn.Module:
    """Each tiny model in float64. Shared by all tests: copy it before changing a weight."""
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="session", params=ARCHITECTURES)
def model_float32(request: pytest.FixtureRequest) -> nn.Module:
    """Each tiny model as transformers builds it."""
    return request.getfixturevalue(f"{request.param}_float32")


@pytest.fixture(scope="session")
def sequences() -> list[Sequence1D]:
    """Nine training examples of 2 to 10 tokens, not in order of length: 45 predicting positions.

    More positions than any tiny layer has inputs (13), so that no covariance is singular.
    """
    generator = torch.Generator().manual_seed(3)
    lengths = (4, 10, 2, 7, 9, 3, 8, 5, 6)
    return [
        Sequence1D(
            tokens=tuple(torch.randint(VOCABULARY, (length,), generator=generator).tolist()),
            row=100 + i,
        )
        for i, length in enumerate(lengths)
    ]


@pytest.fixture(scope="session")
def queries() -> list[Sequence1D]:
    """Three prompts with completions of 1, 3 and 2 tokens."""
    return [
        Sequence1D(tokens=(1, 4, 2, 7, 9), first_target=4),
        Sequence1D(tokens=(3, 8, 10, 0), first_target=1),
        Sequence1D(tokens=(5, 5, 6, 1, 2, 8, 4), first_target=5),
    ]


@pytest.fixture(scope="session")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> "Workspace":
    """A tiny trained model with corpus, factors and index; tests only read them."""
    from tests.service_fixtures import make_workspace  # the service loads long

    return make_workspace(tmp_path_factory.mktemp("workspace"))


@pytest.fixture(scope="session")
def nursery() -> Iterator["Nursery"]:
    """Starts commands in processes of their own, quickly."""
    from tests.commands import Nursery

    nursery = Nursery()
    yield nursery
    nursery.close()
