"""Every kind of code agrees with brute force over its codes; the best rows come out in order."""

import math
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from index import vectors
from index.errors import IndexCorrupt
from index.vectors import CODES, best_rows, import_faiss, make_index


def unit_rows(rows: int, dimensions: int, seed: int = 0) -> np.ndarray:
    x = np.random.default_rng(seed).standard_normal((rows, dimensions)).astype(np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def signs(codes: np.ndarray, dimensions: int) -> np.ndarray:
    """The -1 and +1 in one-bit codes, read from their documented layout: one bit a dimension."""
    bits = np.unpackbits(codes[:, : dimensions // 8], axis=1, bitorder="little")
    return bits.astype(np.int8) * 2 - 1


def brute_force(kind: str, codes: np.ndarray, x: np.ndarray, query: np.ndarray) -> np.ndarray:
    """Inner products in float64 from the bytes of the codes.

    A one-bit code stands for ``sign(x) / |x|_1`` times ``|x|^2``; ``x`` serves only for the norms.
    """
    wide = query.astype(np.float64)
    if kind == "flat":
        return codes.view("<f4").astype(np.float64) @ wide
    if kind == "half":
        return codes.view("<f2").astype(np.float64) @ wide
    assert kind == "one-bit", f"add the brute force of the new kind of code '{kind}' here"
    one_norms = np.abs(x.astype(np.float64)).sum(1)
    return signs(codes, len(query)) @ wide / one_norms


def tolerance(kind: str, query: np.ndarray) -> float:
    """What the inner product of a unit row may be off by.

    float32 sums for flat and half. One-bit codes meet a query of 8 bits: each coordinate is off by
    up to half a step, uniformly, and a row weighs each coordinate by about sqrt(pi / (2 k)) at most
    1.1 of it. Six standard deviations.
    """
    if kind != "one-bit":
        return 1e-6 * float(np.linalg.norm(query))
    step = float(query.max() - query.min()) / 255
    return 6 * 1.1 * step / math.sqrt(12) * math.sqrt(math.pi / 2)


@pytest.mark.parametrize("dimensions", [64, 1024, 16384])
@pytest.mark.parametrize("rows", [1, 7, 1000])
@pytest.mark.parametrize("kind", CODES)
def test_inner_products_equal_brute_force_over_the_codes(kind, dimensions, rows):
    x = unit_rows(rows, dimensions)
    query = np.random.default_rng(1).standard_normal(dimensions).astype(np.float32)
    index = make_index(kind, dimensions)
    codes = index.encode(x)
    assert codes.shape == (rows, index.code_size)
    assert codes.dtype == np.uint8
    index.add(codes)
    found = index.inner_products(query)
    assert found.shape == (rows,)
    expected = brute_force(kind, codes, x, query)
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance(kind, query))


@pytest.mark.parametrize("kind", CODES)
def test_rows_added_in_parts_keep_their_order(kind):
    x = unit_rows(50, 64)
    query = unit_rows(1, 64, seed=1)[0]
    whole, parts = make_index(kind, 64), make_index(kind, 64)
    codes = whole.encode(x)
    whole.add(codes)
    for part in np.split(codes, [1, 8, 40]):
        parts.add(part)
    np.testing.assert_array_equal(parts.inner_products(query), whole.inner_products(query))


@pytest.mark.parametrize("dimensions", [64, 1024])
@pytest.mark.parametrize("rows", [1, 7, 1000])
@pytest.mark.parametrize("kind", ["flat", "half"])
def test_exact_codes_find_the_exact_ids_with_ties_to_the_lower_row(kind, rows, dimensions):
    # Integers up to 3 and their inner products are exact in float16 and float32: all ties are real.
    generator = np.random.default_rng(2)
    x = np.zeros((rows, dimensions), dtype=np.float32)
    x[:, :16] = generator.integers(-3, 4, (rows, 16))
    x[rows // 2] = x[0]  # a duplicate row, besides the many equal inner products
    query = np.zeros(dimensions, dtype=np.float32)
    query[:16] = generator.integers(-3, 4, 16)
    index = make_index(kind, dimensions)
    index.add(index.encode(x))
    truth = (x.astype(np.int64) @ query.astype(np.int64)).tolist()
    ranked = sorted(range(rows), key=lambda row: (-truth[row], row))
    found = index.inner_products(query)
    for count in (1, 3, rows // 2, rows):
        assert best_rows(found, count).tolist() == ranked[:count]


@pytest.mark.parametrize("dimensions", [1024, 16384])
def test_one_bit_is_the_sign_formula_for_random_unit_rows(dimensions):
    """``<y, sign(x)> sqrt(pi / (2 k))``, the form whose noise the certificates count on.

    The code's own factor 1 / |x|_1 differs from the formula's by the spread of |x|_1, a relative
    ``sqrt(pi / 2 - 1) / sqrt(k)`` a row; six of these on top of the 8-bit query.
    """
    x = unit_rows(300, dimensions)
    query = unit_rows(1, dimensions, seed=3)[0]
    index = make_index("one-bit", dimensions)
    codes = index.encode(x)
    np.testing.assert_array_equal(signs(codes, dimensions), np.where(x > 0, 1, -1))
    index.add(codes)
    formula = np.sign(x) @ query * math.sqrt(math.pi / (2 * dimensions))
    spread = 6 * math.sqrt((math.pi / 2 - 1) / dimensions) * np.abs(formula)
    error = np.abs(index.inner_products(query) - formula)
    assert np.all(error <= spread + tolerance("one-bit", query))
    # and so it estimates cosines with the noise of one bit: (pi / 2 - 1 + 1) / k in all
    residuals = index.inner_products(query) - x @ query
    assert np.std(residuals) < 1.2 * math.sqrt(math.pi / 2 / dimensions)


@pytest.mark.parametrize("kind", CODES)
def test_zero_rows_give_zero(kind):
    x = unit_rows(5, 64)
    x[[0, 3]] = 0
    index = make_index(kind, 64)
    index.add(index.encode(x))
    found = index.inner_products(unit_rows(1, 64, seed=4)[0])
    assert (found == 0).tolist() == [True, False, False, True, False]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("kind", CODES)
def test_rows_that_are_not_finite_are_refused(kind, bad):
    x = unit_rows(3, 64)
    x[1, 5] = bad
    with pytest.raises(ValueError, match="NaN or infinite"):
        make_index(kind, 64).encode(x)


def test_codes_that_hold_nan_are_found_out_at_the_scan():
    x = unit_rows(3, 64)
    x[1, 5] = np.nan
    index = make_index("flat", 64)
    index.add(x.view(np.uint8))
    with pytest.raises(IndexCorrupt, match="2 of 3 rows"):
        index.inner_products(x[0])


@pytest.mark.parametrize("kind", CODES)
def test_codes_of_another_size_are_refused_with_both_sizes(kind):
    index = make_index(kind, 64)
    codes = make_index(kind, 128).encode(unit_rows(2, 128))
    with pytest.raises(IndexCorrupt, match=f"{codes.shape[1]} bytes.*{index.code_size}"):
        index.add(codes)


def test_an_unknown_kind_of_code_lists_the_known_ones():
    with pytest.raises(ValueError, match="two-bit") as caught:
        make_index("two-bit", 64)
    for kind in CODES:
        assert kind in str(caught.value)


@given(
    values=st.lists(st.sampled_from([-np.inf, -1.5, -0.0, 0.0, 1.0, 2.0, 7.25]), max_size=40),
    count=st.integers(0, 50),
)
def test_best_rows_is_a_stable_descending_sort(values, count):
    expected = sorted(range(len(values)), key=lambda row: (-values[row], row))[:count]
    assert best_rows(np.array(values, dtype=np.float64), count).tolist() == expected


@given(st.lists(st.floats(allow_nan=False, width=32), min_size=1, max_size=40), st.data())
def test_best_rows_of_any_values(values, data):
    count = data.draw(st.integers(1, len(values)))
    expected = sorted(range(len(values)), key=lambda row: (-values[row], row))[:count]
    assert best_rows(np.array(values, dtype=np.float32), count).tolist() == expected


def test_two_distributions_of_faiss_are_refused_by_name(monkeypatch):
    monkeypatch.setattr(vectors, "_installed", lambda name: name in ("faiss-cpu", "faiss-gpu"))
    with pytest.raises(RuntimeError, match="faiss-cpu and faiss-gpu are both installed"):
        import_faiss()


def test_a_missing_faiss_names_the_extras(monkeypatch):
    monkeypatch.setattr(vectors, "_installed", lambda name: False)
    monkeypatch.setitem(sys.modules, "faiss", None)  # makes `import faiss` fail
    with pytest.raises(RuntimeError, match=r"\.\[cpu\].*\.\[gpu\]"):
        import_faiss()


def test_installed_looks_up_distributions():
    assert vectors._installed("numpy")
    assert not vectors._installed("no-such-distribution-of-etymon")
