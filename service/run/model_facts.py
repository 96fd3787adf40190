"""What a model tells of itself: where it comes from, its adapter, precision and padding."""

from collections import Counter
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from torch import nn

from service.checkpoints import ModelSource, place
from service.run.errors import Unrecordable


def source_of(model: nn.Module, given: ModelSource | None) -> ModelSource | None:
    """Where a model comes from, folders as absolute paths; None if it was made up."""
    if given is None:
        config: Any = getattr(model, "config", None)
        name = getattr(config, "_name_or_path", "") or ""
        if not name:
            return None
        revision = None if Path(name).exists() else getattr(config, "_commit_hash", None)
        given = ModelSource(name=name, revision=revision)
    record = given.recorded("", "")
    return ModelSource(
        name=record.source,
        revision=record.revision,
        tokenizer=record.tokenizer,
        base_model=record.base_model,
        unused_weights=given.unused_weights,
    )


def adapter_of(model: nn.Module) -> Mapping[str, Any] | None:
    """Configuration of the model's PEFT adapter, as JSON has it.

    Raises:
        Unrecordable: there are several, or it puts tokens of its own before the text.
    """
    adapters: Any = getattr(model, "peft_config", None)
    if not adapters:
        return None
    if len(adapters) > 1:
        raise Unrecordable(
            f"The model has {len(adapters)} adapters ({', '.join(adapters)}); record it with one."
        )
    name, config = next(iter(adapters.items()))
    if name != "default":
        raise Unrecordable(f"The adapter is called '{name}'; a run is recorded with 'default'.")
    if getattr(config, "is_prompt_learning", False):
        raise Unrecordable(
            f"The adapter is a {type(config).__name__}, which puts tokens of its own before the "
            f"text; a run is recorded with adapters of layers, e.g. LoRA."
        )
    facts = {key: _plain(value) for key, value in config.to_dict().items()}
    if facts.get("base_model_name_or_path"):
        facts["base_model_name_or_path"] = place(facts["base_model_name_or_path"])
    return facts


def attention_of(model: nn.Module) -> str | None:
    """Which implementation of attention the model has."""
    found = getattr(getattr(model, "config", None), "_attn_implementation", None)
    return None if found is None else str(found)


def main_dtype(model: nn.Module) -> str:
    """The dtype of most numbers among the parameters."""
    counts: Counter[str] = Counter()
    for parameter in model.parameters():
        counts[str(parameter.dtype).removeprefix("torch.")] += parameter.numel()
    return counts.most_common(1)[0][0]


def padding_of(model: nn.Module, given: int | None) -> int | None:
    """Token id of padding, as far as it is known."""
    if given is not None:
        return given
    found = getattr(getattr(model, "config", None), "pad_token_id", None)
    return None if found is None else int(found)


def check_placement(model: nn.Module) -> None:
    """Raise Unrecordable for a model on several devices or processes, or a compiled one."""
    if hasattr(model, "_orig_mod"):
        raise Unrecordable("The model is compiled (torch.compile); record it uncompiled.")
    devices = sorted({str(parameter.device) for parameter in model.parameters()})
    if len(devices) > 1 or isinstance(model, nn.DataParallel):
        raise Unrecordable(
            f"The model is on {len(devices)} devices ({', '.join(devices)}); record a training on "
            f"one."
        )
    distributed: Any = torch.distributed
    if distributed.is_available() and distributed.is_initialized():
        processes = distributed.get_world_size()
        if processes > 1:
            raise Unrecordable(
                f"The training runs in {processes} processes; record one in a single process."
            )


def _plain(value: Any) -> Any:
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, set | frozenset):
        return sorted(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
