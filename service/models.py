"""The model under study: loading, fingerprints; what it reads and writes."""

import hashlib
import json
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers.tokenization_utils_base import VERY_LARGE_INTEGER

from estimators.model.capture import freeze
from estimators.model.layers import Coverage, find_layers
from estimators.model.recomputation import recompute_blocks
from estimators.model.selection import EVERY_LAYER, LayerSelection
from estimators.model.tokens import Sequence1D
from estimators.storage import fingerprint_model
from index.manifest import ModelRecord
from service.adapters import read_model
from service.asking import Prompt, encode_query, read_prompt
from service.checkpoints import (
    ModelSource,
    check_vocabulary,
    place,
    read_tokenizer,
)
from service.completing import Writing, Written, write
from service.conversation import Messages
from service.errors import BadQuery as BadQuery

UNSTATED_CONTEXT = 2048
"""Tokens that a model is given at once that states no limit (Bloom, MPT, Mamba): texts are cut."""


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A frozen causal language model with its tokenizer.

    Attributes:
        origin: where it and all that belongs to it were loaded from.
        notes: what a user should know of how it was loaded, a sentence each.
        model: in evaluation mode, without weight gradients.
        tokenizer: a Hugging Face tokenizer.
        coverage: its attributed layers and what is left out.
        context: most tokens it can read.
        model_sha256: hash of its weights.
        tokenizer_sha256: hash of its tokenizer.
        turn: held by whoever runs the model, since gradients are captured by hooks on it.
    """

    origin: ModelSource
    model: nn.Module
    tokenizer: Any
    coverage: Coverage
    context: int
    model_sha256: str
    tokenizer_sha256: str
    notes: tuple[str, ...] = ()
    turn: threading.RLock = field(default_factory=threading.RLock, compare=False, repr=False)

    @property
    def source(self) -> str:
        """Absolute path of its folder, or the name of its repository, without a revision."""
        return place(self.origin.name)

    @property
    def record(self) -> ModelRecord:
        """What an index keeps of it."""
        return self.origin.recorded(self.model_sha256, self.tokenizer_sha256)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.model.parameters()).device

    @property
    def vocabulary(self) -> int:
        """How many tokens the embeddings know, those that no text has included."""
        embeddings: Any = self.model.get_input_embeddings()  # type: ignore[operator]
        return int(getattr(embeddings, "num_embeddings", len(embeddings.weight)))

    def encode(self, text: str) -> list[int]:
        """Token ids of a text as the model reads a training example, special tokens included."""
        ids: list[int] = self.tokenizer(text, verbose=False)["input_ids"]
        return ids

    def read_prompt(self, prompt: str, messages: Messages = ()) -> Prompt:
        """What stands before a completion: a prompt, or a conversation in its place.

        Raises:
            BadQuery: as the function of this name.
        """
        return read_prompt(self.tokenizer, prompt, messages)

    def encode_query(self, prompt: str, completion: str) -> Sequence1D:
        """Prompt and completion as one sequence whose completion tokens count.

        Raises:
            BadQuery: as the function of this name.
        """
        return encode_query(self.tokenizer, self.context, prompt, completion)

    def write(self, prompt: Prompt, writing: Writing) -> list[Written]:
        """The model's own completions of a prompt, greedy or sampled.

        Raises:
            BadQuery: as the function ``write``.
        """
        with self.turn:
            return write(self.model, self.tokenizer, self.context, prompt, writing)

    def complete(self, prompt: str, max_new_tokens: int = 24, stop: Sequence[str] = (".",)) -> str:
        """The model's own greedy completion, up to the first stop string or line break.

        Raises:
            BadQuery: no token to begin with, a prompt that fills the context, or a completion that
                is empty.
        """
        writing = Writing(max_new_tokens=max_new_tokens, stop=(*stop, "\n"))
        return self.write(self.read_prompt(prompt), writing)[0].text


def load_model(
    source: str | ModelSource,
    *,
    layers: LayerSelection = EVERY_LAYER,
    device: str = "cpu",
    dtype: str = "auto",
    trust_remote_code: bool = False,
    gradient_checkpointing: bool = False,
) -> LoadedModel:
    """Load a causal language model and its tokenizer from a folder or by name.

    A folder written by PEFT gives its base model with the adapters in place; the tokenizer is the
    base model's where the folder has none.

    Args:
        source: what ``from_pretrained`` takes, alone or with all that belongs to it.
        layers: which layers to attribute.
        device: e.g. "cpu", "cuda".
        dtype: "auto" (as stored), "float32", "bfloat16" or "float16".
        trust_remote_code: run code that comes with the model.
        gradient_checkpointing: keep only the inputs of each block and compute it again in the
            backward pass: less memory, a forward pass more, the same numbers.

    Raises:
        UnusableModel: it cannot be loaded as it was trained.
        ValueError: it cannot be put on the device, or no layer is left to attribute.
    """
    if isinstance(source, str):
        source = ModelSource.of(source)
    weights = read_model(source, dtype=dtype, trust_remote_code=trust_remote_code)
    tokenizer = read_tokenizer(source, trust_remote_code=trust_remote_code)
    model: Any = weights.model
    check_vocabulary(model, tokenizer)
    try:
        if model.device != torch.device(device):  # quantised models may refuse to be moved at all
            model.to(device)
    except (AssertionError, RuntimeError, ValueError) as error:
        raise ValueError(f"Cannot put the model on '{device}': {error}") from error
    freeze(model)
    _keep_packing(model)
    if gradient_checkpointing:
        recompute_blocks(model)
    return LoadedModel(
        origin=source,
        notes=(*weights.notes, *_notes_on_context(model, tokenizer)),
        model=model,
        tokenizer=tokenizer,
        coverage=find_layers(model, layers),
        context=context_of(model, tokenizer),
        model_sha256=fingerprint_model(model),
        tokenizer_sha256=_fingerprint_tokenizer(tokenizer),
    )


def _keep_packing(model: nn.Module) -> None:
    """Stop bitsandbytes from packing 4-bit weights anew in the first pass without gradients.

    On some CPUs it does so in place, for inference: rounded once more, in a form that not every
    width has, and the fingerprint is another one afterwards.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            vars(module)["support_avx512bf16_for_cpu"] = False


def context_of(model: Any, tokenizer: Any) -> int:
    """Most tokens that the model can read, or is given where neither it nor its tokenizer says."""
    return _stated_context(model, tokenizer) or UNSTATED_CONTEXT


def _stated_context(model: Any, tokenizer: Any) -> int | None:
    declared = getattr(model.config, "max_position_embeddings", None)
    most = int(declared or tokenizer.model_max_length)
    return most if most < VERY_LARGE_INTEGER else None


def _notes_on_context(model: Any, tokenizer: Any) -> tuple[str, ...]:
    if _stated_context(model, tokenizer) is not None:
        return ()
    return (
        f"The model does not say how many tokens it reads at once; it is given {UNSTATED_CONTEXT} "
        f"at most.",
    )


def _fingerprint_tokenizer(tokenizer: Any) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        facts = json.dumps([tokenizer.get_vocab(), str(tokenizer.special_tokens_map)])
    else:
        backend.no_padding()
        backend.no_truncation()
        facts = backend.to_str()
    return hashlib.sha256(facts.encode()).hexdigest()
