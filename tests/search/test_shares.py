"""Answers say what part of all influence their results carry, or why they do not."""

from dataclasses import replace

import numpy as np
import pytest

from scripts.bench.certificates.shares import answers, summarise
from scripts.bench.certificates.worlds import Known
from service.scoring.exhaustive import exact_scores
from service.search.answer import Clock
from service.search.opening import open_index
from service.search.proxies import Proxies, RankedProxies
from service.search.query import Condition, Query
from service.search.retrieval import Retriever
from service.search.search import Search
from service.search.shards import DenseShard

pytest_plugins = ["tests.index_fixtures"]

ASKED = ("Kyoto is known for", " its garden")
ROWS = 2000


@pytest.fixture(scope="module")
def retriever(workshop, built) -> Retriever:
    return Retriever(open_index(built, workshop.loaded))


@pytest.fixture(scope="module")
def truth(retriever) -> np.ndarray:
    """Exact scores of every row."""
    index = retriever.index
    own = {"": index.estimators.own.directions}
    asked = [index.loaded.encode_query(*ASKED)]
    return exact_scores(index.loaded, own, index.examples, asked)[""][0].astype(float)


def query(**changes) -> Query:
    return Query(prompt=ASKED[0], completion=ASKED[1], seed=3, **{"k": 5, **changes})


def world(generator: np.random.Generator, *, norms: bool = False) -> tuple[np.ndarray, Proxies]:
    """Scores with a heavy tail, with proxies as of a sketch."""
    cosines = 0.01 * generator.standard_t(3, size=ROWS)
    lengths = 1 + generator.pareto(3, ROWS) if norms else np.ones(ROWS)
    return cosines * lengths, Proxies(
        values=cosines + 0.01 * generator.standard_normal(ROWS),
        sigmas=np.full(ROWS, 0.01),
        relative=0.0,
        divisors=lengths,
        failed=np.zeros(ROWS, dtype=bool),
    )


def searched(scores: np.ndarray, proxies: Proxies, asked: Query, seed: int = 0) -> Search:
    search = Search(asked, DenseShard(proxies), seed)
    search.run(Known(scores), Clock())
    return search


@pytest.mark.parametrize("ranking", ["score", "normalised"])
def test_where_everything_is_scored_the_share_is_exact(retriever, truth, ranking):
    answer = retriever.answer(query(ranking=ranking, direction="both", audit_rows=120))
    for side, share in answer.sided_shares:
        signed = truth if side == "proponents" else -truth
        rows = [r.row for r in answer.results if r.direction == side]
        whole = np.maximum(signed, 0).sum()
        assert share.estimate == pytest.approx(np.maximum(signed[rows], 0).sum() / whole, rel=1e-3)
        assert share.low == share.high == share.estimate
        assert share.confidence == 1
        assert "every row was scored exactly" in share.sentence
        assert ("negative influence" in share.sentence) == (side == "opponents")


def test_filters_leave_the_rows_that_the_share_is_of(retriever, truth):
    answer = retriever.answer(query(filters={"page": Condition(at_most=49)}, audit_rows=120))
    ((_, share),) = answer.sided_shares
    kept = np.maximum(truth[:50], 0)
    shown = kept[[result.row for result in answer.results]].sum()
    assert share.estimate == pytest.approx(shown / kept.sum(), rel=1e-3)


def test_a_sample_gives_an_interval_around_the_truth(retriever, truth):
    answer = retriever.answer(query(budget=5, calibration_rows=30, audit_rows=40))
    ((_, share),) = answer.sided_shares
    positive = np.maximum(truth, 0)
    true = positive[[result.row for result in answer.results]].sum() / positive.sum()
    assert share.confidence == 0.95
    assert 40 <= share.sampled <= 70
    assert share.low < true < share.high
    assert f"{share.low:.0%} to {share.high:.0%} at 95% confidence" in share.sentence


def test_estimators_without_gradients_state_no_share(retriever):
    answer = retriever.answer(query(estimator="bm25"))
    ((_, share),) = answer.sided_shares
    assert share.estimate is None
    assert "without gradients" in share.sentence


def test_too_few_random_rows_state_no_share(retriever):
    answer = retriever.answer(query(budget=5, calibration_rows=0, audit_rows=0))
    ((_, share),) = answer.sided_shares
    assert share.estimate is None
    assert "0 were scored at random" in share.sentence


def test_an_order_that_estimates_nothing_still_gives_an_interval(retriever, truth):
    asked = query(proposer="bm25", budget=5, calibration_rows=30, audit_rows=40)
    answer = retriever.answer(asked)
    ((_, share),) = answer.sided_shares
    assert share.low is not None
    assert share.low < share.estimate < share.high
    ranked = RankedProxies(
        values=truth, sigmas=0 * truth, relative=0.0, divisors=1 + 0 * truth, failed=truth > 9e9
    )
    assert not ranked.scores().any()


def test_a_search_that_was_ended_states_no_share():
    scores, proxies = world(np.random.default_rng(0))
    search = Search(Query(), DenseShard(proxies), 0)
    steps = search.steps(Clock())
    rows = next(steps)
    search.end()
    with pytest.raises(StopIteration):
        while True:
            rows = steps.send(scores[rows])
    assert "the deadline ended the search" in search.share().sentence


def test_shares_are_of_scores_whatever_results_are_ranked_by():
    """Proxies of ranking values are multiplied by the norms that those were divided by."""
    scores, proxies = world(np.random.default_rng(1), norms=True)
    np.testing.assert_allclose(proxies.scores(), proxies.values * proxies.divisors)
    search = searched(scores, proxies, Query(k=10, budget=ROWS, audit_rows=ROWS))
    positive = np.maximum(scores, 0)
    best = np.argsort(-scores / proxies.divisors)[:10]
    assert search.share().estimate == pytest.approx(positive[best].sum() / positive.sum())


def test_rows_without_a_score_carry_nothing():
    scores, proxies = world(np.random.default_rng(2))
    scores[::50] = np.nan
    values = np.where(np.arange(ROWS) % 7 == 1, -np.inf, proxies.values)
    proxies = replace(proxies, values=values, failed=np.isinf(values))
    scores[proxies.failed] = np.nan
    exact = searched(scores, proxies, Query(k=10, budget=ROWS, audit_rows=ROWS)).share()
    usable = np.maximum(np.nan_to_num(scores), 0)
    assert exact.estimate == pytest.approx(np.sort(usable)[-10:].sum() / usable.sum())
    sampled = searched(scores, proxies, Query(k=10)).share()
    assert sampled.low < exact.estimate < sampled.high


def test_rows_of_the_first_sample_are_audited_unless_their_proxies_had_them_rescored():
    scores, proxies = world(np.random.default_rng(3))
    search = searched(scores, proxies, Query(k=10, budget=200))
    left = search._sample[~search._before_audit[search._sample]]
    assert 40 < len(left) < 64
    assert set(left) <= set(search._audited)
    assert not search._before_audit[search._audited].any()
    assert len(set(search._audited)) == search.share().sampled == 64
    assert int(search.scored.sum()) == search.rescored + 64


@pytest.mark.parametrize("ranking", ["score", "normalised"])
def test_searches_hold_the_truth_about_as_often_as_they_say(ranking):
    generator = np.random.default_rng(4)
    trials = []
    for number in range(20):
        scores, proxies = world(generator, norms=True)
        if ranking == "score":
            norms = proxies.divisors
            proxies = replace(
                proxies,
                values=proxies.values * norms,
                sigmas=proxies.sigmas * norms,
                divisors=np.ones(ROWS),
            )
        asked = Query(k=10, budget=100, ranking=ranking, direction="opponents")
        trials.append(answers(asked, scores, proxies, range(20 * number, 20 * number + 20)))
    found = summarise(trials)
    assert found["answers"] == 400
    assert 0.92 <= found["coverage"] <= 0.995
    assert found["coverage_of_worst_query"] <= found["coverage"]
    assert 0 < found["median_share"] < 1
