"""Reading a corpus: any source that the datasets library loads, cut into windows of tokens."""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from estimators.grounds import as_trained
from estimators.model.tokens import Sequence1D
from index.examples import Example
from service.corpus.formats import RowReader, Said
from service.corpus.rows import read_rows
from service.corpus.source import CorpusSource, Format
from service.corpus.sources import NO_EXAMPLES, kind_of, refusal
from service.models import LoadedModel


@dataclass(kw_only=True)
class Dirt:
    """What was wrong with texts, counted while reading.

    Attributes:
        rows: all of them.
        null_rows: null or NaN instead of text; kept as empty rows.
        replaced_rows: holding U+FFFD, the mark of bytes that are not UTF-8; kept as they are.
        empty_rows: other rows without a character; kept as empty rows.
        short_rows: other rows of less than two tokens, so that none predicts another; kept, too.
        uncounted_rows: other rows of which the loss counts no token; kept, too.
        learnable_rows: all others.
        merged_rows: whose prompt and completion share a token, which counts.
        truncated_rows: longer than a window, and cut off.
        format: what rows are.
    """

    rows: int = 0
    null_rows: int = 0
    replaced_rows: int = 0
    empty_rows: int = 0
    short_rows: int = 0
    uncounted_rows: int = 0
    learnable_rows: int = 0
    merged_rows: int = 0
    truncated_rows: int = 0
    format: Format | None = None

    def count(self, said: Said) -> None:
        """Count one row."""
        text, tokens = said.text, said.tokens
        self.rows += 1
        self.null_rows += text is None
        self.replaced_rows += text is not None and "\ufffd" in text
        self.empty_rows += text == ""
        self.short_rows += bool(text) and len(tokens) < 2
        counts = Sequence1D(tokens=tuple(tokens), counted=said.counted).targets > 0
        self.uncounted_rows += len(tokens) > 1 and not counts
        self.learnable_rows += counts
        self.merged_rows += said.merged


def read_examples(
    source: CorpusSource, loaded: LoadedModel, max_tokens: int, dirt: Dirt | None = None
) -> Iterator[Example]:
    """Tokenise the corpus; a row of more than ``max_tokens`` tokens is cut into windows.

    Windows follow each other, without overlap unless one is asked for, whose tokens are context
    then and do not count twice. Each is an example of its own with the id ``ID#wNUMBER``; all name
    the same document. Of documents packed in one row each is an example, ``ID#pNUMBER``. Texts that
    tokenise to nothing are kept, as examples without gradient, so that nothing is skipped in
    silence; so are nulls. At the end, a corpus without any text that a model can learn from is
    refused.

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
    if not 0 <= source.overlap < max_tokens:
        raise ValueError(
            f"The overlap of windows must be from 0 to less than their {max_tokens} tokens, got "
            f"{source.overlap}."
        )
    dirt = dirt or Dirt()
    reader = RowReader(source, loaded, max_tokens)
    for number, (row, weight) in enumerate(read_rows(source)):
        documents = reader.read(row, number)
        dirt.format = reader.format
        for place, said in enumerate(documents):
            dirt.count(said)
            packed = f"#p{place}" if len(documents) > 1 else ""
            example = _example(number, row, said, reader, source, packed)
            example = replace(example, weight=weight * example.weight)
            dirt.truncated_rows += _longest(said) > max_tokens and (
                source.truncate or said.preference is not None
            )
            yield from _windows(example, source, loaded, max_tokens)
    _check_something_to_learn(source, dirt)


def _check_something_to_learn(source: CorpusSource, dirt: Dirt) -> None:
    """Refuse a corpus of no row, or of rows in which no token follows another."""
    if not dirt.rows:
        raise refusal(source.name, NO_EXAMPLES)
    reasons = {
        f"{dirt.null_rows} without text": dirt.null_rows,
        f"{dirt.empty_rows} of an empty text": dirt.empty_rows,
        f"{dirt.short_rows} of a single token": dirt.short_rows,
        f"{dirt.uncounted_rows} of which no token counts": dirt.uncounted_rows,
    }
    if not dirt.learnable_rows:
        listing = ", ".join(reason for reason, count in reasons.items() if count)
        why = "no row has two tokens" if not dirt.uncounted_rows else "no token counts"
        raise refusal(
            source.name,
            f"there is nothing to learn from in it, because {why} ({listing})",
            f"Is '{source.text_column}' the column of the texts?"
            if not dirt.uncounted_rows
            else "Conversations need turns of the assistant, tokens labels other than -100.",
        )


def _example(
    number: int,
    row: dict[str, Any],
    said: Said,
    reader: RowReader,
    source: CorpusSource,
    packed: str,
) -> Example:
    """What a row, or a document packed in it, is as an example, however long."""
    named = source.id_column
    identifier = _identifier(reader.column(row, named, number), named, number) if named else None
    identifier = (str(number) if identifier is None else identifier) + packed
    document = None
    if source.document_column:
        document = reader.column(row, source.document_column, number)
        if document is not None:
            document = _identifier(document, source.document_column, number)
    roles = reader.roles | {source.id_column, source.document_column}
    keep = source.metadata_columns
    if keep is None:
        keep = tuple(name for name in row if name not in roles)
    return Example(
        id=identifier,
        document=identifier if document is None else document,
        text=said.text or "",
        tokens=tuple(said.tokens),
        counted=said.counted,
        weight=reader.weight(row, number),
        preference=said.preference,
        metadata={name: _json_value(reader.column(row, name, number)) for name in keep},
    )


def _identifier(value: Any, column: str, number: int) -> str:
    """An id as it is; one that would have to be changed is refused."""
    if (isinstance(value, str) and value) or type(value) is int:
        return str(value)
    if value is None or value == "" or (isinstance(value, float) and math.isnan(value)):
        raise ValueError(
            f"Row {number} of the corpus has no id in column '{column}'. Give it one, or leave "
            f"the column's option out."
        )
    raise ValueError(
        f"Row {number} of the corpus has {kind_of(value)} ({value}) in column '{column}', expected "
        f"a text or a whole number as its id. Write ids as texts."
    )


def _windows(
    example: Example, source: CorpusSource, loaded: LoadedModel, max_tokens: int
) -> Iterator[Example]:
    """The example in pieces of at most so many tokens; a pair is cut off."""
    other = example.preference
    if other is not None:
        yield replace(
            example,
            tokens=example.tokens[:max_tokens],
            preference=replace(other, tokens=other.tokens[:max_tokens]),
        )
        return
    tokens, step = example.tokens, max_tokens - source.overlap
    if len(tokens) <= max_tokens:
        yield example
        return
    decode = loaded.tokenizer.decode
    for window, start in enumerate(range(0, len(tokens) - source.overlap, step)):
        stop = min(start + max_tokens, len(tokens))
        context = source.overlap if window else 0
        spans = ((0, len(tokens)),) if example.counted is None else example.counted
        cut = [(max(a - start, context), min(b, stop) - start) for a, b in spans]
        counted = tuple(span for span in cut if span[0] < span[1])
        piece = tokens[start:stop]
        yield replace(
            example,
            id=example.id if source.truncate else f"{example.id}#w{window}",
            text=decode(piece),
            tokens=piece,
            counted=None if example.counted is None and not context else counted,
        )
        if source.truncate:
            return


def _json_value(value: Any) -> Any:
    """The value as JSON has it: dates and other objects as text, NaN and infinities as null."""
    return json.loads(json.dumps(value, default=str), parse_constant=lambda _: None)


def sequence_of(example: Example, row: int = 0) -> Sequence1D:
    """An example as its trainer saw it."""
    return as_trained(example.tokens, example.counted, example.weight, example.preference, row)


def _longest(said: Said) -> int:
    other = said.preference
    return max(len(said.tokens), 0 if other is None else len(other.tokens))
