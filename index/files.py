"""Files that are either whole or absent: temporary name, fsync, rename, fsync of the folder."""

import errno
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from index.errors import DiskFull, IndexBusy, IndexCorrupt


def write_whole(path: Path, content: bytes) -> None:
    """Write ``content`` so that a crash at any moment leaves the old file or the new one.

    Raises:
        DiskFull: no room; nothing is left behind.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskFull(
                f"No room on the disk for {path} ({len(content):,} bytes). Free some and run the "
                f"same command again; finished shards are kept."
            ) from error
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_sealed(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON object with a checksum over its own content."""
    document = {**content, "checksum": _checksum(content)}
    write_whole(path, json.dumps(document, indent=1).encode())


def read_sealed(path: Path, mend: str) -> dict[str, Any]:
    """Read what ``write_sealed`` wrote, without the checksum.

    Args:
        path: an existing file.
        mend: what to do if it is damaged, as the end of the error's sentence.

    Raises:
        IndexCorrupt: it is not a JSON object, or was changed after it was written.
    """
    try:
        content: dict[str, Any] = json.loads(path.read_bytes())
        checksum = content.pop("checksum", None)
    except (ValueError, AttributeError, TypeError) as error:
        raise IndexCorrupt(f"{path} is not a JSON object ({error}); {mend}.") from error
    if checksum != _checksum(content):
        raise IndexCorrupt(
            f"{path} was changed after it was written: its checksum is {checksum}, its content "
            f"has {_checksum(content)}; {mend}."
        )
    return content


def _checksum(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files of killed writers; only while nobody else writes in ``folder``.

    Also in folders that it has links to.
    """
    for root in (folder, *(path for path in folder.iterdir() if path.is_symlink())):
        for path in root.rglob(".*.tmp"):
            path.unlink(missing_ok=True)


@contextmanager
def exclusive(folder: Path, name: str = ".lock", *, wait: bool = False) -> Iterator[None]:
    """Hold ``folder`` for one builder; the lock goes with the process, also when it is killed.

    Args:
        folder: created if it does not exist.
        name: of the lock's file; holders of other names do not exclude each other.
        wait: for another holder to finish, instead of refusing.

    Raises:
        IndexBusy: another process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / name)
    try:
        lock.acquire(timeout=-1 if wait else 0)
    except Timeout as error:
        raise IndexBusy(
            f"Another process is writing to {folder}. Wait for it, stop it, or choose another "
            f"folder."
        ) from error
    try:
        yield
    finally:
        lock.release()
