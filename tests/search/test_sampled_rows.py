"""Random rows serve two checks; the search does not depend on them. When a search gives up."""

from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from scripts.bench.certificates.worlds import Known
from service.search.answer import Clock
from service.search.proxies import Proxies
from service.search.query import Query
from service.search.search import Search
from service.search.shards import DenseShard

ROWS, K = 1500, 10


def world(seed: int, noise: float) -> tuple[np.ndarray, Proxies]:
    """Scores with a heavy tail and estimates that err by ``noise``."""
    generator = np.random.default_rng(seed)
    truth = generator.standard_t(4, ROWS)
    return truth, Proxies(
        values=truth + noise * generator.standard_normal(ROWS),
        sigmas=np.full(ROWS, noise),
        relative=0.0,
        divisors=np.ones(ROWS),
        failed=np.zeros(ROWS, dtype=bool),
    )


def searched(truth: np.ndarray, proxies: Proxies, asked: Query, seed: int = 0) -> Search:
    search = Search(asked, DenseShard(proxies), seed)
    search.certificates = search.run(Known(truth), Clock())
    return search


# --- random rows --------------------------------------------------------------------------------


def test_which_rows_are_rescored_does_not_depend_on_the_random_ones():
    truth, proxies = world(0, 1.0)
    asked = Query(k=K, budget=300)
    search = searched(truth, proxies, asked)
    drawn = search._sample[~search._before_audit[search._sample]]
    assert len(drawn) > 30
    other = truth.copy()
    other[drawn] += np.linspace(-0.3, 0.3, len(drawn))  # small enough for the noise's check
    other[drawn[:3]] = np.nan
    again = searched(other, proxies, asked)
    np.testing.assert_array_equal(search._before_audit, again._before_audit)
    assert search.rescored == again.rescored
    assert again.certificates[0].observed["unscorable_rows"] == 3


def test_a_random_row_that_is_wanted_is_not_scored_twice():
    truth, proxies = world(1, 0.5)
    asked: list[int] = []

    class Counted(Known):
        def score(self, rows):
            asked.extend(rows)
            return super().score(rows)

    search = Search(Query(k=K, budget=400, calibration_rows=200), DenseShard(proxies), 0)
    search.run(Counted(truth), Clock())
    assert len(asked) == len(set(asked)) == search.rescored + search.sampled
    wanted = search._before_audit & np.isin(np.arange(ROWS), search._sample)
    assert wanted.sum() > 3
    assert search.scored.sum() == len(asked)


def test_the_audit_begins_with_what_is_left_of_the_random_rows():
    truth, proxies = world(2, 1.0)
    for audit_rows in (0, 40, 64, 100):
        search = searched(truth, proxies, Query(k=K, budget=100, audit_rows=audit_rows))
        left = set(search._sample[~search._before_audit[search._sample]])
        assert left < set(np.flatnonzero(search.scored))
        assert left <= set(search._audited)
        assert len(search._audited) == max(len(left), audit_rows)
        audit = search.certificates[1]
        assert audit.observed["sampled_rows"] == len(search._audited)
        assert audit.observed["unscored_rows"] == (~search._before_audit).sum()


@pytest.mark.parametrize("noise", [0.3, 30.0])
def test_the_audit_covers_as_often_as_it_says(noise):
    """With proxies that tell something, and with such that tell nothing."""
    wrong = []
    for seed in range(400):
        truth, proxies = world(seed % 20, noise)
        asked = Query(k=K, budget=40, audit_rows=300, calibration_rows=300, confidence=0.9)
        search = searched(truth, proxies, asked, seed)
        true = np.sort(truth)[-K]
        recall = float(np.mean(truth[search.best(K)] >= true))
        bound = search.certificates[1].recall_lower_bound
        assert bound is not None
        wrong.append(bound > recall + 1e-9)
    assert sum(wrong) <= stats.binom.ppf(0.999, len(wrong), 0.1)


def test_rows_without_a_gradient_are_drawn_as_any_and_counted_as_above():
    truth, proxies = world(3, 1.0)
    failed = np.arange(ROWS) % 5 == 0
    truth[failed] = np.nan
    values = np.where(failed, -np.inf, proxies.values)
    proxies = replace(proxies, values=values, failed=failed)
    search = searched(truth, proxies, Query(k=K, budget=100, audit_rows=300))
    above = search.certificates[1].observed["sampled_above_threshold"]
    assert above >= failed[search._audited].sum() > 30
    assert not search.scored[failed].any()


def test_a_search_that_is_ended_while_it_draws_audits_nothing():
    truth, proxies = world(4, 1.0)
    search = Search(Query(k=K, budget=100), DenseShard(proxies), 0)
    steps = search.steps(Clock())
    rows = next(steps)
    search.end()
    with pytest.raises(StopIteration) as ended:
        steps.send(truth[rows[:20]])
    assert ended.value.value[1].observed["sampled_rows"] == 0
    assert search.sampled == 20


# --- patience -----------------------------------------------------------------------------------


def test_a_search_that_cannot_be_certified_ends_when_it_finds_no_more():
    truth, proxies = world(7, 1.5)
    asked = Query(k=K, budget=600, patience=None)
    spent = searched(truth, proxies, asked)
    assert spent.certificates[0].status == "not certified"
    assert spent.rescored == 600
    patient = searched(truth, proxies, replace(asked, patience=100))
    assert patient.certificates[0].status == "not certified"
    assert 100 <= patient.rescored < 600
    assert patient.certificates[0].open_rows > 600 - patient.rescored
    hasty = searched(truth, proxies, replace(asked, patience=0))
    assert hasty.rescored == 32


def test_patience_never_ends_a_search_that_the_budget_can_certify():
    for seed in range(10):
        truth, proxies = world(seed, 0.4)
        asked = Query(k=K, budget=ROWS, patience=0)
        search = searched(truth, proxies, asked)
        whole = searched(truth, proxies, replace(asked, patience=None))
        assert search.certificates[0].status in ("certified", "exhaustive")
        assert search.rescored == whole.rescored
    certified = 0
    for seed in range(5, 13):
        truth, proxies = world(seed, 1.5)
        asked = Query(k=K, budget=600, patience=100)
        whole = searched(truth, proxies, replace(asked, patience=None))
        if whole.certificates[0].status == "certified":
            certified += 1
            assert searched(truth, proxies, asked).rescored == whole.rescored
    assert certified > 1
