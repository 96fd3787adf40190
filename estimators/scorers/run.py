"""Influence through the training run itself, looked up where it was traced beforehand."""

from collections.abc import Mapping
from typing import ClassVar, Self

import numpy as np
from jaxtyping import Float, Int

from estimators.grounds import Grounds, Parameter, Questions, Traced, Unavailable


class RunInfluence:
    """Influence through the training run, to first order, of questions traced beforehand.

    The score of row i is ``df/dw_i``, in nats of f for a change of weight 1: leaving the row out of
    the run changes f by minus that, to first order (``estimators/run/adjoint.py``). A row that the
    run never read has 0. No curvature is approximated; second moments next to nothing have a floor
    unless the trace was made without (``--exact``).

    Args:
        traced: what was traced.
    """

    parameters: ClassVar[Mapping[str, Parameter]] = {}

    def __init__(self, traced: Traced) -> None:
        self._traced = traced

    @classmethod
    def open(cls, grounds: Grounds) -> Self:
        """Of an index that is served with a trace.

        Raises:
            Unavailable: it is served without one.
        """
        if grounds.traced is None:
            raise Unavailable(
                "This index is served without a trace of the run that trained its model; trace "
                "questions with etymon trace, then serve what it wrote with "
                "etymon serve --trace FOLDER."
            )
        return cls(grounds.traced)

    def score(
        self, questions: Questions, rows: Int[np.ndarray, "row"], values: Mapping[str, float]
    ) -> Float[np.ndarray, "question row"]:
        """Influences of some rows, in nats of f.

        Raises:
            Untraced: one of the questions was not traced.
        """
        chosen: np.ndarray = self.propose(questions)[:, rows]
        return chosen

    def propose(self, questions: Questions) -> Float[np.ndarray, "question row"]:
        """Influences of all rows, in nats of f.

        Raises:
            Untraced: one of the questions was not traced.
        """
        numbers = range(len(questions))
        return np.stack([self._traced.influences(questions.fingerprint(n)) for n in numbers])
