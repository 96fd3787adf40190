"""Finding equal ids and equal rows among many, in 8 bytes a row."""

import hashlib
from array import array
from collections.abc import Callable, Iterable

import numpy as np
from jaxtyping import Int, UInt64


class HashColumn:
    """64-bit hashes of byte strings, in order of their rows."""

    def __init__(self) -> None:
        self._hashes = array("Q")

    def append(self, content: bytes) -> None:
        """Add the next row's content."""
        digest = hashlib.blake2b(content, digest_size=8).digest()
        self._hashes.append(int.from_bytes(digest, "little"))

    def extend(self, contents: Iterable[str]) -> "HashColumn":
        """Add rows of text; returns itself."""
        for content in contents:
            self.append(content.encode())
        return self

    @property
    def values(self) -> UInt64[np.ndarray, "row"]:
        """The hashes."""
        return np.frombuffer(self._hashes, dtype=np.uint64)

    def repeated_rows(self) -> Int[np.ndarray, "repeated"]:
        """Rows whose hash an earlier row has, ascending."""
        _, first, inverse = np.unique(self.values, return_index=True, return_inverse=True)
        rows: np.ndarray = np.flatnonzero(first[inverse] != np.arange(len(inverse)))
        return rows


def first_repeated(column: HashColumn, content: Callable[[int], str]) -> tuple[int, int] | None:
    """The first row whose content an earlier row has, as (earlier, row); None if there is none.

    Args:
        column: hashes of all contents.
        content: reads one row's content, to tell equal contents from equal hashes.
    """
    values = column.values
    for row in column.repeated_rows().tolist():
        wanted = content(row)
        for earlier in np.flatnonzero(values[:row] == values[row]).tolist():
            if content(earlier) == wanted:
                return earlier, row
    return None
