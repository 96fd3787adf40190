"""Low-rank codes: signs of the best factors; scans equal brute force over the codes."""

import numpy as np
import pytest

from index.codes import lowrank
from index.codes.lowrank import Block, LowRankIndex, allocate, component_size
from index.codes.vectors import LAWFUL, LOW_RANK, make_index
from index.errors import IndexCorrupt

BLOCKS = (
    Block(rows=24, columns=40, components=3),
    Block(rows=9, columns=13, components=0),  # no room for it
    Block(rows=33, columns=17, components=2),
)
ENTRIES = sum(block.size for block in BLOCKS)


def unit_rows(rows: int, seed: int = 0, entries: int = ENTRIES) -> np.ndarray:
    x = np.random.default_rng(seed).standard_normal((rows, entries)).astype(np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def reference(matrix: np.ndarray, components: int) -> np.ndarray:
    """What one block's code stands for up to the row's factor, slowly: SVD, then pursuit."""
    left = np.linalg.svd(matrix.astype(np.float64), full_matrices=False)[0]
    rest, total = matrix.astype(np.float64), np.zeros(matrix.shape)
    for i in range(components):
        u = np.where(left[:, i] >= 0, 1.0, -1.0)
        v = np.where(u @ rest >= 0, 1.0, -1.0)
        part = np.outer(u, v) * (u @ rest @ v) / matrix.size
        rest, total = rest - part, total + part
    return total


def low_rank_rows(rows: int, seed: int = 0) -> np.ndarray:
    """Unit rows with clearly separated singular values, so that rounding decides no sign."""
    generator = np.random.default_rng(seed)
    parts = []
    for block in BLOCKS:
        u, v = (generator.standard_normal((rows, n, 3)) for n in (block.rows, block.columns))
        u, v = np.linalg.qr(u).Q, np.linalg.qr(v).Q
        parts.append(((u * [1, 0.5, 0.2]) @ v.transpose(0, 2, 1)).reshape(rows, -1))
    x = np.concatenate(parts, axis=1)
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


def test_codes_stand_for_the_signs_of_the_leading_factors():
    x = low_rank_rows(20)
    index = LowRankIndex(BLOCKS)
    found = index.decode(index.encode(x))
    for row, decoded in zip(x, found, strict=True):
        start, parts = 0, []
        for block in BLOCKS:
            entries = row[start : start + block.size].reshape(block.rows, block.columns)
            parts.append(reference(entries, block.components).ravel())
            start += block.size
        expected = np.concatenate(parts)
        expected *= (row @ row) / (expected @ row)
        agree = np.isclose(decoded, expected, rtol=2e-3, atol=1e-4).mean()
        assert agree > 0.98  # a factor's entry next to 0 may have either sign


def test_a_row_estimates_itself_exactly():
    index = LowRankIndex(BLOCKS)
    x = unit_rows(50)
    index.add(index.pack(index.encode(x)), 50)
    assert np.allclose(np.diag(index.scan(x)), 1, atol=2e-2)  # LEFT_OUT, and float16


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("queries", [1, 5])
def test_a_scan_is_brute_force_over_the_codes(threads, queries, monkeypatch):
    monkeypatch.setattr(lowrank, "SCANNED_AT_ONCE", 16)
    index = LowRankIndex(BLOCKS, threads)
    codes = index.encode(unit_rows(75))
    for part in np.split(codes, [33]):
        index.add(index.pack(part), len(part))
    y = unit_rows(queries, seed=1)
    exact = y @ index.decode(codes).T
    monkeypatch.setattr(lowrank, "LEFT_OUT", 0.0)
    np.testing.assert_allclose(index.scan(y), exact, atol=1e-6)
    np.testing.assert_allclose(index.inner_products(y[0]), exact[0], atol=1e-6)
    monkeypatch.setattr(lowrank, "LEFT_OUT", 1e-3)
    error = index.scan(y) - exact
    assert np.square(error).mean() <= 4e-3 * np.square(exact).mean()


def test_company_and_threads_change_no_code():
    x = unit_rows(40)
    whole = LowRankIndex(BLOCKS, 1).encode(x)
    assert np.array_equal(LowRankIndex(BLOCKS, 4).encode(x), whole)
    parts = [LowRankIndex(BLOCKS, 2).encode(part) for part in np.split(x, [1, 7, 30])]
    assert np.array_equal(np.concatenate(parts), whole)


@pytest.mark.parametrize("decay", [4, 8, 30])
def test_rounding_of_a_row_changes_no_more_than_the_odd_sign(decay):
    """Another batch or processor changes a row's last digit; how fast its spectrum falls is free.

    With the iterated subspace orthogonalised only at the end, that moved what every code stands for
    by a third of the code's error.
    """
    generator = np.random.default_rng(4)
    u, v = np.linalg.qr(generator.standard_normal((2, 40, 64, 64))).Q
    x = ((u * np.exp(-np.arange(64) / decay)) @ v).reshape(40, -1)
    x = (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)
    rounded = (x * (1 + 1e-7 * generator.standard_normal(x.shape))).astype(np.float32)
    index = LowRankIndex([Block(rows=64, columns=64, components=30)])
    codes, others = index.decode(index.encode(x)), index.decode(index.encode(rounded))
    error = np.linalg.norm(codes - x, axis=1)
    moved = np.linalg.norm(others - codes, axis=1) / error
    assert (moved > 0.01).sum() <= 2  # of 40; in float64 it is 3 of 800 for the fastest decay
    assert moved.max() < 0.25


def test_zero_rows_have_estimates_of_zero():
    index = LowRankIndex(BLOCKS)
    codes = index.encode(np.concatenate([unit_rows(1), np.zeros((2, ENTRIES), np.float32)]))
    index.add(codes, 3)
    found = index.inner_products(unit_rows(1, seed=2)[0])
    assert found[0] != 0 and not found[1:].any()


def test_more_components_leave_less():
    x = unit_rows(30, entries=24 * 40)
    errors = []
    for components in (1, 4, 12, 24):
        index = LowRankIndex([Block(rows=24, columns=40, components=components)])
        decoded = index.decode(index.encode(x))
        cosine = (decoded * x).sum(1) / np.linalg.norm(decoded, axis=1)
        errors.append(1 - cosine.mean())
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.3


def test_bytes_go_where_energy_is():
    shapes = [(16, 16), (16, 16), (64, 64)]
    blocks = allocate(shapes, [4.0, 1.0, 0.0], 10 * component_size(16, 16))
    assert [b.components for b in blocks] == [8, 2, 0]
    even = allocate([(8, 8)] * 3, [1.0] * 3, 13 * component_size(8, 8))
    assert [b.components for b in even] == [5, 4, 4]
    assert sum(b.code_size for b in even) == LowRankIndex(even).code_size
    (full,) = allocate([(4, 8)], [1.0], 1000)
    assert full.components == 4  # no more than its rank
    with pytest.raises(ValueError, match="hold no component; the smallest takes 6"):
        allocate([(16, 16)], [1.0], 5)


def test_what_cannot_be_coded_or_searched_is_refused():
    index = LowRankIndex(BLOCKS)
    bad = unit_rows(2)
    bad[1, 3] = np.inf
    with pytest.raises(ValueError, match="NaN or infinite"):
        index.encode(bad)
    with pytest.raises(ValueError, match="NaN or infinite"):
        index.scan(bad)
    codes = index.encode(unit_rows(2))
    with pytest.raises(IndexCorrupt, match="should have codes"):
        index.add(codes[:, 1:], 2)
    codes[1, -2:] = np.array([np.nan], dtype=np.float16).view(np.uint8)
    with pytest.raises(IndexCorrupt, match="NaN"):
        index.add(codes, 2)


def test_low_rank_is_a_kind_of_code_without_a_law():
    assert isinstance(make_index(LOW_RANK, 0, blocks=BLOCKS), LowRankIndex)
    assert LOW_RANK not in LAWFUL
