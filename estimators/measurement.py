"""What is differentiated: training losses, log-probabilities of completions, sampled labels."""

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from estimators.tokens import TokenBatch

_UNCOUNTED = -100
_CHUNK = 2**23
"""Probabilities held at once while labels are drawn: 32 MB, which are reused, not mapped anew."""


def next_token_logits(
    model: nn.Module, batch: TokenBatch
) -> Float[Tensor, "batch token vocabulary"]:
    """The model's logits at every position; those at the last predict nothing.

    They are not cut off: a slice would cost a copy of all of them, and two in the backward pass.
    """
    everything = torch.ones_like(batch.input_ids)  # see TokenBatch on why padding is not masked
    logits: Tensor = model(
        input_ids=batch.input_ids, attention_mask=everything, use_cache=False
    ).logits
    return logits


def negative_log_likelihood(
    logits: Float[Tensor, "batch token vocabulary"], batch: TokenBatch, labels: Tensor | None = None
) -> Float[Tensor, "batch"]:
    """Sum of next-token negative log-likelihoods over the counted tokens, in nats, per sequence.

    Computed in float32 at least, whatever the model's own precision.

    Args:
        logits: from ``next_token_logits``; position t predicts token t + 1.
        batch: which tokens count.
        labels: the tokens to predict at every position but the last, ``[batch, token - 1]``; the
            batch's own tokens when not given.
    """
    targets = batch.input_ids[:, 1:] if labels is None else labels
    wide = logits if logits.dtype == torch.float64 else logits.float()
    counted = targets.masked_fill(~batch.target_mask[:, 1:], _UNCOUNTED)
    counted = nn.functional.pad(counted, (0, 1), value=_UNCOUNTED)
    losses = nn.functional.cross_entropy(
        wide.flatten(0, 1), counted.flatten(), reduction="none", ignore_index=_UNCOUNTED
    )
    return losses.view(counted.shape).sum(1)


@torch.no_grad()
def sample_labels(
    logits: Float[Tensor, "batch token vocabulary"], batch: TokenBatch, seed: int
) -> Int[Tensor, "batch token"]:
    """Draw next tokens from the model's own distribution, as the true Fisher needs.

    By inversion of the cumulative distribution, with one uniform number per token drawn from a
    counter-based generator keyed by ``(seed, row)``: the labels of a row do not depend on the batch
    that it is in.
    """
    count = logits.shape[1]
    uniform = np.stack(
        [np.random.Generator(np.random.Philox(key=[seed, row])).random(count) for row in batch.rows]
    )
    wanted = torch.from_numpy(uniform).to(logits.device, torch.float32).unsqueeze(-1)
    vocabulary = logits.shape[-1]
    size = max(1, _CHUNK // vocabulary)
    labels = []
    for sequence, numbers in zip(logits, wanted, strict=True):
        for chunk, u in zip(sequence.split(size), numbers.split(size), strict=True):
            cumulative = torch.softmax(chunk.float(), dim=-1).cumsum_(dim=-1)
            labels.append(torch.searchsorted(cumulative, u * cumulative[:, -1:]))
    return torch.cat(labels).clamp_(max=vocabulary - 1).view(len(batch.rows), count)
