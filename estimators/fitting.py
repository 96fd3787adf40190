"""Fitting an estimator: passes over examples with labels drawn from the model."""

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from estimators.capture import visit_gradients
from estimators.contracts import Estimator, FitVisitor
from estimators.layers import LinearLayer
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
    batches = list(plan_batches([len(s.tokens) for s in useful], token_budget))
    passes = 0

    def run_pass(description: str, visit: FitVisitor) -> int:
        nonlocal passes
        label_seed = None if labels == "empirical" else 2 * seed + passes
        passes += 1
        for positions in progress(description, batches):
            batch = collate([useful[p] for p in positions]).to(device)
            visit_gradients(model, layers, batch, _masked(visit, batch), label_seed)
        return len(useful)

    return estimator_class(name).fit(layers, run_pass)


def _masked(visit: FitVisitor, batch: TokenBatch) -> Callable[[LinearLayer, Tensor, Tensor], None]:
    mask = batch.position_mask
    positions = int(mask.sum())

    def masked(layer: LinearLayer, a: Tensor, d: Tensor) -> None:
        visit(layer, torch.where(mask[..., None], a, 0), d, positions)

    return masked
