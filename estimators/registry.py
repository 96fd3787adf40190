"""Estimators by name."""

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import cast

from torch import Tensor

from estimators.contracts import Estimator

ESTIMATORS = {
    "ekfac": "estimators.operators.ekfac:EKFac",
    "identity": "estimators.operators.identity:Identity",
    "kfac": "estimators.operators.kfac:KFac",
}


def estimator_class(name: str) -> type[Estimator]:
    """The class registered as ``name``.

    Raises:
        ValueError: no such name; the message lists the names.
    """
    if name not in ESTIMATORS:
        raise ValueError(f"Unknown estimator '{name}'; choose one of {', '.join(ESTIMATORS)}.")
    module, attribute = ESTIMATORS[name].split(":")
    return cast(type[Estimator], getattr(import_module(module), attribute))


def rebuild_estimator(name: str, tensors: Mapping[str, Tensor]) -> Estimator:
    """The estimator ``name`` from the tensors that its ``tensors()`` gave."""
    build = cast(Callable[[Mapping[str, Tensor]], Estimator], estimator_class(name))
    return build(tensors)
