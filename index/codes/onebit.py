"""One bit a dimension: RaBitQ codes (Gao and Long 2024), made by FAISS."""

import numpy as np
from jaxtyping import Float, Float32, UInt8

from index.codes.fourbit import FourBitIndex
from index.codes.signs import estimate_signs, rabitq, with_factors

SIGNS = 2.0 * np.array([[v >> j & 1 for j in range(4)] for v in range(16)], dtype=np.float32) - 1
"""The -1 and +1 that each value of four bits stands for."""


class OneBitIndex(FourBitIndex):
    """Rows of sign bits: ``sign(x)`` and ``f = |x|^2 / |x|_1``.

    Args:
        dimensions: of the vectors.
        threads: that scan; as many as the process has processors by default.
    """

    def __init__(self, dimensions: int, threads: int | None = None) -> None:
        super().__init__(SIGNS, dimensions, threads)
        self._encoder = rabitq(dimensions)

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

    def _scan_plainly(
        self, queries: Float32[np.ndarray, "query dimension"]
    ) -> Float32[np.ndarray, "query row"]:
        """With FAISS's own RaBitQ index, part after part."""
        result = np.empty((len(queries), self._rows), dtype=np.float32)
        first = 0
        for part in self._parts:
            rows = len(part.factors)
            plain = self.unpack(part.codes.reshape(-1, self.code_size), rows)
            codes = with_factors(plain[:, : self._width], part.factors, self._dimensions)
            result[:, first : first + rows] = estimate_signs(codes, queries, self._threads)
            first += rows
        return result
