"""Low-rank codes: signs of the leading singular vectors of each layer's block.

A gradient is a sum of few outer products that matter, so that the leading factors of a layer's
block hold most of what ranks examples: at 2 KB an example they find about what signs of a random
sketch find at 8 KB (docs/decisions/2026-11-25-low-rank-codes.md). What the factors leave out is not
random, though: a sketch's law says nothing of the error, and these codes carry no sketch
certificate. LoRIF stores factors of whole layers in half precision; here they are of whitened,
randomly reduced blocks, one bit a coordinate.
"""

import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np
from jaxtyping import Float, Float32, UInt8
from threadpoolctl import threadpool_limits

from index.codes.faiss_module import usable_processors
from index.errors import IndexCorrupt

SCALE_BYTES = 2
ROUNDS = 2
"""Of subspace iteration."""
RANK = 1e-5
"""Squared singular values below so much of the largest are taken for rounding."""
SPARE = 3
"""Further columns of the iterated subspace."""
SEED = 20261125
"""Of its first guess."""
ENCODED_AT_ONCE = 16
"""Rows that a thread encodes together."""
SCANNED_AT_ONCE = 512
"""Rows that a thread decodes together."""
LEFT_OUT = 1e-3
"""Share of a query's energy in a block that may be left out of a scan: leaving out ten times as
much lowered recall by 0.005 (docs/decisions/2026-11-25-low-rank-codes.md)."""


one_thread_each = partial(threadpool_limits, limits=1, user_api="blas")
"""Threads of ours and threads of NumPy's matrix products wait for each other for long."""


@dataclass(frozen=True, kw_only=True)
class Block:
    """A layer's part of a vector: a matrix of rows x columns, and how many factors are kept."""

    rows: int
    columns: int
    components: int

    @property
    def size(self) -> int:
        """Entries in a vector."""
        return self.rows * self.columns

    @property
    def code_size(self) -> int:
        """Bytes of a code."""
        return self.components * component_size(self.rows, self.columns)


def component_size(rows: int, columns: int) -> int:
    """Bytes of one pair of factors and its scale."""
    return -(-rows // 8) - (-columns // 8) + SCALE_BYTES


def allocate(
    shapes: Sequence[tuple[int, int]], energies: Sequence[float], size: int
) -> tuple[Block, ...]:
    """Share out at most ``size`` bytes a row among the blocks.

    A block's i-th component is taken to hold energy in proportion to 1 / i; the next one always
    goes where it holds most for its bytes. (Shares measured on a corpus recalled no more.)

    Args:
        shapes: rows and columns of each block.
        energies: expected squared norm of each, in any unit.
        size: bytes.

    Raises:
        ValueError: not even one component fits.
    """
    costs = [component_size(*shape) for shape in shapes]
    counts = [0] * len(shapes)
    left = size
    while True:
        fitting = [i for i, cost in enumerate(costs) if cost <= left and counts[i] < min(shapes[i])]
        if not fitting:
            break
        best = max(fitting, key=lambda i: energies[i] / (counts[i] + 1) / costs[i])
        counts[best] += 1
        left -= costs[best]
    if not any(counts):
        raise ValueError(
            f"Low-rank codes of {size} bytes hold no component; the smallest takes {min(costs)}. "
            f"Choose more dimensions or a smaller rank."
        )
    return tuple(
        Block(rows=r, columns=c, components=n) for (r, c), n in zip(shapes, counts, strict=True)
    )


class LowRankIndex:
    """Rows as signs of the leading factors of their blocks, scanned by matrix products.

    ``sum_i s_i u_i^T Q v_i`` over all components estimates a row's inner product with a query of
    blocks Q; all s_i of a row have a common factor that makes its estimate of itself exact, as in
    RaBitQ (without it large inner products come out at a third). A row's company changes nothing of
    its code, and its estimates in the last digits at most. Rows that differ by rounding have codes
    that differ in the signs of factors' entries next to 0, if at all.

    Args:
        blocks: that a vector consists of, in order.
        threads: that encode and scan; as many as the process has processors by default.
    """

    def __init__(self, blocks: Sequence[Block], threads: int | None = None) -> None:
        self._blocks = tuple(blocks)
        self._dimensions = sum(block.size for block in blocks)
        self._threads = threads or usable_processors()
        self._parts: list[UInt8[np.ndarray, "row byte"]] = []

    @property
    def code_size(self) -> int:
        """Bytes a row."""
        return sum(block.code_size for block in self._blocks)

    def encode(self, rows: Float[np.ndarray, "row dimension"]) -> UInt8[np.ndarray, "row byte"]:
        """Codes of unit-norm (or zero) rows, each by itself.

        Raises:
            ValueError: a row has a NaN or infinite entry.
        """
        if not np.isfinite(rows).all():
            raise ValueError("Cannot encode rows with NaN or infinite entries; leave them out.")
        rows = np.asarray(rows, dtype=np.float32)
        codes = np.empty((len(rows), self.code_size), dtype=np.uint8)

        def work(start: int) -> None:
            some = slice(start, start + ENCODED_AT_ONCE)
            places = list(self._places())
            found = [
                _encode_block(rows[some, entries].reshape(-1, b.rows, b.columns), b.components)
                for b, entries, _ in places
            ]
            whole = np.square(rows[some]).sum(1)
            held = np.sum([code.held for code in found], axis=0)
            factor = np.divide(whole, held, out=np.zeros_like(whole), where=held > 0)
            for (_, _, place), code in zip(places, found, strict=True):
                codes[some, place] = code.packed(factor)

        with one_thread_each(), ThreadPoolExecutor(self._threads) as pool:
            for _ in pool.map(work, range(0, len(rows), ENCODED_AT_ONCE)):
                pass
        return codes

    def decode(self, codes: UInt8[np.ndarray, "row byte"]) -> Float32[np.ndarray, "row dimension"]:
        """What codes stand for."""
        result = np.zeros((len(codes), self._dimensions), dtype=np.float32)
        for block, entries, place in self._places():
            u, v, scales = _factors(codes[:, place], block)
            weighted = (u * scales[..., None]).transpose(0, 2, 1)
            result[:, entries] = np.matmul(weighted, v).reshape(len(codes), -1)
        return result

    def pack(self, codes: UInt8[np.ndarray, "row byte"]) -> UInt8[np.ndarray, "row byte"]:
        """The codes of a shard in the order in which they are scanned: as they are."""
        return codes

    def add(self, codes: UInt8[np.ndarray, "row byte"], rows: int) -> None:
        """Append ``rows`` rows by their codes, which stay where they are.

        Raises:
            IndexCorrupt: the codes are not of this kind of index, or hold NaN.
        """
        if codes.shape != (rows, self.code_size):
            raise IndexCorrupt(
                f"{rows} rows should have codes of {rows} x {self.code_size} bytes, these are "
                f"{' x '.join(map(str, codes.shape))}; the index was built with another kind of "
                f"code or other sizes."
            )
        for block, _, place in self._places():
            if not np.isfinite(_scales(codes[:, place], block)).all():
                raise IndexCorrupt("The codes hold NaN or infinite scales; build them again.")
        self._parts.append(codes)

    def inner_products(self, query: Float[np.ndarray, "dimension"]) -> Float[np.ndarray, "row"]:
        """Estimated inner product of ``query`` with every row, in order of row."""
        values: Float[np.ndarray, row] = self.scan(query[None])[0]
        return values

    def scan(self, queries: Float[np.ndarray, "query dimension"]) -> Float[np.ndarray, "query row"]:
        """``inner_products`` of many queries; 4 bytes of memory a query and row.

        Of each block of a query, the leading singular vectors are used that hold all but
        ``LEFT_OUT`` of its energy.

        Raises:
            ValueError: a query has a NaN or infinite entry.
        """
        queries = np.ascontiguousarray(queries, dtype=np.float32)
        if not np.isfinite(queries).all():
            raise ValueError("Cannot search for queries with NaN or infinite entries.")
        result = np.zeros((len(queries), sum(map(len, self._parts))), dtype=np.float32)
        sides = [
            [
                _leading(query[entries].reshape(block.rows, block.columns))
                for block, entries, _ in self._places()
            ]
            for query in queries
        ]

        def work(chunk: tuple[int, np.ndarray]) -> None:
            first, codes = chunk
            for number, (block, _, place) in enumerate(self._places()):
                u, v, scales = _factors(codes[:, place], block)
                u, v = u.reshape(-1, block.rows), v.reshape(-1, block.columns)
                for sums, mine in zip(result, sides, strict=True):
                    left, right = mine[number]
                    products = np.einsum("ij,ij->i", u @ left, v @ right).reshape(scales.shape)
                    sums[first : first + len(codes)] += (products * scales).sum(1)

        with one_thread_each(), ThreadPoolExecutor(self._threads) as pool:
            for _ in pool.map(work, self._chunks()):
                pass
        return result

    def _chunks(self) -> Iterator[tuple[int, UInt8[np.ndarray, "row byte"]]]:
        first = 0
        for codes in self._parts:
            for start in range(0, len(codes), SCANNED_AT_ONCE):
                yield first + start, codes[start : start + SCANNED_AT_ONCE]
            first += len(codes)

    def _places(self) -> Iterator[tuple[Block, slice, slice]]:
        """Each block that is coded, its entries in a vector and its bytes in a code."""
        entry = byte = 0
        for block in self._blocks:
            ends = entry + block.size, byte + block.code_size
            if block.components:
                yield block, slice(entry, ends[0]), slice(byte, ends[1])
            entry, byte = ends


def _leading(
    block: Float32[np.ndarray, "r c"],
) -> tuple[Float32[np.ndarray, "r kept"], Float32[np.ndarray, "c kept"]]:
    """Scaled left and right singular vectors whose product is the block, but for ``LEFT_OUT``."""
    u, s, v = np.linalg.svd(block, full_matrices=False)
    rest = np.cumsum(np.square(s, dtype=np.float64)[::-1])[::-1]
    kept = int((rest > LEFT_OUT * rest[0]).sum())
    return np.ascontiguousarray(u[:, :kept] * s[:kept]), np.ascontiguousarray(v[:kept].T)


@dataclass(frozen=True, kw_only=True)
class _BlockCode:
    """Factors of one block of some rows.

    Attributes:
        left: signs of the left factors.
        right: of the right ones.
        scales: of the components, times the root of the block's size.
        held: inner product of the block with what the factors stand for.
    """

    left: Float32[np.ndarray, "row component r"]
    right: Float32[np.ndarray, "row component c"]
    scales: Float32[np.ndarray, "row component"]
    held: Float32[np.ndarray, "row"]

    def packed(self, factor: Float32[np.ndarray, "row"]) -> UInt8[np.ndarray, "row byte"]:
        """Signs in bits, left ones first; then the scales times ``factor`` in float16."""
        bits = [np.packbits(s > 0, axis=2, bitorder="little") for s in (self.left, self.right)]
        scales = (self.scales * factor[:, None]).astype(np.float16).view(np.uint8)
        return np.concatenate([p.reshape(len(factor), -1) for p in (*bits, scales)], axis=1)


def _encode_block(x: Float32[np.ndarray, "row r c"], components: int) -> _BlockCode:
    """Signs of the leading factors.

    Each right factor is what the signs of its left one find in what is left of the block after the
    components before it; its mean absolute value is the scale that leaves least.
    """
    left = _signs(_leading_left(x, components))
    found = np.matmul(left, x)  # [row, component, c]
    overlaps = np.matmul(left, left.transpose(0, 2, 1))
    right = np.zeros_like(found)
    scales = np.zeros(found.shape[:2], dtype=np.float32)
    unit = np.float32(math.sqrt(x.shape[1] * x.shape[2]))
    for i in range(components):
        weights = overlaps[:, i, :i] * scales[:, :i] / unit
        rest = found[:, i] - np.matmul(weights[:, None], right[:, :i])[:, 0]
        right[:, i] = _signs(rest)
        scales[:, i] = np.abs(rest).sum(1) / unit
    held = ((found * right).sum(2) * scales).sum(1) / unit
    return _BlockCode(left=left, right=right, scales=scales, held=held)


def _signs(x: Float32[np.ndarray, "..."]) -> Float32[np.ndarray, "..."]:
    return np.where(x >= 0, np.float32(1), np.float32(-1))


def _leading_left(
    x: Float32[np.ndarray, "row r c"], components: int
) -> Float32[np.ndarray, "row component r"]:
    """Leading left singular vectors, by subspace iteration (Halko et al. 2011, algorithm 4.4).

    Orthogonalised before every product with ``x x^T``: without it the fifth power of ``x`` leaves
    components below 4 % of the largest to rounding, and a row's last digit, which depends on the
    batch that computed it, changed a third of what its code leaves open. So it does no more than
    with singular vectors in float64. 0 beyond the numerical rank of a block, where rounding alone
    would choose a direction.
    """
    width = min(components + SPARE, *x.shape[1:])
    start = np.random.default_rng(SEED).standard_normal((x.shape[2], width), dtype=np.float32)
    basis = np.matmul(x, start)
    for _ in range(ROUNDS):
        basis = np.linalg.qr(basis).Q
        basis = np.matmul(x, np.matmul(x.transpose(0, 2, 1), basis))
    basis = np.linalg.qr(basis).Q
    small = np.matmul(basis.transpose(0, 2, 1), x)
    squares, vectors = np.linalg.eigh(np.matmul(small, small.transpose(0, 2, 1)))
    vectors = vectors * (squares > RANK * squares[:, -1:])[:, None]
    leading = vectors[:, :, ::-1][:, :, :components].transpose(0, 2, 1)
    return np.asarray(np.matmul(leading, basis.transpose(0, 2, 1)))


def _factors(
    codes: UInt8[np.ndarray, "row byte"], block: Block
) -> tuple[
    Float32[np.ndarray, "row component r"],
    Float32[np.ndarray, "row component c"],
    Float32[np.ndarray, "row component"],
]:
    """Left factors, right factors and scales of one block."""
    middle = block.components * -(-block.rows // 8)
    end = block.code_size - SCALE_BYTES * block.components
    left = _unpack(codes[:, :middle], block.components)[..., : block.rows]
    right = _unpack(codes[:, middle:end], block.components)[..., : block.columns]
    return left, right, _scales(codes, block)


BITS = 2.0 * (np.arange(256)[:, None] >> np.arange(8) & 1).astype(np.float32) - 1
"""The eight signs that each value of a byte stands for."""


def _unpack(
    codes: UInt8[np.ndarray, "row byte"], components: int
) -> Float32[np.ndarray, "row component n"]:
    return np.take(BITS, codes, axis=0).reshape(len(codes), components, -1)


def _scales(
    codes: UInt8[np.ndarray, "row byte"], block: Block
) -> Float32[np.ndarray, "row component"]:
    stored = codes[:, block.code_size - SCALE_BYTES * block.components :]
    scales = np.ascontiguousarray(stored).view(np.float16).astype(np.float32)
    return scales / np.float32(math.sqrt(block.size))
