"""The second step of a build: the gradients of a shard's examples become codes and norms."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from estimators.grounds import training_sequence
from estimators.model.tokens import Sequence1D
from estimators.sketching.slices import SketchSlices
from index.examples import ExampleStore
from index.manifest import FailedRow, FileRecord, ShardRecord, SlicesRecord
from index.shards import read_shard, write_receipt, write_shard
from index.slices import write_slices
from service.coding import coded_index
from service.indexing.encoding import Encoded, encode_gradients, encode_slices
from service.models import LoadedModel


@dataclass(frozen=True, kw_only=True)
class ShardJob:
    """Builds shards of one part; any process may build any shard, and again.

    Attributes:
        part: folder of the part.
        loaded: the model with the layers to attribute.
        sketches: of the index.
        codes: kind of code.
        token_budget: padded tokens in a batch.
    """

    part: Path
    loaded: LoadedModel
    sketches: SketchSlices
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
        packed = coded_index(self.codes, self.sketches.first).pack(encoded.codes)
        return write_shard(self.part, packed, encoded.norms, record)

    def extend(self, record: ShardRecord, file: FileRecord) -> ShardRecord:
        """Add the slices to a shard that it lacks; what it has stays as it is."""
        first, model = 1 + record.further_slices, self.loaded.model
        sequences, (_, norms) = self._sequences(file), read_shard(self.part, record)
        further = encode_slices(model, self.sketches, first, sequences, norms, self.token_budget)
        slices = [*record.slices, *self._write_slices(record.number, first, further)]
        return write_receipt(self.part, record.model_copy(update={"slices": slices}))

    def _sequences(self, file: FileRecord) -> list[Sequence1D]:
        examples = ExampleStore([self.part / file.path])
        return [training_sequence(examples, row) for row in range(len(examples))]

    def _write_slices(
        self, number: int, first: int, codes: UInt8[np.ndarray, "row slice byte"]
    ) -> list[SlicesRecord]:
        return [write_slices(self.part, number, first, codes)] if codes.shape[1] else []

    def encode(self, sequences: Sequence[Sequence1D]) -> Encoded:
        """Codes and whitened norms, from one pass through the model for all slices."""
        index = coded_index(self.codes, self.sketches.first)
        model = self.loaded.model
        return encode_gradients(model, self.sketches, index, sequences, self.token_budget)
