"""One bit a dimension: RaBitQ codes, scanned by FAISS's fast-scan kernel in pieces that fit it.

FAISS's own RaBitQ indexes are of no use here. The plain one takes five times what reading the codes
takes; the fast-scan one adds up all dimensions in 16 bits, which overflow silently from 2,048
dimensions on, depending on the query (tests/test_onebit.py). This one calls the same kernel
(``faiss::accumulate_to_mem``, fast_scan.h) on ``PIECE`` dimensions at a time, with tables whose
sums cannot overflow, and adds the pieces up in 32 bits.
"""

import ctypes
import functools
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Float32, UInt8

from index.errors import IndexCorrupt
from index.faiss_module import import_faiss, usable_processors

PIECE = 2048
"""Dimensions in a piece: tables of 8 KB, which stay in the first-level cache."""

BLOCK = 32
"""Rows that the kernel looks at together."""

LONG_RUN, SHORT_RUN = 2048, 128
"""Blocks that a thread scans in one go: many for a few queries, as memory is fastest in long
stretches; few for more, so that all but the first find them in the cache. Measured at 16,384 bits
(docs/decisions.md, "Search")."""

QUERIES_AT_ONCE = 4
"""Queries that the kernel takes; it knows up to four."""

ORDER = np.array([0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6, 14, 7, 15])
"""In which the kernel wants the first half of a block's rows (``pq4_pack_codes``)."""

SIGNS = 2.0 * np.array([[v >> j & 1 for j in range(4)] for v in range(16)], dtype=np.float32) - 1
"""The -1 and +1 that each value of four bits stands for."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """Rows that were added together: their bits piece by piece, and their factors."""

    pieces: list[UInt8[np.ndarray, "block byte"]]
    factors: Float32[np.ndarray, "row"]


@dataclass(frozen=True, kw_only=True)
class Tables:
    """What a few queries add up to for each value of four bits, in steps of 1 / 255 of the largest.

    Attributes:
        pieces: for the kernel, a table a piece.
        steps: size of a step, by query.
        offsets: what is added up too much, by query.
    """

    pieces: list[UInt8[np.ndarray, "byte"]]
    steps: Float32[np.ndarray, "query"]
    offsets: Float32[np.ndarray, "query"]


class OneBitIndex:
    """Rows of sign bits, scanned exhaustively.

    A row x is stored as ``sign(x)`` and ``f = |x|^2 / |x|_1``; ``f <y, sign(x)>`` estimates its
    inner product with a query y. The error of the tables comes on top: uniform over a step, with a
    relative variance of about 1e-4 of that of one bit. The number of threads and the company that a
    query or row has do not change its estimates.

    Args:
        dimensions: of the vectors.
        threads: that scan; as many as the process has processors by default.
    """

    def __init__(self, dimensions: int, threads: int | None = None) -> None:
        faiss = import_faiss()
        self._dimensions = dimensions
        self._threads = threads or usable_processors()
        self._encoder = faiss.IndexRaBitQ(dimensions, faiss.METRIC_INNER_PRODUCT)
        self._encoder.train(np.zeros((1, dimensions), dtype=np.float32))  # centre at the origin
        self._parts: list[Part] = []
        self._rows = 0

    @property
    def code_size(self) -> int:
        """Bytes a row: its bits, and a factor in float32."""
        return self._width + 4

    @property
    def _width(self) -> int:
        return -(-self._dimensions // 8)

    def encode(self, rows: Float[np.ndarray, "row dimension"]) -> UInt8[np.ndarray, "row byte"]:
        """Codes of unit-norm (or zero) rows: bits in order of dimension, then the factor.

        Raises:
            ValueError: a row has a NaN or infinite entry, which FAISS would accept silently.
        """
        if not np.isfinite(rows).all():
            raise ValueError("Cannot encode rows with NaN or infinite entries; leave them out.")
        codes: np.ndarray = self._encoder.sa_encode(np.ascontiguousarray(rows, dtype=np.float32))
        # FAISS keeps, after the bits, |x - centre|^2 - |x|^2 = 0 and the factor times sqrt(k).
        factors = codes[:, -4:].copy().view(np.float32) / np.float32(self._dimensions**0.5)
        return np.concatenate([codes[:, : self._width], factors.view(np.uint8)], axis=1)

    def pack(self, codes: UInt8[np.ndarray, "row byte"]) -> UInt8[np.ndarray, "padded byte"]:
        """The codes of a shard in the order in which they are scanned, padded to whole blocks.

        All blocks of the first piece, of the second, ...; then all factors. Within a piece of a
        block, the 32 bytes for every eight dimensions lie as ``pq4_pack_codes`` of FAISS has it.
        """
        padded = -(-len(codes) // BLOCK) * BLOCK
        packed = np.zeros((padded, self.code_size), dtype=np.uint8)
        flat = packed.reshape(-1)
        for first, last in self._bounds():
            piece = np.zeros((padded, last - first), dtype=np.uint8)
            piece[: len(codes)] = codes[:, first:last]
            flat[padded * first : padded * last] = _pack_piece(piece).reshape(-1)
        factors = codes[:, self._width :].reshape(-1)
        flat[padded * self._width :][: len(factors)] = factors
        return packed

    def unpack(
        self, packed: UInt8[np.ndarray, "padded byte"], rows: int
    ) -> UInt8[np.ndarray, "row byte"]:
        """The codes by row that ``pack`` was given."""
        flat, padded = packed.reshape(-1), len(packed)
        codes = np.empty((padded, self.code_size), dtype=np.uint8)
        for first, last in self._bounds():
            piece = flat[padded * first : padded * last].reshape(-1, last - first, 2, BLOCK // 2)
            halves = np.empty((*piece.shape[:3], BLOCK), dtype=np.uint8)
            halves[..., ORDER], halves[..., ORDER + BLOCK // 2] = piece & 15, piece >> 4
            bits = (halves[:, :, 0] | halves[:, :, 1] << 4).transpose(0, 2, 1)
            codes[:, first:last] = bits.reshape(padded, last - first)
        codes[:, self._width :] = flat[padded * self._width :].reshape(padded, 4)
        return codes[:rows]

    def add(self, codes: UInt8[np.ndarray, "padded byte"], rows: int) -> None:
        """Append ``rows`` rows by their packed codes, which stay where they are.

        Raises:
            IndexCorrupt: the codes are not of this kind of index, or hold NaN.
        """
        padded = -(-rows // BLOCK) * BLOCK
        if codes.shape != (padded, self.code_size):
            raise IndexCorrupt(
                f"{rows} rows should have codes of {padded} x {self.code_size} bytes, these are "
                f"{' x '.join(map(str, codes.shape))}; the index was built with another kind of "
                f"code or number of dimensions."
            )
        flat = np.ascontiguousarray(codes).reshape(-1)
        factors = flat[padded * self._width :].view(np.float32)[:rows]
        if not np.isfinite(factors).all():
            raise IndexCorrupt("The codes hold NaN or infinite factors; build them again.")
        pieces = [
            flat[padded * first : padded * last].reshape(-1, BLOCK * (last - first))
            for first, last in self._bounds()
        ]
        self._parts.append(Part(pieces=pieces, factors=factors))
        self._rows += rows

    def inner_products(self, query: Float[np.ndarray, "dimension"]) -> Float[np.ndarray, "row"]:
        """Estimated inner product of ``query`` with every row, in order of row."""
        values: Float[np.ndarray, row] = self.scan(query[None])[0]
        return values

    def scan(self, queries: Float[np.ndarray, "query dimension"]) -> Float[np.ndarray, "query row"]:
        """``inner_products`` of many queries; 4 bytes of memory a query and row.

        Raises:
            ValueError: a query has a NaN or infinite entry.
        """
        queries = np.ascontiguousarray(queries, dtype=np.float32)
        if not np.isfinite(queries).all():
            raise ValueError("Cannot search for queries with NaN or infinite entries.")
        starts = range(0, len(queries), QUERIES_AT_ONCE)
        tables = [self._tables(queries[s : s + QUERIES_AT_ONCE]) for s in starts]
        result = np.empty((len(queries), self._rows), dtype=np.float32)
        together = min(QUERIES_AT_ONCE, len(queries))
        blocks = self._blocks_at_once(len(queries))
        local = threading.local()

        def prepare() -> None:
            local.sums = _aligned((len(self._bounds()) * together * blocks * BLOCK,), np.uint16)

        def work(run: tuple[int, Part, slice]) -> None:
            first, part, span = run
            factors = part.factors[span.start * BLOCK : span.stop * BLOCK]
            codes = [piece[span] for piece in part.pieces]
            for start, table in zip(starts, tables, strict=True):
                into = result[start : start + QUERIES_AT_ONCE, first : first + len(factors)]
                _scan(codes, table, factors, local.sums, into)

        with ThreadPoolExecutor(self._threads, initializer=prepare) as pool:
            for _ in pool.map(work, self._runs(blocks)):
                pass
        return result

    def _bounds(self) -> list[tuple[int, int]]:
        """First and last byte of each piece of a row."""
        step = PIECE // 8
        return [(b, min(b + step, self._width)) for b in range(0, self._width, step)]

    def _blocks_at_once(self, queries: int) -> int:
        longest = LONG_RUN if queries <= QUERIES_AT_ONCE else SHORT_RUN
        share = -(-self._rows // (BLOCK * self._threads))  # so that every thread has work
        return max(1, min(longest, share))

    def _runs(self, length: int) -> Iterator[tuple[int, Part, slice]]:
        """Number of the first row, part, and blocks within it, of what a thread does in one go."""
        first = 0
        for part in self._parts:
            for start in range(0, len(part.pieces[0]), length):
                yield first + start * BLOCK, part, slice(start, start + length)
            first += len(part.factors)

    def _tables(self, queries: Float32[np.ndarray, "query dimension"]) -> Tables:
        """Tables whose entries fit 8 bits, and whose sums over a piece fit 16."""
        fours = np.zeros((len(queries), 2 * self._width, 4), dtype=np.float32)
        fours.reshape(len(queries), -1)[:, : self._dimensions] = queries
        reach = np.abs(fours).sum(2)
        bounds = [slice(2 * first, 2 * last) for first, last in self._bounds()]
        sums = np.stack([2 * reach[:, b].sum(1) / (65535 - PIECE // 4) for b in bounds])
        span = 2 * reach.max(1)
        span[span == 0] = 1
        levels = span / np.maximum(span / 255, sums.max(0))
        steps = span / (levels // 4 * 4)  # a multiple of 4: exact if all coordinates are equal
        entries = np.rint((fours @ SIGNS.T + reach[..., None]) / steps[:, None, None])
        entries = np.minimum(entries, 255).astype(np.uint8).reshape(len(queries), -1, 32)
        pieces = []
        for first, last in self._bounds():
            piece = _aligned((last - first, len(queries), 32), np.uint8)
            piece[:] = entries[:, first:last].transpose(1, 0, 2)
            pieces.append(piece.reshape(-1))
        return Tables(pieces=pieces, steps=steps, offsets=reach.sum(1))


def _pack_piece(
    bits: UInt8[np.ndarray, "padded byte"],
) -> UInt8[np.ndarray, "block byte half 16"]:
    blocks = bits.reshape(-1, BLOCK, bits.shape[1]).transpose(0, 2, 1)
    halves = np.stack([blocks & 15, blocks >> 4], axis=2)[..., [*ORDER, *(ORDER + BLOCK // 2)]]
    packed: UInt8[np.ndarray, "block byte half 16"] = halves[..., :16] | halves[..., 16:] << 4
    return packed


def _scan(
    codes: list[UInt8[np.ndarray, "block byte"]],
    tables: Tables,
    factors: Float32[np.ndarray, "row"],
    sums: Any,
    result: Float32[np.ndarray, "query row"],
) -> None:
    """Write the estimates of a few queries for some blocks of rows into ``result``."""
    kernel = _kernel()
    queries, rows = len(tables.steps), len(codes[0]) * BLOCK
    sums = sums[: len(codes) * queries * rows].reshape(len(codes), queries, rows)
    for piece, table, into in zip(codes, tables.pieces, sums, strict=True):
        width = 2 * piece.shape[1] // BLOCK
        kernel(queries, rows, width, piece.ctypes.data, table.ctypes.data, into.ctypes.data)
    totals = sums.sum(axis=0, dtype=np.uint32)[:, : len(factors)]
    np.multiply(totals, tables.steps[:, None], out=result, dtype=np.float32, casting="same_kind")
    result -= tables.offsets[:, None]
    result *= factors


def _aligned(shape: tuple[int, ...], dtype: Any) -> Any:
    """An empty array that starts at a multiple of 64 bytes, as the kernel's wide stores like it."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    memory = np.empty(size + 64, dtype=np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + size].view(dtype).reshape(shape)


@functools.cache
def _kernel() -> Any:
    """``faiss::accumulate_to_mem``, which FAISS exports from C++ but not to Python.

    void accumulate_to_mem(int nq, size_t ntotal2, int nsq, const uint8_t* codes,
    const uint8_t* LUT, uint16_t* accu)

    Raises:
        RuntimeError: this build of FAISS has no such function.
    """
    faiss = import_faiss()
    try:
        library = ctypes.CDLL(faiss.swigfaiss._swigfaiss.__file__)
        function = library["_ZN5faiss17accumulate_to_memEimiPKhS1_Pt"]
    except (AttributeError, OSError) as error:
        raise RuntimeError(
            f"FAISS {faiss.__version__} as installed here has no fast-scan kernel that can be "
            f"called ({error}); install the version that pyproject.toml names."
        ) from error
    pointer = ctypes.c_void_p
    function.argtypes = [ctypes.c_int, ctypes.c_size_t, ctypes.c_int, pointer, pointer, pointer]
    function.restype = None
    return function
