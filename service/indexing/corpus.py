"""Reading a corpus: any source that the datasets library loads, cut into windows of tokens."""

import hashlib
import json
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from datasets import load_dataset

from index.examples import Example
from index.files import sha256_of
from service.indexing.sources import (
    NO_EXAMPLES,
    READERS,
    begins_with_array,
    check_array,
    corpus_file,
    is_one_object,
    kind_of,
    refusal,
    suffix_of,
    why_unreadable,
)
from service.models import LoadedModel


@dataclass(frozen=True, kw_only=True)
class CorpusSource:
    """Where the training examples are and which columns hold what.

    Attributes:
        data: a .jsonl, .json, .parquet, .csv or .txt file (a line an example), a folder of such
            files, or the name of a data set as ``NAME`` or ``NAME:CONFIGURATION``.
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
        rows: all of them.
        null_rows: null or NaN instead of text; kept as empty rows.
        replaced_rows: holding U+FFFD, the mark of bytes that are not UTF-8; kept as they are.
        empty_rows: other rows without a character; kept as empty rows.
        short_rows: other rows of less than two tokens, so that none predicts another; kept, too.
        learnable_rows: of two tokens or more.
    """

    rows: int = 0
    null_rows: int = 0
    replaced_rows: int = 0
    empty_rows: int = 0
    short_rows: int = 0

    learnable_rows: int = 0

    def count(self, text: str | None, tokens: Sequence[int]) -> None:
        """Count one row of ``text``, None for null."""
        self.rows += 1
        self.null_rows += text is None
        self.replaced_rows += text is not None and "\ufffd" in text
        self.empty_rows += text == ""
        self.learnable_rows += len(tokens) > 1
        self.short_rows += bool(text) and len(tokens) < 2


def read_examples(
    source: CorpusSource, loaded: LoadedModel, max_tokens: int, dirt: Dirt | None = None
) -> Iterator[Example]:
    """Tokenise the corpus; a text of more than ``max_tokens`` tokens is cut into windows.

    Windows follow each other without overlap. Each is an example of its own with the id
    ``ID#wNUMBER``; all name the same document. Texts that tokenise to nothing are kept, as
    examples without gradient, so that nothing is skipped in silence; so are nulls. At the end, a
    corpus without any text that a model can learn from is refused.

    Args:
        source: what to read.
        loaded: the model whose tokenizer is used.
        max_tokens: of a window.
        dirt: where to count what is wrong with texts.

    Raises:
        ValueError: the source cannot be read, a column is missing, or there is no row of two
            tokens.
    """
    if max_tokens < 2 or max_tokens > loaded.context:
        raise ValueError(
            f"max_tokens must be between 2 and the model's context of {loaded.context} tokens, "
            f"got {max_tokens}."
        )
    dirt = dirt or Dirt()
    for number, row in enumerate(_read_rows(source)):
        text = _text(row, source, number)
        tokens = loaded.encode(text or "")
        dirt.count(text, tokens)
        yield from _examples_of_row(number, row, text or "", tokens, source, loaded, max_tokens)
    _check_something_to_learn(source, dirt)


def _text(row: dict[str, Any], source: CorpusSource, number: int) -> str | None:
    """The text of a row; None for null and NaN."""
    text = _column(row, source.text_column, number, source)
    if text is None or (isinstance(text, float) and math.isnan(text)):
        return None
    if not isinstance(text, str):
        nested = isinstance(text, list | dict)
        advice = "Write a row's text into a column of its own" if nested else "Remove the row"
        raise ValueError(
            f"Row {number} of the corpus has {kind_of(text)} in column '{source.text_column}', "
            f"expected text. {_hint(source, number)}{advice} or name another column."
        )
    return text


def _check_something_to_learn(source: CorpusSource, dirt: Dirt) -> None:
    """Refuse a corpus of no row, or of rows in which no token follows another."""
    if not dirt.rows:
        raise refusal(source.data, NO_EXAMPLES)
    reasons = {
        f"{dirt.null_rows} without text": dirt.null_rows,
        f"{dirt.empty_rows} of an empty text": dirt.empty_rows,
        f"{dirt.short_rows} of a single token": dirt.short_rows,
    }
    if not dirt.learnable_rows:
        listing = ", ".join(reason for reason, count in reasons.items() if count)
        raise refusal(
            source.data,
            f"there is nothing to learn from in it, because no row has two tokens ({listing})",
            f"Is '{source.text_column}' the column of the texts?",
        )


def _examples_of_row(
    number: int,
    row: dict[str, Any],
    text: str,
    tokens: Sequence[int],
    source: CorpusSource,
    loaded: LoadedModel,
    max_tokens: int,
) -> Iterator[Example]:
    named = source.id_column
    identifier = str(_column(row, named, number, source)) if named else str(number)
    document = source.document_column and _column(row, source.document_column, number, source)
    roles = {source.text_column, source.id_column, source.document_column}
    keep = source.metadata_columns
    if keep is None:
        keep = tuple(name for name in row if name not in roles)
    metadata = {name: _json_value(_column(row, name, number, source)) for name in keep}
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
        ValueError: there is no such file, or it can be seen that it holds no corpus.
    """
    facts = {**asdict(source), "data": describe(source)}
    path = corpus_file(source.data)
    if path is not None:
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
    path = corpus_file(source.data)
    # What the library's readers log as errors, they raise as well.
    logging.getLogger("datasets.packaged_modules").setLevel(logging.CRITICAL)
    if path and READERS[suffix_of(source.data)] == "json" and begins_with_array(path):
        check_array(source.data, path)
    try:
        rows = _load(source, path)
        yield from rows if source.limit is None else rows.take(source.limit)
    except (OSError, ValueError, RuntimeError) as error:
        raise why_unreadable(source.data, path, error) from error


def _load(source: CorpusSource, path: Path | None) -> Any:
    if path is None:
        folder = Path(source.data).is_dir()
        name, _, configuration = (source.data, "", "") if folder else source.data.partition(":")
        return load_dataset(name, configuration or None, split=source.split, streaming=True)
    suffix = suffix_of(source.data)
    return load_dataset(
        READERS[suffix],
        data_files=str(path),
        split="train",
        streaming=True,
        **_reader_options(source, suffix),
    )


def _column(row: dict[str, Any], name: str, number: int, source: CorpusSource) -> Any:
    if name in row:
        return row[name]
    raise ValueError(
        f"Row {number} of the corpus has no column '{name}'; it has {', '.join(sorted(row))}. "
        f"{_hint(source, number)}Name a column that it has."
    )


def _hint(source: CorpusSource, number: int) -> str:
    """What to say beside a fault of the first row if the whole file was taken for one row."""
    if number or not is_one_object(source.data):
        return ""
    return "The file is a single object; give an array of objects, or an object a line. "


def _json_value(value: Any) -> Any:
    """The value as JSON has it: dates and other objects as text, NaN and infinities as null."""
    return json.loads(json.dumps(value, default=str), parse_constant=lambda _: None)


def describe(source: CorpusSource) -> str:
    """The source as one line for the manifest: a file's name or the data set's."""
    return Path(source.data).name if suffix_of(source.data) else f"{source.data} ({source.split})"
