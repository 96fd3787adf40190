"""Vector indexes over FAISS, all behind one contract: inner products of a query with every row."""

import importlib.metadata
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
from jaxtyping import Float, Int, UInt8

from index.errors import IndexCorrupt


class VectorIndex(Protocol):
    """Rows stored as codes; a query's inner product with each of them can be estimated."""

    @property
    def code_size(self) -> int:
        """Bytes a row."""
        ...

    def encode(self, rows: Float[np.ndarray, "row dimension"]) -> UInt8[np.ndarray, "row byte"]:
        """Codes of unit-norm (or zero) rows."""
        ...

    def add(self, codes: UInt8[np.ndarray, "row byte"]) -> None:
        """Append rows by their codes."""
        ...

    def inner_products(self, query: Float[np.ndarray, "dimension"]) -> Float[np.ndarray, "row"]:
        """Estimated inner product of ``query`` with every row, in order of row."""
        ...


class FaissIndex:
    """A flat FAISS index whose rows are scanned exhaustively.

    Args:
        index: a trained ``faiss.IndexFlatCodes`` with the inner-product metric.
    """

    def __init__(self, index: Any) -> None:
        self._index = index

    @property
    def code_size(self) -> int:
        """Bytes a row."""
        return int(self._index.sa_code_size())

    def encode(self, rows: Float[np.ndarray, "row dimension"]) -> UInt8[np.ndarray, "row byte"]:
        """Codes of unit-norm (or zero) rows.

        Raises:
            ValueError: a row has a NaN or infinite entry, which FAISS would accept silently.
        """
        if not np.isfinite(rows).all():
            raise ValueError("Cannot encode rows with NaN or infinite entries; leave them out.")
        codes: np.ndarray = self._index.sa_encode(np.ascontiguousarray(rows, dtype=np.float32))
        return codes

    def add(self, codes: UInt8[np.ndarray, "row byte"]) -> None:
        """Append rows by their codes.

        Raises:
            IndexCorrupt: the codes are not of this kind of index.
        """
        if codes.shape[1] != self.code_size:
            raise IndexCorrupt(
                f"Codes have {codes.shape[1]} bytes a row, this index has {self.code_size}; the "
                f"index was built with another kind of code or number of dimensions."
            )
        self._index.add_sa_codes(np.ascontiguousarray(codes))

    def inner_products(self, query: Float[np.ndarray, "dimension"]) -> Float[np.ndarray, "row"]:
        """Estimated inner product of ``query`` with every row, in order of row."""
        rows = self._index.ntotal
        wide = np.ascontiguousarray(query[None], dtype=np.float32)
        # A range search below any possible value gives every row without a heap of their size.
        limits, values, labels = self._index.range_search(wide, -3.0e38)
        if limits[1] != rows:
            raise IndexCorrupt(
                f"The scan gave {limits[1]} of {rows} rows; the codes hold NaN. Build them again."
            )
        result = np.empty(rows, dtype=np.float32)
        result[labels] = values
        return result


def _one_bit(dimensions: int) -> Any:
    faiss = import_faiss()
    index = faiss.IndexRaBitQ(dimensions, faiss.METRIC_INNER_PRODUCT)
    index.qb = 8  # 8-bit queries; qb = 0 (exact queries) is 350 times slower for the same recall
    index.train(np.zeros((1, dimensions), dtype=np.float32))  # centre at the origin
    return index


def _flat(dimensions: int) -> Any:
    return import_faiss().IndexFlatIP(dimensions)


def _half(dimensions: int) -> Any:
    faiss = import_faiss()
    quantiser = faiss.ScalarQuantizer.QT_fp16
    return faiss.IndexScalarQuantizer(dimensions, quantiser, faiss.METRIC_INNER_PRODUCT)


CODES: dict[str, Callable[[int], Any]] = {"one-bit": _one_bit, "flat": _flat, "half": _half}
"""Kinds of code: one bit a dimension (RaBitQ), float32 (the exact reference), float16."""


def make_index(codes: str, dimensions: int) -> VectorIndex:
    """An empty index of one of the kinds in ``CODES``.

    Raises:
        ValueError: no such kind; the message lists them.
    """
    if codes not in CODES:
        raise ValueError(f"Unknown kind of code '{codes}'; choose one of {', '.join(CODES)}.")
    return FaissIndex(CODES[codes](dimensions))


def best_rows(values: Float[np.ndarray, "row"], count: int) -> Int[np.ndarray, "best"]:
    """Rows with the ``count`` largest values, best first; ties go to the lower row number."""
    count = min(count, len(values))
    if count == 0:
        return np.empty(0, dtype=np.int64)
    threshold = np.partition(values, len(values) - count)[len(values) - count]
    contenders = np.flatnonzero(values >= threshold)
    order = np.argsort(-values[contenders], kind="stable")
    return contenders[order[:count]]


def import_faiss() -> Any:
    """The ``faiss`` module, after checking that exactly one distribution provides it.

    Raises:
        RuntimeError: none does, or both faiss-cpu and faiss-gpu are installed (they overwrite each
            other's files).
    """
    names = sorted(
        {
            name
            for name in ("faiss-cpu", "faiss-gpu", "faiss-gpu-cu12", "faiss-gpu-cu11")
            if _installed(name)
        }
    )
    if len(names) > 1:
        raise RuntimeError(
            f"{' and '.join(names)} are both installed and overwrite each other; "
            f"uninstall both and install one: pip install -e '.[cpu]' or '.[gpu]'."
        )
    try:
        import faiss
    except ImportError as error:
        raise RuntimeError(
            "FAISS is not installed; install the extra for your machine: pip install "
            "-e '.[cpu]' or '.[gpu]'."
        ) from error
    return faiss


def _installed(name: str) -> bool:
    try:
        importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
