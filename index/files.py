"""Files that are either whole or absent: temporary name, fsync, rename, fsync of the folder."""

import errno
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from index.errors import DiskFull, IndexBusy


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


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Hold ``folder`` for one builder; the lock goes with the process, also when it is killed.

    Raises:
        IndexBusy: another process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise IndexBusy(
            f"Another process is writing to {folder}. Wait for it, stop it, or choose another "
            f"folder."
        ) from error
    try:
        yield
    finally:
        lock.release()
