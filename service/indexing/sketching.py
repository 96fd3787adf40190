"""The second step of a build: the gradients of a shard's examples become codes and norms."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from jaxtyping import Float, UInt8

from estimators.model.memory import BackOff
from estimators.model.tokens import Sequence1D, TokenBatch, collate, plan_batches
from estimators.sketching.sketch import Sketch, training_sketches
from index.codes.signs import encode_signs, sign_bytes
from index.examples import ExampleStore
from index.manifest import FailedRow, FileRecord, ShardRecord, SlicesRecord
from index.shards import write_receipt, write_shard
from index.slices import write_slices
from service.coding import coded_index
from service.models import LoadedModel

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


@dataclass(frozen=True, kw_only=True)
class ShardJob:
    """Builds shards of one part; any process may build any shard, and again.

    Attributes:
        part: folder of the part.
        loaded: the model with the layers to attribute.
        sketches: of the index, one a slice.
        codes: kind of code.
        token_budget: padded tokens in a batch.
    """

    part: Path
    loaded: LoadedModel
    sketches: Sequence[Sketch]
    codes: str
    token_budget: int

    def run(self, number: int, first_row: int, file: FileRecord) -> ShardRecord:
        """Sketch, encode and write one shard."""
        encoded = self.encode(self._sequences(file))
        record = ShardRecord(
            number=number,
            first_row=first_row,
            rows=len(encoded.norms),
            sha256="",
            examples_sha256=file.sha256,
            failed=[
                FailedRow(row=first_row + row, reason="its gradient is not finite")
                for row in encoded.failed
            ],
            slices=self._write_slices(number, 1, encoded.further),
        )
        packed = coded_index(self.codes, self.sketches[0]).pack(encoded.codes)
        return write_shard(self.part, packed, encoded.norms, record)

    def extend(self, record: ShardRecord, file: FileRecord) -> ShardRecord:
        """Add the slices to a shard that it lacks; what it has stays as it is."""
        first = 1 + record.further_slices
        further = self._further(self._sequences(file), self.sketches[first:])
        slices = [*record.slices, *self._write_slices(record.number, first, further)]
        return write_receipt(self.part, record.model_copy(update={"slices": slices}))

    def _sequences(self, file: FileRecord) -> list[Sequence1D]:
        examples = ExampleStore([self.part / file.path])
        return [Sequence1D(tokens=examples.tokens(row)) for row in range(len(examples))]

    def _write_slices(
        self, number: int, first: int, codes: UInt8[np.ndarray, "row slice byte"]
    ) -> list[SlicesRecord]:
        return [write_slices(self.part, number, first, codes)] if codes.shape[1] else []

    def encode(self, sequences: Sequence[Sequence1D]) -> Encoded:
        """Codes and whitened norms, from one pass through the model for all slices."""
        index = coded_index(self.codes, self.sketches[0])
        codes = np.zeros((len(sequences), index.code_size), dtype=np.uint8)
        norms = np.zeros(len(sequences), dtype=np.float32)
        further = self._no_codes(sequences, self.sketches[1:])
        failed: list[int] = []

        def encode(positions: Sequence[int], sketched: list[Sketched]) -> None:
            units, norm = sketched[0]
            bad = ~np.isfinite(norm) | ~np.isfinite(units).all(1)
            units[bad], norm[bad] = 0, 0
            codes[list(positions)], norms[list(positions)] = index.encode(units), norm
            failed.extend(positions[i] for i in np.flatnonzero(bad).tolist())
            _encode_further(further, positions, sketched[1:])

        self._sketch(sequences, self.sketches, encode)
        return Encoded(codes=codes, norms=norms, failed=sorted(failed), further=further)

    def _further(
        self, sequences: Sequence[Sequence1D], sketches: Sequence[Sketch]
    ) -> UInt8[np.ndarray, "row slice byte"]:
        codes = self._no_codes(sequences, sketches)

        def encode(positions: Sequence[int], sketched: list[Sketched]) -> None:
            _encode_further(codes, positions, sketched)

        self._sketch(sequences, sketches, encode)
        return codes

    def _no_codes(
        self, sequences: Sequence[Sequence1D], sketches: Sequence[Sketch]
    ) -> UInt8[np.ndarray, "row slice byte"]:
        width = sign_bytes(self.sketches[0].plan.dimensions)
        return np.zeros((len(sequences), len(sketches), width), dtype=np.uint8)

    def _sketch(
        self,
        sequences: Sequence[Sequence1D],
        sketches: Sequence[Sketch],
        consume: Callable[[Sequence[int], list[Sketched]], None],
    ) -> None:
        """Hand each batch's positions and sketches on."""

        def work(positions: Sequence[int]) -> None:
            batch = collate([sequences[p] for p in positions]).to(self.loaded.device)
            consume(positions, unit_sketches(sketches, self.loaded, batch))

        lengths = [len(sequence.tokens) for sequence in sequences]
        backing = BackOff(lengths)
        for positions in plan_batches(lengths, self.token_budget):
            backing.run(positions, work)


def _encode_further(
    codes: UInt8[np.ndarray, "row slice byte"],
    positions: Sequence[int],
    sketched: Sequence[Sketched],
) -> None:
    for number, (units, _) in enumerate(sketched):
        units[~np.isfinite(units).all(1)] = 0
        codes[list(positions), number] = encode_signs(units)


def unit_sketches(
    sketches: Sequence[Sketch], loaded: LoadedModel, batch: TokenBatch
) -> list[Sketched]:
    """A batch's gradients by each sketch: unit vectors (0 where empty), and their norms."""
    found = []
    for x, norm in training_sketches(sketches, loaded.model, batch):
        length = torch.linalg.vector_norm(x, dim=1, keepdim=True)
        unit = torch.where(length > 0, x / length, 0)
        found.append((unit.cpu().numpy(), norm.cpu().numpy()))
    return found
