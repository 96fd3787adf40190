"""Losses of a batch without all its logits: the output head runs on some positions at a time.

The logits of a batch are larger than anything else in a pass (a vocabulary a position), and much of
their cost is memory that is mapped and read anew for each step from logits to gradient.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from estimators.model.measurement import draw_labels, label_numbers, next_token_logits
from estimators.model.tokens import TokenBatch
from estimators.model.trial import trial_tokens

LOGITS_AT_ONCE = 2**21
"""Logits that are held at once on a CPU: 8 MB in float32."""

LOGITS_AT_ONCE_ON_DEVICES = 2**26
"""On any other device: 256 MB in float32; not measured."""

FEWEST_POSITIONS = 128
"""At once, however large the vocabulary: the head's weights are read for each part."""

_PLAIN: "WeakKeyDictionary[nn.Module, bool]" = WeakKeyDictionary()
"""Whether a model's logits are what its output head gives."""


def final_states(
    model: nn.Module, batch: TokenBatch
) -> tuple[nn.Module, Float[Tensor, "batch token feature"]]:
    """Run the model up to its output head.

    Returns:
        The head and its inputs; for a model that has none, or that changes its logits after it (by
        capping or scaling them), ``nn.Identity`` and the logits.
    """
    head = plain_head(model)
    if head is None:
        return nn.Identity(), next_token_logits(model, batch)
    with _watched(head, factor=1.0, keep=1) as given:
        next_token_logits(model, batch)
    return head, given[0]


def losses_and_gradient(
    head: nn.Module,
    states: Float[Tensor, "batch token feature"],
    batch: TokenBatch,
    label_seed: int | None = None,
    drawn: Int[Tensor, "batch token"] | None = None,
) -> tuple[Float[Tensor, "batch"], Float[Tensor, "batch token feature"] | None]:
    """Losses of a batch's sequences, and the gradient of their sum with respect to ``states``.

    A loss is the sum of the next-token negative log-likelihoods of the counted tokens, in nats, in
    float32 at least, whatever the model's own precision. The gradient has the batch's weights, the
    losses have not. Positions that predict no counted token do
    not pass through the head.

    Args:
        head: turns states into logits, each position by itself.
        states: from ``final_states``.
        batch: which tokens count.
        label_seed: see ``estimators.model.capture.visit_gradients``.
        drawn: is filled with the label of each position that predicts a counted token.

    Returns:
        The losses; the gradient, None if the states require none.
    """
    flat = states.detach().flatten(0, 1)
    counted = batch.target_mask[:, 1:]  # the token after each position
    places = predicting(batch)
    targets = batch.input_ids[:, 1:][counted]
    numbers = None if label_seed is None else label_numbers(batch, label_seed)[counted]
    gradient = torch.zeros_like(flat) if states.requires_grad else None
    losses = flat.new_zeros(len(flat), dtype=_wide(flat).dtype)
    room: Tensor | None = None  # for one part after another: new memory costs more than its use
    for part in _parts(len(places), head, flat):
        some = places[part]
        given = flat[some].requires_grad_(states.requires_grad)
        logits = head(given[None]).flatten(0, 1)
        wide = _wide(logits.detach())
        if room is None:
            room = torch.empty_like(wide)
        probabilities = torch.softmax(wide, dim=-1, out=room[: len(wide)])
        labels = targets[part] if numbers is None else draw_labels(probabilities, numbers[part])
        if drawn is not None:
            drawn.view(-1)[some] = labels
        labels = labels[:, None]
        losses[some] = _surprisal(wide, probabilities, labels)
        if gradient is not None:
            slope = probabilities.scatter_add_(1, labels, -torch.ones_like(probabilities[:, :1]))
            slope = _weighted(slope, batch, some)
            (gradient[some],) = torch.autograd.grad(logits, given, slope.to(logits.dtype))
    return losses.view(batch.input_ids.shape).sum(1), (
        None if gradient is None else gradient.view_as(states)
    )


def predicting(batch: TokenBatch) -> Int[Tensor, "position"]:
    """Positions that predict a counted token, numbered through the flattened batch; ascending."""
    return nn.functional.pad(batch.target_mask[:, 1:], (0, 1)).flatten().nonzero()[:, 0]


@torch.no_grad()
def residuals(
    head: nn.Module,
    states: Float[Tensor, "batch token feature"],
    batch: TokenBatch,
    labels: Int[Tensor, "batch token"],
) -> Iterator[tuple[Int[Tensor, "position"], Float[Tensor, "position vocabulary"]]]:
    """``w (p - y)``, the weighted losses' gradients by the logits, some positions at a time.

    The head runs again: keeping them all from ``losses_and_gradient`` would take a vocabulary a
    position.

    Args:
        head: turns states into logits.
        states: from ``final_states``.
        batch: which tokens count.
        labels: of each position that predicts a counted token.

    Yields:
        Positions as in ``predicting``, and their residuals in float32 at least, which are
        overwritten at the next step.
    """
    flat, places = states.flatten(0, 1), predicting(batch)
    room: Tensor | None = None
    for part in _parts(len(places), head, flat):
        some = places[part]
        wide = _wide(head(flat[some][None]).flatten(0, 1))
        room = torch.empty_like(wide) if room is None else room
        slope = torch.softmax(wide, dim=-1, out=room[: len(wide)])
        own = labels.flatten()[some][:, None]
        slope.scatter_add_(1, own, -torch.ones_like(slope[:, :1]))
        yield some, _weighted(slope, batch, some)


def _weighted(slopes: Tensor, batch: TokenBatch, places: Tensor) -> Tensor:
    """Times the weight of the sequence that each position is of; in place."""
    if batch.weights is None:
        return slopes
    owners = places // batch.input_ids.shape[1]
    return slopes.mul_(batch.weights[owners][:, None].to(slopes))


def _surprisal(
    logits: Float[Tensor, "position vocabulary"],
    probabilities: Float[Tensor, "position vocabulary"],
    labels: Int[Tensor, "position 1"],
) -> Float[Tensor, "position"]:
    """Negative log-probability of the labels, in nats; a probability of 0 does no harm.

    The largest probability gives the logits' normaliser, so that no more exponentials are taken.
    """
    normaliser = logits.amax(1) - probabilities.amax(1).log()
    return normaliser - logits.gather(1, labels)[:, 0]


def _wide(values: Tensor) -> Tensor:
    return values if values.dtype == torch.float64 else values.float()


def _parts(count: int, head: nn.Module, states: Tensor) -> Iterator[slice]:
    width = getattr(head, "out_features", states.shape[-1])
    at_once = LOGITS_AT_ONCE if states.device.type == "cpu" else LOGITS_AT_ONCE_ON_DEVICES
    size = max(FEWEST_POSITIONS, at_once // width)
    for start in range(0, count, size):
        yield slice(start, start + size)


def plain_head(model: nn.Module) -> nn.Module | None:
    """The output head, if the logits are what it gives; tried once a model."""
    get_head = getattr(model, "get_output_embeddings", None)
    head = get_head() if callable(get_head) else None
    if not isinstance(head, nn.Module):
        return None
    if model not in _PLAIN:
        _PLAIN[model] = _is_plain(model, head)
    return head if _PLAIN[model] else None


@torch.no_grad()
def _is_plain(model: nn.Module, head: nn.Module) -> bool:
    """Whether the logits are the head's outputs; tried with inputs that show a cap on them."""
    embeddings = getattr(model, "get_input_embeddings", None)
    if not callable(embeddings):
        return False
    tokens = trial_tokens(embeddings())
    with _watched(head, factor=64.0) as given:
        logits = model(**tokens, use_cache=False).logits
    if len(given) != 1 or given[0].shape[:-1] != tokens["input_ids"].shape:
        return False
    return torch.equal(logits, head(given[0]))


@contextmanager
def _watched(head: nn.Module, factor: float, keep: int | None = None) -> Iterator[list[Tensor]]:
    """Collects what the head is given, times ``factor``.

    Args:
        head: of a model that is run meanwhile.
        factor: multiplies the head's inputs.
        keep: let the head itself see only so many positions of as many sequences.
    """
    given: list[Tensor] = []

    def before(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Tensor, ...] | None:
        if not inputs:
            return None
        states = inputs[0] if factor == 1 else inputs[0] * factor
        given.append(states)
        return (states[:keep, :keep],)

    handle = head.register_forward_pre_hook(before)
    try:
        yield given
    finally:
        handle.remove()
