"""From the tensors of a forward pass to rows without padding."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from estimators.run.recorded import UNCOUNTED
from service.run.errors import Unrecordable

Numbers = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class ReadBatch:
    """The rows of one forward pass.

    Attributes:
        tokens: of all rows, with padding on the right.
        labels: likewise.
        lengths: of the rows without padding.
        divisor: what the summed losses are divided by, as far as it is known yet.
        is_mean: whether the pass' own mean was taken, so that more may divide it.
    """

    tokens: Numbers
    labels: Numbers
    lengths: tuple[int, ...]
    divisor: float
    is_mean: bool

    @property
    def width(self) -> int:
        """Tokens of each row, padding included."""
        return int(self.tokens.shape[1])

    def rows(self) -> Iterator[tuple[Numbers, Numbers]]:
        """Tokens and labels of each row."""
        for tokens, labels, length in zip(self.tokens, self.labels, self.lengths, strict=True):
            yield tokens[:length], labels[:length]


def content_id(tokens: Numbers, labels: Numbers) -> str:
    """SHA-256 of a row: its tokens and then its labels, each as 64 little-endian bits."""
    digest = hashlib.sha256(np.ascontiguousarray(tokens, dtype="<i8").data)
    digest.update(np.ascontiguousarray(labels, dtype="<i8").data)
    return digest.hexdigest()


def read_batch(
    input_ids: Tensor,
    labels: Tensor,
    attention_mask: Tensor | None,
    divisor: float | None,
    padding: int | None,
) -> ReadBatch:
    """Read the tensors that a model was given.

    Args:
        input_ids: token ids.
        labels: at each position its own token, or ``UNCOUNTED``; the model shifts them.
        attention_mask: 1 for tokens and 0 for padding, if there is one.
        divisor: what the summed losses are divided by; None takes the number of counted tokens.
        padding: token id of padding; without it nothing is padding unless a mask says so.

    Raises:
        Unrecordable: padding on the left, padding that counts, or labels of other tokens.
    """
    tokens = input_ids.detach().cpu().numpy()
    targets = labels.detach().cpu().numpy()
    if tokens.ndim != 2 or tokens.shape != targets.shape:
        raise Unrecordable(
            f"Expected tokens and labels of one shape (rows, tokens), got {tokens.shape} and "
            f"{targets.shape}."
        )
    counted = _counted(tokens, targets)
    if attention_mask is not None:
        lengths = _masked_lengths(attention_mask.detach().cpu().numpy(), counted)
    else:
        lengths = _unmasked_lengths(tokens, counted, padding)
    return ReadBatch(
        tokens=tokens,
        labels=targets,
        lengths=tuple(lengths.tolist()),
        divisor=float(counted[:, 1:].sum()) if divisor is None else divisor,
        is_mean=divisor is None,
    )


def _counted(tokens: Numbers, targets: Numbers) -> NDArray[np.bool_]:
    """Where labels count; raises Unrecordable unless each is its own token."""
    counted = targets != UNCOUNTED
    if (counted & (targets != tokens)).any():
        raise Unrecordable(
            "Labels differ from the tokens at their own positions; a run is recorded where each "
            f"label is its own token or {UNCOUNTED}, and the model shifts them."
        )
    return np.asarray(counted)


def _masked_lengths(mask: Numbers, counted: NDArray[np.bool_]) -> Numbers:
    """Raises Unrecordable unless the mask is ones and then zeros, whose labels do not count."""
    if mask.shape != counted.shape:
        raise Unrecordable(
            f"The attention mask has shape {mask.shape}, the tokens {counted.shape}; only masks of "
            f"padding are recorded."
        )
    lengths = (mask != 0).sum(1)
    inside = np.arange(mask.shape[1]) < lengths[:, None]
    if ((mask != 0) != inside).any():
        raise Unrecordable(
            "Rows are padded on the left, or tokens between others are masked; pad on the right "
            "(tokenizer.padding_side = 'right')."
        )
    if (counted & ~inside).any():
        raise Unrecordable(
            f"Padding counts in the loss; give it the label {UNCOUNTED}, as the data collators of "
            f"transformers do."
        )
    return np.asarray(lengths)


def _unmasked_lengths(tokens: Numbers, counted: NDArray[np.bool_], padding: int | None) -> Numbers:
    """Up to the last token that counts or is not padding; at least one."""
    last = counted | (tokens != padding)
    kept = np.where(last.any(1), tokens.shape[1] - last[:, ::-1].argmax(1), 1)
    return np.asarray(kept)
