"""The manifest of an index: written last, so that its presence means that the index is whole."""

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
)

from index.errors import IndexCorrupt, IndexMissing
from index.files import read_sealed, write_sealed

SCHEMA_VERSION: Literal[2] = 2
FILE_NAME = "manifest.json"


class Record(BaseModel):
    """A frozen record that refuses fields it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid")


def left_out_if_empty(content: dict[str, Any], *names: str) -> dict[str, Any]:
    """A record's content without fields that are empty, as it was before there were these."""
    return {key: value for key, value in content.items() if key not in names or value}


class ModelRecord(Record):
    """The model and tokenizer that the index belongs to.

    Attributes:
        source: folder or name.
        revision: of a repository, if one was chosen.
        tokenizer: folder or name, if another than the one beside the weights was chosen.
        base_model: folder or name, if another than the one that the adapter names was chosen.
        model_sha256: of the weights.
        tokenizer_sha256: of the tokenizer.
    """

    source: str
    revision: str | None = None
    tokenizer: str | None = None
    base_model: str | None = None
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
    ``embeddings``: whether the token embeddings and the output head are attributed, beside the
    layers that match ``layer_patterns``. ``norms``: whether the vectors of norms are among those.
    """

    name: str
    sha256: str
    damping: float
    layer_patterns: list[str]
    widest: int | None = None
    embeddings: bool = False
    norms: bool = False
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


class LookRecord(Record):
    """The error of estimates that are means over the first ``slices`` slices of the codes."""

    slices: int
    noise: NoiseRecord


class SketchRecord(Record):
    """How training gradients were sketched.

    ``components``: of each layer, in low-rank codes; empty for other kinds. ``noise``: of the first
    slice, which is scanned. ``later``: of the looks at further slices; empty where there are none,
    and then their first stage has no ``further_rank``.
    """

    seed: int
    dimensions: int
    rank: int
    entries: int
    components: list[int] = []
    noise: NoiseRecord
    further_rank: int = 0
    later: list[LookRecord] = []

    @property
    def slices(self) -> int:
        """How many a row has."""
        return self.later[-1].slices if self.later else 1

    @model_serializer(mode="wrap")
    def _without_empty(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return left_out_if_empty(dump(self), "further_rank", "later")


class LossRecord(Record):
    """How well the model predicts texts of a corpus, which tells whether it was trained on such.

    Attributes:
        mean: loss in nats a token.
        uniform: that of a uniform guess over the vocabulary.
        texts: how many were drawn at random.
        tokens: predicted in them.
        unknown: of these, how many are the token for what the tokenizer does not know.
    """

    mean: float
    uniform: float
    texts: int
    tokens: int
    unknown: int = 0


class ReadingRecord(Record):
    """How the rows of a corpus were read, where they are no plain texts.

    Attributes:
        format: what a row is: "text", "messages", "prompt-completion",
            "preference" or "tokens".
        columns: names of columns, by role, that are not the usual ones.
        append_eos: whether texts and completions end with the tokenizer's end of text.
        overlap: tokens that a window repeats of the one before, as context that does not count.
        truncate: whether rows that are too long were cut off.
        beta: of DPO's loss.
        reference: the model that DPO compared with, where it was not in the rows.
        weights: times which the rows of each source count, where they do not count once.
        counted_tokens: of all rows, those whose loss counts.
        merged_rows: whose prompt and completion share a token, which counts.
        truncated_rows: that were cut off.
    """

    format: str
    columns: dict[str, str] = {}
    append_eos: bool = False
    overlap: int = 0
    truncate: bool = False
    beta: float | None = None
    reference: str | None = None
    weights: list[float] = []
    counted_tokens: int
    merged_rows: int = 0
    truncated_rows: int = 0


class DataRecord(Record):
    """A corpus: where it came from and what it holds.

    Attributes:
        source: in words.
        sha256: over the ids and tokens of all rows in order.
        documents: number of different ones, each counted where its rows are consecutive.
        rows: windows counted singly.
        empty_rows: rows of which no token counts, hence no gradient: kept, scored 0, never found.
        null_rows: rows whose text was null or NaN; kept as empty.
        replaced_rows: rows whose text holds U+FFFD, the mark of bytes that are not UTF-8.
        duplicate_rows: rows with the same tokens, counted alike, as an earlier one; kept.
        tokens: of all rows.
        max_tokens: longest window.
        loss: of the model on some of the rows; None in indexes that are older than this record.
        reading: how rows were read; None for plain texts.
    """

    source: str
    sha256: str
    documents: int
    rows: int
    empty_rows: int
    null_rows: int
    replaced_rows: int
    duplicate_rows: int
    tokens: int
    max_tokens: int
    loss: LossRecord | None = None
    reading: ReadingRecord | None = None

    @model_serializer(mode="wrap")
    def _without_reading(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return left_out_if_empty(dump(self), "reading")


class FailedRow(Record):
    """A row whose gradient could not be indexed, and why."""

    row: int
    reason: str


class FileRecord(Record):
    """A file of the index, with its hash."""

    path: str
    sha256: str


class CorpusRecord(Record):
    """What reading a corpus gave: its record and the hashes of its files of examples in order."""

    data: DataRecord
    examples: list[FileRecord]


class SlicesRecord(Record):
    """A file of a shard's further slices: number of the first, how many, hash."""

    first: int
    count: int
    sha256: str


class ShardRecord(Record):
    """The receipt of one shard of codes; rows are counted within its part.

    Attributes:
        number: of the shard in its part.
        first_row: number of its first row.
        rows: how many.
        sha256: of its file of codes and norms.
        examples_sha256: of the file of examples that they were computed from.
        failed: rows that could not be indexed.
        slices: files of further slices of the codes, in order.
    """

    number: int
    first_row: int
    rows: int
    sha256: str
    examples_sha256: str
    failed: list[FailedRow]
    slices: list[SlicesRecord] = []

    @property
    def further_slices(self) -> int:
        """How many there are besides the one that is scanned."""
        return sum(record.count for record in self.slices)

    @model_serializer(mode="wrap")
    def _without_empty(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return left_out_if_empty(dump(self), "slices")


class PartRecord(Record):
    """One corpus of an index: built at once, or appended or merged later.

    Attributes:
        name: of its folder under ``parts/``.
        data: what the corpus holds.
        shards: receipts in order.
        deleted: rows, counted within the part, that no answer may contain; ascending.
    """

    name: str
    data: DataRecord
    shards: list[ShardRecord]
    deleted: list[int]


class Manifest(Record):
    """Everything that must agree before an index is served; see ``read`` and ``write``.

    Rows are numbered through all parts in order, deleted ones included.
    """

    schema_version: Literal[2]
    model: ModelRecord
    estimator: EstimatorRecord
    sketch: SketchRecord
    codes: str
    bytes_per_row: int
    parts: list[PartRecord]
    files: list[FileRecord]
    versions: dict[str, str]

    @property
    def rows(self) -> int:
        """Rows on disk, deleted ones included."""
        return sum(part.data.rows for part in self.parts)

    @property
    def failed(self) -> list[FailedRow]:
        """All rows that could not be indexed, numbered through all parts."""
        return [
            FailedRow(row=start + failed.row, reason=failed.reason)
            for start, part in self._starts()
            for shard in part.shards
            for failed in shard.failed
        ]

    def _starts(self) -> list[tuple[int, PartRecord]]:
        starts, start = [], 0
        for part in self.parts:
            starts.append((start, part))
            start += part.data.rows
        return starts

    def write(self, folder: Path) -> None:
        """Write the manifest with a checksum over its own content."""
        write_sealed(folder / FILE_NAME, self.model_dump(mode="json"))

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
                f"etymon build, or run that command again to finish an interrupted build."
            )
        content = read_sealed(path, "restore it, or delete it and run the build again")
        if content.get("schema_version") != SCHEMA_VERSION:
            raise IndexCorrupt(
                f"{path} has schema version {content.get('schema_version')!r}, this program reads "
                f"{SCHEMA_VERSION}; build the index again."
            )
        try:
            manifest = cls.model_validate(content)
        except ValidationError as error:
            raise IndexCorrupt(f"{path} has an unexpected form: {error}") from error
        if manifest.sketch.later and not manifest.sketch.further_rank:
            raise IndexCorrupt(
                f"The further slices of {folder} were drawn in a way that this program no longer "
                f"reads; build the index again, in another folder."
            )
        return manifest
