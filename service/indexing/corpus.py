"""Reading a corpus: any source that the datasets library loads, cut into windows of tokens."""

import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from datasets import load_dataset

from index.examples import Example
from index.files import sha256_of
from service.models import LoadedModel

READERS = {
    ".jsonl": "json",
    ".json": "json",
    ".parquet": "parquet",
    ".csv": "csv",
    ".txt": "text",
}


@dataclass(frozen=True, kw_only=True)
class CorpusSource:
    """Where the training examples are and which columns hold what.

    Attributes:
        data: a .jsonl, .json, .parquet, .csv or .txt file (a line an example), or the name of a
            data set as ``NAME`` or ``NAME:CONFIGURATION``.
        split: of a named data set.
        text_column: the text.
        id_column: unique ids; None numbers the rows.
        document_column: the document that a row belongs to; None takes its id.
        metadata_columns: columns to keep beside the text; None keeps all others.
        limit: read this many rows only; None reads all.
    """

    data: str
    split: str = "train"
    text_column: str = "text"
    id_column: str | None = None
    document_column: str | None = None
    metadata_columns: tuple[str, ...] | None = None
    limit: int | None = None


@dataclass(kw_only=True)
class Dirt:
    """What was wrong with texts, counted while reading.

    Attributes:
        null_rows: null or NaN instead of text; kept as empty rows.
        replaced_rows: holding U+FFFD, the mark of bytes that are not UTF-8; kept as they are.
    """

    null_rows: int = 0
    replaced_rows: int = 0


def read_examples(
    source: CorpusSource, loaded: LoadedModel, max_tokens: int, dirt: Dirt | None = None
) -> Iterator[Example]:
    """Tokenise the corpus; a text of more than ``max_tokens`` tokens is cut into windows.

    Windows follow each other without overlap. Each is an example of its own with the id
    ``ID#wNUMBER``; all name the same document. Texts that tokenise to nothing are kept, as
    examples without gradient, so that nothing is skipped in silence; so are nulls.

    Args:
        source: what to read.
        loaded: the model whose tokenizer is used.
        max_tokens: of a window.
        dirt: where to count what is wrong with texts.

    Raises:
        ValueError: the source cannot be read, or a column is missing.
    """
    if max_tokens < 2 or max_tokens > loaded.context:
        raise ValueError(
            f"max_tokens must be between 2 and the model's context of {loaded.context} tokens, "
            f"got {max_tokens}."
        )
    dirt = dirt or Dirt()
    for number, row in enumerate(_read_rows(source)):
        text = _text(row, source, number, dirt)
        yield from _examples_of_row(number, row, text, source, loaded, max_tokens)


def _text(row: dict[str, Any], source: CorpusSource, number: int, dirt: Dirt) -> str:
    text = _column(row, source.text_column, number)
    if text is None or (isinstance(text, float) and math.isnan(text)):
        dirt.null_rows += 1
        return ""
    if not isinstance(text, str):
        raise ValueError(
            f"Row {number} has {type(text).__name__} in column '{source.text_column}', expected "
            f"text. Remove the row or name another column."
        )
    dirt.replaced_rows += "\ufffd" in text
    return text


def _examples_of_row(
    number: int,
    row: dict[str, Any],
    text: str,
    source: CorpusSource,
    loaded: LoadedModel,
    max_tokens: int,
) -> Iterator[Example]:
    identifier = str(_column(row, source.id_column, number)) if source.id_column else str(number)
    document = source.document_column and _column(row, source.document_column, number)
    roles = {source.text_column, source.id_column, source.document_column}
    keep = source.metadata_columns
    if keep is None:
        keep = tuple(name for name in row if name not in roles)
    metadata = {name: _json_value(_column(row, name, number)) for name in keep}
    tokens = loaded.encode(text)
    windows = [tokens[i : i + max_tokens] for i in range(0, len(tokens), max_tokens)] or [[]]
    for window, ids in enumerate(windows):
        whole = len(windows) == 1
        yield Example(
            id=identifier if whole else f"{identifier}#w{window}",
            document=identifier if document is None else str(document),
            text=text if whole else loaded.tokenizer.decode(ids),
            tokens=tuple(ids),
            metadata=metadata,
        )


def fingerprint_source(source: CorpusSource) -> str:
    """SHA-256 over how the corpus is read and, of a file, its bytes.

    A named data set's content is not hashed here: that would need a download before the first row.

    Raises:
        ValueError: there is no such file.
    """
    facts = {**asdict(source), "data": describe(source)}
    path = Path(source.data)
    if path.suffix in READERS:
        if not path.is_file():
            raise ValueError(f"Cannot read the corpus: there is no file {path.resolve()}.")
        facts["file_sha256"] = sha256_of(path)
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _reader_options(source: CorpusSource, suffix: str) -> dict[str, Any]:
    """Bytes that are not UTF-8 become U+FFFD; ids of a table keep their leading zeros."""
    if suffix == ".parquet":
        return {}
    options: dict[str, Any] = {"encoding_errors": "replace"}
    if READERS[suffix] == "json":
        options["encoding"] = "utf8"  # spelt otherwise than its default, the reader decodes itself
    if suffix == ".csv":
        named = (source.id_column, source.document_column)
        options["converters"] = {column: str for column in named if column}
    return options


def _read_rows(source: CorpusSource) -> Iterator[dict[str, Any]]:
    path = Path(source.data)
    try:
        if path.suffix in READERS:
            if not path.is_file():
                raise ValueError(f"there is no file {path.resolve()}")
            rows = load_dataset(
                READERS[path.suffix],
                data_files=str(path),
                split="train",
                streaming=True,
                **_reader_options(source, path.suffix),
            )
        else:
            name, _, configuration = source.data.partition(":")
            rows = load_dataset(name, configuration or None, split=source.split, streaming=True)
        yield from rows if source.limit is None else rows.take(source.limit)
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"Cannot read the corpus '{source.data}': {error}. Give a file ending in "
            f"{', '.join(READERS)}, or the name of a data set."
        ) from error


def _column(row: dict[str, Any], name: str, number: int) -> Any:
    if name not in row:
        raise ValueError(
            f"Row {number} of the corpus has no column '{name}'; it has {', '.join(sorted(row))}."
        )
    return row[name]


def _json_value(value: Any) -> Any:
    """The value as JSON has it: dates and other objects as text, NaN and infinities as null."""
    return json.loads(json.dumps(value, default=str), parse_constant=lambda _: None)


def describe(source: CorpusSource) -> str:
    """The source as one line for the manifest: a file's name or the data set's."""
    path = Path(source.data)
    return path.name if path.suffix in READERS else f"{source.data} ({source.split})"
