"""Every kind of code agrees with brute force over its codes; the best rows come out in order."""

import math
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from index.codes import faiss_module
from index.codes.faiss_module import import_faiss
from index.codes.fourbit import PIECE
from index.codes.vectors import CODES, DISTORTIONS, best_rows, make_index, top_rows
from index.errors import IndexCorrupt


def unit_rows(rows: int, dimensions: int, seed: int = 0) -> np.ndarray:
    x = np.random.default_rng(seed).standard_normal((rows, dimensions)).astype(np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def filled(kind: str, x: np.ndarray, threads: int | None = None):
    """An index of the rows ``x``, and their codes by row."""
    index = make_index(kind, x.shape[1], threads)
    codes = index.encode(x)
    index.add(index.pack(codes), len(x))
    return index, codes


def signs(codes: np.ndarray, dimensions: int) -> np.ndarray:
    """The -1 and +1 in one-bit codes, read from their documented layout: one bit a dimension."""
    bits = np.unpackbits(codes[:, :-4], axis=1, count=dimensions, bitorder="little")
    return bits.astype(np.int8) * 2 - 1


FEW = 4
"""Coordinates that four bits stand for."""


def brute_force(kind: str, codes: np.ndarray, queries: np.ndarray) -> np.ndarray:
    """Inner products [query, row] in float64 from nothing but the bytes of the codes."""
    wide = queries.astype(np.float64)
    if kind == "flat":
        return wide @ codes.view("<f4").astype(np.float64).T
    if kind == "half":
        return wide @ codes.view("<f2").astype(np.float64).T
    assert kind == "one-bit", f"add the brute force of the new kind of code '{kind}' here"
    factors = codes[:, -4:].copy().view("<f4").astype(np.float64)
    return wide @ (signs(codes, queries.shape[1]) * factors).T


def by_word(query: np.ndarray) -> np.ndarray:
    return np.pad(query.astype(np.float64), (0, -len(query) % (2 * FEW))).reshape(-1, FEW)


def reaches(query: np.ndarray) -> np.ndarray:
    """The largest value of each table."""
    return np.abs(by_word(query)).sum(1)


def table_step(query: np.ndarray) -> float:
    """Step of the tables: 8 bits an entry, 16 bits a sum over a piece."""
    reach, size = reaches(query), 2 * PIECE
    starts = range(0, len(reach), size)
    sums = [2 * reach[g : g + size].sum() / (65535 - size) for g in starts]
    span = 2 * reach.max()
    return span / (span / max(span / 255, *sums) // 4 * 4)


def brute_force_of_tables(codes: np.ndarray, query: np.ndarray) -> np.ndarray:
    """What codes give for a query that is rounded as the tables round it, in float64."""
    padded, step = by_word(query), table_step(query)
    reach = reaches(query)
    words = signs(codes, padded.size).reshape(len(codes), *padded.shape)
    entries = np.rint(((words * padded).sum(2) + reach) / step)
    assert entries.max(initial=0) <= 255
    factors = codes[:, -4:].copy().view("<f4").astype(np.float64).reshape(-1)
    return (entries.sum(1) * step - reach.sum()) * factors


def tolerance(kind: str, query: np.ndarray) -> float:
    """What the inner product of a unit row may be off by, for a query of normal coordinates.

    float32 sums for flat and half. Tables are each off by at most half a step, uniformly, and a row
    weighs each by its factor: at most 1.5 sqrt(pi / (2 k)) here. Six standard deviations, or all of
    it if there are few tables.
    """
    if kind != "one-bit":
        return 2e-6 * float(np.linalg.norm(query))
    tables = len(by_word(query))
    error = table_step(query) * min(6 * math.sqrt(tables / 12), tables / 2)
    return error * 1.5 * math.sqrt(math.pi / (2 * len(query)))


@pytest.mark.parametrize("dimensions", [8, 12, 64, 100, 1000, 1024, 3000, 16384, 65536])
@pytest.mark.parametrize("rows", [0, 1, 7, 33, 300])
@pytest.mark.parametrize("kind", CODES)
def test_inner_products_equal_brute_force_over_the_codes(kind, dimensions, rows):
    x = unit_rows(rows, dimensions)
    queries = np.random.default_rng(1).standard_normal((5, dimensions)).astype(np.float32)
    queries[3] = np.sign(queries[3])  # every coordinate as large as the next
    queries[4, 1:] = 0  # all in one coordinate
    index, codes = filled(kind, x)
    assert codes.shape == (rows, index.code_size)
    assert codes.dtype == np.uint8
    found = index.scan(queries)
    assert found.shape == (5, rows)
    expected = brute_force(kind, codes, queries)
    for query, values, truth in zip(queries[:3], found[:3], expected[:3], strict=True):
        np.testing.assert_allclose(values, truth, rtol=0, atol=tolerance(kind, query))
    if kind != "one-bit":
        np.testing.assert_allclose(found[3:], expected[3:], rtol=0, atol=2e-6 * dimensions**0.5)
        return
    # Coordinates of equal size are exact.
    np.testing.assert_allclose(found[3], expected[3], rtol=0, atol=1e-5 * dimensions**0.5)
    for query, values in zip(queries, found, strict=True):
        # At most an entry or two lies so near a half that float32 rounds it the other way.
        slack = 3 * table_step(query) + 1e-6 * np.abs(query).sum()
        reference = brute_force_of_tables(codes, query)
        weight = codes[:, -4:].copy().view("<f4").max() if rows else 0
        np.testing.assert_allclose(values, reference, rtol=0, atol=slack * weight)


@pytest.mark.parametrize("dimensions", [12, 1024, 3000])
@pytest.mark.parametrize("kind", CODES)
@pytest.mark.parametrize("count", [1, 10, 63, 299, 300, 1000])
def test_the_top_rows_are_those_of_brute_force_but_for_rounding(kind, dimensions, count):
    x = unit_rows(300, dimensions)
    x[200] = x[100] = x[3]  # ties
    queries = unit_rows(70, dimensions, seed=5)
    queries[0] = x[3]
    index, codes = filled(kind, x)
    expected = brute_force(kind, codes, queries)
    for query, truth, (rows, values) in zip(
        queries, expected, top_rows(index, queries, count), strict=True
    ):
        assert len(rows) == len(set(rows.tolist())) == min(count, 300)
        assert np.all(np.diff(values) <= 0)
        threshold = np.sort(truth)[::-1][len(rows) - 1]
        assert truth[rows].min() >= threshold - 2 * tolerance(kind, query)
    first = top_rows(index, queries[:1], 3)[0][0]
    assert first.tolist() == [3, 100, 200]


def test_there_are_no_top_rows_of_nothing():
    index, _ = filled("one-bit", unit_rows(0, 64))
    ((rows, values),) = top_rows(index, unit_rows(1, 64), 10)
    assert len(rows) == len(values) == 0


@pytest.mark.parametrize("kind", CODES)
@pytest.mark.parametrize("dimensions", [64, 2100])
def test_threads_and_batches_do_not_change_the_numbers(kind, dimensions):
    x = unit_rows(2500, dimensions)
    queries = unit_rows(9, dimensions, seed=1)
    index, _ = filled(kind, x, threads=1)
    one = index.scan(queries)
    for threads in (2, 5):
        other, _ = filled(kind, x, threads)
        np.testing.assert_array_equal(other.scan(queries), one)
    singly = np.stack([index.inner_products(query) for query in queries])
    if kind == "one-bit":
        np.testing.assert_array_equal(singly, one)
    else:  # FAISS multiplies batches in another order
        np.testing.assert_allclose(singly, one, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", CODES)
def test_rows_added_in_parts_keep_their_order(kind):
    x = unit_rows(500, 640)
    query = unit_rows(1, 640, seed=1)[0]
    whole, codes = filled(kind, x)
    parts = make_index(kind, 640)
    for part in np.split(codes, [1, 80, 81, 400]):
        parts.add(parts.pack(part), len(part))
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
    index, _ = filled(kind, x)
    truth = (x.astype(np.int64) @ query.astype(np.int64)).tolist()
    ranked = sorted(range(rows), key=lambda row: (-truth[row], row))
    found = index.inner_products(query)
    for count in (1, 3, rows // 2, rows):
        assert best_rows(found, count).tolist() == ranked[:count]


@pytest.mark.parametrize("dimensions", [1024, 16384])
def test_one_bit_is_the_sign_formula_for_random_unit_rows(dimensions):
    """``<y, sign(x)> sqrt(pi / (2 k))``, the form whose noise the certificates count on.

    The code's own factor 1 / |x|_1 differs from the formula's by the spread of |x|_1, a relative
    ``sqrt(pi / 2 - 1) / sqrt(k)`` a row; six of these on top of the tables' steps.
    """
    x = unit_rows(300, dimensions)
    query = unit_rows(1, dimensions, seed=3)[0]
    index, codes = filled("one-bit", x)
    np.testing.assert_array_equal(signs(codes, dimensions), np.where(x > 0, 1, -1))
    formula = np.sign(x) @ query * math.sqrt(math.pi / (2 * dimensions))
    spread = 6 * math.sqrt((math.pi / 2 - 1) / dimensions) * np.abs(formula)
    error = np.abs(index.inner_products(query) - formula)
    assert np.all(error <= spread + tolerance("one-bit", query))
    # and so it estimates cosines with the noise of one bit: (pi / 2 - 1 + 1) / k in all
    residuals = index.inner_products(query) - x @ query
    assert np.std(residuals) < 1.2 * math.sqrt(math.pi / 2 / dimensions)


@pytest.mark.parametrize("kind", CODES)
def test_the_noise_of_each_kind_is_its_distortion(kind):
    """Errors of estimates at right angles to the rows have variance distortion / k."""
    x, queries = unit_rows(2000, 4096), unit_rows(50, 4096, seed=1)
    index, _ = filled(kind, x)
    residuals = index.scan(queries) - queries @ x.T
    expected = DISTORTIONS[kind] / 4096
    assert np.var(residuals) == pytest.approx(expected, rel=0.02, abs=1e-8)
    # and no bias: the estimate's slope over the truth is one
    nearer = x[:50] + 0.3 * unit_rows(50, 4096, seed=2)
    slopes = (index.scan(nearer)[:, :50].diagonal()) / (nearer * x[:50]).sum(1)
    assert np.mean(slopes) == pytest.approx(1, abs=0.005)


@pytest.mark.parametrize("kind", CODES)
def test_zero_rows_give_zero_and_so_do_zero_queries(kind):
    x = unit_rows(5, 64)
    x[[0, 3]] = 0
    index, _ = filled(kind, x)
    found = index.inner_products(unit_rows(1, 64, seed=4)[0])
    assert (found == 0).tolist() == [True, False, False, True, False]
    assert not index.inner_products(np.zeros(64, dtype=np.float32)).any()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("kind", CODES)
def test_rows_and_queries_that_are_not_finite_are_refused(kind, bad):
    x = unit_rows(3, 64)
    index, _ = filled(kind, x)
    x[1, 5] = bad
    with pytest.raises(ValueError, match="NaN or infinite"):
        index.encode(x)
    with pytest.raises(ValueError, match="NaN or infinite"):
        index.scan(x)


def test_codes_that_hold_nan_are_found_out():
    x = unit_rows(3, 64)
    x[1, 5] = np.nan
    index = make_index("flat", 64)
    index.add(x.view(np.uint8), 3)
    with pytest.raises(IndexCorrupt, match="2 of 3 inner products"):
        index.inner_products(x[0])
    onebit, codes = filled("one-bit", unit_rows(3, 64))
    codes[1, -4:] = np.frombuffer(np.float32("nan").tobytes(), dtype=np.uint8)
    with pytest.raises(IndexCorrupt, match="NaN"):
        onebit.add(onebit.pack(codes), 3)


@pytest.mark.parametrize("kind", CODES)
def test_codes_of_another_size_are_refused_with_both_sizes(kind):
    index, other = make_index(kind, 64), make_index(kind, 128)
    codes = other.pack(other.encode(unit_rows(2, 128)))
    with pytest.raises(IndexCorrupt, match=f"x {index.code_size} bytes.* x {codes.shape[1]};"):
        index.add(codes, 2)
    with pytest.raises(IndexCorrupt, match=r"200 rows should have"):
        other.add(codes, 200)


@pytest.mark.parametrize("kind", CODES)
def test_codes_may_lie_anywhere_in_a_mapped_file(kind, tmp_path):
    x = unit_rows(100, 320)
    index, codes = filled(kind, x)
    packed = index.pack(codes)
    path = tmp_path / "codes"
    path.write_bytes(b"odd" + packed.tobytes())
    mapped = np.memmap(path, dtype=np.uint8, mode="r", offset=3, shape=packed.shape)
    other = make_index(kind, 320)
    other.add(mapped, 100)
    queries = unit_rows(5, 320, seed=1)
    np.testing.assert_array_equal(other.scan(queries), index.scan(queries))


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
    monkeypatch.setattr(faiss_module, "_installed", lambda name: name in ("faiss-cpu", "faiss-gpu"))
    with pytest.raises(RuntimeError, match="faiss-cpu and faiss-gpu are both installed"):
        import_faiss()


def test_a_missing_faiss_names_the_extras(monkeypatch):
    monkeypatch.setattr(faiss_module, "_installed", lambda name: False)
    monkeypatch.setitem(sys.modules, "faiss", None)  # makes `import faiss` fail
    with pytest.raises(RuntimeError, match=r"\.\[cpu\].*\.\[gpu\]"):
        import_faiss()


def test_installed_looks_up_distributions():
    assert faiss_module._installed("numpy")
    assert not faiss_module._installed("no-such-distribution-of-etymon")
