"""Rows as they are, in float32 or float16, scanned by FAISS where they lie."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8

from index.codes.faiss_module import import_faiss, usable_processors
from index.errors import IndexCorrupt

BLOCK_BYTES = 1 << 22
"""Codes that a thread scans in one go: a batch of queries finds them in the cache again."""


class FlatIndex:
    """Vectors of FAISS's ``IndexFlatCodes``, scanned exhaustively in blocks of rows.

    Codes stay where they are, in an array or in a mapped file: FAISS is shown one block after the
    other. Neither the number of threads nor the other rows change a row's estimates; a batch of
    queries may be multiplied in another order, which changes the last digits.

    Args:
        make: an empty index with the inner-product metric, given the number of dimensions.
        dimensions: of the vectors.
        threads: that scan; as many as the process has processors by default.
    """

    def __init__(
        self, make: Callable[[int], Any], dimensions: int, threads: int | None = None
    ) -> None:
        self._make = make
        self._dimensions = dimensions
        self._threads = threads or usable_processors()
        self._encoder = make(dimensions)
        self._codes: list[UInt8[np.ndarray, "row byte"]] = []
        self._rows = 0

    @property
    def code_size(self) -> int:
        """Bytes a row."""
        return int(self._encoder.sa_code_size())

    def encode(self, rows: Float[np.ndarray, "row dimension"]) -> UInt8[np.ndarray, "row byte"]:
        """Codes of rows.

        Raises:
            ValueError: a row has a NaN or infinite entry, which FAISS would accept silently.
        """
        if not np.isfinite(rows).all():
            raise ValueError("Cannot encode rows with NaN or infinite entries; leave them out.")
        codes: np.ndarray = self._encoder.sa_encode(np.ascontiguousarray(rows, dtype=np.float32))
        return codes

    def pack(self, codes: UInt8[np.ndarray, "row byte"]) -> UInt8[np.ndarray, "row byte"]:
        """The codes of a shard in the order in which they are scanned: as they are."""
        return codes

    def add(self, codes: UInt8[np.ndarray, "row byte"], rows: int) -> None:
        """Append ``rows`` rows by their packed codes, which stay where they are.

        Raises:
            IndexCorrupt: the codes are not of this kind of index.
        """
        if codes.shape != (rows, self.code_size):
            raise IndexCorrupt(
                f"{rows} rows should have codes of {rows} x {self.code_size} bytes, these are "
                f"{' x '.join(map(str, codes.shape))}; the index was built with another kind of "
                f"code or number of dimensions."
            )
        self._codes.append(np.ascontiguousarray(codes))
        self._rows += rows

    def inner_products(self, query: Float[np.ndarray, "dimension"]) -> Float[np.ndarray, "row"]:
        """Inner product of ``query`` with every row, in order of row."""
        values: Float[np.ndarray, row] = self.scan(query[None])[0]
        return values

    def scan(self, queries: Float[np.ndarray, "query dimension"]) -> Float[np.ndarray, "query row"]:
        """``inner_products`` of many queries; 4 bytes of memory a query and row.

        Raises:
            ValueError: a query has a NaN or infinite entry.
            IndexCorrupt: codes hold NaN.
        """
        queries = np.ascontiguousarray(queries, dtype=np.float32)
        if not np.isfinite(queries).all():
            raise ValueError("Cannot search for queries with NaN or infinite entries.")
        result = np.empty((len(queries), self._rows), dtype=np.float32)
        faiss = import_faiss()
        local = threading.local()

        def prepare() -> None:
            faiss.omp_set_num_threads(1)  # of this thread only
            local.index = self._make(self._dimensions)

        def work(block: tuple[int, np.ndarray]) -> None:
            first, codes = block
            show(local.index, faiss.swig_ptr(codes), codes)
            scan_shown(local.index, queries, result[:, first : first + len(codes)])

        with ThreadPoolExecutor(self._threads, initializer=prepare) as pool:
            for _ in pool.map(work, self._blocks()):
                pass
        return result

    def _blocks(self) -> Iterator[tuple[int, UInt8[np.ndarray, "row byte"]]]:
        """First row and codes of each block."""
        size = max(1, BLOCK_BYTES // self.code_size)
        first = 0
        for codes in self._codes:
            for start in range(0, len(codes), size):
                yield first + start, codes[start : start + size]
            first += len(codes)


def scan_shown(
    index: Any,
    queries: Float[np.ndarray, "query dimension"],
    result: Float[np.ndarray, "query row"],
) -> None:
    """Write the inner products of all queries with the rows of ``index`` into ``result``."""
    # A range search below any possible value gives every row without a heap of their size.
    limits, values, labels = index.range_search(queries, -3.0e38)
    if limits[-1] != result.size:
        raise IndexCorrupt(
            f"The scan gave {limits[-1]} of {result.size} inner products; the codes hold NaN. "
            f"Build them again."
        )
    for row, start in zip(result, limits, strict=False):
        row[labels[start : start + len(row)]] = values[start : start + len(row)]


def show(index: Any, pointer: Any, codes: UInt8[np.ndarray, "row byte"]) -> None:
    """Let an ``IndexFlatCodes`` look at codes that stay in NumPy's (or the page cache's) memory.

    FAISS has views for this (``MaybeOwnedVector``), but no constructor of them in Python; their
    fields are set instead, and tests compare with codes that FAISS owns. FAISS aborts the process
    when rows are added to a view, so nothing else may use the index.
    """
    view = index.codes
    view.is_owned = False
    view.view_data, view.view_size = pointer, codes.size
    view.c_ptr, view.c_size = pointer, codes.size
    index.ntotal = len(codes)


def float32(dimensions: int) -> Any:
    """An empty FAISS index of float32 vectors."""
    return import_faiss().IndexFlatIP(dimensions)


def float16(dimensions: int) -> Any:
    """An empty FAISS index of float16 vectors."""
    faiss = import_faiss()
    quantiser = faiss.ScalarQuantizer.QT_fp16
    return faiss.IndexScalarQuantizer(dimensions, quantiser, faiss.METRIC_INNER_PRODUCT)
