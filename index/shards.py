"""Shards of codes and norms; a shard's receipt is written after it and marks it as whole."""

import hashlib
from pathlib import Path

import numpy as np
from jaxtyping import Float, UInt8
from pydantic import ValidationError
from safetensors.numpy import save

from index.errors import IndexCorrupt
from index.files import read_sealed, sha256_of, write_sealed, write_whole
from index.manifest import ShardRecord
from index.mapped import map_tensors
from index.slices import check_slices

MEND = "run the build again: it replaces this shard and keeps the others"


def codes_path(part: Path, number: int) -> Path:
    """Where shard ``number`` of a part keeps codes and norms."""
    return part / "shards" / f"{number:05d}.safetensors"


def receipt_path(part: Path, number: int) -> Path:
    """Where shard ``number`` of a part keeps its receipt."""
    return part / "shards" / f"{number:05d}.json"


def write_shard(
    part: Path,
    codes: UInt8[np.ndarray, "padded byte"],
    norms: Float[np.ndarray, "row"],
    record: ShardRecord,
) -> ShardRecord:
    """Write codes and norms, then the receipt.

    Args:
        part: folder of the part.
        codes: of all rows, as ``VectorIndex.pack`` puts them in order.
        norms: whitened norm of each row's gradient, float32; 0 for failed rows.
        record: the receipt, whose ``sha256`` is filled in here.
    """
    content = save({"codes": codes, "norms": norms.astype(np.float32)})
    write_whole(codes_path(part, record.number), content)
    record = record.model_copy(update={"sha256": hashlib.sha256(content).hexdigest()})
    return write_receipt(part, record)


def write_receipt(part: Path, record: ShardRecord) -> ShardRecord:
    """Write a shard's receipt, which marks its files as whole."""
    write_sealed(receipt_path(part, record.number), record.model_dump(mode="json"))
    return record


def find_receipt(part: Path, number: int, examples_sha256: str) -> ShardRecord | None:
    """The receipt of a shard that is whole on disk, or None if it must be (re)built.

    Its further slices are whole too, however many it has.

    Args:
        part: folder of the part.
        number: of the shard.
        examples_sha256: hash of the examples that it must have been computed from.
    """
    path = receipt_path(part, number)
    try:
        record = ShardRecord.model_validate(read_sealed(path, MEND))
        whole = sha256_of(codes_path(part, number)) == record.sha256
        for slices in record.slices:
            check_slices(part, number, slices)
    except (OSError, ValueError, ValidationError, IndexCorrupt):
        return None
    return record if whole and record.examples_sha256 == examples_sha256 else None


def check_shard(part: Path, record: ShardRecord) -> Path:
    """The file of a shard, after checking it against its receipt.

    Raises:
        IndexCorrupt: the file is missing, truncated or changed.
    """
    path = codes_path(part, record.number)
    if not path.is_file():
        raise IndexCorrupt(f"{path} is missing; {MEND}.")
    actual = sha256_of(path)
    if actual != record.sha256:
        raise IndexCorrupt(
            f"{path} is truncated or was changed: its SHA-256 is {actual}, the manifest says "
            f"{record.sha256}; {MEND}."
        )
    return path


def read_shard(
    part: Path, record: ShardRecord
) -> tuple[UInt8[np.ndarray, "padded byte"], Float[np.ndarray, "row"]]:
    """Codes and norms of a shard, checked against its receipt and mapped into memory.

    Raises:
        IndexCorrupt: the file is missing, truncated or changed.
    """
    tensors = map_tensors(check_shard(part, record))
    return tensors["codes"], tensors["norms"]
