"""One-bit codes have FAISS's layout, and FAISS's own indexes could not serve in their place."""

import ctypes

import numpy as np
import pytest

from index.codes import kernel
from index.codes.faiss_module import import_faiss
from index.codes.fourbit import BLOCK
from index.codes.onebit import OneBitIndex
from index.codes.vectors import make_index
from tests.packed_codes import unpack

faiss = import_faiss()


def unit_rows(rows: int, dimensions: int, seed: int = 0) -> np.ndarray:
    x = np.random.default_rng(seed).standard_normal((rows, dimensions)).astype(np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def rabitq(kind: type, x: np.ndarray):
    index = kind(x.shape[1], faiss.METRIC_INNER_PRODUCT)
    index.qb = 8
    index.train(np.zeros((1, x.shape[1]), dtype=np.float32))
    index.add(x)
    return index


def recall(index, x: np.ndarray, queries: np.ndarray) -> float:
    """Share of the best 10 rows by exact arithmetic over the codes that are among the best 50."""
    truth = queries @ (np.sign(x) / np.abs(x).sum(1, keepdims=True)).T
    wanted = np.argsort(-truth, axis=1)[:, :10]
    _, found = index.search(queries, 50)
    return float(np.mean([np.isin(w, f).mean() for w, f in zip(wanted, found, strict=True)]))


@pytest.mark.parametrize("dimensions", [64, 100, 4096])
def test_estimates_are_those_of_faiss_with_8_bit_queries(dimensions):
    x, queries = unit_rows(200, dimensions), unit_rows(3, dimensions, seed=1)
    index = OneBitIndex(dimensions)
    index.add(index.pack(index.encode(x)), 200)
    values, rows = rabitq(faiss.IndexRaBitQ, x).search(queries, 200)
    ours = np.take_along_axis(index.scan(queries), rows, axis=1)
    np.testing.assert_allclose(ours, values, atol=6 * 0.02 * np.sqrt(np.pi / 2 / dimensions))


@pytest.mark.parametrize(("rows", "dimensions"), [(1, 8), (33, 100), (64, 2056), (70, 4096)])
def test_packed_codes_have_the_documented_layout(rows, dimensions):
    index = OneBitIndex(dimensions)
    codes = index.encode(unit_rows(rows, dimensions))
    packed = index.pack(codes)
    np.testing.assert_array_equal(unpack(packed, rows), codes)
    np.testing.assert_array_equal(index.unpack(packed, rows), codes)


@pytest.mark.parametrize("width", [1, 8, 256])
def test_a_piece_is_packed_as_faiss_packs_it(width):
    rows, dimensions = 70, 8 * width
    index = OneBitIndex(dimensions)
    codes = index.encode(unit_rows(rows, dimensions))
    padded = -(-rows // BLOCK) * BLOCK
    pack = ctypes.CDLL(faiss.swigfaiss._swigfaiss.__file__)["_ZN5faiss14pq4_pack_codesEPKhmmmmmPhm"]
    pointer, size = ctypes.c_void_p, ctypes.c_size_t
    pack.argtypes = [pointer, size, size, size, size, size, pointer, size]
    expected = np.zeros(padded * width, dtype=np.uint8)
    bits = np.ascontiguousarray(codes[:, :width])
    pack(bits.ctypes.data, rows, 2 * width, padded, 32, 2 * width, expected.ctypes.data, 0)
    np.testing.assert_array_equal(index.pack(codes).reshape(-1)[: padded * width], expected)


def test_the_fast_scan_form_of_faiss_is_right_only_up_to_1024_dimensions():
    """Why there is no such kind of code: sums over all dimensions leave 16 bits, without a word.

    It depends on the query: with coordinates of equal size nothing is left at 2,048 dimensions,
    with normal ones it happens at some thousands (docs/decisions/2026-11-22-one-bit-scan.md).
    """
    for dimensions, right in ((1024, True), (2048, False)):
        x = unit_rows(500, dimensions)
        level = np.sign(unit_rows(5, dimensions, seed=1)) / np.float32(dimensions**0.5)
        fast = recall(rabitq(faiss.IndexRaBitQFastScan, x), x, level)
        assert recall(rabitq(faiss.IndexRaBitQ, x), x, level) == 1
        assert (fast == 1) if right else (fast < 0.5)


@pytest.mark.parametrize("dimensions", [8, 64, 100, 2048, 16384])
def test_a_faiss_without_the_kernel_gives_the_same_estimates(monkeypatch, caplog, dimensions):
    class Empty:
        def __init__(self, path: str) -> None:
            self.path = path

        def __getitem__(self, name: str):
            raise AttributeError(f"{self.path}: undefined symbol: {name}")

    index = make_index("one-bit", dimensions, threads=2)
    for seed, rows in enumerate((70, 1, 33)):
        index.add(index.pack(index.encode(unit_rows(rows, dimensions, seed=seed))), rows)
    queries = unit_rows(5, dimensions, seed=9)
    usual = index.scan(queries)
    monkeypatch.setattr(kernel.ctypes, "CDLL", Empty)
    kernel.accumulate_to_mem.cache_clear()
    try:
        plain = index.scan(queries)
    finally:
        kernel.accumulate_to_mem.cache_clear()
    assert "no fast-scan kernel" in caplog.text
    # both quantise the query to eight bits, by coordinate or by four coordinates
    assert np.std(plain - usual) < 0.02 / dimensions**0.5
    assert np.abs(plain - usual).max() < 0.1 / dimensions**0.5
