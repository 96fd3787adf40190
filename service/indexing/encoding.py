"""Gradients into codes: sketched on the model's device, encoded on the host."""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import nn

from estimators.model.memory import BackOff
from estimators.model.tokens import Sequence1D, TokenBatch, collate, plan_batches
from estimators.sketching.sketch import Sketch
from index.codes.vectors import VectorIndex


def encode_gradients(
    model: nn.Module,
    sketch: Sketch,
    index: VectorIndex,
    sequences: Sequence[Sequence1D],
    token_budget: int,
) -> tuple[UInt8[np.ndarray, "row byte"], Float[np.ndarray, "row"], list[int]]:
    """Codes and whitened norms, and the rows without a finite gradient (coded as 0, norm 0).

    Args:
        model: frozen, in evaluation mode.
        sketch: of its layers.
        index: of the kind of code that is wanted.
        sequences: training examples.
        token_budget: padded tokens in a batch.
    """
    codes = np.zeros((len(sequences), index.code_size), dtype=np.uint8)
    norms = np.zeros(len(sequences), dtype=np.float32)
    failed: list[int] = []
    device = next(model.parameters()).device

    def encode(positions: Sequence[int]) -> None:
        batch = collate([sequences[p] for p in positions]).to(device)
        units, norm = unit_sketches(sketch, model, batch)
        bad = ~np.isfinite(norm) | ~np.isfinite(units).all(1)
        units[bad], norm[bad] = 0, 0
        codes[list(positions)], norms[list(positions)] = index.encode(units), norm
        failed.extend(positions[i] for i in np.flatnonzero(bad).tolist())

    lengths = [len(sequence.tokens) for sequence in sequences]
    backing = BackOff(lengths)
    for positions in plan_batches(lengths, token_budget):
        backing.run(positions, encode)
    return codes, norms, sorted(failed)


def unit_sketches(
    sketch: Sketch, model: nn.Module, batch: TokenBatch
) -> tuple[Float[np.ndarray, "row dimension"], Float[np.ndarray, "row"]]:
    """Sketches of a batch's gradients scaled to unit length (0 where empty), and whitened norms."""
    x, norm = sketch.training(model, batch)
    length = torch.linalg.vector_norm(x, dim=1, keepdim=True)
    unit = torch.where(length > 0, x / length, 0)
    return unit.cpu().numpy(), norm.cpu().numpy()
