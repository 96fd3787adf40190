"""Shards of rows: their answers are those of arrays over all rows, whatever the blocks."""

import math

import numpy as np
import pytest

from service.search import shards as shards_module
from service.search.proposing import CodedShard
from service.search.proxies import Proxies, RankedProxies
from service.search.shards import DenseShard, Found

ROWS = 500


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(shards_module, "BLOCK", 64)


def dense(seed: int) -> Proxies:
    """Estimates with ties, rows that are empty and rows that failed."""
    generator = np.random.default_rng(seed)
    values = np.round(generator.standard_normal(ROWS), 1)
    failed = generator.random(ROWS) < 0.05
    values[failed] = -np.inf
    return Proxies(
        values=values,
        sigmas=np.where(generator.random(ROWS) < 0.1, 0, generator.uniform(0.1, 1, ROWS)),
        relative=0.3,
        divisors=generator.uniform(1, 2, ROWS),
        failed=failed,
    )


def by_depth(depths: np.ndarray, rows: np.ndarray) -> list[int]:
    return sorted(rows.tolist(), key=lambda row: (depths[row], row))


@pytest.mark.parametrize("seed", range(5))
def test_the_best_are_those_of_a_sort(seed):
    proxies = dense(seed)
    without = np.random.default_rng(seed).random(ROWS) < 0.3
    usable = np.flatnonzero(~without & ~proxies.failed)
    wanted = sorted(usable.tolist(), key=lambda row: (-proxies.values[row], row))
    for count in (0, 1, 17, 200, ROWS):
        assert DenseShard(proxies).best(count, without).tolist() == wanted[:count]


@pytest.mark.parametrize("slack", [False, True])
@pytest.mark.parametrize("threshold", [-math.inf, -0.5, 1.2])
@pytest.mark.parametrize("most", [0, 5, 60, ROWS])
def test_contenders_are_those_of_a_sort_and_the_rest_lies_deeper(threshold, most, slack):
    proxies = dense(1)
    shard = DenseShard(proxies)
    without = np.random.default_rng(0).random(ROWS) < 0.3
    usable = np.flatnonzero(~without & ~proxies.failed)
    depths = np.full(ROWS, np.nan)
    ruler = proxies.at(usable)
    depths[usable] = (ruler.with_slack() if slack else ruler).depths(threshold)
    for depth in (-math.inf, 0.0, 1.5, math.inf):
        found = shard.contenders(threshold, depth, without, most, slack=slack)
        wanted = by_depth(depths, usable[depths[usable] <= depth])[:most]
        assert found.rows.tolist() == wanted
        np.testing.assert_array_equal(found.depths, depths[wanted])
        rest = np.setdiff1d(usable, wanted)
        assert found.beyond == depths[rest].min(initial=math.inf)


def test_guesses_are_summed_over_the_rows_that_are_left():
    proxies = dense(2)
    without = np.random.default_rng(0).random(ROWS) < 0.3
    usable = ~without & ~proxies.failed
    wanted = sum(
        max(0.0, v * d)
        for v, d in zip(proxies.values, proxies.divisors, strict=True)
        if math.isfinite(v)
    )
    everything = DenseShard(proxies).guessed(np.zeros(ROWS, dtype=bool))
    assert everything == pytest.approx(wanted)
    some = np.maximum(proxies.scores(), 0)[usable].sum()
    assert DenseShard(proxies).guessed(without) == pytest.approx(some)


@pytest.mark.parametrize("ranking", ["score", "normalised"])
def test_estimates_from_codes_are_their_formula(ranking):
    generator = np.random.default_rng(3)
    cosines = generator.standard_normal(ROWS).astype(np.float32)
    norms = np.where(generator.random(ROWS) < 0.1, 0, generator.uniform(1, 9, ROWS))
    norms = norms.astype(np.float32)
    failed = generator.random(ROWS) < 0.05
    shard = CodedShard(
        cosines=cosines,
        norms=norms,
        failed=failed,
        psi=2.5,
        scale=0.01,
        relative=0.1,
        ranking=ranking,
        lawful=True,
    )
    rows = generator.permutation(ROWS)[:90]
    found = shard.at(rows)
    for place, row in enumerate(rows):
        weight = float(norms[row]) if ranking == "score" else float(norms[row] > 0)
        value = -math.inf if failed[row] else float(cosines[row]) * 2.5 * weight
        assert found.values[place] == pytest.approx(value, rel=1e-6)
        assert found.sigmas[place] == pytest.approx(0.01 * 2.5 * weight)
        divisor = float(norms[row]) or math.inf if ranking == "normalised" else 1.0
        assert found.divisors[place] == divisor
    opposite, some = shard.negated(), shard.among(rows)
    np.testing.assert_array_equal(
        opposite.at(rows).values, np.where(failed[rows], -np.inf, -found.values)
    )
    np.testing.assert_array_equal(some.at(slice(None)).values, found.values)


def test_places_are_those_among_all_rows_that_are_asked_about():
    values = np.array([3.0, 9.0, 1.0, 7.0, 7.0])
    ranked = RankedProxies(
        values=values,
        sigmas=np.zeros(5),
        relative=0.0,
        divisors=np.ones(5),
        failed=np.zeros(5, dtype=bool),
        lawful=False,
    )
    shard, nothing = DenseShard(ranked), np.zeros(5, dtype=bool)
    rows = np.array([2, 4, 0])
    assert shard.at(rows).depths(0.0).tolist() == [5, 3, 4]
    assert shard.among(rows).at(slice(None)).depths(0.0).tolist() == [3, 1, 2]
    assert shard.negated().at(rows).depths(0.0).tolist() == [1, 4, 2]
    assert shard.contenders(0.0, 2.5, nothing, 9).rows.tolist() == [1, 3]


def test_scores_that_were_found_are_kept_in_order_of_row():
    found = Found()
    assert np.isnan(found.scores_of(np.array([3]))).all()
    found.add(np.array([7, 2]), np.array([4.0, 1.0]), np.array([2.0, 1.0]))
    found.add(np.array([5, 9]), np.array([np.nan, 6.0]), np.array([1.0, 3.0]))
    assert found.rows.tolist() == [2, 5, 7, 9]
    np.testing.assert_array_equal(found.scores_of(np.array([9, 5, 3])), [6.0, np.nan, np.nan])
    np.testing.assert_array_equal(found.values_of(np.array([7, 2])), [2.0, 1.0])
    rows, values = found.best(2)
    assert (rows.tolist(), values.tolist()) == ([7, 9], [2.0, 2.0])  # ties: the lower row
