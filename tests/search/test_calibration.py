"""Calibration: its arithmetic, its coverage by repeated draws, and that of a real index."""

import json
import math
import shutil
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from index.certificates.calibration import (
    CalibrationEvidence,
    certify_calibration,
    effort_needed,
    failures_allowed,
    queries_needed,
    tolerance_limit,
)
from index.editing import delete_rows
from index.errors import IndexCorrupt
from scripts.bench.certificates.trials import Fixed
from scripts.bench.certificates.worlds import Known
from service.models import BadQuery
from service.search.answer import Clock
from service.search.calibrating import calibrate_index
from service.search.calibration import FILE_NAME
from service.search.opening import open_index
from service.search.proxies import Proxies, RankedProxies
from service.search.query import Query, Term
from service.search.retrieval import Retriever
from service.search.search import Search
from service.search.shards import DenseShard
from tests.index.test_certificates import most_alarms
from tests.index_fixtures import sentences

pytest_plugins = ["tests.index_fixtures"]

ROWS, K = 400, 10


# --- the arithmetic -----------------------------------------------------------------------------


def test_the_effort_needed_finds_all_but_the_misses_allowed():
    efforts = np.array([3.0, -1.0, 8.0, 2.0, 100.0])
    assert effort_needed(efforts, 4, 0) == 8
    assert effort_needed(efforts, 4, 1) == 3
    assert effort_needed(efforts, 4, 4) == -math.inf
    assert effort_needed(efforts, 4, -1) == math.inf
    with pytest.raises(ValueError, match="top 6 rows, got 5"):
        effort_needed(efforts, 6, 0)


def test_fifty_nine_queries_without_a_failure_are_the_fewest():
    assert queries_needed(0.95, 0.95) == 59  # 0.95^59 = 0.0485
    assert failures_allowed(58, 0.95, 0.95) == -1
    assert failures_allowed(59, 0.95, 0.95) == 0
    assert failures_allowed(92, 0.95, 0.95) == 0
    assert failures_allowed(93, 0.95, 0.95) == 1
    assert tolerance_limit(list(range(58)), 0.95, 0.95) == math.inf
    assert tolerance_limit(list(range(59)), 0.95, 0.95) == 58
    assert tolerance_limit(list(range(93)), 0.95, 0.95) == 91


@pytest.mark.parametrize("queries", [59, 100, 250])
def test_the_limit_is_enough_for_the_share_as_often_as_it_says(queries):
    """3,000 draws of calibration queries from a known law; ties as of whole numbers of rows."""
    law = stats.geom(0.02)
    draws = law.rvs((3000, queries), random_state=np.random.default_rng(queries))
    limits = [tolerance_limit(draw, 0.9, 0.95) for draw in draws.tolist()]
    short = int((law.cdf(limits) < 0.9).sum())
    assert short <= most_alarms(3000, 0.05)


def test_the_coverage_test_notices_one_failure_too_many():
    generator = np.random.default_rng(1)
    draws = np.sort(generator.random((3000, 100)), axis=1)
    allowed = failures_allowed(100, 0.95, 0.95)
    short = int((draws[:, 100 - 1 - (allowed + 1)] < 0.95).sum())
    assert short > most_alarms(3000, 0.05)


def evidence(needed, reached, stale=None):
    return CalibrationEvidence(needed=needed, reached=reached, unit="rows", stale=stale)


def test_statuses_of_the_calibration_certificate():
    needed = list(range(100))  # one may fail: 98 suffices
    enough = certify_calibration(evidence(needed, 98.5), 10, 0.9, 0.95)
    assert (enough.status, enough.recall_lower_bound) == ("certified", 0.9)
    assert "9 or more of their 10" in enough.sentence
    assert "not this answer by itself" in enough.scope
    assert enough.observed["required_effort"] == 98
    short = certify_calibration(evidence(needed, 98), 10, 0.9, 0.95)
    assert (short.status, short.recall_lower_bound) == ("not certified", 0.0)
    few = certify_calibration(evidence(needed[:20], 1e9), 10, 0.9, 0.95)
    assert (few.status, few.recall_lower_bound) == ("not certified", 0.0)
    assert "20 calibration queries are too few, 59 are needed" in few.sentence
    stale = certify_calibration(evidence([], 5.0, "rows were added"), 10, 0.9, 0.95)
    assert (stale.status, stale.recall_lower_bound) == ("refused", None)
    assert stale.sentence == "No statement: rows were added."


def test_what_was_scored_in_full_needs_no_calibration():
    full = certify_calibration(evidence([], math.inf, "rows were added"), 10, 0.9, 0.95)
    assert (full.status, full.recall_lower_bound, full.confidence) == ("exhaustive", 1.0, 1.0)
    broken = CalibrationEvidence(needed=[], reached=math.inf, unit="rows", unscorable=2)
    rest = certify_calibration(broken, 10, 0.9, 0.95)
    assert (rest.status, rest.recall_lower_bound) == ("not certified", 0.8)


def test_an_effort_that_no_query_can_make_certifies_nothing():
    needed = [math.inf] * 100
    assert tolerance_limit(needed, 0.95, 0.95) == math.inf
    certificate = certify_calibration(evidence(needed, 1e9), 10, 0.9, 0.95)
    assert certificate.status == "not certified"


# --- the search ---------------------------------------------------------------------------------


def topics(queries: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Exact scores of all rows for some queries, and a word-like proposer's whole numbers."""
    generator = np.random.default_rng(seed)
    relevance = generator.exponential(1.0, (queries, ROWS)) ** 2
    words = np.floor(relevance * 3 + generator.exponential(12.0, (queries, ROWS)))
    return relevance, words


def ranked(words: np.ndarray) -> RankedProxies:
    return RankedProxies(
        values=words,
        sigmas=np.zeros(ROWS),
        relative=0.0,
        divisors=np.ones(ROWS),
        failed=np.zeros(ROWS, dtype=bool),
        lawful=False,
    )


def ranks_needed(scores: np.ndarray, words: np.ndarray, misses: int) -> float:
    best = np.argsort(-scores)[:K]
    return effort_needed(ranked(words).depths(0.0)[best], K, misses)


def test_any_proposer_that_only_ranks_is_calibrated_and_its_answers_keep_the_promise():
    """59 queries calibrate; of 400 further ones at most 5 % (and chance) lack recall 0.9."""
    scores, words = topics(59, seed=1)
    needed = [ranks_needed(s, w, misses=1) for s, w in zip(scores, words, strict=True)]
    limit = max(needed)
    scores, words = topics(400, seed=2)
    failures = 0
    for number, (truth, proposed) in enumerate(zip(scores, words, strict=True)):
        query = Query(prompt="p", k=K, until="calibration", calibration_rows=0, audit_rows=0)
        search = Search(query, DenseShard(ranked(proposed)), number, Fixed(needed))
        certificates = {c.type: c for c in search.run(Known(truth), Clock())}
        assert certificates["sketch"].status == "refused"  # no law is known
        assert certificates["calibration"].status == "certified"
        assert certificates["calibration"].observed["effort_unit"] == "rows"
        assert limit <= search.rescored < limit + 256  # no chunk too many
        recall = np.isin(np.argsort(-truth)[:K], search.best(K)).mean()
        failures += recall < 0.9 - 1e-9
    assert failures <= most_alarms(400, 0.05)


def test_a_budget_below_the_calibrated_depth_certifies_nothing():
    scores, words = topics(60, seed=3)
    needed = [ranks_needed(s, w, misses=1) for s, w in zip(scores, words, strict=True)]
    budget = int(max(needed)) - 1
    query = Query(
        prompt="p", k=K, budget=budget, until="calibration", calibration_rows=0, audit_rows=0
    )
    search = Search(query, DenseShard(ranked(words[0])), 0, Fixed(needed))
    certificate = search.run(Known(scores[0]), Clock())[-1]
    assert (certificate.type, certificate.status) == ("calibration", "not certified")
    assert search.rescored == budget > 2 * K


def test_rows_without_a_score_count_among_the_misses():
    scores, words = topics(60, seed=3)
    needed = [ranks_needed(s, w, misses=1) for s, w in zip(scores, words, strict=True)]
    asked = []

    class Watched(Fixed):
        def needed(self, k: int, ranking: str, misses: int) -> list[float]:
            asked.append(misses)
            return super().needed(k, ranking, misses)

    scores[0, np.argmax(words[0])] = np.nan
    query = Query(prompt="p", k=K, until="calibration", calibration_rows=0, audit_rows=0)
    Search(query, DenseShard(ranked(words[0])), 0, Watched(needed)).run(Known(scores[0]), Clock())
    assert asked[-1] == 0  # one of the ten may be missed, and one cannot be scored


def test_depths_by_calibration_are_those_of_a_search():
    """A query that is searched to the depth it needs finds what it should, and not a row less."""
    generator = np.random.default_rng(4)
    for seed in range(30):
        truth = generator.exponential(1.0, ROWS)
        proxies = Proxies(
            values=truth + 0.3 * generator.standard_normal(ROWS),
            sigmas=np.full(ROWS, 0.3),
            relative=0.0,
            divisors=np.ones(ROWS),
            failed=np.zeros(ROWS, dtype=bool),
        )
        best = np.argsort(-truth)[:K]
        depths = proxies.with_slack().depths(float(truth[best[-1]]))[best]
        query = Query(prompt="p", k=K, until="calibration", calibration_rows=0, audit_rows=0)
        fixed = Fixed([effort_needed(depths, K, 1)] * 59)
        search = Search(query, DenseShard(proxies), seed, fixed)
        certificate = search.run(Known(truth), Clock())[-1]
        assert certificate.status == "certified"
        assert np.isin(best, search.best(K)).mean() >= 0.9


# --- of an index ----------------------------------------------------------------------------------

TEXTS = sentences()
ASKED = [(" ".join(text.split()[:3]), f" {' '.join(text.split()[3:6])}") for text in TEXTS[:60]]


@pytest.fixture(scope="module")
def calibrated(workshop, tmp_path_factory):
    folder = tmp_path_factory.mktemp("calibrated") / "index"
    workshop.build(folder)
    index = open_index(folder, workshop.loaded)
    return folder, calibrate_index(index, [Term(prompt=p, completion=c) for p, c in ASKED])


def test_the_calibration_of_an_index_is_what_exhaustive_answers_say(workshop, calibrated):
    """For each query: the best rows by exact score, their proxies, the depths they needed."""
    folder, record = calibrated
    index = open_index(folder, workshop.loaded)
    retriever, known = Retriever(index), index.calibration
    assert known is not None
    for number, (prompt, completion) in enumerate(ASKED[:4]):
        for ranking in ("normalised", "score"):
            query = Query(
                prompt=prompt, completion=completion, k=K, ranking=ranking, calibration_rows=120
            )
            answer = retriever.answer(query)
            name = "normalised_score" if ranking == "normalised" else "score"
            exact = [getattr(result, name) for result in answer.results]
            top = record.tops[ranking][number]
            np.testing.assert_allclose(top.exact[:K], exact, rtol=1e-3, atol=1e-6)
            np.testing.assert_allclose(
                top.proxies[:K], [r.proxy for r in answer.results], rtol=1e-3, atol=1e-6
            )
            scales = np.hypot(top.sigmas[:K], record.relative * max(0.0, top.exact[K - 1]))
            depths = (top.exact[K - 1] - np.array(top.proxies[:K])) / scales
            assert known.needed(K, ranking, 1)[number] == pytest.approx(np.sort(depths)[K - 2])


def test_answers_from_a_calibrated_index_say_so(workshop, calibrated):
    folder, _ = calibrated
    retriever = Retriever(open_index(folder, workshop.loaded))
    query = Query(
        prompt=ASKED[0][0],
        completion=ASKED[0][1],
        k=5,
        recall=0.8,
        until="calibration",
        calibration_rows=0,
        audit_rows=0,
    )
    answer = retriever.answer(query)
    certificate = answer.certificates[-1]
    assert (certificate.type, certificate.status) == ("calibration", "certified")
    assert certificate.observed["calibration_queries"] == 60
    assert answer.rescored_rows <= 120


def test_what_the_calibration_does_not_cover_is_refused(workshop, calibrated):
    folder, _ = calibrated
    retriever = Retriever(open_index(folder, workshop.loaded))
    query = Query(prompt=ASKED[0][0], completion=ASKED[0][1], k=5, parameters={"damping": 0.5})
    certificate = retriever.answer(query).certificates[-1]
    assert certificate.status == "refused"
    assert "its own parameters" in certificate.sentence
    other = replace(query, parameters={}, estimator="kfac")
    certificate = retriever.answer(other).certificates[-1]
    assert certificate.status == "refused"
    assert "for the estimator 'ekfac', not for 'kfac'" in certificate.sentence
    known = retriever.index.calibration
    assert known is not None
    assert "up to 120 results, not 121" in str(known.stale(Query(prompt="p", k=121)))


def test_a_changed_index_makes_its_calibration_stale(workshop, calibrated, tmp_path):
    folder, _ = calibrated
    copied = tmp_path / "index"
    shutil.copytree(folder, copied)
    delete_rows(copied, {"fact-3"})
    query = Query(prompt=ASKED[0][0], completion=ASKED[0][1], k=5)
    answer = Retriever(open_index(copied, workshop.loaded)).answer(query)
    certificate = answer.certificates[-1]
    assert (certificate.type, certificate.status) == ("calibration", "refused")
    assert "--calibration-queries" in certificate.sentence


def test_an_edited_calibration_is_refused(workshop, calibrated, tmp_path):
    folder, _ = calibrated
    copied = tmp_path / "index"
    shutil.copytree(folder, copied)
    content = json.loads((copied / FILE_NAME).read_text())
    content["relative"] = 0.5
    (copied / FILE_NAME).write_text(json.dumps(content))
    with pytest.raises(IndexCorrupt, match=FILE_NAME):
        open_index(copied, workshop.loaded)


def test_a_calibration_needs_queries(workshop, calibrated):
    folder, _ = calibrated
    with pytest.raises(BadQuery, match="no calibration query"):
        calibrate_index(open_index(folder, workshop.loaded), [])
