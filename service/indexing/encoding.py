"""Gradients into codes: sketched on the model's device, encoded on the host."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import nn

from estimators.model.memory import BackOff
from estimators.model.tokens import Sequence1D, TokenBatch, collate, plan_batches
from estimators.sketching.sketch import Sketch, training_sketches
from index.codes.signs import encode_signs, sign_bytes
from index.codes.vectors import VectorIndex

Sketched: TypeAlias = tuple[Float[np.ndarray, "row dimension"], Float[np.ndarray, "row"]]


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """What is stored of some rows.

    Attributes:
        codes: of the first slice.
        norms: whitened, as the first slice's sketch has them; 0 for failed rows.
        failed: rows without a finite gradient (coded as 0).
        further: codes of the other slices.
    """

    codes: UInt8[np.ndarray, "row byte"]
    norms: Float[np.ndarray, "row"]
    failed: list[int]
    further: UInt8[np.ndarray, "row slice byte"]


def encode_gradients(
    model: nn.Module,
    sketches: Sequence[Sketch],
    index: VectorIndex,
    sequences: Sequence[Sequence1D],
    token_budget: int,
) -> Encoded:
    """Codes of all slices and whitened norms, from one pass through the model.

    Args:
        model: frozen, in evaluation mode.
        sketches: of its layers, one a slice.
        index: of the kind of code that is wanted of the first slice.
        sequences: training examples.
        token_budget: padded tokens in a batch.
    """
    codes = np.zeros((len(sequences), index.code_size), dtype=np.uint8)
    norms = np.zeros(len(sequences), dtype=np.float32)
    further = _no_codes(sequences, sketches[1:])
    failed: list[int] = []

    def encode(positions: Sequence[int], sketched: list[Sketched]) -> None:
        units, norm = sketched[0]
        bad = ~np.isfinite(norm) | ~np.isfinite(units).all(1)
        units[bad], norm[bad] = 0, 0
        codes[list(positions)], norms[list(positions)] = index.encode(units), norm
        failed.extend(positions[i] for i in np.flatnonzero(bad).tolist())
        _encode_further(further, positions, sketched[1:])

    _sketch(model, sketches, sequences, token_budget, encode)
    return Encoded(codes=codes, norms=norms, failed=sorted(failed), further=further)


def encode_slices(
    model: nn.Module,
    sketches: Sequence[Sketch],
    sequences: Sequence[Sequence1D],
    token_budget: int,
) -> UInt8[np.ndarray, "row slice byte"]:
    """Codes of slices that come after the first; see ``encode_gradients``."""
    codes = _no_codes(sequences, sketches)

    def encode(positions: Sequence[int], sketched: list[Sketched]) -> None:
        _encode_further(codes, positions, sketched)

    _sketch(model, sketches, sequences, token_budget, encode)
    return codes


def unit_sketches(
    sketches: Sequence[Sketch], model: nn.Module, batch: TokenBatch
) -> list[Sketched]:
    """A batch's gradients by each sketch: unit vectors (0 where empty), and whitened norms."""
    found = []
    for x, norm in training_sketches(sketches, model, batch):
        length = torch.linalg.vector_norm(x, dim=1, keepdim=True)
        unit = torch.where(length > 0, x / length, 0)
        found.append((unit.cpu().numpy(), norm.cpu().numpy()))
    return found


def _no_codes(
    sequences: Sequence[Sequence1D], sketches: Sequence[Sketch]
) -> UInt8[np.ndarray, "row slice byte"]:
    width = sign_bytes(sketches[0].plan.dimensions) if sketches else 0
    return np.zeros((len(sequences), len(sketches), width), dtype=np.uint8)


def _encode_further(
    codes: UInt8[np.ndarray, "row slice byte"],
    positions: Sequence[int],
    sketched: Sequence[Sketched],
) -> None:
    for number, (units, _) in enumerate(sketched):
        units[~np.isfinite(units).all(1)] = 0
        codes[list(positions), number] = encode_signs(units)


def _sketch(
    model: nn.Module,
    sketches: Sequence[Sketch],
    sequences: Sequence[Sequence1D],
    token_budget: int,
    consume: Callable[[Sequence[int], list[Sketched]], None],
) -> None:
    """Hand each batch's positions and sketches on."""
    device = next(model.parameters()).device

    def work(positions: Sequence[int]) -> None:
        batch = collate([sequences[p] for p in positions]).to(device)
        consume(positions, unit_sketches(sketches, model, batch))

    lengths = [len(sequence.tokens) for sequence in sequences]
    backing = BackOff(lengths)
    for positions in plan_batches(lengths, token_budget):
        backing.run(positions, work)
