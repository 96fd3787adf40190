"""The manifest of an index: written last, so that its presence means that the index is whole."""

import hashlib
import json
from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from index.errors import IndexCorrupt, IndexMissing
from index.files import write_whole

SCHEMA_VERSION = 1
FILE_NAME = "manifest.json"


class Record(BaseModel):
    """A frozen record that refuses fields it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class ModelRecord(Record):
    """The model and tokenizer that the index belongs to."""

    source: str
    model_sha256: str
    tokenizer_sha256: str


class SkippedRecord(Record):
    """A module whose parameters are not attributed; share of all parameters in [0, 1]."""

    name: str
    kind: str
    parameters: int
    share: float
    reason: str


class EstimatorRecord(Record):
    """The estimator, the layers it attributes and those it leaves out.

    ``widest``: sides of weight matrices with more features are split into blocks; None: no side is.
    """

    name: str
    sha256: str
    damping: float
    layer_patterns: list[str]
    widest: int | None = None
    layers: list[str]
    attributed_share: float
    skipped: list[SkippedRecord]


class NoiseRecord(Record):
    """Standard deviation of the proxy's error, in cosine units.

    The error of a row at cosine c has variance ``noise^2 + (relative * c)^2``: the first stage errs
    more for rows that are like the query. ``noise`` is the larger of ``predicted``, by the sketch's
    own law, and ``measured``, on ``pairs`` pairs of pseudo-queries and rows scored exactly at the
    end of the build; ``relative`` comes from the pairs with the largest cosines.
    """

    predicted: float
    measured: float
    relative: float
    kurtosis: float
    pairs: int


class SketchRecord(Record):
    """How training gradients were sketched."""

    seed: int
    dimensions: int
    rank: int
    entries: int
    noise: NoiseRecord


class DataRecord(Record):
    """The corpus: where it came from and what it holds.

    ``empty_rows`` have no token to predict, hence no gradient: kept, scored 0, never found.
    """

    source: str
    sha256: str
    documents: int
    rows: int
    empty_rows: int
    tokens: int
    max_tokens: int


class FailedRow(Record):
    """A row whose gradient could not be indexed, and why."""

    row: int
    reason: str


class ShardRecord(Record):
    """The receipt of one shard of codes: its rows, its file's hash and what failed in it."""

    number: int
    first_row: int
    rows: int
    sha256: str
    failed: list[FailedRow]


class FileRecord(Record):
    """Another file of the index, with its hash."""

    path: str
    sha256: str


class Manifest(Record):
    """Everything that must agree before an index is served; see ``read`` and ``write``."""

    schema_version: Literal[1]
    model: ModelRecord
    estimator: EstimatorRecord
    sketch: SketchRecord
    codes: str
    bytes_per_row: int
    data: DataRecord
    shards: list[ShardRecord]
    files: list[FileRecord]
    versions: dict[str, str]

    @property
    def failed(self) -> list[FailedRow]:
        """All rows that could not be indexed."""
        return [failed for shard in self.shards for failed in shard.failed]

    def write(self, folder: Path) -> None:
        """Write the manifest with a checksum over its own content."""
        content = self.model_dump(mode="json")
        document = {**content, "checksum": _checksum(content)}
        write_whole(folder / FILE_NAME, json.dumps(document, indent=1).encode())

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Read and check the manifest of the index in ``folder``.

        Raises:
            IndexMissing: there is none, i.e. the index does not exist or was not finished.
            IndexCorrupt: it is not JSON, was edited, or has another schema.
        """
        path = folder / FILE_NAME
        if not path.is_file():
            raise IndexMissing(
                f"No complete index in {folder}: {FILE_NAME} is missing. Build it with "
                f"scripts.build_index, or run that command again to finish an interrupted build."
            )
        try:
            content = json.loads(path.read_bytes())
            checksum = content.pop("checksum", None)
        except (ValueError, AttributeError, TypeError) as error:
            raise IndexCorrupt(f"{path} is not a JSON object ({error}); rebuild it.") from error
        if content.get("schema_version") != SCHEMA_VERSION:
            raise IndexCorrupt(
                f"{path} has schema version {content.get('schema_version')!r}, this program reads "
                f"{SCHEMA_VERSION}; build the index again."
            )
        if checksum != _checksum(content):
            raise IndexCorrupt(
                f"{path} was changed after it was written: its checksum is {checksum}, its content "
                f"has {_checksum(content)}. Restore it, or delete it and run the build again."
            )
        try:
            return cls.model_validate(content)
        except ValidationError as error:
            raise IndexCorrupt(f"{path} has an unexpected form: {error}") from error


def _checksum(content: dict[str, object]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
