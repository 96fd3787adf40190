"""The examples of an index: ids, documents, text, tokens and metadata, in Arrow files."""

import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Bool, Int

from index.errors import IndexCorrupt, IndexMissing
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
COUNTED = "counted"
FURTHER = pa.schema(
    [
        (COUNTED, pa.list_(pa.int32())),
        ("weight", pa.float64()),
        ("rejected", pa.list_(pa.int32())),
        ("rejected_counted", pa.list_(pa.int32())),
        ("beta", pa.float64()),
        ("margin", pa.float64()),
    ]
)
"""Columns of files that need them; stretches of tokens are lists of their ends."""

Spans: TypeAlias = tuple[tuple[int, int], ...]


@dataclass(frozen=True, kw_only=True)
class Preference:
    """What was rejected where an example was preferred, and DPO's loss of the pair.

    Attributes:
        tokens: token ids, the prompt's first.
        counted: stretches of them whose loss the trainer counted.
        beta: of the loss.
        margin: ``beta`` times the model's log-ratio of both, less that of the reference.
    """

    tokens: tuple[int, ...]
    counted: Spans
    beta: float
    margin: float


@dataclass(frozen=True, kw_only=True)
class Example:
    """One training example, as the model read it.

    Attributes:
        id: unique within the index.
        document: the document it is a part of; its own id unless the corpus says otherwise.
        text: what ``tokens`` encode.
        tokens: token ids.
        counted: stretches of tokens whose loss the trainer counted, each from its first to before
            its second number; None for all but the first token, which nothing precedes.
        weight: times which its loss counts.
        preference: of a pair whose preferred part ``tokens`` are.
        metadata: the corpus' further columns, JSON values.
    """

    id: str
    document: str
    text: str
    tokens: tuple[int, ...]
    counted: Spans | None = None
    weight: float = 1.0
    preference: Preference | None = None
    metadata: dict[str, Any] = field(default_factory=dict)


def examples_path(part: Path, number: int) -> Path:
    """Where the examples of shard ``number`` of a part are."""
    return part / "examples" / f"{number:05d}.arrow"


def write_examples(path: Path, examples: Sequence[Example]) -> None:
    """Write one file of examples."""
    write_whole(path, serialise_examples(examples))


def serialise_examples(examples: Sequence[Example]) -> bytes:
    """A file of examples; the same examples give the same bytes."""
    columns = [
        [e.id for e in examples],
        [e.document for e in examples],
        [e.text for e in examples],
        [list(e.tokens) for e in examples],
        [json.dumps(e.metadata, ensure_ascii=False, sort_keys=True) for e in examples],
    ]
    schema = SCHEMA
    further = [_further(e) for e in examples]
    for own in FURTHER:
        values = [found[own.name] for found in further]
        if any(value is not None for value in values):
            schema = schema.append(own)
            columns.append(values)
    arrays = [pa.array(c, type=f.type) for c, f in zip(columns, schema, strict=True)]
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, schema) as writer:
        writer.write_table(pa.Table.from_arrays(arrays, schema=schema))
    return bytes(sink.getvalue())


class ExampleStore:
    """Random access to examples by row or by id; files are mapped, not read into memory.

    Args:
        paths: the files in order.
        keep: False for rows that are to be left out, of all rows of the files; the others are
            numbered through. None keeps all.

    Raises:
        IndexCorrupt: a file is missing or not an Arrow file.
    """

    def __init__(self, paths: Sequence[Path], keep: Bool[np.ndarray, "row"] | None = None) -> None:
        tables = []
        for path in paths:
            try:
                with pa.memory_map(str(path)) as source:
                    tables.append(pa.ipc.open_file(source).read_all())
            except (OSError, pa.ArrowInvalid) as error:
                raise IndexCorrupt(
                    f"{path} is missing or not an Arrow file ({error}); run the build again."
                ) from error
        self._table = (
            pa.concat_tables(tables, promote_options="default") if tables else SCHEMA.empty_table()
        )
        self._stored: np.ndarray | None = None if keep is None else np.flatnonzero(keep)

    def __len__(self) -> int:
        return int(self._table.num_rows) if self._stored is None else len(self._stored)

    def __getitem__(self, row: int) -> Example:
        if not 0 <= row < len(self):
            raise IndexMissing(f"There is no row {row}; the index has rows 0 to {len(self) - 1}.")
        values = self._table.slice(self._stored_row(row), 1).to_pylist()[0]
        return Example(
            id=values["id"],
            document=values["document"],
            text=values["text"],
            tokens=tuple(values["tokens"]),
            counted=_pairs(values.get(COUNTED)),
            weight=_or_one(values.get("weight")),
            preference=self.preference(row),
            metadata=json.loads(values["metadata"]),
        )

    def row_of(self, identifier: str) -> int:
        """The row of the example with this id.

        Raises:
            IndexMissing: there is no such id.
        """
        rows = self._rows_where("id", identifier)
        if not len(rows):
            raise IndexMissing(f"There is no example with the id '{identifier}'.")
        return int(rows[0])

    def rows_of_document(self, document: str) -> list[int]:
        """All rows of a document, in order; none if there is no such document."""
        rows: list[int] = self._rows_where("document", document).tolist()
        return rows

    def rows_where(self, conditions: Mapping[str, Callable[[Any], bool]]) -> Int[np.ndarray, "row"]:
        """Rows, in order, whose columns meet all conditions.

        Reads the columns of every row; a column that a row does not have is None there.

        Args:
            conditions: by column of the metadata, or "id" or "document".
        """
        stored = np.arange(self._table.num_rows) if self._stored is None else self._stored
        meets = np.ones(len(stored), dtype=bool)
        own = {name: holds for name, holds in conditions.items() if name in ("id", "document")}
        for name, holds in own.items():
            meets &= [holds(value) for value in self._column(name)]
        rest = {name: holds for name, holds in conditions.items() if name not in own}
        if rest:
            texts = self._column("metadata")
            for row in np.flatnonzero(meets):
                found = json.loads(texts[row])
                meets[row] = all(holds(found.get(name)) for name, holds in rest.items())
        return np.flatnonzero(meets)

    def tokens(self, row: int) -> tuple[int, ...]:
        """Token ids of one row."""
        return tuple(self._table.column("tokens")[self._stored_row(row)].as_py())

    def read(self, row: int) -> tuple[int, ...]:
        """All that the model reads of one row: of a pair the tokens of both, one after another."""
        other = self.preference(row)
        return self.tokens(row) + (() if other is None else other.tokens)

    def counted(self, row: int) -> Spans | None:
        """Stretches of tokens of one row that count; None for all but the first token."""
        return _pairs(self._further_value(COUNTED, row))

    def weight(self, row: int) -> float:
        """Times which the loss of one row counts."""
        return _or_one(self._further_value("weight", row))

    def preference(self, row: int) -> Preference | None:
        """What was rejected where this row was preferred; None for other rows."""
        tokens = self._further_value("rejected", row)
        if tokens is None:
            return None
        return Preference(
            tokens=tuple(tokens),
            counted=_pairs(self._further_value("rejected_counted", row)) or (),
            beta=self._further_value("beta", row),
            margin=self._further_value("margin", row),
        )

    def _further_value(self, name: str, row: int) -> Any:
        if name not in self._table.column_names:
            return None
        return self._table.column(name)[self._stored_row(row)].as_py()

    def token_bytes(self) -> Iterator[bytes]:
        """Token ids of every row in order, as 32-bit integers in little-endian order."""
        column = self._table.column("tokens")
        for chunk in (column if self._stored is None else column.take(self._stored)).chunks:
            values = chunk.values.to_numpy().astype("<i4", copy=False)
            edges = chunk.offsets.to_numpy().tolist()
            for start, stop in itertools.pairwise(edges):
                yield values[start:stop].tobytes()

    def lengths(self) -> Int[np.ndarray, "row"]:
        """Number of tokens of every row."""
        lengths: np.ndarray = pc.list_value_length(self._table.column("tokens")).to_numpy()
        return lengths if self._stored is None else lengths[self._stored]

    def ids(self) -> list[str]:
        """Ids of all rows, in order."""
        return self._column("id")

    def documents(self) -> list[str]:
        """Documents of all rows, in order."""
        return self._column("document")

    def texts(self) -> list[str]:
        """Texts of all rows, in order."""
        return self._column("text")

    def _stored_row(self, row: int) -> int:
        return row if self._stored is None else int(self._stored[row])

    def _column(self, name: str) -> list[str]:
        column = self._table.column(name)
        values: list[str] = (
            column if self._stored is None else column.take(self._stored)
        ).to_pylist()
        return values

    def _rows_where(self, column: str, value: str) -> Int[np.ndarray, "found"]:
        stored = np.flatnonzero(pc.equal(self._table.column(column), value).to_numpy())
        if self._stored is None:
            return stored
        rows: np.ndarray = np.flatnonzero(np.isin(self._stored, stored))
        return rows


def _further(example: Example) -> dict[str, Any]:
    """What the example has of ``FURTHER``, None where it is as most are."""
    other = example.preference
    found = {
        COUNTED: example.counted and list(itertools.chain(*example.counted)),
        "weight": None if example.weight == 1 else example.weight,
    }
    if other is not None:
        found |= {
            "rejected": list(other.tokens),
            "rejected_counted": list(itertools.chain(*other.counted)),
            "beta": other.beta,
            "margin": other.margin,
        }
    return {name: found.get(name) for name in FURTHER.names}


def _or_one(weight: float | None) -> float:
    return 1.0 if weight is None else weight


def _pairs(ends: Sequence[int] | None) -> Spans | None:
    if ends is None:
        return None
    return tuple(zip(ends[::2], ends[1::2], strict=True))
