"""One-bit codes row by row: encoded many at a time, estimated for the few rows that are asked."""

from typing import Any

import numpy as np
from jaxtyping import Float, Float32, UInt8

from index.codes.faiss_module import import_faiss
from index.codes.flat import FlatIndex

FACTOR_BYTES = 4


def sign_bytes(dimensions: int) -> int:
    """Bytes of a code: a bit a dimension, and the factor in float32."""
    return -(-dimensions // 8) + FACTOR_BYTES


def encode_signs(rows: Float[np.ndarray, "row dimension"]) -> UInt8[np.ndarray, "row byte"]:
    """Codes of rows, each by itself: bits in order of dimension, then ``|x|^2 / |x|_1``.

    The bits are those of RaBitQ (Gao and Long 2024), at a quarter of what FAISS's encoder takes.
    Rows of zeros have a factor of 0.

    Raises:
        ValueError: a row has a NaN or infinite entry.
    """
    if not np.isfinite(rows).all():
        raise ValueError("Cannot encode rows with NaN or infinite entries; leave them out.")
    x = np.ascontiguousarray(rows, dtype=np.float32)
    absolute = np.abs(x).sum(1)
    factors = np.divide(
        np.square(x).sum(1), absolute, out=np.zeros_like(absolute), where=absolute > 0
    )
    bits = np.packbits(x > 0, axis=1, bitorder="little")
    return np.concatenate([bits, factors[:, None].view(np.uint8)], axis=1)


def estimate_signs(
    codes: UInt8[np.ndarray, "row byte"],
    queries: Float[np.ndarray, "query dimension"],
    threads: int | None = None,
) -> Float32[np.ndarray, "query row"]:
    """Estimated inner products of queries with coded rows, by FAISS's RaBitQ.

    A row's estimates do not depend on the rows that it is estimated with.
    """
    dimensions = queries.shape[1]
    bits = codes[:, :-FACTOR_BYTES]
    # FAISS keeps, after the bits, |x - centre|^2 - |x|^2 = 0 and the factor times sqrt(k).
    scales = codes[:, -FACTOR_BYTES:].copy().view(np.float32) * np.float32(dimensions**0.5)
    zeros = np.zeros((len(codes), FACTOR_BYTES), dtype=np.uint8)
    index = FlatIndex(rabitq, dimensions, threads)
    index.add(np.concatenate([bits, zeros, scales.view(np.uint8)], axis=1), len(codes))
    return index.scan(queries)


def rabitq(dimensions: int) -> Any:
    """An empty RaBitQ index of FAISS, for inner products, its centre at the origin."""
    faiss = import_faiss()
    index = faiss.IndexRaBitQ(dimensions, faiss.METRIC_INNER_PRODUCT)
    index.qb = 8  # bits of a query's coordinates; exact queries are 350 times slower
    index.train(np.zeros((1, dimensions), dtype=np.float32))
    return index
