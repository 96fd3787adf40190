"""The examples of an index: ids, documents, text, tokens and metadata, in Arrow files."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from index.errors import DuplicateIds, IndexCorrupt, IndexMissing
from index.files import write_whole

SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("document", pa.string()),
        ("text", pa.string()),
        ("tokens", pa.list_(pa.int32())),
        ("metadata", pa.string()),
    ]
)


@dataclass(frozen=True, kw_only=True)
class Example:
    """One training example, as the model read it.

    Attributes:
        id: unique within the corpus.
        document: the document it is a part of; its own id unless the corpus says otherwise.
        text: what ``tokens`` encode.
        tokens: token ids.
        metadata: the corpus' further columns, JSON values.
    """

    id: str
    document: str
    text: str
    tokens: tuple[int, ...]
    metadata: dict[str, Any] = field(default_factory=dict)


def check_ids(examples: Iterable[Example]) -> None:
    """Raise DuplicateIds if an id comes twice."""
    seen: dict[str, int] = {}
    for row, example in enumerate(examples):
        if seen.setdefault(example.id, row) != row:
            raise DuplicateIds(
                f"The id '{example.id}' comes twice, in rows {seen[example.id]} and {row}; ids "
                f"must be unique. Name another id column, or none to number the rows."
            )


def write_examples(folder: Path, examples: Iterable[Example], rows_per_file: int) -> list[Path]:
    """Write ``folder/examples/NNNNN.arrow``, ``rows_per_file`` rows each."""
    paths: list[Path] = []
    for chunk in _chunks(examples, rows_per_file):
        path = folder / "examples" / f"{len(paths):05d}.arrow"
        write_whole(path, _serialise(chunk))
        paths.append(path)
    return paths


def corpus_sha256(examples: Iterable[Example]) -> str:
    """SHA-256 over ids and tokens in order: two corpora with the same hash give the same index."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(json.dumps([example.id, example.tokens]).encode())
    return digest.hexdigest()


class ExampleStore:
    """Random access to the examples of an index, by row or by id.

    Args:
        paths: the files in order.

    Raises:
        IndexCorrupt: a file is missing or not an Arrow file.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        tables = []
        for path in paths:
            try:
                with pa.memory_map(str(path)) as source:
                    tables.append(pa.ipc.open_file(source).read_all())
            except (OSError, pa.ArrowInvalid) as error:
                raise IndexCorrupt(
                    f"{path} is missing or not an Arrow file ({error}); run the build again."
                ) from error
        self._table = pa.concat_tables(tables) if tables else SCHEMA.empty_table()
        ids = self._table.column("id").to_pylist()
        self._row_of = {identifier: row for row, identifier in enumerate(ids)}

    def __len__(self) -> int:
        return len(self._row_of)

    def __getitem__(self, row: int) -> Example:
        if not 0 <= row < len(self):
            raise IndexMissing(f"There is no row {row}; the index has rows 0 to {len(self) - 1}.")
        values = self._table.slice(row, 1).to_pylist()[0]
        return Example(
            id=values["id"],
            document=values["document"],
            text=values["text"],
            tokens=tuple(values["tokens"]),
            metadata=json.loads(values["metadata"]),
        )

    def row_of(self, identifier: str) -> int:
        """The row of the example with this id.

        Raises:
            IndexMissing: there is no such id.
        """
        try:
            return self._row_of[identifier]
        except KeyError as error:
            raise IndexMissing(f"There is no example with the id '{identifier}'.") from error

    def tokens(self, row: int) -> tuple[int, ...]:
        """Token ids of one row."""
        return tuple(self._table.column("tokens")[row].as_py())

    def texts(self) -> list[str]:
        """Texts of all rows, in order."""
        result: list[str] = self._table.column("text").to_pylist()
        return result


def _chunks(examples: Iterable[Example], size: int) -> Iterator[list[Example]]:
    chunk: list[Example] = []
    for example in examples:
        chunk.append(example)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def _serialise(examples: Sequence[Example]) -> bytes:
    columns = [
        [e.id for e in examples],
        [e.document for e in examples],
        [e.text for e in examples],
        [list(e.tokens) for e in examples],
        [json.dumps(e.metadata, ensure_ascii=False, sort_keys=True) for e in examples],
    ]
    arrays = [pa.array(c, type=f.type) for c, f in zip(columns, SCHEMA, strict=True)]
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, SCHEMA) as writer:
        writer.write_table(pa.Table.from_arrays(arrays, schema=SCHEMA))
    return bytes(sink.getvalue())
