"""What a build is made of, written before its first row: a resumed build must agree with it."""

import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from index.errors import IndexMismatch
from index.files import read_sealed, write_sealed
from index.parts import find_manifest, part_folder

PLAN_NAME = "plan.json"
SLICES_NAME = "slices.json"
MOST_SLICES, USUAL_SLICES = 256, 16
"""At most; and of a new index with one-bit codes if nobody says how many."""
DRAWN = "sixteen of one wide sketch"
"""How further slices are; those of other versions cannot stand beside them."""
RECORD_NAME = "corpus.json"
"""Written when the corpus of a part was read."""

OF_THE_INDEX = (
    "model_sha256",
    "tokenizer_sha256",
    "factors_sha256",
    "damping",
    "dimensions",
    "rank",
    "codes",
    "seed",
)
"""Entries of a plan in which all parts of an index agree."""


def settle_plan(folder: Path, plan: Mapping[str, Any], *, append: bool) -> tuple[str, int]:
    """Find the part that ``plan`` belongs to, or begin one.

    A part whose corpus was not read to its end does not bind: nothing was built from it.

    Args:
        folder: of the index.
        plan: settings and hashes of inputs; a ``seed`` of None agrees with any.
        append: whether another corpus may be added to what is there.

    Returns:
        The part's name and the sketch's seed.

    Raises:
        IndexMismatch: the folder holds a build with other inputs or settings.
        IndexCorrupt: a plan was damaged.
    """
    paths = sorted(folder.glob(f"parts/*/{PLAN_NAME}"))
    found = {p.parent.name: _read(p) for p in paths if (p.parent / RECORD_NAME).is_file()}
    for name, other in found.items():
        if not _differences(plan, other, plan):
            return name, int(other["seed"])
    if not found:
        seed = secrets.randbits(62) if plan["seed"] is None else plan["seed"]
        return _begin(folder, "000", plan, seed)
    first = next(iter(found.values()))
    if not append:
        raise IndexMismatch(
            f"{folder} holds a build with other inputs or settings "
            f"({_differences(plan, first, plan)}). Repeat them, choose another folder, or add "
            f"the corpus to the index that is there with --append."
        )
    _check_append(folder, plan, found)
    return _begin(folder, f"{len(found):03d}", plan, int(first["seed"]))


def settle_slices(folder: Path, wanted: int | None, codes: str) -> int:
    """``planned_slices``, kept for builds that go on later.

    A file beside the parts holds the number where it is more than one, from before the first
    gradient on.
    """
    slices = planned_slices(folder, wanted, codes)
    if slices > 1:
        write_sealed(folder / SLICES_NAME, {"slices": slices, "drawn": DRAWN})
    return slices


def planned_slices(folder: Path, wanted: int | None, codes: str) -> int:
    """How many slices the rows of an index are to have.

    Args:
        folder: of the index.
        wanted: None takes as many as it has or was to have, the usual number if it is new.
        codes: kind of code.

    Raises:
        IndexMismatch: it has more, or was to have more.
        IndexCorrupt: that file was damaged.
        ValueError: out of range, or not to be had with this kind of code.
    """
    path, manifest = folder / SLICES_NAME, find_manifest(folder)
    known = 1 if manifest is None else manifest.sketch.slices
    usual = USUAL_SLICES if manifest is None and codes == "one-bit" else known
    if path.is_file():
        begun = _read(path)
        if begun.get("drawn") != DRAWN:
            raise IndexMismatch(
                f"The further slices of {folder} were begun by another version, which drew them in "
                f"another way; build the index in another folder."
            )
        known = usual = max(known, int(begun["slices"]))
    slices = usual if wanted is None else wanted
    if not 1 <= slices <= MOST_SLICES:
        raise ValueError(f"An index has from 1 to {MOST_SLICES} slices, {slices} were asked for.")
    if slices > 1 and codes != "one-bit":
        raise ValueError(f"Only one-bit codes have slices, this index has {codes} codes.")
    if slices < known:
        raise IndexMismatch(
            f"{folder} has {known} slices or was begun with as many, {slices} were asked for; "
            f"slices can only be added. Leave --slices out, or choose another folder."
        )
    return slices


def _check_append(folder: Path, plan: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    manifest = find_manifest(folder)
    finished = set() if manifest is None else {part.name for part in manifest.parts}
    for name, other in found.items():
        if name not in finished:
            raise IndexMismatch(
                f"A build of {part_folder(folder, name)} was not finished "
                f"({_differences(plan, other, plan)}). Repeat its command first, or remove that "
                f"folder."
            )
        differences = _differences(plan, other, OF_THE_INDEX)
        if differences:
            raise IndexMismatch(
                f"Cannot append to {folder}: all parts of an index share these settings "
                f"({differences}). Repeat them, or build another index."
            )


def _begin(folder: Path, name: str, plan: Mapping[str, Any], seed: int) -> tuple[str, int]:
    path = part_folder(folder, name) / PLAN_NAME
    if path.is_file() and not _differences(plan, begun := _read(path), plan):
        return name, int(begun["seed"])
    write_sealed(path, {**plan, "seed": seed})
    return name, seed


def _read(path: Path) -> dict[str, Any]:
    return read_sealed(path, f"restore it, or remove {path.parent} and build again")


def _differences(plan: Mapping[str, Any], found: Mapping[str, Any], keys: Any) -> str:
    changed = sorted(
        key
        for key in keys
        if plan[key] != found.get(key) and not (key == "seed" and plan[key] is None)
    )
    return "; ".join(f"{key}: {found.get(key)} -> {plan[key]}" for key in changed)
