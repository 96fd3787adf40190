"""Hashes of models and tensors, and factors on disk (safetensors; no pickle)."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from estimators.contracts import Factors
from estimators.registry import rebuild_factors


def fingerprint_tensors(tensors: Mapping[str, Tensor], salt: str = "") -> str:
    """SHA-256 over names, dtypes, shapes and bytes of ``tensors`` in order of name."""
    digest = hashlib.sha256(salt.encode())
    for name in sorted(tensors):
        for part, plain in _plain_tensors(name, tensors[name].detach()):
            tensor = plain.cpu().contiguous()
            digest.update(f"{part}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
            digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _plain_tensors(name: str, tensor: Any) -> Iterator[tuple[str, Tensor]]:
    """The tensor, or those that a quantised one is made of, each with a name."""
    if not is_traceable_wrapper_subclass(tensor):
        yield name, tensor
        return
    for part in tensor.__tensor_flatten__()[0]:
        yield from _plain_tensors(f"{name}.{part}", getattr(tensor, part))


def fingerprint_model(model: nn.Module) -> str:
    """SHA-256 of the model's parameters and buffers as loaded."""
    return fingerprint_tensors(model.state_dict())


def serialise_factors(name: str, factors: Factors, facts: Mapping[str, str]) -> bytes:
    """The factors as a safetensors file; ``facts`` (model fingerprint, ...) go to its header."""
    tensors = {key: value.contiguous() for key, value in factors.tensors().items()}
    # One header entry: safetensors writes several in random order, and a file's hash must not vary.
    contents = json.dumps({"estimator": name, "facts": dict(facts)}, sort_keys=True)
    return bytes(save(tensors, metadata={"etymon": contents}))


def load_factors(path: Path) -> tuple[str, Factors, dict[str, str]]:
    """Read what ``serialise_factors`` wrote: name, factors and facts.

    Raises:
        ValueError: the file holds no factors.
    """
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except Exception as error:
        raise ValueError(f"{path} is not a readable safetensors file ({error}).") from error
    if "etymon" not in header:
        raise ValueError(f"{path} holds no fitted estimator; write one with scripts.fit_estimator.")
    contents = json.loads(header["etymon"])
    name = contents["estimator"]
    return name, rebuild_factors(name, tensors), contents["facts"]
