"""Vector indexes behind one contract: inner products of queries with every row."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

import numpy as np
from jaxtyping import Float, Int, UInt8

from index.codes.flat import FlatIndex, float16, float32
from index.codes.lowrank import Block, LowRankIndex
from index.codes.onebit import OneBitIndex


class VectorIndex(Protocol):
    """Rows stored as codes; a query's inner product with each of them can be estimated."""

    @property
    def code_size(self) -> int:
        """Bytes a row."""
        ...

    def encode(self, rows: Float[np.ndarray, "row dimension"]) -> UInt8[np.ndarray, "row byte"]:
        """Codes of unit-norm (or zero) rows, each by itself.

        Raises:
            ValueError: a row has a NaN or infinite entry.
        """
        ...

    def pack(self, codes: UInt8[np.ndarray, "row byte"]) -> UInt8[np.ndarray, "padded byte"]:
        """The codes of all rows of a shard in the order in which they are stored and scanned."""
        ...

    def add(self, codes: UInt8[np.ndarray, "padded byte"], rows: int) -> None:
        """Append ``rows`` rows by their packed codes, which stay where they are, e.g. in a file.

        Raises:
            IndexCorrupt: the codes are not of this kind of index.
        """
        ...

    def inner_products(self, query: Float[np.ndarray, "dimension"]) -> Float[np.ndarray, "row"]:
        """Estimated inner product of ``query`` with every row, in order of row."""
        ...

    def scan(self, queries: Float[np.ndarray, "query dimension"]) -> Float[np.ndarray, "query row"]:
        """``inner_products`` of many queries; 4 bytes of memory a query and row."""
        ...


CODES: dict[str, Callable[[int, int | None], VectorIndex]] = {
    "one-bit": OneBitIndex,
    "flat": partial(FlatIndex, float32),
    "half": partial(FlatIndex, float16),
}
"""Kinds of code: one bit a dimension (RaBitQ), float32 (the exact reference), float16."""

LOW_RANK = "low-rank"
"""A further kind of code, of vectors that consist of blocks."""

KINDS = (*CODES, LOW_RANK)
"""All kinds of code."""

DISTORTIONS = {"one-bit": math.pi / 2 - 1, "flat": 0.0, "half": 0.0}
"""Squared length of a code's error at right angles to a unit vector with normal coordinates."""
LAWFUL = tuple(DISTORTIONS)
"""Kinds of code whose errors are those of a random sketch, so that its law bounds them."""


def make_index(
    codes: str, dimensions: int, threads: int | None = None, blocks: Sequence[Block] = ()
) -> VectorIndex:
    """An empty index of one of the ``KINDS``.

    Args:
        codes: kind of code.
        dimensions: of the vectors.
        threads: that scan; as many as the process has processors by default.
        blocks: that the vectors consist of; for low-rank codes, which take the place of dimensions.

    Raises:
        ValueError: no such kind; the message lists them.
    """
    if codes not in KINDS:
        raise ValueError(f"Unknown kind of code '{codes}'; choose one of {', '.join(KINDS)}.")
    if codes == LOW_RANK:
        return LowRankIndex(blocks, threads)
    return CODES[codes](dimensions, threads)


def top_rows(
    index: VectorIndex, queries: Float[np.ndarray, "query dimension"], count: int
) -> list[tuple[Int[np.ndarray, "best"], Float[np.ndarray, "best"]]]:
    """For each query, the ``count`` rows with the largest estimates, and these; best first.

    All rows if there are not so many; ties go to the lower row number. Queries are scanned
    ``QUERIES_AT_ONCE`` at a time, which bounds the memory.
    """
    found = []
    for start in range(0, len(queries), QUERIES_AT_ONCE):
        for values in index.scan(queries[start : start + QUERIES_AT_ONCE]):
            rows = best_rows(values, count)
            found.append((rows, values[rows]))
    return found


QUERIES_AT_ONCE = 64


def best_rows(values: Float[np.ndarray, "row"], count: int) -> Int[np.ndarray, "best"]:
    """Rows with the ``count`` largest values, best first; ties go to the lower row number."""
    count = min(count, len(values))
    if count == 0:
        return np.empty(0, dtype=np.int64)
    threshold = np.partition(values, len(values) - count)[len(values) - count]
    contenders = np.flatnonzero(values >= threshold)
    order = np.argsort(-values[contenders], kind="stable")
    return contenders[order[:count]]
