"""The rows of a corpus, from wherever they are: one file or many, a folder, a named data set."""

import itertools
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from datasets import DatasetDict, load_dataset, load_from_disk

from service.corpus.source import CorpusSource
from service.corpus.sources import (
    READERS,
    check_array,
    corpus_file,
    places_of,
    refusal,
    saved_by_datasets,
    suffix_of,
    why_unreadable,
    with_exact_numbers,
)


def read_rows(source: CorpusSource) -> Iterator[tuple[dict[str, Any], float]]:
    """All rows in order, those of each file after those of the one before, with their weights.

    Raises:
        ValueError: something cannot be read; names it and says why.
    """
    # What the library's readers log as errors, they raise as well.
    logging.getLogger("datasets.packaged_modules").setLevel(logging.CRITICAL)
    places = [
        (place, corpus_file(place), weight)
        for named, weight in source.weighted
        for place in places_of(named)
    ]
    everything = (
        (row, weight) for place, path, weight in places for row in _rows(source, place, path)
    )
    yield from itertools.islice(everything, source.limit)


def _rows(source: CorpusSource, place: str, path: Path | None) -> Iterator[dict[str, Any]]:
    if path is None and saved_by_datasets(Path(place)):
        yield from _saved(source, place)
        return
    rows = _read(source, place, path)
    if path is not None and READERS[suffix_of(place)] == "json":
        check_array(place, path)
        rows = with_exact_numbers(place, path, rows)
    yield from rows


def _saved(source: CorpusSource, place: str) -> Any:
    try:
        found = load_from_disk(place)
    except (OSError, ValueError) as error:
        raise refusal(place, str(error).rstrip(".")) from error
    if not isinstance(found, DatasetDict):
        return found
    if source.split not in found:
        splits = ", ".join(found)
        raise refusal(place, f"it has no split '{source.split}' but {splits}", "Name one.")
    return found[source.split]


def _read(source: CorpusSource, place: str, path: Path | None) -> Iterator[dict[str, Any]]:
    try:
        yield from _load(source, place, path)
    except (OSError, EOFError, ValueError, RuntimeError) as error:
        raise why_unreadable(place, path, error) from error


def _load(source: CorpusSource, place: str, path: Path | None) -> Any:
    if path is None:
        name, _, configuration = (place, "", "") if Path(place).is_dir() else place.partition(":")
        return load_dataset(name, configuration or None, split=source.split, streaming=True)
    suffix = suffix_of(place)
    return load_dataset(
        READERS[suffix],
        data_files=str(path),
        split="train",
        streaming=True,
        **_reader_options(source, suffix),
    )


def _reader_options(source: CorpusSource, suffix: str) -> dict[str, Any]:
    """Bytes that are not UTF-8 become U+FFFD; ids of a table keep their leading zeros."""
    if READERS[suffix] in ("parquet", "arrow"):
        return {}
    options: dict[str, Any] = {"encoding_errors": "replace"}
    if READERS[suffix] == "json":
        options["encoding"] = "utf8"  # spelt otherwise than its default, the reader decodes itself
    if suffix == ".txt":
        options["encoding"] = "utf-8-sig"  # a mark of byte order is no part of the first line
    if suffix == ".csv":
        named = (source.id_column, source.document_column)
        options["converters"] = {column: str for column in named if column}
    return options
