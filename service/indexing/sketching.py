"""The second step of a build: the gradients of a shard's examples become codes and norms."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, UInt8

from estimators.model.memory import BackOff
from estimators.model.tokens import Sequence1D, TokenBatch, collate, plan_batches
from estimators.sketching.sketch import Sketch
from index.examples import ExampleStore
from index.manifest import FailedRow, FileRecord, ShardRecord
from index.shards import write_shard
from service.coding import coded_index
from service.models import LoadedModel


@dataclass(frozen=True, kw_only=True)
class ShardJob:
    """Builds shards of one part; any process may build any shard, and again.

    Attributes:
        part: folder of the part.
        loaded: the model with the layers to attribute.
        sketch: of the index.
        codes: kind of code.
        token_budget: padded tokens in a batch.
    """

    part: Path
    loaded: LoadedModel
    sketch: Sketch
    codes: str
    token_budget: int

    def run(self, number: int, first_row: int, file: FileRecord) -> ShardRecord:
        """Sketch, encode and write one shard."""
        examples = ExampleStore([self.part / file.path])
        sequences = [Sequence1D(tokens=examples.tokens(row)) for row in range(len(examples))]
        codes, norms, failed = self.encode(sequences)
        record = ShardRecord(
            number=number,
            first_row=first_row,
            rows=len(norms),
            sha256="",
            examples_sha256=file.sha256,
            failed=[
                FailedRow(row=first_row + row, reason="its gradient is not finite")
                for row in failed
            ],
        )
        packed = coded_index(self.codes, self.sketch).pack(codes)
        return write_shard(self.part, packed, norms, record)

    def encode(
        self, sequences: Sequence[Sequence1D]
    ) -> tuple[UInt8[np.ndarray, "row byte"], Float[np.ndarray, "row"], list[int]]:
        """Codes and whitened norms, and the rows without a finite gradient (coded as 0, norm 0)."""
        index = coded_index(self.codes, self.sketch)
        codes = np.zeros((len(sequences), index.code_size), dtype=np.uint8)
        norms = np.zeros(len(sequences), dtype=np.float32)
        failed: list[int] = []

        def encode(positions: Sequence[int]) -> None:
            batch = collate([sequences[p] for p in positions]).to(self.loaded.device)
            units, norm = unit_sketches(self.sketch, self.loaded, batch)
            bad = ~np.isfinite(norm) | ~np.isfinite(units).all(1)
            units[bad], norm[bad] = 0, 0
            codes[list(positions)], norms[list(positions)] = index.encode(units), norm
            failed.extend(positions[i] for i in np.flatnonzero(bad).tolist())

        lengths = [len(sequence.tokens) for sequence in sequences]
        backing = BackOff(lengths)
        for positions in plan_batches(lengths, self.token_budget):
            backing.run(positions, encode)
        return codes, norms, sorted(failed)


def unit_sketches(
    sketch: Sketch, loaded: LoadedModel, batch: TokenBatch
) -> tuple[Float[np.ndarray, "row dimension"], Float[np.ndarray, "row"]]:
    """Sketches of a batch's gradients scaled to unit length (0 where empty), and whitened norms."""
    x, norm = sketch.training(loaded.model, batch)
    length = torch.linalg.vector_norm(x, dim=1, keepdim=True)
    unit = torch.where(length > 0, x / length, 0)
    return unit.cpu().numpy(), norm.cpu().numpy()
