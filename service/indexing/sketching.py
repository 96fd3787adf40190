"""The second step of a build: the gradients of a shard's examples become codes and norms."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float, UInt8

from estimators.model.tokens import Sequence1D
from estimators.sketching.sketch import Sketch
from index.examples import ExampleStore
from index.manifest import FailedRow, FileRecord, ShardRecord
from index.shards import write_shard
from service.coding import coded_index
from service.indexing.encoding import encode_gradients
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
        return encode_gradients(self.loaded.model, self.sketch, index, sequences, self.token_budget)
