"""Optimizers of PyTorch: their constants as a recipe, and back."""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from estimators.model.layers import plain_name
from estimators.run.recorded import Group, OptimizerName, Recipe, State
from service.run.errors import Unrecordable

KINDS = ("exp_avg", "exp_avg_sq", "momentum_buffer")
"""Moments that optimizers keep."""
UNUSUAL = ("amsgrad", "maximize", "capturable", "differentiable")
"""Flags with which a step is another function."""
CONSTANTS = ("weight_decay", "betas", "eps", "momentum", "dampening", "nesterov")
CLASSES: Mapping[type, OptimizerName] = {
    torch.optim.SGD: "sgd",
    torch.optim.Adam: "adam",
    torch.optim.AdamW: "adamw",
}


def named_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Each parameter once, by its plain name."""
    return {plain_name(name): parameter for name, parameter in model.named_parameters()}


def bare_optimizer(optimizer: Any) -> Any:
    """The optimizer inside of what wraps it, e.g. of Accelerate's."""
    while not isinstance(optimizer, tuple(CLASSES)) and hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


def recipe_of(optimizer: Any, model: nn.Module, clipping: float | None) -> Recipe:
    """An optimizer's constants.

    Raises:
        Unrecordable: it is none of those that can be repeated, or has flags that change its step.
    """
    if type(optimizer) not in CLASSES:
        kind = f"{type(optimizer).__module__}.{type(optimizer).__name__}"
        raise Unrecordable(
            f"The optimizer is a {kind}; a run is recorded with torch.optim's SGD, Adam or AdamW "
            f"only."
        )
    names: dict[Tensor, str] = {
        parameter: name for name, parameter in named_parameters(model).items()
    }
    for number, group in enumerate(optimizer.param_groups):
        _check_group(group, number, names)
    name = CLASSES[type(optimizer)]
    if name == "adam" and any(g.get("decoupled_weight_decay") for g in optimizer.param_groups):
        name = "adamw"
    groups = tuple(_group(group, names) for group in optimizer.param_groups)
    return Recipe(optimizer=name, groups=groups, clipping=clipping or None)


def constants_of(optimizer: Any) -> list[dict[str, Any]]:
    """What no step changes, group by group."""
    return [{name: group.get(name) for name in CONSTANTS} for group in optimizer.param_groups]


def flag_of(optimizer: Any, flag: str) -> bool | None:
    """What all groups have as ``foreach`` or ``fused``.

    Raises:
        Unrecordable: they differ.
    """
    found = {group.get(flag) for group in optimizer.param_groups}
    if len(found) > 1:
        raise Unrecordable(f"The optimizer's groups differ in {flag}; give all of them the same.")
    value: bool | None = found.pop()
    return value


def _check_group(group: Mapping[str, Any], number: int, names: Mapping[Tensor, str]) -> None:
    unusual = [flag for flag in UNUSUAL if group.get(flag)]
    if unusual:
        raise Unrecordable(
            f"The optimizer has {' and '.join(unusual)} on; leave it off to record the run."
        )
    if any(isinstance(group[name], Tensor) for name in ("lr", "betas") if name in group):
        raise Unrecordable("The learning rate is a tensor; give the optimizer a number.")
    strangers = sum(parameter not in names for parameter in group["params"])
    if strangers:
        raise Unrecordable(
            f"Group {number} of the optimizer has {strangers} parameters that are not the model's; "
            f"record the model that holds them all."
        )


def _group(group: Mapping[str, Any], names: Mapping[Tensor, str]) -> Group:
    parameters = tuple(names[parameter] for parameter in group["params"])
    decay = float(group["weight_decay"])
    if "betas" in group:
        first, second = group["betas"]
        return Group(
            parameters=parameters,
            weight_decay=decay,
            betas=(float(first), float(second)),
            epsilon=float(group["eps"]),
        )
    return Group(
        parameters=parameters,
        weight_decay=decay,
        momentum=float(group["momentum"]),
        dampening=float(group["dampening"]),
        nesterov=bool(group["nesterov"]),
    )


def build_optimizer(
    recipe: Recipe,
    parameters: Mapping[str, nn.Parameter],
    *,
    foreach: bool | None = None,
    fused: bool | None = None,
) -> torch.optim.Optimizer:
    """The optimizer of a recipe, without moments; its rates are 0 until they are set."""
    groups: list[dict[str, Any]] = []
    for group in recipe.groups:
        constants: dict[str, Any] = {"weight_decay": group.weight_decay}
        if recipe.optimizer == "sgd":
            constants |= {
                "momentum": group.momentum,
                "dampening": group.dampening,
                "nesterov": group.nesterov,
            }
        else:
            constants |= {"betas": group.betas, "eps": group.epsilon}
        groups.append({"params": [parameters[name] for name in group.parameters], **constants})
    make: Callable[..., torch.optim.Optimizer] = {
        "sgd": torch.optim.SGD,
        "adam": torch.optim.Adam,
        "adamw": torch.optim.AdamW,
    }[recipe.optimizer]
    return make(groups, lr=0.0, foreach=foreach, fused=fused)


def state_of(
    step: int, parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer
) -> State:
    """What the optimizer has reached: views, not copies.

    Args:
        step: how many steps were made.
        parameters: those that are trained, by name.
        optimizer: that trains them.
    """
    moments: dict[str, dict[str, Tensor]] = {}
    for name, parameter in parameters.items():
        kept = optimizer.state.get(parameter, {})
        for kind in KINDS:
            if isinstance(kept.get(kind), Tensor):
                moments.setdefault(kind, {})[name] = kept[kind].detach()
    values = {name: parameter.detach() for name, parameter in parameters.items()}
    return State(step=step, parameters=values, moments=moments)


def trained_names(recipe: Recipe) -> tuple[str, ...]:
    """Parameters of all groups, in the optimizer's order."""
    return tuple(name for group in recipe.groups for name in group.parameters)


def bytes_of_state(recipe: Recipe, parameters: Iterable[Tensor]) -> int:
    """How large a state's file will be, after the first step."""
    momentum = any(group.momentum for group in recipe.groups)
    copies = 1 + momentum if recipe.optimizer == "sgd" else 3
    return copies * sum(parameter.numel() * parameter.element_size() for parameter in parameters)


def states_kept(total: int, every: int) -> int:
    """How many states a run of ``total`` steps keeps: the first, each ``every``-th, the last."""
    return 1 + math.ceil(total / every)
