"""Gradients into codes: sketched on the model's device, encoded on the host."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import nn

from estimators.model.memory import BackOff
from estimators.model.tokens import Sequence1D, collate, plan_batches
from estimators.sketching.slices import SketchSlices
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
    sketches: SketchSlices,
    index: VectorIndex,
    sequences: Sequence[Sequence1D],
    token_budget: int,
) -> Encoded:
    """Codes of all slices and whitened norms, from one pass through the model.

    Args:
        model: frozen, in evaluation mode.
        sketches: of its layers.
        index: of the kind of code that is wanted of the first slice.
        sequences: training examples.
        token_budget: padded tokens in a batch.
    """
    codes = np.zeros((len(sequences), index.code_size), dtype=np.uint8)
    norms = np.zeros(len(sequences), dtype=np.float32)
    further = _no_codes(sequences, sketches, 1)
    failed: list[int] = []

    def encode(positions: Sequence[int], sketched: list[Sketched]) -> None:
        x, norm = sketched[0]
        units = _units(x)
        bad = ~np.isfinite(norm) | ~np.isfinite(units).all(1)
        units[bad], norm[bad] = 0, 0
        codes[list(positions)], norms[list(positions)] = index.encode(units), norm
        failed.extend(positions[i] for i in np.flatnonzero(bad).tolist())
        if len(sketches) > 1:
            further[list(positions)] = encode_further(sketched[1:], norm)

    _sketch(model, sketches, 0, sequences, token_budget, encode)
    return Encoded(codes=codes, norms=norms, failed=sorted(failed), further=further)


def encode_slices(
    model: nn.Module,
    sketches: SketchSlices,
    start: int,
    sequences: Sequence[Sequence1D],
    norms: Float[np.ndarray, "row"],
    token_budget: int,
) -> UInt8[np.ndarray, "row slice byte"]:
    """Codes of the slices from number ``start`` on, for the norms that are stored of the rows."""
    codes = _no_codes(sequences, sketches, start)

    def encode(positions: Sequence[int], sketched: list[Sketched]) -> None:
        codes[list(positions)] = encode_further(sketched, norms[list(positions)])

    _sketch(model, sketches, start, sequences, token_budget, encode)
    return codes


def _units(x: Float[np.ndarray, "row dimension"]) -> Float[np.ndarray, "row dimension"]:
    """Scaled to unit length; rows of zeros stay so."""
    rows = torch.from_numpy(x)
    length = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    return torch.where(length > 0, rows / length, 0).numpy()


def _no_codes(
    sequences: Sequence[Sequence1D], sketches: SketchSlices, start: int
) -> UInt8[np.ndarray, "row slice byte"]:
    width = sign_bytes(sketches.first.plan.dimensions)
    return np.zeros((len(sequences), len(sketches) - start, width), dtype=np.uint8)


def encode_further(
    sketched: Sequence[Sketched], norms: Float[np.ndarray, "row"]
) -> UInt8[np.ndarray, "row slice byte"]:
    """Codes of further slices of some rows; their estimates are of cosines.

    Scaled by each row's norm as its slice has it over the stored one, which errs more, so that an
    estimate times the stored norm is free of that norm's error.
    """
    codes = []
    for x, norm in sketched:
        usable = np.isfinite(norm) & (norms > 0)
        x[~usable] = 0
        codes.append(encode_signs(x, np.divide(norm, norms, out=0 * norms, where=usable)))
    return np.stack(codes, axis=1)


def _sketch(
    model: nn.Module,
    sketches: SketchSlices,
    start: int,
    sequences: Sequence[Sequence1D],
    token_budget: int,
    consume: Callable[[Sequence[int], list[Sketched]], None],
) -> None:
    """Hand each batch's positions and sketches on."""
    device = next(model.parameters()).device

    def work(positions: Sequence[int]) -> None:
        batch = collate([sequences[p] for p in positions]).to(device)
        sketched = sketches.training(model, batch, start)
        consume(positions, [(x.cpu().numpy(), norm.cpu().numpy()) for x, norm in sketched])

    lengths = [sequence.padded for sequence in sequences]
    backing = BackOff(lengths)
    for positions in plan_batches(lengths, token_budget):
        backing.run(positions, work)
