"""Looks at further slices: which rows they drop, and how often certificates over them are wrong."""

import functools
import math
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from index.certificates.sketch import (
    LATER,
    FoundTop,
    Level,
    Scales,
    SketchEvidence,
    certify_sketch,
    misses_bound,
    plan_levels,
    with_open_rows,
)
from index.certificates.statement import Certificate
from scripts.bench.certificates.worlds import HOSTILE, Known, World, unchanged
from service.search import looks as looks_module
from service.search.answer import Clock
from service.search.looks import Looks
from service.search.proxies import Proxies
from service.search.query import Query
from service.search.search import Search
from service.search.shards import DenseShard
from tests.index.test_certificates import hard_data, most_alarms

REDRAWS, K, BITS, AFTER = 200, 10, 64, (1, 4, 16)
"""Bits of a slice; slices that the estimates of each look are made of."""


def proxies_of(values: np.ndarray, sigma: float, relative: float = 0.0) -> Proxies:
    return Proxies(
        values=values,
        sigmas=np.full(len(values), sigma),
        relative=relative,
        divisors=np.ones(len(values)),
        failed=np.zeros(len(values), dtype=bool),
    )


HARD = hard_data()


@functools.cache
def redrawn(seed: int) -> list[Proxies]:
    """Estimates of ``HARD`` after each look, by slices of a dense Gaussian sign sketch."""
    query, rows = HARD
    generator = np.random.default_rng([7, seed])
    scale = math.sqrt(math.pi / (2 * BITS))
    total, found = np.zeros(len(rows)), []
    for number in range(1, AFTER[-1] + 1):
        projection = generator.standard_normal((BITS, rows.shape[1]))
        y = projection @ query
        codes = np.where(rows @ projection.T > 0, 1.0, -1.0)
        total += codes @ y / np.linalg.norm(y) * scale
        if number in AFTER:
            found.append(proxies_of(total / number, scale / math.sqrt(number)))
    return found


# --- depths and contenders ----------------------------------------------------------------------


def some_looks(seed: int, relative: float) -> tuple[np.ndarray, list[Proxies]]:
    generator = np.random.default_rng(seed)
    truth = generator.standard_t(4, 400)
    looks = []
    total = np.zeros(400)
    for number in range(1, 17):
        total += truth + generator.standard_normal(400)
        if number in AFTER:
            root = math.sqrt(number)
            looks.append(proxies_of(total / number, 1 / root, relative / root))
    return truth, looks


@pytest.mark.parametrize("relative", [0.0, 0.3])
@pytest.mark.parametrize("most", [16, 1 << 16])
def test_contenders_are_the_rows_that_no_look_drops(monkeypatch, relative, most):
    monkeypatch.setattr(looks_module, "AT_ONCE", most)
    monkeypatch.setattr(looks_module, "ROUNDS", 400)
    inflations = [1.2, 1.0, 1.5]
    for seed in range(10):
        truth, each = some_looks(seed, relative)
        without = np.random.default_rng(seed).random(400) < 0.2
        threshold, goal = float(np.sort(truth)[-10]), 1.2 * 2.3
        left = []
        for row in np.flatnonzero(~without):
            dropped = False
            for look, (proxies, inflation) in enumerate(zip(each, inflations, strict=True)):
                scale = math.hypot(proxies.sigmas[row], proxies.relative * threshold)
                depth = (threshold - proxies.values[row]) / scale
                z = 2.3 * inflation * (LATER if look else 1)
                limit = 1 / proxies.relative if relative else math.inf
                dropped |= depth > z and limit > z
            if not dropped:
                left.append(row)
        looks = Looks(DenseShard(*each))
        found = looks.contenders(threshold, goal, inflations, without, 400)
        if most > 400:
            assert sorted(found.tolist()) == left
            order = each[-1].values[found]
            assert (np.diff(order) <= 0).all()  # all scales of a look are the same here
        else:
            assert set(found.tolist()) <= set(left)
            assert bool(len(found)) == bool(left)
        without = without.copy()
        without[left] = True
        assert not len(looks.contenders(threshold, goal, inflations, without, 400))
        assert looks.reached(threshold, goal, inflations, without) > goal


def test_rows_that_were_not_read_for_want_of_time_count_as_they_were_scanned(monkeypatch):
    monkeypatch.setattr(looks_module, "AT_ONCE", 8)
    monkeypatch.setattr(looks_module, "ROUNDS", 2)
    truth, each = some_looks(0, 0.0)
    threshold, goal = float(np.sort(truth)[-10]), 2.3
    near = threshold - each[0].values <= goal
    looks = Looks(DenseShard(*each))
    without = np.zeros(400, dtype=bool)
    for _ in range(40):
        found = looks.contenders(threshold, goal, [1.0] * 3, without, 4)
        if not len(found):
            break
        without[found] = True
    order = np.sort((threshold - each[0].values)[near & ~without])
    assert len(order) > 16
    assert looks.reached(threshold, goal, [1.0] * 3, without) == order[16]


def test_no_row_is_read_twice():
    _, each = some_looks(0, 0.0)
    read: list[tuple[int, int]] = []

    class Counting(DenseShard):
        def at(self, rows, look=0):
            if look and not isinstance(rows, slice):
                read.extend((look, int(row)) for row in rows)
            return super().at(rows, look)

    shard = Counting(*each)
    truth = each[0].values
    asked = Query(k=5, budget=60, calibration_rows=16, audit_rows=0)
    Search(asked, shard, 0).run(Known(truth), Clock())
    assert len(read) == len(set(read))
    assert 0 < len(read) < 2 * 400


# --- the certificate's arithmetic ---------------------------------------------------------------


def test_the_levels_of_several_looks_pay_for_each():
    for k, recall, looks in ((10, 0.9, 3), (100, 0.9, 2), (1, 1.0, 4), (10, 0.5, 3)):
        one, several = (plan_levels(k, recall, 0.95, "gaussian", n) for n in (1, looks))
        for before, after in zip(one, several, strict=True):
            total = stats.norm.sf(after.z) + (looks - 1) * stats.norm.sf(LATER * after.z)
            assert total == pytest.approx(stats.norm.sf(before.z), rel=1e-6)
        assert sum(level.delta for level in several) <= 0.05 * (1 + 1e-9)


def bound_by_the_formula(level, exact, each, relative):
    """The least J with ``B_m <= delta m`` for all m > J, look by look, from the docstring."""
    k = len(exact)
    failing = [0]
    for m in range(1, k + 1):
        total = 0.0
        for look, sigmas in enumerate(each):
            z = level.z * (LATER if look else 1)
            total += m * stats.norm.sf(z)
            for j in range(k - m):
                threshold = exact[k - m - 1]
                here = math.hypot(sigmas[j], relative * max(0, threshold))
                there = math.hypot(sigmas[j], relative * max(0, exact[j]))
                total += stats.norm.sf((exact[j] - threshold + z * here) / there)
        if total > level.delta * m:
            failing.append(m)
    return max(failing)


@pytest.mark.parametrize("relative", [0.0, 0.1])
@pytest.mark.parametrize("z", [1.6, 1.9, 2.3])
def test_the_bound_over_looks_equals_its_formula(z, relative):
    generator = np.random.default_rng(int(10 * z))
    for _ in range(20):
        k = int(generator.integers(1, 25))
        exact = np.sort(generator.exponential(2.0, k))[::-1]
        each = [generator.uniform(0.5, 2, k) / n for n in (1, 2, 4)]
        later = tuple(Scales(sigmas=sigmas, relative=relative) for sigmas in each[1:])
        top = FoundTop(exact=exact, sigmas=each[0], relative=relative, later=later)
        level = Level(z=z, delta=0.05)
        wanted = bound_by_the_formula(level, exact, each, relative)
        assert misses_bound(level, top, "gaussian") == wanted


# --- coverage -----------------------------------------------------------------------------------


def one_search(each: list[Proxies], tail: str, seed: int) -> tuple[float, float, int]:
    """One redraw, searched: the recall stated (NaN if refused), the true one, rows rescored."""
    query, rows = HARD
    truth = rows @ query
    asked = Query(k=K, budget=len(rows), calibration_rows=32, audit_rows=0, tail=tail)
    search = Search(asked, DenseShard(*each), seed)
    certificate = search.run(Known(truth), Clock())[0]
    recall = float(np.mean(truth[search.best(K)] >= np.sort(truth)[-K]))
    bound = certificate.recall_lower_bound
    return (math.nan if bound is None else bound), recall, search.rescored


def outcomes(tail: str) -> list[tuple[float, float, int]]:
    return [one_search(redrawn(seed), tail, seed) for seed in range(REDRAWS)]


def violations(found: list[tuple[float, float, int]]) -> int:
    return sum(bound > recall + 1e-12 for bound, recall, _ in found)


@pytest.mark.parametrize("tail", ["gaussian", "hoeffding"])
def test_redrawn_slices_keep_the_stated_confidence(tail):
    """Near-duplicates make the top and ties sit at the threshold; most rows are spared."""
    found = outcomes(tail)
    assert violations(found) <= most_alarms(REDRAWS, 0.05)
    assert sum(bound >= 0.9 for bound, _, _ in found) > 0.9 * REDRAWS
    alone = [one_search(redrawn(seed)[:1], tail, seed)[2] for seed in range(5)]
    assert np.median([rescored for *_, rescored in found]) < 0.5 * np.median(alone)


def test_later_looks_that_drop_more_than_the_bound_pays_for_are_noticed(monkeypatch):
    monkeypatch.setattr(looks_module, "LATER", LATER / 6)
    wrong = violations(outcomes("gaussian"))
    assert stats.binomtest(wrong, REDRAWS, 0.05, "greater").pvalue < 0.01


def test_slices_that_are_not_independent_are_refused():
    """The same slice again and again claims a quarter of its error; random rows tell."""
    first, *later = redrawn(0)
    same = [first, *(replace(look, values=first.values) for look in later)]
    bound, _, _ = one_search(same, "gaussian", 0)
    assert math.isnan(bound)


@pytest.mark.parametrize("name", ["none", *HOSTILE])
def test_hostile_worlds(name):
    """Duplicates, ties, lost rows, heavy norms: as often right as stated, by redraws of noise."""
    change = {"none": unchanged, **HOSTILE}[name]
    truth = 0.05 * np.random.default_rng(3).standard_t(4, 600)
    if name == "ties":  # of the truth, so that every look errs around the same values
        truth, change = np.round(truth / 0.02) * 0.02, unchanged
    wrong = refused = 0
    for draw in range(60):
        generator = np.random.default_rng([11, draw])
        total, each = np.zeros(600), []
        for number in range(1, 17):
            total += truth + 0.04 * generator.standard_normal(600)
            if number in AFTER:
                each.append(proxies_of(total / number, 0.04 / math.sqrt(number)))
        worlds = [
            change(World(truth=truth, scores=truth, proxies=look), np.random.default_rng(5))
            for look in each
        ]
        world = worlds[0]
        asked = Query(k=K, budget=len(world.truth) // 2, audit_rows=0)
        search = Search(asked, DenseShard(*(w.proxies for w in worlds)), draw)
        bound = search.run(Known(world.scores), Clock())[0].recall_lower_bound
        refused += bound is None
        recall = world.recall(search.best(K).tolist(), K)
        wrong += bound is not None and bound > recall + 1e-9
    assert wrong <= most_alarms(60, 0.05)
    if name == "15 % of proxies shuffled":
        assert refused > 30
    else:
        assert refused <= most_alarms(60, 2e-3)


TRIALS = 4000


def missed_too_many(looks: int, counted: int) -> int:
    """Redraws that miss more than is stated, when ``counted`` of the looks enter the bound.

    Three rows of the top ten are tied at the threshold, the others lie far above; errors of looks
    are independent, which is the worst case for a sum over them.
    """
    exact = np.concatenate([np.linspace(90, 30, 7), np.zeros(3), np.full(20, -9.0)])
    level = Level(z=float(stats.norm.isf(0.024 / looks)), delta=0.04)
    generator = np.random.default_rng(6)
    wrong = 0
    for _ in range(TRIALS):
        noise = generator.standard_normal((looks, len(exact)))
        found = (noise >= -level.z - exact).all(0)
        found[K:] = True
        later = (Scales(sigmas=np.ones(K)),) * (counted - 1)
        best = exact[np.flatnonzero(found)[:K]]
        top = FoundTop(exact=best, sigmas=np.ones(K), later=later)
        stated = max(0, misses_bound(level, top, "gaussian"))
        wrong += int((~found[:K]).sum()) > stated
    return wrong


def test_a_bound_that_forgets_later_looks_is_noticed():
    """What is forgotten is two thirds of the error probability."""
    assert missed_too_many(looks=3, counted=3) <= most_alarms(TRIALS, 0.04)
    assert missed_too_many(looks=3, counted=1) > most_alarms(TRIALS, 0.04)


# --- what a certificate would take --------------------------------------------------------------


@pytest.mark.parametrize("looks", [1, 3])
def test_so_many_more_rows_as_it_says_certify_an_answer(looks: int) -> None:
    """With them the same search ends certified, or says that a few more are open by now."""
    query, rows = HARD
    truth, told = rows @ query, 0
    for seed in range(12):
        shard = DenseShard(*redrawn(seed)[:looks])
        asked = Query(prompt="", completion="a", k=K, ranking="score", budget=K, audit_rows=0)
        short = Search(asked, shard, seed).run(Known(truth), Clock())[0]
        if short.status != "not certified":
            assert "open_rows" not in short.observed
            continue
        told += 1
        more = int(short.observed["open_rows"])
        assert 0 < more <= len(truth)
        assert f"about {more:,} more rows would have to be scored exactly" in short.sentence
        enough = replace(asked, budget=K + more)
        found = Search(enough, shard, seed).run(Known(truth), Clock())[0]
        if found.status == "not certified":  # errors near the query seem larger by now
            assert int(found.observed["open_rows"]) <= max(5, more // 5)
        assert int(found.observed["rescored_rows"]) <= int(short.observed["rescored_rows"]) + more
    assert told > 5


def test_more_open_rows_than_are_counted_are_told_as_such() -> None:
    certificate = certify_nothing()
    assert "more than 10,000 more rows" in with_open_rows(certificate, 10_000, 10_000).sentence
    assert "about 9,999 more rows" in with_open_rows(certificate, 9_999, 10_000).sentence


def certify_nothing() -> Certificate:
    top = FoundTop(exact=np.zeros(0), sigmas=np.zeros(0))
    evidence = SketchEvidence(
        reached=0.0, top=top, rows=50_000, rescored=10, unscorable=0, check=None
    )
    return certify_sketch(evidence, K, 0.9, 0.95, "hoeffding")
