"""Exhaustive search on a device by matrix products, for indexes that fit into its memory."""

import functools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from index.codes.fourbit import FourBitIndex
from index.codes.lowrank import Block
from index.codes.vectors import LOW_RANK, VectorIndex, make_index

logger = logging.getLogger(__name__)

SignProducts = Callable[[Tensor, Tensor, Tensor, Tensor], None]
"""See ``service.sign_kernel.multiply_signs``."""

CHUNK_BYTES = 1 << 28
"""Rows that are looked at together, as numbers: bounds the memory beside the codes."""


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Rows on the device: values; or codes, with a factor a row and what four bits stand for."""

    values: Tensor
    factors: Tensor | None = None
    words: Tensor | None = None


class DeviceIndex:
    """A ``VectorIndex`` whose codes lie on a device and are scanned there.

    Codes are read as in ``index.codes.vectors`` and stay codes in memory. A kernel reads those of
    one bit a dimension once. Of other kinds, and where the kernel cannot be had, a chunk of rows at
    a time becomes numbers in float16 (float32 on a CPU) and is multiplied with all queries. Queries
    are rounded to that type, which adds a relative variance below 1e-7 to an estimate's.

    Args:
        codes: kind of code.
        dimensions: of the vectors.
        device: where to search, e.g. "cuda".
        kernel: whether the kernel may be used.
    """

    def __init__(self, codes: str, dimensions: int, device: str, *, kernel: bool = True) -> None:
        self._host = make_index(codes, dimensions)
        self._codes = codes
        self._dimensions = dimensions
        self._device = torch.device(device)
        self._dtype = torch.float32 if self._device.type == "cpu" else torch.float16
        self._parts: list[Rows] = []
        usable = kernel and codes == "one-bit"
        self._kernel = find_sign_kernel(self._device) if usable else None

    @property
    def has_kernel(self) -> bool:
        """Whether the kernel does its scans."""
        return self._kernel is not None

    @property
    def code_size(self) -> int:
        """Bytes a row."""
        return self._host.code_size

    def encode(self, rows: Float[np.ndarray, "row dimension"]) -> UInt8[np.ndarray, "row byte"]:
        """Codes of unit-norm (or zero) rows."""
        return self._host.encode(rows)

    def pack(self, codes: UInt8[np.ndarray, "row byte"]) -> UInt8[np.ndarray, "padded byte"]:
        """The codes of a shard in the order in which they are stored."""
        return self._host.pack(codes)

    def add(self, codes: UInt8[np.ndarray, "padded byte"], rows: int) -> None:
        """Copy ``rows`` rows to the device.

        Raises:
            IndexCorrupt: the codes are not of this kind of index.
        """
        checked = make_index(self._codes, self._dimensions)
        checked.add(codes, rows)  # the same checks as on the host
        if isinstance(checked, FourBitIndex):
            plain = checked.unpack(codes, rows)
            factors = torch.from_numpy(plain[:, -4:].copy().view(np.float32)[:, 0])
            self.add_unpacked(torch.from_numpy(plain[:, :-4].copy()), factors)
        else:
            kind = np.float32 if self._codes == "flat" else np.float16
            values = torch.from_numpy(np.array(codes).view(kind))
            self._parts.append(Rows(values=values.to(self._device)))

    def add_unpacked(self, words: UInt8[Tensor, "row byte"], factors: Float[Tensor, "row"]) -> None:
        """Append rows of words and factors that are in order of row; on the device they stay.

        Raises:
            ValueError: the kind of code has no words, or another number of bytes a row.
        """
        width = self.code_size - 4
        if not isinstance(self._host, FourBitIndex) or words.shape[1] != width:
            raise ValueError(
                f"Rows of {words.shape[1]} bytes of words are not rows of {self._codes} codes of "
                f"{self._dimensions} dimensions."
            )
        stand_for = torch.from_numpy(self._host.words).to(self._device, self._dtype)
        values, factors = words.to(self._device), factors.to(self._device)
        self._parts.append(Rows(values=values, factors=factors, words=stand_for))

    def inner_products(self, query: Float[np.ndarray, "dimension"]) -> Float[np.ndarray, "row"]:
        """Estimated inner product of ``query`` with every row, in order of row."""
        return np.asarray(self.scan(query[None])[0])

    def scan(self, queries: Float[np.ndarray, "query dimension"]) -> Float[np.ndarray, "query row"]:
        """``inner_products`` of many queries; 4 bytes a query and row on the device and here.

        Queries are scaled to unit length first, so that none leaves float16's range.

        Raises:
            ValueError: a query has a NaN or infinite entry.
        """
        if not np.isfinite(queries).all():
            raise ValueError("Cannot search for queries with NaN or infinite entries.")
        y = torch.from_numpy(np.ascontiguousarray(queries, dtype=np.float32)).to(self._device)
        lengths = torch.linalg.vector_norm(y, dim=1, keepdim=True)
        unit = torch.where(lengths > 0, y / lengths, 0)
        rows = sum(len(part.values) for part in self._parts)
        found = torch.empty(len(y), rows, device=self._device)
        first = 0
        for part in self._parts:
            into = found[:, first : first + len(part.values)]
            if self._kernel is not None and part.factors is not None:
                self._kernel(unit, part.values, part.factors, into)
            else:
                self._multiply_chunks(unit, part, into)
            first += len(part.values)
        return np.asarray(found.mul_(lengths).cpu().numpy())

    def _multiply_chunks(
        self,
        queries: Float[Tensor, "query dimension"],
        part: Rows,
        into: Float[Tensor, "query row"],
    ) -> None:
        size = max(1, CHUNK_BYTES // (4 * self._dimensions))
        for start in range(0, len(part.values), size):
            chunk = slice(start, start + size)
            into[:, chunk] = _multiply(queries, part, chunk, self._dtype)


def _multiply(
    queries: Float[Tensor, "query dimension"], rows: Rows, chunk: slice, dtype: torch.dtype
) -> Float[Tensor, "query row"]:
    values = rows.values[chunk]
    if rows.factors is None or rows.words is None:
        return queries @ values.to(queries.dtype).T
    halves = torch.stack([values & 15, values >> 4], dim=2).flatten(1)
    decoded = rows.words.to(dtype)[halves.long()].flatten(1)[:, : queries.shape[1]]
    # float16 sums are accumulated in float32 but leave as float16; a cosine has digits enough.
    return (queries.to(dtype) @ decoded.T).float() * rows.factors[chunk]


@functools.cache
def find_sign_kernel(device: torch.device) -> SignProducts | None:
    """The kernel for signs, tried on the device; None, with a warning, where there is none."""
    if device.type != "cuda":
        return None
    try:
        from service.sign_kernel import find_obstacle, multiply_signs
    except ImportError as error:
        obstacle: str | None = str(error)
    else:
        obstacle = find_obstacle(device)
        if obstacle is None:
            return multiply_signs
    logger.warning(
        "Scans on '%s' take many times as long without the kernel for one-bit codes, which needs "
        "Triton and cannot be used here (%s).",
        device,
        obstacle,
    )
    return None


def make_search_index(
    codes: str, dimensions: int, device: str, blocks: Sequence[Block] = ()
) -> VectorIndex:
    """An empty index that is searched on ``device``: on the host if "cpu", by PyTorch elsewhere.

    Raises:
        ValueError: low-rank codes, which are searched on the host only.
    """
    if device == "cpu":
        return make_index(codes, dimensions, blocks=blocks)
    if codes == LOW_RANK:
        raise ValueError(
            f"Low-rank codes are searched on the CPU only, '{device}' was asked for; set the "
            f"search device to cpu."
        )
    return DeviceIndex(codes, dimensions, device)
