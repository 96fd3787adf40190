"""Sizes of what is measured: as a GPU wants them, and small enough for any processor."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from estimators.model.capture import freeze
from scripts.bench.passes import Problem, random_problem

Shape = Mapping[str, int]
"""Arguments of a ``LlamaConfig``."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How much of everything.

    Attributes:
        models: shapes of the models that are timed, by name.
        dtype: of their weights.
        sequences: of random tokens, by model.
        length: tokens of each.
        budget: padded tokens in a batch.
        widest: sides of the largest model's layers with more features are split for the fit, whose
            decompositions take the cube of a side.
        repeats: of all but fits and loading; the median counts.
        dimensions: of sketches and codes, one bit each.
        queries: of each scan.
        loaded_rows: rows whose codes come from the host.
        rows: rows that are scanned; None for as many as fit into the device's memory.
        compared: shape of the model whose scores are compared, in float32.
        compared_sequences: training sequences that it scores.
        compared_length: tokens of each.
    """

    models: Mapping[str, Shape]
    dtype: str
    sequences: Mapping[str, int]
    length: int
    budget: int
    widest: Mapping[str, int]
    repeats: int
    dimensions: int
    queries: tuple[int, ...]
    loaded_rows: int
    rows: int | None
    compared: Shape
    compared_sequences: int
    compared_length: int


FULL = Sizes(
    models={
        "llama-135m": {
            "hidden_size": 576,
            "intermediate_size": 1536,
            "num_hidden_layers": 30,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "vocab_size": 49_152,
        },
        "llama-1b": {
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_hidden_layers": 16,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "vocab_size": 128_256,
        },
    },
    dtype="bfloat16",
    sequences={"llama-135m": 256, "llama-1b": 128},
    length=512,
    budget=8192,
    widest={"llama-1b": 2048},
    repeats=3,
    dimensions=16_384,
    queries=(1, 8, 64),
    loaded_rows=65_536,
    rows=None,
    compared={
        "hidden_size": 256,
        "intermediate_size": 768,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "vocab_size": 4096,
    },
    compared_sequences=96,
    compared_length=64,
)
"""SmolLM2-135M's and Llama-3.2-1B's shapes."""

_TINY: Shape = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
}

SMALL = Sizes(
    models={"llama-135m": _TINY, "llama-1b": {**_TINY, "intermediate_size": 96}},
    dtype="bfloat16",
    sequences={"llama-135m": 6, "llama-1b": 6},
    length=16,
    budget=48,
    widest={"llama-1b": 32},
    repeats=1,
    dimensions=256,
    queries=(1, 8, 64),
    loaded_rows=512,
    rows=2048,
    compared=_TINY,
    compared_sequences=12,
    compared_length=16,
)
"""The same steps within a minute on a processor; the figures mean nothing."""


def llama(shape: Shape, length: int, dtype: str, device: torch.device) -> LlamaForCausalLM:
    """A frozen model with random weights, drawn on the device."""
    ends = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}
    config = LlamaConfig(**shape, **ends, max_position_embeddings=length, tie_word_embeddings=True)
    torch.manual_seed(0)
    with device:
        model = LlamaForCausalLM(config)
    freeze(model.to(device, getattr(torch, dtype)))
    return model


def timed_problem(name: str, sizes: Sizes, device: torch.device) -> Problem:
    """One of the models that are timed, and its batches."""
    shape = sizes.models[name]
    model = llama(shape, sizes.length, sizes.dtype, device)
    count = sizes.sequences[name]
    return random_problem(name, model, shape["vocab_size"], count, sizes.length, sizes.budget)
