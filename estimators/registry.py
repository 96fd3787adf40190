"""Everything that can be chosen by name, each a literal table of name to class, resolved lazily."""

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any, cast

from torch import Tensor

from estimators.contracts import Factors, Operator, Proposer, Scorer

FACTORS = {
    "ekfac": "estimators.operators.ekfac:EKFac",
    "identity": "estimators.operators.identity:Identity",
    "kfac": "estimators.operators.kfac:KFac",
}
"""The index side: what is fitted, and whitens an index."""

OPERATORS = {
    "ekfac": "estimators.operators.ekfac:EKFac",
    "identity": "estimators.operators.identity:Identity",
    "kfac": "estimators.operators.kfac:KFac",
    "run-direction": "estimators.operators.run_direction:RunDirection",
}
"""The query side: estimators by gradients."""

SCORERS = {
    "bm25": "estimators.scorers.bm25:BM25",
    "run": "estimators.scorers.run:RunInfluence",
}
"""Estimators without gradients."""

TRACED = ("run",)
"""Those of them whose scores are influences, known of every row before the question is asked."""

PROPOSERS = {
    "bm25": "estimators.scorers.bm25:BM25",
    "run": "estimators.scorers.run:RunInfluence",
}
"""Orders in which rows are scored, beside the index' own codes (``CODES``)."""

CODES = "codes"
"""The proposer that every index has: estimates from its codes."""


def factors_class(name: str) -> type[Factors]:
    """The class that fits factors, by name.

    Raises:
        ValueError: no such name; the message lists the names.
    """
    return cast(type[Factors], _resolve(FACTORS, name, "estimator"))


def rebuild_factors(name: str, tensors: Mapping[str, Tensor]) -> Factors:
    """The factors ``name`` from the tensors that their ``tensors()`` gave."""
    build = cast(Callable[[Mapping[str, Tensor]], Factors], factors_class(name))
    return build(tensors)


def estimator_class(name: str) -> type[Operator] | type[Scorer]:
    """The operator or scorer that answers under a name.

    Raises:
        ValueError: no such name; the message lists the names.
    """
    return cast(type[Operator] | type[Scorer], _resolve(OPERATORS | SCORERS, name, "estimator"))


def proposer_class(name: str) -> type[Proposer]:
    """The proposer of a name.

    Raises:
        ValueError: no such name; the message lists the names.
    """
    return cast(type[Proposer], _resolve(PROPOSERS, name, "proposer", CODES))


def _resolve(table: Mapping[str, str], name: str, what: str, *more: str) -> Any:
    if name not in table:
        names = ", ".join(sorted([*table, *more]))
        raise ValueError(f"Unknown {what} '{name}'; choose one of {names}.")
    module, attribute = table[name].split(":")
    return getattr(import_module(module), attribute)
