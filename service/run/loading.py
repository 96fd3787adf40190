"""The model of a run, as it was before the first step."""

import importlib.util
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from estimators.model.layers import plain_name
from estimators.run.recorded import State
from estimators.storage import fingerprint_tensors
from service.adapters import read_model
from service.checkpoints import ModelSource
from service.run.dropout import silence_dropout
from service.run.errors import RunMismatch
from service.run.folder import RecordedRun
from service.run.optimizers import named_parameters


def load_first_model(
    run: RecordedRun,
    source: ModelSource | None = None,
    *,
    device: str | None = None,
    trust_remote_code: bool = False,
) -> nn.Module:
    """Load a run's model, adapter included, and put it before the first step.

    Args:
        run: the run.
        source: of the model, of an adapter its base model; None takes what the run names.
        device: where to; None takes that of the run.
        trust_remote_code: run code that comes with the model.

    Raises:
        RunMismatch: it is another model, or none is named.
        UnusableModel: it cannot be loaded.
    """
    source = source or run.model
    if source is None:
        raise RunMismatch(
            "The run does not say where its model comes from, since it was not loaded from a "
            "folder or by name; name one of the same shape with --model."
        )
    if run.facts.adapter is not None:
        source = source.base() or source
    model: Any = read_model(
        source, dtype=run.facts.dtype, trust_remote_code=trust_remote_code
    ).model
    if run.facts.attention is not None:
        model.set_attn_implementation(run.facts.attention)
    if run.facts.adapter is not None:
        model = _with_new_adapter(model, run)
    model.to(device or run.facts.device)
    put_first(run, model)
    return model  # type: ignore[no-any-return]


def put_first(run: RecordedRun, model: nn.Module) -> None:
    """Put the run's first state in place, and check that all weights are those of the run.

    Raises:
        RunMismatch: another weight differs, or a trained one is missing or has another shape.
    """
    put_state(model, run.state(0))
    weights = {plain_name(name): value for name, value in model.state_dict().items()}
    found = fingerprint_tensors(weights)
    if found != run.facts.weights_sha256:
        raise RunMismatch(
            f"This is another model than the run's: with the run's first state in place, the "
            f"hash of its weights is {found[:16]}..., that of the run "
            f"{run.facts.weights_sha256[:16]}... Give the model that was trained: "
            f"--model FOLDER_OR_NAME."
        )


@torch.no_grad()
def put_state(model: nn.Module, state: State) -> None:
    """Put a state's parameters in place.

    Raises:
        RunMismatch: one is missing or has another shape.
    """
    parameters = named_parameters(model)
    for name, value in state.parameters.items():
        parameter = parameters.get(name)
        if parameter is None or parameter.shape != value.shape:
            has = "none of this name" if parameter is None else f"one of {list(parameter.shape)}"
            raise RunMismatch(
                f"This is another model than the run's: the run trained {name} of "
                f"{list(value.shape)}, the model has {has}. Give the model that was trained: "
                f"--model FOLDER_OR_NAME."
            )
        if parameter.dtype != value.dtype:
            parameter.data = value.to(parameter.device, copy=True)
        else:
            parameter.copy_(value)


@contextmanager
def in_training(run: RecordedRun, model: nn.Module) -> Iterator[None]:
    """Training mode without dropout, and gradients for the parameters that had them in the run."""
    modes = {module: module.training for module in model.modules()}
    flags = {parameter: parameter.requires_grad for parameter in model.parameters()}
    model.train()
    silence_dropout(model)
    wanted = set(run.facts.differentiated)
    for name, parameter in named_parameters(model).items():
        parameter.requires_grad_(name in wanted)
    try:
        yield
    finally:
        model.zero_grad()
        for module, mode in modes.items():
            module.training = mode
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)


def _with_new_adapter(model: Any, run: RecordedRun) -> Any:
    if importlib.util.find_spec("peft") is None:
        raise RunMismatch("The run trained a PEFT adapter; install the extra 'peft' to repeat it.")
    import peft

    facts = {**(run.facts.adapter or {}), "inference_mode": False, "init_lora_weights": True}
    del facts["base_model_name_or_path"]  # PEFT takes it from the model, and warns of another
    known = {name: value for name, value in facts.items() if value is not None}
    make: Callable[..., Any] = peft.PeftConfig.from_peft_type
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of PEFT's use of transformers
        return peft.get_peft_model(model, make(**known))
