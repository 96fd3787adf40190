"""Reading a model: whole, or a PEFT adapter on its base model; nothing of either is made up."""

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from safetensors import safe_open
from torch import nn
from transformers.utils import cached_file

from service.checkpoints import (
    ModelSource,
    UnusableModel,
    check_weights,
    one_line,
    quietly,
    whole_model,
)

WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
"""Before every name in an adapter's file."""


@dataclass(frozen=True, kw_only=True)
class Weights:
    """A model as it was read.

    Attributes:
        model: on the CPU.
        notes: what a user should know of how it was read, a sentence each.
    """

    model: nn.Module
    notes: tuple[str, ...] = ()


def read_model(source: ModelSource, *, dtype: str, trust_remote_code: bool) -> Weights:
    """Read all weights of a causal language model, and of its adapter if it has one.

    Raises:
        UnusableModel: it cannot be read; weights are missing, have another shape, or are left
            over; or it is not a causal language model.
    """
    base = source.base()
    if base is None:
        whole = whole_model(source, dtype=dtype, trust_remote_code=trust_remote_code)
        return Weights(model=whole)
    if importlib.util.find_spec("peft") is None:
        raise UnusableModel(
            f"'{source.title}' holds a PEFT adapter; install the extra 'peft' to load it."
        )
    try:
        model = whole_model(base, dtype=dtype, trust_remote_code=trust_remote_code)
    except UnusableModel as error:
        raise UnusableModel(
            f"The adapter in '{source.title}' belongs to the base model '{base.title}', which "
            f"cannot be used. {error} If the base model lies elsewhere, name its place with "
            f"--base-model FOLDER_OR_NAME."
        ) from error
    return _with_adapter(model, source, base)


def _with_adapter(model: Any, source: ModelSource, base: ModelSource) -> Weights:
    from peft import get_peft_model_state_dict

    shapes = _shapes(source)
    _resize(model, source, shapes)
    of_base = set(model.state_dict())
    try:
        info = quietly(
            model.load_adapter,
            source.name,
            ignore_mismatched_sizes=True,  # told below, in a sentence
            adapter_kwargs={"revision": source.revision},
        ).to_dict()
        wanted = set(get_peft_model_state_dict(model, save_embedding_layers=False))
    except Exception as error:  # damaged files raise whatever their readers happen to raise
        raise UnusableModel(
            f"Cannot load the adapter in '{source.title}': {one_line(error)}."
        ) from error
    if shapes:  # the library counts modules that were saved whole as left over
        unused = {n for n in set(shapes) - wanted - of_base if _without_wrapper(n) not in shapes}
        info |= {"missing_keys": wanted - set(shapes), "unexpected_keys": unused}
    check_weights(source, info)
    arrived = [value for name, value in model.state_dict().items() if ".default" in name]
    if not arrived:
        raise UnusableModel(
            f"The adapter in '{source.title}' adds no weight to its base model '{base.title}'; "
            f"give the folder that its training wrote."
        )
    numbers = sum(value.numel() for value in arrived)
    note = (
        f"adapter: all of its {len(arrived):,} weights ({numbers:,} numbers) are in place on the "
        f"base model '{base.title}'"
    )
    return Weights(model=model, notes=(note,))


def _without_wrapper(name: str) -> str:
    """The weight itself: embeddings that were resized and saved whole are there three times."""
    for wrapper in (".modules_to_save", ".original_module"):
        if wrapper in name:
            return name.replace(wrapper, "")
    return ""


def _shapes(source: ModelSource) -> dict[str, list[int]]:
    """Names and shapes in the adapter's file; empty for one in another format."""
    path = cached_file(
        source.name,
        WEIGHTS,
        revision=source.revision,
        _raise_exceptions_for_missing_entries=False,
    )
    if path is None:
        return {}
    try:
        with safe_open(path, framework="pt") as file:
            names = file.keys()
            return {n.removeprefix(PREFIX): file.get_slice(n).get_shape() for n in names}
    except Exception as error:  # as above
        raise UnusableModel(
            f"Cannot load the adapter in '{source.title}': {one_line(error)}."
        ) from error


def _resize(model: Any, source: ModelSource, shapes: Mapping[str, list[int]]) -> None:
    """Give the base model the vocabulary that the adapter was trained with, if it saved that.

    Raises:
        UnusableModel: the adapter has the embedding's new rows, but not those of an output head of
            its own.
    """
    modules = dict(model.named_modules())
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    named = {
        modules[name.rpartition(".")[0]]: shape
        for name, shape in shapes.items()
        if name.rpartition(".")[0] in modules and len(shape) == 2
    }
    rows = named.get(embedding, [len(embedding.weight)])[0]
    if rows == len(embedding.weight):
        return
    if head is not None and head.weight is not embedding.weight and head not in named:
        raise UnusableModel(
            f"The adapter in '{source.title}' was trained with a vocabulary of {rows:,}, its base "
            f"model has {len(embedding.weight):,}, and it saved no output head, whose new rows "
            f"would be random; train it with the head among modules_to_save."
        )
    model.resize_token_embeddings(rows, mean_resizing=False)
