"""Changing finished indexes: deleting rows, merging indexes. No model is needed."""

import hashlib
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Literal

from index.errors import IndexCorrupt, IndexMismatch, IndexMissing
from index.examples import ExampleStore, examples_path
from index.files import exclusive, remove_leftovers, write_whole
from index.manifest import (
    FILE_NAME,
    LookRecord,
    Manifest,
    NoiseRecord,
    PartRecord,
    SketchRecord,
)
from index.parts import check_new_ids, example_files, part_folder, text_id
from index.shards import check_shard, codes_path, receipt_path
from index.slices import slices_path

Column = Literal["id", "document"]


def delete_rows(folder: Path, values: Collection[str], column: Column = "id") -> int:
    """Delete the rows whose id (or document) is among ``values``; answers no longer contain them.

    Only the manifest changes, at once: codes and texts stay on disk. Deleted rows cannot be
    brought back other than by appending them anew.

    Args:
        folder: of a finished index.
        values: ids, or documents; the id of a text stands for the windows that it was cut into.
        column: which of the two.

    Returns:
        How many rows were deleted.

    Raises:
        IndexMissing: no finished index, or a value that no row has; nothing is deleted then.
        IndexMismatch: no row would be left.
    """
    with exclusive(folder):
        manifest = Manifest.read(folder)
        wanted, found, parts = set(values), set(), []
        deleted = 0
        for part in manifest.parts:
            rows, names = _matching_rows(folder, part, wanted, column)
            found |= names
            deleted += len(rows)
            parts.append(part.model_copy(update={"deleted": sorted({*part.deleted, *rows})}))
        missing = sorted(wanted - found)
        if missing:
            raise IndexMissing(
                f"No row has the {column} '{missing[0]}', nor {len(missing) - 1} more of the "
                f"{len(wanted)} given; nothing was deleted."
            )
        if all(len(part.deleted) == part.data.rows for part in parts):
            raise IndexMismatch("This would delete every row; remove the index' folder instead.")
        manifest.model_copy(update={"parts": parts}).write(folder)
    return deleted


def _matching_rows(
    folder: Path, part: PartRecord, wanted: set[str], column: Column
) -> tuple[list[int], set[str]]:
    store = ExampleStore(example_files(folder, [part]))
    gone = set(part.deleted)
    rows, found = [], set()
    keys = zip(store.ids(), store.documents(), strict=True)
    for row, (identifier, document) in enumerate(keys):
        names = {document} if column == "document" else {identifier, text_id(identifier)}
        if row not in gone and names & wanted:
            rows.append(row)
            found |= names & wanted
    return rows, found


def merge_indexes(out: Path, folders: Sequence[Path]) -> Manifest:
    """Put the parts of indexes that were built apart into one new index.

    They must share model, tokenizer, factors, sketch (its seed too) and kind of code. Every file is
    checked. The noise on record is, figure by figure, the worst of theirs.

    Args:
        out: a folder that does not exist, or holds an unfinished merge of the same indexes.
        folders: of finished indexes, in the order of their rows.

    Raises:
        IndexMismatch: two of them differ in what they must share, or ``out`` is an index.
        DuplicateIds: two of them have an id in common.
        IndexMissing, IndexCorrupt: one is not finished, or damaged.
    """
    manifests = [Manifest.read(folder) for folder in folders]
    for folder, manifest in zip(folders[1:], manifests[1:], strict=True):
        _check_alike(folders[0], manifests[0], folder, manifest)
    with exclusive(out):
        if (out / FILE_NAME).exists():
            raise IndexMismatch(f"{out} holds an index already; choose another folder.")
        remove_leftovers(out)
        parts: list[PartRecord] = []
        for folder, manifest in zip(folders, manifests, strict=True):
            for part in manifest.parts:
                copied = part.model_copy(update={"name": f"{len(parts):03d}"})
                _copy_part(folder, part, out, copied)
                check_new_ids(out, parts, example_files(out, [copied]))
                parts.append(copied)
        for record in manifests[0].files:
            _copy(folders[0] / record.path, out / record.path, record.sha256)
        sketch = _worst_errors([manifest.sketch for manifest in manifests])
        merged = manifests[0].model_copy(update={"parts": parts, "sketch": sketch})
        merged.write(out)
    return merged


def _check_alike(first: Path, one: Manifest, second: Path, other: Manifest) -> None:
    sides = [
        {
            "model_sha256": m.model.model_sha256,
            "tokenizer_sha256": m.model.tokenizer_sha256,
            "estimator": m.estimator.model_dump(exclude={"skipped"}),
            "slices": m.sketch.slices,
            "sketch": m.sketch.model_dump(exclude={"noise", "later"}),
            "codes": m.codes,
        }
        for m in (one, other)
    ]
    for name, value in sides[0].items():
        if value != sides[1][name]:
            raise IndexMismatch(
                f"{first} and {second} cannot be merged: {name} is {value} in the one and "
                f"{sides[1][name]} in the other. Build them with the same model, factors, "
                f"options and --seed."
            )


def _copy_part(folder: Path, part: PartRecord, out: Path, copied: PartRecord) -> None:
    source, target = part_folder(folder, part.name), part_folder(out, copied.name)
    for shard in part.shards:
        check_shard(source, shard)
        _copy(codes_path(source, shard.number), codes_path(target, shard.number), shard.sha256)
        _copy(receipt_path(source, shard.number), receipt_path(target, shard.number), None)
        for record in shard.slices:
            place = slices_path(target, shard.number, record.first)
            _copy(slices_path(source, shard.number, record.first), place, record.sha256)
        path = examples_path(source, shard.number)
        _copy(path, examples_path(target, shard.number), shard.examples_sha256)
    for path in source.glob("*.json"):
        _copy(path, target / path.name, None)


def _copy(source: Path, target: Path, sha256: str | None) -> None:
    content = source.read_bytes()
    actual = hashlib.sha256(content).hexdigest()
    if sha256 is not None and actual != sha256:
        raise IndexCorrupt(
            f"{source} is truncated or was changed: its SHA-256 is {actual}, the manifest says "
            f"{sha256}. Run its build again."
        )
    write_whole(target, content)


def _worst_errors(sketches: Sequence[SketchRecord]) -> SketchRecord:
    """The sketch that all share, with the worst of their errors after each look."""
    looks = zip(*(sketch.later for sketch in sketches), strict=True)
    later = [
        LookRecord(slices=each[0].slices, noise=_worst([look.noise for look in each]))
        for each in looks
    ]
    noise = _worst([sketch.noise for sketch in sketches])
    return sketches[0].model_copy(update={"noise": noise, "later": later})


def _worst(noises: Sequence[NoiseRecord]) -> NoiseRecord:
    return NoiseRecord(
        predicted=max(noise.predicted for noise in noises),
        measured=max(noise.measured for noise in noises),
        relative=max(noise.relative for noise in noises),
        kurtosis=max(noise.kurtosis for noise in noises),
        pairs=sum(noise.pairs for noise in noises),
    )
