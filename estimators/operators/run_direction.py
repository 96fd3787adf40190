"""The run's own direction, traced beforehand, against gradients of its last model."""

from collections.abc import Mapping, Sequence
from typing import ClassVar, Self

import torch
from torch import Tensor

from estimators.grounds import Grounds, Parameter, Questions, Traced, Unavailable
from estimators.model.layers import LinearLayer


class RunDirection:
    """What reading a row in the training run would have done, by the run's own direction.

    The score of a row is the inner product of its gradient with the direction that was traced
    backward through the run (``estimators/run/direction.py``): in nats of f, to first order, were
    the row read once an epoch. The row need not have been in the run.

    Args:
        traced: what was traced.
        layers: that the index attributes.
    """

    parameters: ClassVar[Mapping[str, Parameter]] = {}

    def __init__(self, traced: Traced, layers: Sequence[LinearLayer]) -> None:
        self._traced, self._layers = traced, layers

    @classmethod
    def open(cls, grounds: Grounds) -> Self:
        """Of an index that is served with directions of layers that it attributes.

        Raises:
            Unavailable: it is served without any, or the run trained none of its layers.
        """
        traced = grounds.traced
        if traced is None or not traced.directed:
            raise Unavailable(
                "This index is served without directions of the run that trained its model; trace "
                "questions with etymon trace --direction, then serve what it wrote with "
                "etymon serve --trace FOLDER."
            )
        names = set(traced.directed)
        if not any(layer.parameter_names & names for layer in grounds.layers):
            raise Unavailable(
                f"The run trained none of the {len(grounds.layers)} layers of this index; build "
                f"one of the layers that were trained, with --layers."
            )
        return cls(traced, grounds.layers)

    def directions(self, questions: Questions, values: Mapping[str, float]) -> dict[str, Tensor]:
        """What was traced, [question, in, out] a layer; 0 for layers that the run did not train.

        Raises:
            Untraced: no direction was traced for one of the questions.
        """
        found = [self._traced.direction(questions.fingerprint(n)) for n in range(len(questions))]
        return {
            layer.name: torch.stack([layer.part_of(one) for one in found]) for layer in self._layers
        }
