"""One-bit codes row by row: encoded many at a time, estimated for the few rows that are asked."""

from typing import Any

import numpy as np
from jaxtyping import Float, Float32, UInt8

from index.codes.faiss_module import import_faiss
from index.codes.flat import FlatIndex, scan_shown, show

TAIL_BYTES = 8
"""What follows a row's bits, two numbers in float32: FAISS's RaBitQ keeps there
``|x - centre|^2 - |x|^2 = 0`` and the factor times the root of the dimensions."""


def sign_bytes(dimensions: int) -> int:
    """Bytes of a code: a bit a dimension, and the tail."""
    return -(-dimensions // 8) + TAIL_BYTES


def encode_signs(
    rows: Float[np.ndarray, "row dimension"], lengths: Float[np.ndarray, "row"] | None = None
) -> UInt8[np.ndarray, "row byte"]:
    """Codes of rows, each by itself: bits in order of dimension, factor ``|x|^2 / |x|_1``.

    They are those of RaBitQ (Gao and Long 2024), at a tenth of what FAISS's encoder takes. Rows of
    zeros have a factor of 0.

    Args:
        rows: to be encoded.
        lengths: that they are to have, whatever they have; their own if left out.

    Raises:
        ValueError: a row has a NaN or infinite entry.
    """
    x = np.ascontiguousarray(rows, dtype=np.float32)
    absolute, square = np.abs(x).sum(1), np.einsum("rd,rd->r", x, x)
    if not np.isfinite(square).all():
        raise ValueError("Cannot encode rows with NaN or infinite entries; leave them out.")
    if lengths is not None:
        square = np.sqrt(square) * lengths.astype(np.float32)
    factors = np.divide(square, absolute, out=np.zeros_like(absolute), where=absolute > 0)
    return with_factors(np.packbits(x > 0, axis=1, bitorder="little"), factors, rows.shape[1])


def with_factors(
    bits: UInt8[np.ndarray, "row bits"], factors: Float32[np.ndarray, "row"], dimensions: int
) -> UInt8[np.ndarray, "row byte"]:
    """Codes of given bits and factors."""
    tails = np.zeros((len(bits), 2), dtype=np.float32)
    tails[:, 1] = factors * np.float32(dimensions**0.5)
    return np.concatenate([bits, tails.view(np.uint8)], axis=1)


def estimate_signs(
    codes: UInt8[np.ndarray, "row byte"],
    queries: Float[np.ndarray, "query dimension"],
    threads: int | None = None,
) -> Float32[np.ndarray, "query row"]:
    """Estimated inner products of queries with coded rows, by FAISS's RaBitQ.

    A row's estimates do not depend on the rows that it is estimated with.
    """
    index = FlatIndex(rabitq, queries.shape[1], threads)
    index.add(codes, len(codes))
    return index.scan(queries)


def estimate_slices(
    codes: UInt8[np.ndarray, "slice row byte"], queries: Float32[np.ndarray, "slice dimension"]
) -> Float32[np.ndarray, "slice row"]:
    """``estimate_signs`` of each slice with a query of its own, for a few rows: without threads."""
    estimates = np.empty(codes.shape[:2], dtype=np.float32)
    if not estimates.size:
        return estimates
    index, faiss = rabitq(queries.shape[1]), import_faiss()
    for slice_codes, query, found in zip(codes, queries, estimates, strict=True):
        slice_codes = np.ascontiguousarray(slice_codes)
        show(index, faiss.swig_ptr(slice_codes), slice_codes)
        scan_shown(index, np.ascontiguousarray(query[None]), found[None])
    return estimates


def rabitq(dimensions: int) -> Any:
    """An empty RaBitQ index of FAISS, for inner products, its centre at the origin."""
    faiss = import_faiss()
    index = faiss.IndexRaBitQ(dimensions, faiss.METRIC_INNER_PRODUCT)
    index.qb = 8  # bits of a query's coordinates; exact queries are 350 times slower
    index.train(np.zeros((1, dimensions), dtype=np.float32))
    return index
