"""Four bits for every few dimensions, scanned by FAISS's fast-scan kernel in pieces that fit it.

FAISS's own RaBitQ indexes serve the purpose badly. The plain one takes five times what reading the
codes takes. The fast-scan one adds up all dimensions in 16 bits, which overflow silently from 2,048
dimensions on, depending on the query (tests/index/test_onebit.py). This one calls the same kernel
(``faiss::accumulate_to_mem``, fast_scan.h) on ``PIECE`` bytes of codes at a time, with tables whose
sums cannot overflow, and adds the pieces up in 32 bits.

What the sixteen values of four bits stand for is the subclass' business, e.g. signs of four
dimensions.
"""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Float32, UInt8, UInt16

from index.codes.faiss_module import usable_processors
from index.codes.kernel import accumulate_to_mem
from index.errors import IndexCorrupt

PIECE = 256
"""Bytes of codes in a piece: tables of 8 KB, which stay in the first-level cache."""

BLOCK = 32
"""Rows that the kernel looks at together."""

LONG_RUN, SHORT_RUN = 2048, 128
"""Blocks that a thread scans in one go: many for a few queries, so that Python's part is small; few
for more, so that all but the first find them in the processor's cache; see
docs/decisions/2026-11-22-one-bit-scan.md."""

ENCODED_AT_ONCE = 256
"""Rows whose words are chosen together, which bounds the memory."""

QUERIES_AT_ONCE = 4
"""Queries that the kernel takes; it knows up to four."""

ORDER = np.array([0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6, 14, 7, 15])
"""In which the kernel wants the first half of a block's rows (``pq4_pack_codes``)."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """Rows that were added together.

    Attributes:
        codes: packed.
        factors: of each row, a view of them.
    """

    codes: UInt8[np.ndarray, "byte"]
    factors: Float32[np.ndarray, "row"]


@dataclass(frozen=True, kw_only=True)
class Span:
    """Blocks of one part that are scanned in one go.

    Attributes:
        first_row: in the index.
        blocks: how many.
        addresses: where each piece of the first block is.
        factors: of each row.
    """

    first_row: int
    blocks: int
    addresses: list[int]
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
    steps: Float32[np.ndarray, "query 1"]
    offsets: Float32[np.ndarray, "query 1"]


class FourBitIndex:
    """Rows of four-bit words and a factor each, scanned exhaustively.

    A row x is stored as the word nearest in angle to every few of its dimensions, in all ``w(x)``,
    and ``f = |x|^2 / <x, w(x)>``; ``f <y, w(x)>`` estimates its inner product with a query y. The
    error of the tables comes on top: uniform over a step, with a relative variance of about 1e-4 of
    that of one bit. The number of threads and the company that a query or row has do not change its
    estimates.

    Args:
        words: what each value of four bits stands for; the negative of each word is one too.
        dimensions: of the vectors.
        threads: that scan; as many as the process has processors by default.
    """

    def __init__(
        self, words: Float32[np.ndarray, "16 few"], dimensions: int, threads: int | None
    ) -> None:
        self._words = words
        self._dimensions = dimensions
        self._threads = threads or usable_processors()
        self._parts: list[Part] = []
        self._plans: dict[int, list[list[Span]]] = {}
        self._rows = 0

    @property
    def words(self) -> Float32[np.ndarray, "16 few"]:
        """What each value of four bits stands for."""
        return self._words

    @property
    def code_size(self) -> int:
        """Bytes a row: its words, and a factor in float32."""
        return self._width + 4

    @property
    def _width(self) -> int:
        return -(-self._dimensions // (2 * int(self._words.shape[1])))

    @property
    def _padded(self) -> int:
        """Dimensions of whole bytes."""
        return 2 * self._width * int(self._words.shape[1])

    def encode(self, rows: Float[np.ndarray, "row dimension"]) -> UInt8[np.ndarray, "row byte"]:
        """Codes of unit-norm (or zero) rows: words, the low half of a byte first; then the factor.

        Raises:
            ValueError: a row has a NaN or infinite entry.
        """
        if not np.isfinite(rows).all():
            raise ValueError("Cannot encode rows with NaN or infinite entries; leave them out.")
        codes = np.empty((len(rows), self.code_size), dtype=np.uint8)
        for start in range(0, len(rows), ENCODED_AT_ONCE):
            some = slice(start, start + ENCODED_AT_ONCE)
            codes[some] = self._encode(self._by_word(np.asarray(rows[some], dtype=np.float32)))
        return codes

    def _encode(self, x: Float32[np.ndarray, "row word few"]) -> UInt8[np.ndarray, "row byte"]:
        chosen, products = self._choose(x)
        with np.errstate(invalid="ignore"):
            factors = np.square(x).sum((1, 2)) / products.sum(1)
        factors = np.nan_to_num(factors).astype(np.float32)  # 0 for a row of zeros
        halves = chosen[:, ::2] | chosen[:, 1::2] << 4
        return np.concatenate([halves, factors[:, None].view(np.uint8)], axis=1)

    def _choose(
        self, x: Float32[np.ndarray, "row word few"]
    ) -> tuple[UInt8[np.ndarray, "row word"], Float32[np.ndarray, "row word"]]:
        """The word nearest in angle to every few dimensions, and its inner product with them."""
        products = (x.reshape(-1, x.shape[2]) @ self._words.T).reshape(*x.shape[:2], 16)
        return products.argmax(2).astype(np.uint8), products.max(2)

    def decode(self, codes: UInt8[np.ndarray, "row byte"]) -> Float32[np.ndarray, "row dimension"]:
        """What codes by row stand for, factor included."""
        halves = np.stack([codes[:, : self._width] & 15, codes[:, : self._width] >> 4], axis=2)
        rows = self._words[halves].reshape(len(codes), self._padded)[:, : self._dimensions]
        factors: np.ndarray = codes[:, self._width :].copy().view(np.float32)
        return np.asarray(rows * factors)

    def _by_word(
        self, x: Float32[np.ndarray, "row dimension"]
    ) -> Float32[np.ndarray, "row word few"]:
        padded = np.zeros((len(x), 2 * self._width, self._words.shape[1]), dtype=np.float32)
        padded.reshape(len(x), self._padded)[:, : self._dimensions] = x
        return padded

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
        self._parts.append(Part(codes=flat, factors=factors))
        self._rows += rows
        self._plans.clear()

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
        if accumulate_to_mem() is None:
            return self._scan_plainly(queries)
        starts = range(0, len(queries), QUERIES_AT_ONCE)
        tables = [self._tables(queries[s : s + QUERIES_AT_ONCE]) for s in starts]
        result = np.empty((len(queries), self._rows), dtype=np.float32)
        together = min(QUERIES_AT_ONCE, len(queries))
        blocks = self._blocks_at_once(len(queries))
        widths = [last - first for first, last in self._bounds()]
        local = threading.local()

        def prepare() -> None:
            local.sums = _aligned((len(widths) * together * blocks * BLOCK,), np.uint16)

        def work(spans: list[Span]) -> None:
            for start, table in zip(starts, tables, strict=True):
                _scan(spans, widths, table, local.sums, result[start : start + QUERIES_AT_ONCE])

        with ThreadPoolExecutor(self._threads, initializer=prepare) as pool:
            for _ in pool.map(work, self._plan(blocks)):
                pass
        return result

    def _scan_plainly(
        self, queries: Float32[np.ndarray, "query dimension"]
    ) -> Float32[np.ndarray, "query row"]:
        """By decoding, where FAISS's kernel cannot be called."""
        result = np.empty((len(queries), self._rows), dtype=np.float32)
        first = 0
        for part in self._parts:
            codes = self.unpack(part.codes.reshape(-1, self.code_size), len(part.factors))
            for start in range(0, len(codes), ENCODED_AT_ONCE):
                some = codes[start : start + ENCODED_AT_ONCE]
                into = slice(first + start, first + start + len(some))
                result[:, into] = queries @ self.decode(some).T
            first += len(codes)
        return result

    def _bounds(self) -> list[tuple[int, int]]:
        """First and last byte of each piece of a row."""
        step = PIECE
        return [(b, min(b + step, self._width)) for b in range(0, self._width, step)]

    def _blocks_at_once(self, queries: int) -> int:
        longest = LONG_RUN if queries <= QUERIES_AT_ONCE else SHORT_RUN
        share = -(-self._rows // (BLOCK * self._threads))  # so that every thread has work
        return max(1, min(longest, share))

    def _plan(self, length: int) -> list[list[Span]]:
        if length not in self._plans:
            self._plans[length] = list(self._runs(length))
        return self._plans[length]

    def _runs(self, length: int) -> Iterator[list[Span]]:
        """What a thread does in one go: consecutive spans of at most ``length`` blocks together."""
        run: list[Span] = []
        room, first_row = length, 0
        for part in self._parts:
            blocks = -(-len(part.factors) // BLOCK)
            start = 0
            while start < blocks:
                count = min(room, blocks - start)
                run.append(self._span(part, first_row, start, count))
                start, room = start + count, room - count
                if not room:
                    yield run
                    run, room = [], length
            first_row += len(part.factors)
        if run:
            yield run

    def _span(self, part: Part, first_row: int, start: int, blocks: int) -> Span:
        padded = len(part.codes) // self.code_size
        base = part.codes.ctypes.data
        return Span(
            first_row=first_row + start * BLOCK,
            blocks=blocks,
            addresses=[
                base + padded * first + start * BLOCK * (last - first)
                for first, last in self._bounds()
            ],
            factors=part.factors[start * BLOCK : (start + blocks) * BLOCK],
        )

    def _tables(self, queries: Float32[np.ndarray, "query dimension"]) -> Tables:
        """Tables whose entries fit 8 bits, and whose sums over a piece fit 16."""
        few = self._by_word(queries)
        values = (few.reshape(-1, few.shape[2]) @ self._words.T).reshape(*few.shape[:2], 16)
        reach = values.max(2)
        bounds = [slice(2 * first, 2 * last) for first, last in self._bounds()]
        sums = np.stack([2 * reach[:, b].sum(1) / (65535 - 2 * PIECE) for b in bounds])
        span = 2 * reach.max(1)
        span[span == 0] = 1
        levels = span / np.maximum(span / 255, sums.max(0))
        steps = span / (levels // 4 * 4)  # a multiple of 4: exact if all coordinates are equal
        entries = np.rint((values + reach[..., None]) / steps[:, None, None])
        entries = np.minimum(entries, 255).astype(np.uint8).reshape(len(queries), -1, 32)
        pieces = []
        for first, last in self._bounds():
            piece = _aligned((last - first, len(queries), 32), np.uint8)
            piece[:] = entries[:, first:last].transpose(1, 0, 2)
            pieces.append(piece.reshape(-1))
        return Tables(pieces=pieces, steps=steps[:, None], offsets=reach.sum(1)[:, None])


def _pack_piece(
    bits: UInt8[np.ndarray, "padded byte"],
) -> UInt8[np.ndarray, "block byte half 16"]:
    blocks = bits.reshape(-1, BLOCK, bits.shape[1]).transpose(0, 2, 1)
    halves = np.stack([blocks & 15, blocks >> 4], axis=2)[..., [*ORDER, *(ORDER + BLOCK // 2)]]
    packed: UInt8[np.ndarray, "block byte half 16"] = halves[..., :16] | halves[..., 16:] << 4
    return packed


def _scan(
    spans: list[Span],
    widths: list[int],
    tables: Tables,
    memory: UInt16[np.ndarray, "place"],
    result: Float32[np.ndarray, "query row"],
) -> None:
    """Write the estimates of a few queries for the rows of ``spans`` into ``result``.

    ``widths`` are the bytes of each piece of a row; ``memory`` holds the sums of the pieces. Little
    happens in Python between two calls of the kernel, since threads wait for each other there.
    """
    kernel = accumulate_to_mem()
    queries = len(tables.steps)
    places = queries * BLOCK * sum(span.blocks for span in spans)
    sums = memory[: len(widths) * places].reshape(len(widths), places)
    addresses = [table.ctypes.data for table in tables.pieces]
    outputs = [piece.ctypes.data for piece in sums]
    place = 0
    for span in spans:
        rows = span.blocks * BLOCK
        for width, codes, table, into in zip(
            widths, span.addresses, addresses, outputs, strict=True
        ):
            kernel(queries, rows, 2 * width, codes, table, into + 2 * place)
        place += queries * rows
    totals = sums.sum(axis=0, dtype=np.uint32)
    place = 0
    for span in spans:
        rows, count = span.blocks * BLOCK, len(span.factors)
        found = totals[place : place + queries * rows].reshape(queries, rows)[:, :count]
        values = np.multiply(found, tables.steps, dtype=np.float32, casting="same_kind")
        values -= tables.offsets
        values *= span.factors
        result[:, span.first_row : span.first_row + count] = values
        place += queries * rows


def _aligned(shape: tuple[int, ...], dtype: Any) -> Any:
    """An empty array that starts at a multiple of 64 bytes, as the kernel's wide stores like it."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    memory = np.empty(size + 64, dtype=np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + size].view(dtype).reshape(shape)
