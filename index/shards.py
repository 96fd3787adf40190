"""Shards of codes and norms; a shard's receipt is written after it and marks it as whole."""

import hashlib
import json
from pathlib import Path

import numpy as np
from jaxtyping import Float, UInt8
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from index.errors import IndexCorrupt
from index.files import sha256_of, write_whole
from index.manifest import FailedRow, ShardRecord


def codes_path(folder: Path, number: int) -> Path:
    """Where shard ``number`` keeps codes and norms."""
    return folder / "shards" / f"{number:05d}.safetensors"


def receipt_path(folder: Path, number: int) -> Path:
    """Where shard ``number`` keeps its receipt."""
    return folder / "shards" / f"{number:05d}.json"


def write_shard(
    folder: Path,
    number: int,
    first_row: int,
    codes: UInt8[np.ndarray, "row byte"],
    norms: Float[np.ndarray, "row"],
    failed: list[FailedRow],
) -> ShardRecord:
    """Write codes and norms, then the receipt.

    Args:
        folder: of the index.
        number: of the shard.
        first_row: row number of its first row.
        codes: one code a row.
        norms: whitened norm of each row's gradient, float32; 0 for failed rows.
        failed: rows that could not be indexed.
    """
    path = codes_path(folder, number)
    content = save({"codes": codes, "norms": norms.astype(np.float32)})
    write_whole(path, content)
    record = ShardRecord(
        number=number,
        first_row=first_row,
        rows=len(codes),
        sha256=hashlib.sha256(content).hexdigest(),
        failed=failed,
    )
    write_whole(receipt_path(folder, number), record.model_dump_json(indent=1).encode())
    return record


def find_receipt(folder: Path, number: int) -> ShardRecord | None:
    """The receipt of a shard that is whole on disk, or None if it must be (re)built."""
    path = receipt_path(folder, number)
    try:
        record = ShardRecord.model_validate(json.loads(path.read_bytes()))
        whole = sha256_of(codes_path(folder, number)) == record.sha256
    except (OSError, ValueError, ValidationError):
        return None
    return record if whole else None


def read_shard(
    folder: Path, record: ShardRecord
) -> tuple[UInt8[np.ndarray, "row byte"], Float[np.ndarray, "row"]]:
    """Codes and norms of a shard, checked against its receipt.

    Raises:
        IndexCorrupt: the file is missing, truncated or changed.
    """
    path = codes_path(folder, record.number)
    mend = "Run the build again: it replaces this shard and keeps the others."
    if not path.is_file():
        raise IndexCorrupt(f"{path} is missing. {mend}")
    actual = sha256_of(path)
    if actual != record.sha256:
        raise IndexCorrupt(
            f"{path} is truncated or was changed: its SHA-256 is {actual}, the manifest says "
            f"{record.sha256}. {mend}"
        )
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise IndexCorrupt(f"{path} is not a safetensors file ({error}). {mend}") from error
    return tensors["codes"], tensors["norms"]
