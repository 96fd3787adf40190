"""The first step of a build: a corpus is read once, as a stream, into files of examples."""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from estimators.model.progress import Progress
from index.errors import DuplicateIds
from index.examples import Example, ExampleStore, examples_path, write_examples
from index.files import read_sealed, sha256_of, write_sealed
from index.ids import HashColumn, first_repeated
from index.manifest import CorpusRecord, DataRecord, FileRecord, LossRecord, ReadingRecord
from service.corpus.reading import Dirt, read_examples, sequence_of
from service.corpus.source import CorpusSource, describe
from service.indexing.plan import RECORD_NAME
from service.indexing.plausibility import TextSample, measure_loss
from service.models import LoadedModel


def read_corpus(
    part: Path,
    source: CorpusSource,
    loaded: LoadedModel,
    max_tokens: int,
    rows_per_file: int,
    progress: Progress,
    check_files: Callable[[list[Path]], None],
) -> CorpusRecord:
    """Write ``part``'s files of examples and, after them, their record; at most one file in memory.

    ``check_files`` is called between the two: what it raises leaves the part without a record, so
    that a corrected corpus can take its place.

    Raises:
        DuplicateIds: two rows have the same id.
        ValueError: the corpus cannot be read or has nothing to learn from.
    """
    tally = _Tally(source=source, max_tokens=max_tokens)
    examples = read_examples(source, loaded, max_tokens, tally.dirt)
    files = []
    for number, chunk in enumerate(chunks(progress("read", examples), rows_per_file)):
        path = examples_path(part, number)
        write_examples(path, chunk)
        files.append(FileRecord(path=str(path.relative_to(part)), sha256=sha256_of(path)))
        for example in chunk:
            tally.add(example)
    paths = [part / file.path for file in files]
    check_ids(tally.ids, paths)
    check_files(paths)
    record = CorpusRecord(data=tally.record(measure_loss(loaded, tally.sample)), examples=files)
    write_sealed(part / RECORD_NAME, record.model_dump(mode="json"))
    return record


def find_corpus(part: Path) -> CorpusRecord | None:
    """The record of a corpus whose files are whole on disk, or None if it must be read (again)."""
    try:
        content = read_sealed(part / RECORD_NAME, "it is written again")
        record = CorpusRecord.model_validate(content)
        whole = all(sha256_of(part / file.path) == file.sha256 for file in record.examples)
    except (OSError, ValueError, ValidationError):
        return None
    return record if whole else None


def check_ids(ids: HashColumn, paths: list[Path]) -> None:
    """Raise DuplicateIds if an id comes twice in the files of examples; ``ids`` are its hashes."""
    if not len(ids.repeated_rows()):
        return
    store = ExampleStore(paths)
    repeated = first_repeated(ids, lambda row: store[row].id)
    if repeated is not None:
        earlier, row = repeated
        raise DuplicateIds(
            f"The id '{store[row].id}' comes twice, in rows {earlier} and {row}; ids must be "
            f"unique. Name another id column, or none to number the rows."
        )


@dataclass(kw_only=True)
class _Tally:
    """What is counted while a corpus is read."""

    source: CorpusSource
    max_tokens: int
    dirt: Dirt = field(default_factory=Dirt)
    ids: HashColumn = field(default_factory=HashColumn)
    contents: HashColumn = field(default_factory=HashColumn)
    sample: TextSample = field(default_factory=TextSample)
    rows: int = 0
    empty_rows: int = 0
    documents: int = 0
    tokens: int = 0
    counted: int = 0

    def __post_init__(self) -> None:
        self._digest = hashlib.sha256()
        self._document: str | None = None

    def add(self, example: Example) -> None:
        sequence, other = sequence_of(example), example.preference
        content: list[Any] = [example.tokens]
        if example.counted is not None:
            content.append(example.counted)
        if other is not None:
            content += [other.tokens, other.counted, other.beta]
        self._digest.update(json.dumps([example.id, *content]).encode())
        self.ids.append(example.id.encode())
        self.contents.append(json.dumps(content if len(content) > 1 else content[0]).encode())
        self.rows += 1
        self.empty_rows += sequence.targets == 0
        self.documents += example.document != self._document
        self._document = example.document
        self.tokens += sum(len(member.tokens) for member, _ in sequence.members)
        self.counted += sequence.targets
        self.sample.add(sequence)

    def record(self, loss: LossRecord | None) -> DataRecord:
        return DataRecord(
            source=describe(self.source),
            sha256=self._digest.hexdigest(),
            documents=self.documents,
            rows=self.rows,
            empty_rows=self.empty_rows,
            null_rows=self.dirt.null_rows,
            replaced_rows=self.dirt.replaced_rows,
            duplicate_rows=len(self.contents.repeated_rows()),
            tokens=self.tokens,
            max_tokens=self.max_tokens,
            loss=loss,
            reading=self._reading(),
        )

    def _reading(self) -> ReadingRecord | None:
        """How rows were read; None for texts read in the usual way."""
        facts = self.source.facts
        found = self.dirt.format or "text"
        recent = {"append_eos", "columns", "overlap", "truncate", "weights"}
        if found == "text" and not recent & set(facts):
            return None
        return ReadingRecord(
            format=found,
            columns=dict(self.source.columns),
            append_eos=self.source.append_eos,
            overlap=self.source.overlap,
            truncate=self.source.truncate,
            beta=self.source.beta if found == "preference" else None,
            reference=self.source.reference,
            weights=list(self.source.weights),
            counted_tokens=self.counted,
            merged_rows=self.dirt.merged_rows,
            truncated_rows=self.dirt.truncated_rows,
        )


def chunks(examples: Iterable[Example], size: int) -> Iterator[list[Example]]:
    """The examples in lists of ``size``, the last one shorter."""
    chunk: list[Example] = []
    for example in examples:
        chunk.append(example)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk
