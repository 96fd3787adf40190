"""An estimator as a question chose it: a name, what answers for it, values of its parameters."""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from torch import Tensor

from estimators.contracts import Operator, Scorer
from estimators.grounds import Parameter, Questions

Part = TypeVar("Part", Operator, Scorer)

DirectionsOf = Callable[[Questions], dict[str, Tensor]]
"""From questions with their gradients to directions, [question, in, out] a layer."""


@dataclass(frozen=True, kw_only=True)
class Chosen(Generic[Part]):
    """An operator or scorer with a value for each of its parameters.

    Attributes:
        name: in the registry.
        part: what answers.
        values: of its parameters.
        grounds_sha256: of the model, factors and examples that it was opened on.
    """

    name: str
    part: Part = field(repr=False, compare=False)
    values: Mapping[str, float]
    grounds_sha256: str

    @property
    def fingerprint(self) -> str:
        """SHA-256 of what its scores depend on besides the question."""
        facts = [self.name, sorted(self.values.items()), self.grounds_sha256]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


class GradientEstimator(Chosen[Operator]):
    """An estimator whose score is the inner product of a direction with a training gradient."""

    def directions(self, questions: Questions) -> dict[str, Tensor]:
        """Of questions with their gradients; see ``Operator.directions``."""
        return self.part.directions(questions, self.values)


class RowEstimator(Chosen[Scorer]):
    """An estimator that scores rows by other means."""


class TracedEstimator(RowEstimator):
    """One whose scores are influences in nats, known of every row (``registry.TRACED``)."""


def settle_values(
    name: str, parameters: Mapping[str, Parameter], given: Mapping[str, float]
) -> dict[str, float]:
    """A value for each parameter: the given ones, defaults for the rest.

    Raises:
        ValueError: an unknown parameter, or a value out of its bounds.
    """
    unknown = sorted(set(given) - set(parameters))
    if unknown:
        known = ", ".join(parameters) or "none"
        raise ValueError(
            f"The estimator '{name}' has no parameter '{unknown[0]}'; its parameters: {known}."
        )
    values = {
        key: float(given.get(key, parameter.default)) for key, parameter in parameters.items()
    }
    for key, value in values.items():
        least, most = parameters[key].least, parameters[key].most
        if not least <= value <= most:
            raise ValueError(
                f"The parameter '{key}' of '{name}' must be from {least:g} to {most:g}, "
                f"got {value}."
            )
    return values
