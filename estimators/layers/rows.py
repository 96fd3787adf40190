"""Rows of tokens that are not one a token, put in order by sequence."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

NOWHERE = -1
"""The place of a row that only fills a sequence up."""


def by_sequence(
    a: Float[Tensor, "row in"],
    d: Float[Tensor, "row out"],
    places: Int[Tensor, "row"],
    batch: tuple[int, int],
) -> tuple[
    Float[Tensor, "batch width in"],
    Float[Tensor, "batch width out"],
    Int[Tensor, "batch width"] | None,
]:
    """Inputs and output gradients with the rows of each sequence together, in order of its tokens.

    The sequence with most rows has ``width``; others are filled up with zeros.

    Args:
        a: inputs.
        d: output gradients.
        places: the token of each row, numbered through the flattened batch.
        batch: sequences and tokens.

    Returns:
        a, d, and the token of each row within its sequence, ``NOWHERE`` for filling; None in place
        of it where every token has one row.
    """
    count, tokens = batch
    if len(places) == count * tokens:
        every = torch.arange(len(places), device=places.device)
        if torch.equal(places, every):
            return a.view(count, tokens, -1), d.view(count, tokens, -1), None
    ordered, order = places.sort(stable=True)
    owners = ordered // tokens
    counts = torch.bincount(owners, minlength=count)
    width = int(counts.max()) if len(places) else 0
    starts = counts.cumsum(0) - counts
    slots = owners * width + torch.arange(len(places), device=places.device) - starts[owners]
    found = []
    for values in (a, d):
        room = values.new_zeros(count * width, values.shape[-1])
        room[slots] = values[order]
        found.append(room.view(count, width, values.shape[-1]))
    within = torch.full((count * width,), NOWHERE, device=places.device, dtype=places.dtype)
    within[slots] = ordered % tokens
    return found[0], found[1], within.view(count, width)
