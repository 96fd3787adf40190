"""Whether a model has learnt anything of a corpus: its mean loss beside that of a uniform guess."""

import logging
import math
from dataclasses import replace
from typing import NoReturn

import numpy as np
import torch

from estimators.model.finite import first_not_finite
from estimators.model.measurement import negative_log_likelihood, next_token_logits
from estimators.model.tokens import Sequence1D, collate
from index.manifest import LossRecord
from service.models import LoadedModel

logger = logging.getLogger(__name__)

TEXTS = 32
TOKENS = 128
"""Of each text, from its beginning; a few seconds with a model of 135 million weights."""
SUSPICIOUS = 0.75
"""Share of a uniform guess' loss above which a model is told to know nothing of the texts."""
UNKNOWN = 0.1
"""Share of unknown tokens above which a tokenizer is told not to know the texts."""
ABSURD = 1000.0
"""Nats a token that no trained model loses; its probabilities are 0 and their gradients too."""


class TextSample:
    """At most ``TEXTS`` texts drawn at random, each as likely, from a stream of unknown length.

    The same stream gives the same texts. Algorithm R (Vitter 1985).
    """

    def __init__(self) -> None:
        self.texts: list[Sequence1D] = []
        self._seen = 0
        self._generator = np.random.default_rng(0)

    def add(self, text: Sequence1D) -> None:
        """Offer a text; one without a token to predict is passed over.

        Where nothing counts in its beginning, all of that does: a long question before a short
        answer is a text that the model should know, too.
        """
        if not text.targets:
            return
        self._seen += 1
        place = len(self.texts)
        if place == TEXTS:
            place = int(self._generator.integers(self._seen))
        if place < TEXTS:
            beginning = replace(text, tokens=text.tokens[:TOKENS], weight=1.0, rejected=None)
            counts = beginning.targets > 0
            self.texts[place : place + 1] = [
                beginning if counts else replace(beginning, counted=None)
            ]


@torch.no_grad()
def measure_loss(loaded: LoadedModel, sample: TextSample) -> LossRecord | None:
    """Mean loss a token over the sample; None if it is empty.

    Texts whose loss is not finite are left out, as a build leaves their rows out.

    Raises:
        ValueError: no text's loss is finite, or it is beyond what a trained model can have.
    """
    if not sample.texts:
        return None
    total, tokens, texts, vocabulary = 0.0, 0, 0, len(loaded.tokenizer)
    with loaded.turn:
        for sequence in sample.texts:
            batch = collate([sequence]).to(loaded.device)
            logits = next_token_logits(loaded.model, batch)
            loss = float(negative_log_likelihood(logits, batch))
            vocabulary = min(vocabulary, logits.shape[-1])
            if math.isfinite(loss):
                total, tokens, texts = total + loss, tokens + sequence.targets, texts + 1
    if not texts or total / tokens > ABSURD:
        _refuse(loaded, sample.texts[0], total / max(tokens, 1))
    return LossRecord(
        mean=total / tokens,
        uniform=math.log(vocabulary),
        texts=texts,
        tokens=tokens,
        unknown=_unknown(loaded, sample),
    )


def _unknown(loaded: LoadedModel, sample: TextSample) -> int:
    """Predicted tokens that stand for what the tokenizer does not know."""
    unknown, ends = loaded.tokenizer.unk_token_id, loaded.tokenizer.eos_token_id
    if unknown is None or unknown == ends:  # some name the end of a text for both
        return 0
    return sum(text.tokens[1:].count(unknown) for text in sample.texts)


def tell_loss(loss: LossRecord | None) -> None:
    """Log the mean loss, and a warning if it is not far below that of a uniform guess."""
    if loss is None:
        return
    logger.info(
        "The model's mean loss is %.2f nats a token on %d texts of the corpus; a uniform guess "
        "would have %.2f.",
        loss.mean,
        loss.texts,
        loss.uniform,
    )
    if loss.unknown > UNKNOWN * loss.tokens:
        logger.warning(
            "Of %d tokens %d are the one for what the tokenizer does not know: it is another "
            "model's, or made for another language. Check it before you rely on an answer "
            "(--tokenizer).",
            loss.tokens,
            loss.unknown,
        )
    if loss.mean > SUSPICIOUS * loss.uniform:
        logger.warning(
            "That is not far below a guess: this model was hardly trained on such texts, or its "
            "tokenizer is another model's. Check both before you rely on an answer (--tokenizer)."
        )


def _refuse(loaded: LoadedModel, sequence: Sequence1D, mean: float) -> NoReturn:
    with loaded.turn:
        module = first_not_finite(loaded.model, collate([sequence]).to(loaded.device))
    if module is None:
        raise ValueError(
            f"The model's mean loss is {mean:.3g} nats a token, which no trained model has: every "
            f"probability is 0 or 1, and no gradient is left. Check the model's weights; those of "
            f"its output head are the first to look at."
        )
    raise ValueError(
        f"The model's loss is not finite on any of the texts tried: the first module whose output "
        f"is NaN or infinite is '{module or 'the model itself'}'. Check its weights, or load the "
        f"model in another precision (--dtype)."
    )
