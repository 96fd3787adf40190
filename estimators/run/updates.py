"""An optimizer's step as a function of gradients and state, to be differentiated.

The same arithmetic as ``torch.optim`` in PyTorch 2.13, out of place: SGD with momentum (Sutskever
et al. 2013, as PyTorch has it), Adam (Kingma and Ba 2015), AdamW (Loshchilov and Hutter 2019).

One deviation, in derivatives only: where a second moment is exactly 0 its root has no derivative,
and 0 is taken. Such an entry has never had a gradient, e.g. the embedding of a token not read yet.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from estimators.run.recorded import Group, OptimizerName, Recipe

SMALLEST = 0.1
"""Of a tensor's mean second moment, for each of its entries, in derivatives and scalings.

Divided by the root of a moment that is next to nothing, any change of a gradient becomes a step of
many times the rate: that is the derivative, and it holds for changes as small as that root. A
larger one makes the moment grow with it, so that the entry moves by about the rate at most. Without
a floor such entries outweigh all others: docs/decisions/2026-11-30-smallest-moment.md.
"""

Tensors = Mapping[str, Tensor]
Moments = Mapping[str, Tensors]
Updated = tuple[Tensor, dict[str, Tensor]]

CLIPPING_EPSILON = 1e-6
"""Added to the norm by ``torch.nn.utils.clip_grad_norm_``."""


def update(
    recipe: Recipe,
    number: int,
    rates: Sequence[float],
    parameters: Tensors,
    moments: Moments,
    gradients: Tensors,
    smallest: float = 0.0,
) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
    """Parameters and moments after a step; nothing is changed in place.

    Args:
        recipe: optimizer, groups and clipping.
        number: of the step, from 0.
        rates: learning rate of each group.
        parameters: by name, each in one group.
        moments: by kind and name; a kind may be missing before the first step.
        gradients: by name.
        smallest: a second moment divides as if it were no less than this part of its tensor's mean,
            a constant; 0 is the optimizer's own step, anything else is for derivatives alone.
    """
    clipped = _clipped(gradients, recipe.clipping)
    step = STEPS[recipe.optimizer]
    after: dict[str, Tensor] = {}
    kept: dict[str, dict[str, Tensor]] = {}
    for group, rate in zip(recipe.groups, rates, strict=True):
        for name in group.parameters:
            own = {kind: tensors[name] for kind, tensors in moments.items()}
            given = (group, rate, number, parameters[name], own, clipped[name])
            after[name], changed = step(*given, smallest)
            for kind, tensor in changed.items():
                kept.setdefault(kind, {})[name] = tensor
    return after, kept


def _clipped(gradients: Tensors, largest: float | None) -> Tensors:
    if largest is None:
        return gradients
    factor = _factor(gradients, largest)
    return {name: value * factor for name, value in gradients.items()}


def _factor(gradients: Tensors, largest: float) -> Tensor:
    norm = torch.linalg.vector_norm(
        torch.stack([torch.linalg.vector_norm(value) for value in gradients.values()])
    )
    return torch.clamp(largest / (norm + CLIPPING_EPSILON), max=1.0)


def _sgd(
    group: Group,
    rate: float,
    number: int,
    weight: Tensor,
    moments: Tensors,
    gradient: Tensor,
    _: float,
) -> Updated:
    direction = gradient + group.weight_decay * weight if group.weight_decay else gradient
    if not group.momentum:
        return weight - rate * direction, {}
    buffer = direction
    if number > 0:
        old = moments["momentum_buffer"]
        buffer = group.momentum * old + (1 - group.dampening) * direction
    moved = direction + group.momentum * buffer if group.nesterov else buffer
    return weight - rate * moved, {"momentum_buffer": buffer}


def _adam(
    group: Group,
    rate: float,
    number: int,
    weight: Tensor,
    moments: Tensors,
    gradient: Tensor,
    smallest: float,
) -> Updated:
    if group.weight_decay:
        gradient = gradient + group.weight_decay * weight
    return _adaptive(group, rate, number, weight, moments, gradient, smallest)


def _adamw(
    group: Group,
    rate: float,
    number: int,
    weight: Tensor,
    moments: Tensors,
    gradient: Tensor,
    smallest: float,
) -> Updated:
    if group.weight_decay:
        weight = weight * (1 - rate * group.weight_decay)
    return _adaptive(group, rate, number, weight, moments, gradient, smallest)


def _adaptive(
    group: Group,
    rate: float,
    number: int,
    weight: Tensor,
    moments: Tensors,
    gradient: Tensor,
    smallest: float,
) -> Updated:
    first, second = group.betas
    zero = torch.zeros_like(gradient)
    mean = first * moments.get("exp_avg", zero) + (1 - first) * gradient
    square = second * moments.get("exp_avg_sq", zero) + (1 - second) * gradient * gradient
    unbiased = 1 - second ** (number + 1)
    root = _root(_floored(square, smallest)) / unbiased**0.5 + group.epsilon
    moved = weight - rate / (1 - first ** (number + 1)) * mean / root
    return moved, {"exp_avg": mean, "exp_avg_sq": square}


def _floored(square: Tensor, smallest: float) -> Tensor:
    return square.clamp(min=smallest * float(square.detach().mean())) if smallest else square


def _root(square: Tensor) -> Tensor:
    positive = square > 0
    return torch.where(positive, torch.where(positive, square, 1.0).sqrt(), 0.0)


def scaling(
    recipe: Recipe,
    number: int,
    rates: Sequence[float],
    gradients: Tensors | None,
    after: Moments,
) -> dict[str, Tensor | float]:
    """What a gradient is multiplied with before a step subtracts it, the optimizer taken as fixed.

    Adam's divisor and the factor of clipping are constants of the step, and momentum is left out:
    what it does later counts at once. A second moment counts as no less than ``SMALLEST`` of its
    tensor's mean; 0 for a tensor that had no gradient.

    Args:
        recipe: optimizer, groups and clipping.
        number: of the step, from 0.
        rates: learning rate of each group.
        gradients: that the step saw before clipping; needed where the recipe clips.
        after: moments behind the step.
    """
    factor = 1.0
    if recipe.clipping is not None and gradients is not None:
        factor = float(_factor(gradients, recipe.clipping))
    found: dict[str, Tensor | float] = {}
    for group, rate in zip(recipe.groups, rates, strict=True):
        for name in group.parameters:
            if recipe.optimizer == "sgd":
                lasting = (1 - group.dampening) / (1 - group.momentum) if group.momentum else 1.0
                found[name] = factor * rate * lasting
            else:
                unbiased = 1 - group.betas[1] ** (number + 1)
                square = _floored(after["exp_avg_sq"][name], SMALLEST)
                root = _root(square) / unbiased**0.5 + group.epsilon
                found[name] = torch.where(square > 0, factor * rate / root, 0.0)
    return found


STEPS: dict[OptimizerName, Callable[..., Updated]] = {"sgd": _sgd, "adam": _adam, "adamw": _adamw}
