"""What is differentiated: training losses, log-probabilities of completions, sampled labels."""

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from estimators.model.tokens import TokenBatch

_UNCOUNTED = -100


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
    logits: Float[Tensor, "batch token vocabulary"], batch: TokenBatch
) -> Float[Tensor, "batch"]:
    """Sum of next-token negative log-likelihoods over the counted tokens, in nats, per sequence.

    Arguments and precision as of ``token_losses``.
    """
    return token_losses(logits, batch).sum(1)


def token_losses(
    logits: Float[Tensor, "batch token vocabulary"], batch: TokenBatch
) -> Float[Tensor, "batch token"]:
    """Next-token negative log-likelihoods in nats, at the position that predicts; 0 if uncounted.

    Computed in float32 at least, whatever the model's own precision.

    Args:
        logits: from ``next_token_logits``; position t predicts token t + 1.
        batch: which tokens count.
    """
    wide = logits if logits.dtype == torch.float64 else logits.float()
    counted = batch.input_ids[:, 1:].masked_fill(~batch.target_mask[:, 1:], _UNCOUNTED)
    counted = nn.functional.pad(counted, (0, 1), value=_UNCOUNTED)
    losses = nn.functional.cross_entropy(
        wide.flatten(0, 1), counted.flatten(), reduction="none", ignore_index=_UNCOUNTED
    )
    return losses.view(counted.shape)


def label_numbers(batch: TokenBatch, seed: int) -> Float[Tensor, "batch token"]:
    """Uniform numbers from which the labels of all positions but the last are drawn.

    From a counter-based generator keyed by ``(seed, row)``: the labels of a row do not depend on
    the batch that it is in.
    """
    count = batch.input_ids.shape[1] - 1
    numbers = [
        np.random.Generator(np.random.Philox(key=[seed, row])).random(count) for row in batch.rows
    ]
    return torch.from_numpy(np.stack(numbers)).to(batch.input_ids.device, torch.float32)


def draw_labels(
    probabilities: Float[Tensor, "position vocabulary"], numbers: Float[Tensor, "position"]
) -> Int[Tensor, "position"]:
    """Draw next tokens from the model's own distribution, as the true Fisher needs.

    By inversion of the cumulative distribution at one uniform number a position.
    """
    cumulative = probabilities.cumsum(dim=-1)
    wanted = numbers.to(cumulative)[:, None] * cumulative[:, -1:]
    labels = torch.searchsorted(cumulative, wanted)[:, 0]
    return labels.clamp_(max=probabilities.shape[-1] - 1)
