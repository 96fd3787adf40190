"""Fitting an estimator: passes over examples with labels drawn from the model."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from estimators.capture import Visitor, visit_gradients
from estimators.contracts import Estimator, FitVisitor
from estimators.layers import LinearLayer
from estimators.memory import BackOff
from estimators.progress import Progress, no_progress
from estimators.registry import estimator_class
from estimators.tokens import Sequence1D, TokenBatch, collate, plan_batches

Labels = Literal["sampled", "empirical"]


def fit_estimator(
    name: str,
    model: nn.Module,
    layers: Sequence[LinearLayer],
    sequences: Sequence[Sequence1D],
    *,
    token_budget: int = 1024,
    seed: int = 0,
    labels: Labels = "sampled",
    progress: Progress = no_progress,
) -> Estimator:
    """Fit the estimator ``name`` on ``sequences``.

    Sequences that predict nothing (fewer than two tokens) are left out of the mean.

    Args:
        name: a name of the registry.
        model: frozen, in evaluation mode.
        layers: attributed layers.
        sequences: examples; their ``row`` seeds their sampled labels.
        token_budget: padded tokens in a batch; changes memory and speed, not the result beyond
            float32 rounding.
        seed: of the sampled labels.
        labels: "sampled" for the true Fisher, "empirical" for the examples' own tokens.
        progress: shows each pass.

    Raises:
        ValueError: no sequence predicts anything, or the model gives non-finite values.
    """
    useful = [sequence for sequence in sequences if sequence.targets > 0]
    if not useful:
        raise ValueError(
            f"None of the {len(sequences)} fitting examples has two tokens or more; "
            f"check the text column."
        )
    device = next(model.parameters()).device
    lengths = [len(sequence.tokens) for sequence in useful]
    batches = list(plan_batches(lengths, token_budget))
    backing = BackOff(lengths)
    passes = 0

    def run_pass(description: str, visit: FitVisitor) -> int:
        nonlocal passes
        label_seed = None if labels == "empirical" else 2 * seed + passes
        passes += 1
        for positions in progress(description, batches):
            counted: dict[str, set[int]] = {layer.name: set() for layer in layers}

            def add(part: Sequence[int], counted: dict[str, set[int]] = counted) -> None:
                batch = collate([useful[p] for p in part]).to(device)
                adding = _adding(visit, batch, part, counted)
                visit_gradients(model, layers, batch, adding, label_seed)

            backing.run(positions, add)
        return len(useful)

    return estimator_class(name).fit(layers, run_pass)


def _adding(
    visit: FitVisitor, batch: TokenBatch, part: Sequence[int], counted: dict[str, set[int]]
) -> Visitor:
    """Hand masked inputs to ``visit``, except for layers that already ``counted`` these sequences.

    A batch that ran out of memory in the middle of its backward pass is done again in halves: the
    layers that it reached have counted all of it.
    """
    mask = batch.position_mask
    positions = int(mask.sum())

    def add(layer: LinearLayer, a: Tensor, d: Tensor) -> None:
        if counted[layer.name].issuperset(part):
            return
        visit(layer, torch.where(mask[..., None], a, 0), d, positions)
        counted[layer.name].update(part)

    return add
