"""Pairs of which one was preferred: how far a model prefers it beyond what a reference does."""

from typing import Any

import torch

from estimators.model.measurement import negative_log_likelihood, next_token_logits
from estimators.model.tokens import Sequence1D, collate
from service.corpus.source import CorpusSource
from service.models import LoadedModel, load_model

NO_REFERENCE = (
    "DPO's loss compares with a reference model, whose log-probabilities are not known; name it "
    "with --reference, or give the columns ref_chosen_logps and ref_rejected_logps"
)


class Margins:
    """``beta ((log p(chosen) - log p(rejected)) - (the same of the reference))``, pair by pair.

    Rafailov et al. 2023, eq. 7. A log p is the sum over the counted tokens, in nats.

    Args:
        source: names ``beta`` and the reference, which is loaded when it is first needed.
        loaded: the model whose gradients are taken.
    """

    def __init__(self, source: CorpusSource, loaded: LoadedModel) -> None:
        self._source = source
        self._loaded = loaded
        self._reference: LoadedModel | None = None

    def of(self, chosen: Sequence1D, rejected: Sequence1D, given: tuple[Any, Any] | None) -> float:
        """The margin of a pair.

        Args:
            chosen: prompt and what was preferred.
            rejected: prompt and what was not.
            given: the reference's log-probabilities of both, if they are known.

        Raises:
            ValueError: there is no reference, or it does not know a token.
        """
        own = _ratio(self._loaded, chosen, rejected)
        theirs = _given(given) if given is not None else self._compared(chosen, rejected)
        return self._source.beta * (own - theirs)

    def _compared(self, chosen: Sequence1D, rejected: Sequence1D) -> float:
        if self._source.reference is None:
            raise ValueError(NO_REFERENCE)
        if self._reference is None:
            self._reference = load_model(self._source.reference, device=str(self._loaded.device))
        largest = max(*chosen.tokens, *rejected.tokens)
        if largest >= self._reference.vocabulary:
            raise ValueError(
                f"the reference '{self._source.reference}' does not know the token {largest}; it "
                f"has {self._reference.vocabulary:,}. Name the model that the training began with"
            )
        return _ratio(self._reference, chosen, rejected)


def _given(values: tuple[Any, Any]) -> float:
    if not all(isinstance(value, int | float) and value <= 0 for value in values):
        raise ValueError(
            f"log-probabilities are numbers of at most 0, got {values[0]}, {values[1]}"
        )
    return float(values[0] - values[1])


@torch.no_grad()
def _ratio(loaded: LoadedModel, chosen: Sequence1D, rejected: Sequence1D) -> float:
    """``log p(chosen) - log p(rejected)``, in nats."""
    batch = collate([chosen, rejected]).to(loaded.device)
    with loaded.turn:
        losses = negative_log_likelihood(next_token_logits(loaded.model, batch), batch)
    return float(losses[1].double() - losses[0].double())
