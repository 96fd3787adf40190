"""Where training examples are, and how they are to be read."""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args

from index.files import sha256_of
from service.corpus.sources import corpus_file, places_of, saved_by_datasets, suffix_of

Format = Literal["text", "messages", "prompt-completion", "preference", "tokens"]
"""What a row is: a text, a conversation, a prompt with its completion, or with two answers of which
one was preferred, or token ids."""

ROLES: dict[str, str] = {
    "text": "text",
    "messages": "messages",
    "tools": "tools",
    "prompt": "prompt",
    "completion": "completion",
    "chosen": "chosen",
    "rejected": "rejected",
    "ref_chosen_logps": "ref_chosen_logps",
    "ref_rejected_logps": "ref_rejected_logps",
    "input_ids": "input_ids",
    "labels": "labels",
    "attention_mask": "attention_mask",
    "position_ids": "position_ids",
    "seq_lengths": "seq_lengths",
    "weight": "",
}
"""What a column can hold that makes up an example, and the column's usual name.

One with a weight, times which a row counts, has none: it has to be named.
"""


@dataclass(frozen=True, kw_only=True)
class CorpusSource:
    """Where the training examples are and which columns hold what.

    Attributes:
        data: a file (.jsonl, .json, .parquet, .arrow, .csv, or .txt with a line an example; all
            but tables of Arrow and Parquet may be compressed: .gz, .bz2, .xz, .zst), a shell
            pattern of such files, a folder of them, one that ``save_to_disk`` wrote, or the name of
            a data set as ``NAME`` or ``NAME:CONFIGURATION``; or several of these, one after
            another.
        split: of a named or saved data set.
        text_column: the text.
        id_column: unique ids; None numbers the rows.
        document_column: the document that a row belongs to; None takes its id.
        metadata_columns: columns to keep beside the text; None keeps all others.
        limit: read this many rows only; None reads all.
        format: what a row is; None tells by the columns of the first one.
        columns: names of columns by role (``ROLES``) that are not the usual ones; a dot leads into
            nested columns.
        append_eos: end each text and each completion with the tokenizer's end of text.
        overlap: tokens that a window repeats of the one before, as context that does not count.
        truncate: cut a row that is too long off instead of reading its rest as further windows.
        beta: of DPO's loss, for pairs of which one was preferred.
        reference: folder or name of the model that DPO compared with.
        weights: times which the rows of each entry of ``data`` count; empty where all count once.
    """

    data: str | tuple[str, ...]
    split: str = "train"
    text_column: str = "text"
    id_column: str | None = None
    document_column: str | None = None
    metadata_columns: tuple[str, ...] | None = None
    limit: int | None = None
    format: Format | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    append_eos: bool = False
    overlap: int = 0
    truncate: bool = False
    beta: float = 0.1
    reference: str | None = None
    weights: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.format is not None and self.format not in get_args(Format):
            known = ", ".join(get_args(Format))
            raise ValueError(f"A row's format is one of {known}; got '{self.format}'.")
        for role in self.columns:
            if role not in ROLES:
                raise ValueError(
                    f"No column can be named for '{role}'; what columns hold is one of "
                    f"{', '.join(ROLES)}."
                )
        if self.weights and len(self.weights) != len(self.entries):
            raise ValueError(
                f"Of {len(self.entries)} sources {len(self.weights)} have a weight; give one for "
                f"each, in the same order."
            )
        if not all(0 <= weight < math.inf for weight in self.weights):
            raise ValueError(
                f"A source's weight is a number of at least 0, got {min(self.weights)}."
            )
        if self.truncate and self.overlap:
            raise ValueError("A row that is cut off has no windows to overlap; leave one out.")

    @property
    def entries(self) -> tuple[str, ...]:
        """Files, patterns, folders and names as given."""
        return (self.data,) if isinstance(self.data, str) else self.data

    @property
    def weighted(self) -> list[tuple[str, float]]:
        """The entries with their weights."""
        return list(zip(self.entries, self.weights or [1.0] * len(self.entries), strict=True))

    @property
    def name(self) -> str:
        """What was given, for people."""
        return ", ".join(self.entries)

    def column_of(self, role: str) -> str:
        """The name of the column with this role."""
        usual = self.text_column if role == "text" else ROLES[role]
        return self.columns.get(role, usual)

    @property
    def facts(self) -> dict[str, Any]:
        """All that decides how it is read; of what older versions did not know, what is used."""
        usual = {f.name: f.default for f in fields(self)} | {"columns": {}}
        recent = (
            *("format", "columns", "append_eos", "overlap", "truncate"),
            *("beta", "reference", "weights"),
        )
        return {
            key: value
            for key, value in asdict(self).items()
            if key not in recent or value != usual[key]
        }


def fingerprint_source(source: CorpusSource) -> str:
    """SHA-256 over how the corpus is read and, of files, their bytes.

    A named data set's content is not hashed here: that would need a download before the first row.

    Raises:
        ValueError: there is no such file, or it can be seen that it holds no corpus.
    """
    facts = {**source.facts, "data": describe(source)}
    hashes = [sha for place in places_of(source.data) for sha in _hashes(place)]
    if isinstance(source.data, str) and suffix_of(source.data):
        facts["file_sha256"] = hashes[0]
    elif hashes:
        facts["files_sha256"] = hashes
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _hashes(place: str) -> list[str]:
    path = corpus_file(place)
    if path is not None:
        return [sha256_of(path)]
    folder = Path(place)
    return [sha256_of(path) for path in sorted(folder.rglob("*.arrow"))] * saved_by_datasets(folder)


def describe(source: CorpusSource) -> str:
    """The source as one line for the manifest: a file's name or the data set's."""
    if not isinstance(source.data, str):
        return ", ".join(describe(replace(source, data=one, weights=())) for one in source.data)
    return Path(source.data).name if suffix_of(source.data) else f"{source.data} ({source.split})"
