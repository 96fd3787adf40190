"""Matrix products on a device give what the scan of the same codes gives."""

import numpy as np
import pytest
import torch

from index.codes.vectors import CODES, make_index
from index.errors import IndexCorrupt
from service import device_search
from service.device_search import DeviceIndex, make_search_index
from tests.index.test_vectors import brute_force


def unit_rows(rows: int, dimensions: int, seed: int = 0) -> np.ndarray:
    x = np.random.default_rng(seed).standard_normal((rows, dimensions)).astype(np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def filled(index, codes: np.ndarray):
    for part in np.split(codes, [33]):
        index.add(index.pack(part), len(part))
    return index


@pytest.mark.parametrize("dimensions", [8, 100, 1024, 3000])
@pytest.mark.parametrize("kind", CODES)
def test_inner_products_are_those_over_the_codes(kind, dimensions, monkeypatch):
    monkeypatch.setattr(device_search, "CHUNK_BYTES", 4 * dimensions * 50)  # several chunks
    host = make_index(kind, dimensions)
    codes = host.encode(unit_rows(140, dimensions))
    queries = 1000 * unit_rows(3, dimensions, seed=1)
    found = filled(DeviceIndex(kind, dimensions, "cpu"), codes).scan(queries)
    np.testing.assert_allclose(found, brute_force(kind, codes, queries), atol=2e-3)
    scanned = filled(host, codes).scan(queries)
    np.testing.assert_allclose(found, scanned, atol=1000 * 6 * 0.02 / dimensions**0.5)


def test_float16_products_keep_the_digits_that_matter(monkeypatch):
    """What runs on a GPU, here on the CPU: cosines to 1e-3 of one bit's noise."""
    index = filled(
        DeviceIndex("one-bit", 4096, "cpu"),
        make_index("one-bit", 4096).encode(unit_rows(100, 4096)),
    )
    queries = unit_rows(4, 4096, seed=1)
    wide = index.scan(queries)
    monkeypatch.setattr(index, "_dtype", torch.float16)
    assert np.std(index.scan(queries) - wide) < 2e-3 * np.std(wide)


def test_an_empty_index_and_a_zero_query_give_nothing():
    index = DeviceIndex("one-bit", 64, "cpu")
    assert index.scan(unit_rows(2, 64)).shape == (2, 0)
    filled(index, index.encode(unit_rows(40, 64)))
    assert not index.inner_products(np.zeros(64, dtype=np.float32)).any()


def test_what_the_scan_refuses_is_refused(monkeypatch):
    index = DeviceIndex("one-bit", 64, "cpu")
    with pytest.raises(IndexCorrupt, match="should have codes"):
        index.add(np.zeros((32, 9), dtype=np.uint8), 32)
    query = unit_rows(1, 64)[0]
    query[3] = np.nan
    with pytest.raises(ValueError, match="NaN or infinite"):
        index.inner_products(query)


def test_the_cpu_is_searched_by_faiss_and_other_devices_by_torch():
    assert type(make_search_index("one-bit", 64, "cpu")) is type(make_index("one-bit", 64))
    assert isinstance(make_search_index("half", 64, "meta"), DeviceIndex)


def test_words_on_the_device_are_searched_like_packed_codes():
    codes = make_index("one-bit", 96).encode(unit_rows(70, 96))
    queries = unit_rows(3, 96, seed=1)
    index = DeviceIndex("one-bit", 96, "cpu")
    words, factors = codes[:, :-4].copy(), codes[:, -4:].copy().view(np.float32)[:, 0]
    index.add_unpacked(torch.from_numpy(words), torch.from_numpy(factors))
    packed = DeviceIndex("one-bit", 96, "cpu")
    packed.add(packed.pack(codes), 70)
    np.testing.assert_array_equal(index.scan(queries), packed.scan(queries))


@pytest.mark.parametrize(("kind", "width"), [("one-bit", 11), ("half", 192)])
def test_rows_that_are_no_words_of_this_kind_are_refused(kind, width):
    index = DeviceIndex(kind, 96, "cpu")
    with pytest.raises(ValueError, match=f"Rows of {width} bytes of words are not rows of {kind}"):
        index.add_unpacked(torch.zeros(2, width, dtype=torch.uint8), torch.ones(2))
