"""Rows of token ids as a trainer packed them: padding, labels, several documents in a row."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from estimators.model.tokens import Spans, spans_of
from service.corpus.sources import kind_of

UNCOUNTED = -100
"""The label of a token that does not count."""

BESIDE = ("labels", "attention_mask", "position_ids")
"""What a row may have of each token."""


def documents_in(
    columns: Mapping[str, Any], vocabulary: int
) -> list[tuple[list[int], Spans | None]]:
    """The documents of a row, each read by itself: its tokens, and which of them count.

    A document begins where its length or position ids say so: in training no token saw those of
    another. What the attention mask leaves out is padding.

    Args:
        columns: by role: "input_ids", and where there are such one of ``BESIDE`` or "seq_lengths".
        vocabulary: tokens that the model knows.

    Raises:
        ValueError: what is wrong with the row, in words that follow "Row 3 of the corpus".
    """
    ids = _numbers(columns, "input_ids")
    wrong = next((i for i in ids if not 0 <= i < vocabulary), None)
    if wrong is not None:
        raise ValueError(f"has the token {wrong}, and the model has {vocabulary:,}")
    labels = _beside(columns, "labels", ids) or ids
    for token, label in zip(ids, labels, strict=True):
        if label not in (token, UNCOUNTED):
            raise ValueError(
                f"has the label {label} beside the token {token}; a label is its own token or "
                f"{UNCOUNTED}, since models shift them themselves"
            )
    mask = _beside(columns, "attention_mask", ids) or [1] * len(ids)
    kept = [i for i, m in enumerate(mask) if m]
    if kept and kept != list(range(kept[0], kept[-1] + 1)):
        raise ValueError("has an attention mask with a gap, so that its tokens do not adjoin")
    found = []
    for start, stop in _edges(columns, ids):
        own = [i for i in range(start, stop) if mask[i]]
        counted = [labels[i] != UNCOUNTED for i in own]
        spans = None if all(counted[1:]) else spans_of(counted)
        if own:  # else padding
            found.append(([ids[i] for i in own], spans))
    return found or [([], ())]


def _edges(columns: Mapping[str, Any], ids: Sequence[int]) -> list[tuple[int, int]]:
    """Where each document begins and ends."""
    if "seq_lengths" in columns:
        ends = list(itertools.accumulate(_numbers(columns, "seq_lengths")))
        total = ends[-1] if ends else 0
        if total != len(ids) or not ends:
            raise ValueError(f"has {len(ids)} tokens, its seq_lengths sum to {total}")
        return list(zip([0, *ends[:-1]], ends, strict=True))
    positions = _beside(columns, "position_ids", ids)
    starts = [i for i, place in enumerate(positions or ()) if place == 0] or [0]
    return list(zip(starts, [*starts[1:], len(ids)], strict=True))


def _beside(columns: Mapping[str, Any], role: str, ids: Sequence[int]) -> list[int] | None:
    """A number for each token, if the row has such."""
    if role not in columns:
        return None
    numbers = _numbers(columns, role)
    if len(numbers) != len(ids):
        raise ValueError(f"has {len(ids)} tokens and {len(numbers)} {role}")
    return numbers


def _numbers(columns: Mapping[str, Any], role: str) -> list[int]:
    value = columns[role]
    if not isinstance(value, list) or not all(type(v) is int for v in value):
        raise ValueError(f"has {kind_of(value)} as {role}, expected a list of whole numbers")
    return value
