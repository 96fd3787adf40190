"""The parts of an index, each one corpus: where they are, and which of their rows count."""

import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Bool

from index.errors import DuplicateIds, IndexMissing
from index.examples import ExampleStore, examples_path
from index.ids import HashColumn
from index.manifest import Manifest, PartRecord

WINDOW = re.compile(r"#w\d+$")
"""What the id of a window adds to that of its text."""


def part_folder(folder: Path, name: str) -> Path:
    """Where part ``name`` of the index in ``folder`` is."""
    return folder / "parts" / name


def find_manifest(folder: Path) -> Manifest | None:
    """The manifest, or None where no index was finished yet."""
    try:
        return Manifest.read(folder)
    except IndexMissing:
        return None


def example_files(folder: Path, parts: Sequence[PartRecord]) -> list[Path]:
    """The files of examples of ``parts`` in order."""
    return [
        examples_path(part_folder(folder, part.name), shard.number)
        for part in parts
        for shard in part.shards
    ]


def text_id(identifier: str) -> str:
    """The id of the text that a row is a window of; its own id if it is a whole text."""
    return WINDOW.sub("", identifier)


def kept_rows(parts: Sequence[PartRecord], *, failed: bool = True) -> Bool[np.ndarray, "row"]:
    """False for deleted rows, and for failed ones unless these are to be kept."""
    keep = np.ones(sum(part.data.rows for part in parts), dtype=bool)
    start = 0
    for part in parts:
        keep[[start + row for row in part.deleted]] = False
        if not failed:
            keep[[start + f.row for shard in part.shards for f in shard.failed]] = False
        start += part.data.rows
    return keep


def supersede(folder: Path, parts: Sequence[PartRecord], fresh: Sequence[Path]) -> list[PartRecord]:
    """``parts`` with those rows deleted that the files of examples ``fresh`` bring anew.

    Rows are the same if their ids are, windows of one text together: all windows of the old text
    go, however many the new one has.
    """
    return [
        part.model_copy(update={"deleted": sorted({*part.deleted, *rows})})
        for part, rows in _rows_in_common(folder, parts, fresh, text_id)
    ]


def check_new_ids(folder: Path, parts: Sequence[PartRecord], fresh: Sequence[Path]) -> None:
    """Raise DuplicateIds if the files of examples ``fresh`` hold an id that counts in ``parts``."""
    for part, rows in _rows_in_common(folder, parts, fresh, str):
        if rows:
            identifier = ExampleStore(example_files(folder, [part]))[rows[0]].id
            raise DuplicateIds(
                f"The id '{identifier}' is in the index already (row {rows[0]} of part "
                f"{part.name}, {part.data.source}), like {len(rows) - 1} more of the new corpus. "
                f"Supersede the old rows (--supersede), delete them, or give the new ones other "
                f"ids."
            )


def _rows_in_common(
    folder: Path, parts: Sequence[PartRecord], fresh: Sequence[Path], key: Callable[[str], str]
) -> Iterator[tuple[PartRecord, list[int]]]:
    """For each part, its undeleted rows whose key is that of a row of ``fresh``."""
    new = HashColumn().extend(key(i) for i in _ids(fresh)).values
    for part in parts:
        files = example_files(folder, [part])
        old = HashColumn().extend(key(i) for i in _ids(files)).values
        candidates = np.isin(old, new)
        candidates[part.deleted] = False
        if not candidates.any():
            yield part, []
            continue
        wanted = np.isin(new, old[candidates])  # equal hashes are looked at again as text
        keys = {key(i) for i, is_wanted in zip(_ids(fresh), wanted, strict=True) if is_wanted}
        ids = zip(_ids(files), candidates, strict=True)
        yield part, [row for row, (i, found) in enumerate(ids) if found and key(i) in keys]


def _ids(files: Sequence[Path]) -> Iterator[str]:
    for path in files:
        yield from ExampleStore([path]).ids()
