"""Further slices of an index' codes: row by row, in a folder of their own, read for few rows."""

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int, UInt8
from safetensors.numpy import save

from index.errors import IndexCorrupt, IndexMismatch, IndexMissing
from index.files import sha256_of, write_whole
from index.manifest import PartRecord, ShardRecord, SlicesRecord
from index.mapped import map_tensors
from index.parts import part_folder

Codes = UInt8[np.ndarray, "row slice byte"]


FOLDER = "slices"
"""Of all further slices in an index, or a link to where they are, e.g. on a slower disk."""


def slices_path(part: Path, shard: int, first: int) -> Path:
    """Where shard ``shard`` of a part keeps its slices from number ``first`` on."""
    return part.parent.parent / FOLDER / part.name / f"{shard:05d}-{first:03d}.safetensors"


def link_slices(index: Path, target: Path | None) -> None:
    """Have the further slices of an index lie in another folder, from its first one on.

    Args:
        index: folder of the index.
        target: empty or not there; None leaves them where they are, or are to be.

    Raises:
        IndexMismatch: the index has slices elsewhere, or ``target`` holds something else.
        IndexMissing: they lie in a folder that is not there.
    """
    place = index / FOLDER
    check_link(index)
    if target is None or (place.is_symlink() and place.resolve() == target.resolve()):
        return
    if place.exists():
        raise IndexMismatch(
            f"The further slices of {index} lie in {place.resolve()} and stay there; leave "
            f"--refine-dir out."
        )
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise IndexMismatch(
            f"{target} is no empty folder; choose one for the further slices of {index} alone."
        )
    target.mkdir(parents=True, exist_ok=True)
    place.symlink_to(target.resolve(), target_is_directory=True)


def check_link(index: Path) -> None:
    """Raise IndexMissing if the further slices lie in a folder that is not there."""
    place = index / FOLDER
    if place.is_symlink() and not place.exists():
        raise IndexMissing(
            f"The further slices of {index} lie in {place.readlink()}, which is not there; mount "
            f"its disk, or have the link {place} lead to where they are now."
        )


def write_slices(part: Path, shard: int, first: int, codes: Codes) -> SlicesRecord:
    """Write a shard's codes of the slices from number ``first`` on; the shard's own is number 0."""
    content = save({"codes": codes})
    write_whole(slices_path(part, shard, first), content)
    digest = hashlib.sha256(content).hexdigest()
    return SlicesRecord(first=first, count=codes.shape[1], sha256=digest)


def check_slices(part: Path, shard: int, record: SlicesRecord) -> Path:
    """The file of a shard's slices, after checking it against its receipt.

    Raises:
        IndexCorrupt: the file is missing, truncated or changed.
    """
    path = slices_path(part, shard, record.first)
    actual = sha256_of(path) if path.is_file() else "missing"
    if actual != record.sha256:
        raise IndexCorrupt(
            f"{path} is missing, truncated or was changed: its SHA-256 is {actual}, the manifest "
            f"says {record.sha256}; run the build again: it replaces this file, no other."
        )
    return path


class SliceStore:
    """Codes of the further slices of all rows on disk, mapped into memory.

    Args:
        folder: of the index.
        parts: of the index; every shard has the same slices.
    """

    def __init__(self, folder: Path, parts: Sequence[PartRecord]) -> None:
        self._starts: list[int] = []
        self._shards: list[list[Codes]] = []
        start = 0
        for path, shard in _shards(folder, parts):
            files = [slices_path(path, shard.number, record.first) for record in shard.slices]
            self._starts.append(start)
            self._shards.append([map_tensors(file)["codes"] for file in files])
            start += shard.rows

    def read(
        self, rows: Int[np.ndarray, "asked"], count: int
    ) -> UInt8[np.ndarray, "slice asked byte"]:
        """Codes of the slices 1 to ``count`` of rows on disk, in the order of ``rows``."""
        shards = np.searchsorted(self._starts, rows, side="right") - 1
        width = self._shards[0][0].shape[2]
        codes = np.empty((count, len(rows), width), dtype=np.uint8)
        for number in np.unique(shards):
            places = np.flatnonzero(shards == number)
            inside, first = rows[places] - self._starts[number], 0
            for file in self._shards[number]:
                last = min(first + file.shape[1], count)
                for one in range(first, last):
                    codes[one, places] = file[inside, one - first]
                first = last
        return codes


def _shards(folder: Path, parts: Sequence[PartRecord]) -> Iterator[tuple[Path, ShardRecord]]:
    for part in parts:
        for shard in part.shards:
            yield part_folder(folder, part.name), shard
