"""Certificates: their arithmetic by brute force, their coverage by repeated draws."""

import functools
import itertools
import math
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from index.certificates import sketch as sketch_module
from index.certificates.audit import (
    AuditSample,
    certify_audit,
    count_above,
    draw_sample,
    hypergeometric_upper_limit,
)
from index.certificates.sketch import (
    CalibrationCheck,
    FoundTop,
    Level,
    SketchEvidence,
    certify_sketch,
    check_calibration,
    misses_bound,
    plan_levels,
    scales_below,
)
from index.certificates.statement import allowed_misses
from scripts.bench.certificates.worlds import Known
from service.search.answer import Clock
from service.search.proxies import Proxies
from service.search.query import Query
from service.search.search import Search
from service.search.shards import DenseShard

FAIR = CalibrationCheck(rows=64, mean_square=1.0, limit=1.6)


def most_alarms(draws: int, rate: float) -> int:
    """Violations of a true rate of at most ``rate`` exceed this once in a thousand test runs."""
    return int(stats.binom.isf(1e-3, draws, rate))


# --- the targets ------------------------------------------------------------------------------


def test_allowed_misses_is_exact_where_floating_point_is_not():
    for k in range(1, 201):
        for twentieths in range(1, 21):
            exact = math.floor(k * (1 - Fraction(twentieths, 20)))
            assert allowed_misses(k, twentieths / 20) == exact, (k, twentieths)
    assert allowed_misses(10, 0.7) == 3  # 10 - 10 * 0.7 is 3.0000000000000004 or less
    assert allowed_misses(3, 1e-9) == 2


@pytest.mark.parametrize("recall", [0, -0.1, 1.01, math.nan])
def test_recall_targets_out_of_range_are_refused(recall):
    with pytest.raises(ValueError, match="recall target"):
        allowed_misses(10, recall)


def test_k_below_one_is_refused():
    with pytest.raises(ValueError, match="k must be at least 1, got 0"):
        allowed_misses(0, 0.9)


@pytest.mark.parametrize("confidence", [0, 1, -1, 2, math.nan])
def test_confidences_out_of_range_are_refused(confidence):
    with pytest.raises(ValueError, match="between 0 and 1"):
        plan_levels(10, 0.9, confidence, "gaussian")
    with pytest.raises(ValueError, match="between 0 and 1"):
        hypergeometric_upper_limit(10, 5, 0, confidence)


# --- audit ------------------------------------------------------------------------------------


def enumerated_limit(population: int, sampled: int, found: int, delta: Fraction) -> int:
    """The largest K with ``P(at most found marked rows in the sample) > delta``, sample by sample.

    Rows 0 .. K - 1 are marked; every subset of the population is looked at.
    """
    best = found
    for marked in range(found, population - (sampled - found) + 1):
        draws = list(itertools.combinations(range(population), sampled))
        few = sum(sum(row < marked for row in draw) <= found for draw in draws)
        if Fraction(few, len(draws)) > delta:
            best = marked
    return best


@pytest.mark.parametrize("percent", [50, 89, 95, 99])
def test_the_upper_limit_equals_enumeration_of_all_samples(percent):
    # 1 / C(6, 3) is 5 % exactly, on the boundary of the definition; there rounding may go either
    # way, so the boundary itself is left to the test below.
    delta = 1 - Fraction(percent, 100)
    for population in range(8):
        for sampled in range(population + 1):
            for found in range(sampled + 1):
                limit = hypergeometric_upper_limit(population, sampled, found, percent / 100)
                low = enumerated_limit(population, sampled, found, delta)
                high = enumerated_limit(population, sampled, found, delta - Fraction(1, 10**12))
                assert low <= limit <= high, (population, sampled, found)


def test_the_upper_limit_at_the_ends():
    assert hypergeometric_upper_limit(0, 0, 0, 0.95) == 0
    assert hypergeometric_upper_limit(50, 0, 0, 0.95) == 50  # nothing sampled, nothing known
    assert hypergeometric_upper_limit(50, 50, 7, 0.95) == 7  # all sampled, all known
    assert hypergeometric_upper_limit(50, 20, 20, 0.95) == 50
    # rule of three: 59 of very many without a find refute a share of 5 % at 95 %
    assert hypergeometric_upper_limit(10**6, 59, 0, 0.95) < 0.05 * 10**6
    assert hypergeometric_upper_limit(10**6, 58, 0, 0.95) > 0.05 * 10**6


@pytest.mark.parametrize(
    ("population", "sampled", "found"), [(5, 6, 0), (5, 3, 4), (5, 3, -1), (-1, 0, 0)]
)
def test_impossible_samples_are_refused(population, sampled, found):
    with pytest.raises(ValueError, match="found <= sampled <= population"):
        hypergeometric_upper_limit(population, sampled, found, 0.95)


@pytest.mark.parametrize("truth", [1, 2, 5, 20, 150, 980])
def test_the_upper_limit_covers_as_often_as_it_says(truth):
    population, sampled, draws = 1000, 150, 4000
    generator = np.random.default_rng(truth)
    found = generator.hypergeometric(truth, population - truth, sampled, size=draws)
    limits = {int(x): hypergeometric_upper_limit(population, sampled, x, 0.95) for x in set(found)}
    violations = sum(limits[x] < truth for x in found)
    assert violations <= most_alarms(draws, 0.05)


@pytest.mark.parametrize("misses", [0, 1, 4, 12])
def test_the_audit_certificate_covers_as_often_as_it_says(misses):
    """2,000 redraws of the sample: the answer, finds merged, has the recall that is stated.

    ``misses`` of the true top 20 of 400 rows are not among the 60 rows that were scored; ties at
    the threshold and two rows without a finite score are among the rest.
    """
    k, draws = 20, 2000
    scores = np.concatenate([np.arange(40, 20, -1.0), np.full(10, 20.0), np.full(370, 1.0)])
    hidden = np.arange(misses)
    scored = np.setdiff1d(np.arange(60), hidden)
    population = np.setdiff1d(np.arange(400), scored)
    broken = population[-2:]
    threshold = np.sort(scores[scored])[-k]
    true_threshold = np.sort(scores)[-k]
    certify = functools.cache(certify_audit)
    violations = 0
    for seed in range(draws):
        sample = draw_sample(population, 80, seed)
        values = np.where(np.isin(sample, broken), np.nan, scores[sample])
        above, merged = count_above(values, threshold)
        audit = AuditSample(population=len(population), sampled=80, above=above, merged=merged)
        certificate = certify(audit, k, 0.9, 0.95)
        answer = np.sort(np.concatenate([scores[scored], values[np.isfinite(values)]]))[-k:]
        recall = float(np.mean(answer >= true_threshold))
        assert certificate.recall_lower_bound is not None
        violations += certificate.recall_lower_bound > recall
    assert violations <= most_alarms(draws, 0.05)


def test_samples_are_uniform_without_replacement_and_repeatable():
    population = np.array([3, 5, 8, 13, 21])
    counts = dict.fromkeys(population.tolist(), 0)
    for seed in range(2000):
        sample = draw_sample(population, 2, seed)
        assert len(set(sample.tolist())) == 2
        np.testing.assert_array_equal(sample, draw_sample(population, 2, seed))
        for row in sample.tolist():
            counts[row] += 1
    assert stats.chisquare(list(counts.values())).pvalue > 1e-4
    assert sorted(draw_sample(population, 9, 0).tolist()) == population.tolist()
    assert len(draw_sample(population, 0, 0)) == 0


def test_like_populations_give_like_samples_and_each_row_its_chance():
    everything = np.arange(3000)
    some = np.setdiff1d(everything, np.random.default_rng(0).permutation(3000)[:200])
    whole, part = draw_sample(everything, 64, 9), draw_sample(some, 64, 9)
    assert np.isin(part, some).all()
    assert len(set(part.tolist())) == 64
    assert np.isin(whole, part).sum() >= 64 - 12
    assert draw_sample(some, 32, 9).tolist() == part[:32].tolist()
    population = np.array([2, 3, 5, 8, 9, 11, 14, 15, 17, 20, 21, 24])
    draws = 6000
    drawn = np.concatenate([draw_sample(population, 3, seed) for seed in range(draws)])
    counts = np.array([(drawn == row).sum() for row in population])
    variance = 0.25 * 0.75 * draws * len(population) / (len(population) - 1)
    chi_square = ((counts - draws / 4) ** 2).sum() / variance
    assert chi_square < stats.chi2.isf(1e-4, len(population) - 1)


def test_ties_are_not_above_the_threshold_and_nan_is():
    scores = np.array([1.0, 2.0, 2.0, 3.0, np.nan, -np.inf])
    assert count_above(scores, 2.0) == (2, 1)
    assert count_above(scores[:0], 2.0) == (0, 0)


def test_statuses_of_the_audit():
    k = 10
    vacuous = certify_audit(AuditSample(population=900, sampled=64, above=0, merged=0), k, 0.9, 0.9)
    assert (vacuous.status, vacuous.recall_lower_bound) == ("not certified", 0.0)
    assert vacuous.confidence == 0.9
    upper = hypergeometric_upper_limit(100, 90, 1, 0.95)
    assert upper == 2
    good = certify_audit(AuditSample(population=100, sampled=90, above=1, merged=1), k, 0.9, 0.95)
    assert good.status == "certified"
    assert good.recall_lower_bound == pytest.approx(1 - (upper - 1) / k)
    assert good.observed["upper_limit_above_threshold"] == upper
    assert "Of 90 unscored rows" in good.sentence
    everything = AuditSample(population=40, sampled=40, above=3, merged=3)
    exhaustive = certify_audit(everything, k, 0.9, 0.95)
    assert (exhaustive.status, exhaustive.confidence) == ("exhaustive", 1.0)
    assert exhaustive.recall_lower_bound == 1
    nothing_left = certify_audit(
        AuditSample(population=0, sampled=0, above=0, merged=0), k, 1, 0.95
    )
    assert nothing_left.status == "exhaustive"


@pytest.mark.parametrize(
    "sample",
    [
        AuditSample(population=40, sampled=40, above=5, merged=3),  # 2 of the sample unscorable
        AuditSample(population=40, sampled=40, above=3, merged=3, unscorable=2),  # 2 beside it
    ],
)
def test_unscorable_rows_lower_the_bound_of_the_audit(sample):
    certificate = certify_audit(sample, 10, 0.9, 0.95)
    assert certificate.status == "not certified"
    assert certificate.recall_lower_bound == pytest.approx(0.8)
    assert "Every row was scored" not in certificate.sentence
    assert certify_audit(sample, 10, 0.8, 0.95).status == "certified"


# --- sketch: the arithmetic -------------------------------------------------------------------


def test_levels_for_ten_at_ninety_percent_by_hand():
    """J = 1: two of ten rows; shares .8 and .2 of delta = .05, leeway 2 and 1."""
    levels = plan_levels(10, 0.9, 0.95, "gaussian")
    assert [level.delta for level in levels] == pytest.approx([0.04, 0.01])
    p = [0.04 * 2 * 0.2, 0.01 * 0.2]
    for level, probability in zip(levels, p, strict=True):
        assert stats.norm.sf(level.z) == pytest.approx(probability, rel=1e-9)
    assert levels[0].z == pytest.approx(2.1444, abs=1e-4)  # normal table: 1 - 0.9840
    bounded = plan_levels(10, 0.9, 0.95, "hoeffding")
    for level, probability in zip(bounded, p, strict=True):
        assert math.exp(-(level.z**2) / 2) == pytest.approx(probability, rel=1e-9)


def test_one_result_has_one_level_and_all_of_the_error_probability():
    (level,) = plan_levels(1, 1.0, 0.95, "gaussian")
    assert stats.norm.sf(level.z) == pytest.approx(0.05)
    assert level.delta == pytest.approx(0.05)


@given(
    k=st.integers(1, 300),
    recall=st.floats(0.01, 1),
    confidence=st.floats(0.01, 0.999),
    tail=st.sampled_from(["gaussian", "hoeffding"]),
)
def test_levels_share_the_error_probability_and_the_last_suffices(k, recall, confidence, tail):
    levels = plan_levels(k, recall, confidence, tail)
    assert sum(level.delta for level in levels) <= (1 - confidence) * (1 + 1e-9)
    assert all(low.z <= high.z for low, high in itertools.pairwise(levels))
    one_score = FoundTop(exact=np.ones(k), sigmas=np.ones(k))  # the worst case: no spread at all
    misses = misses_bound(levels[-1], one_score, tail)
    assert misses <= allowed_misses(k, recall)


def bound_by_the_formula(z, delta, exact, sigmas, relative):
    """The least J with ``B_m <= delta m`` for all m > J, term by term, from the docstring."""
    k = len(exact)
    failing = [0]
    for m in range(1, k + 1):
        total = m * stats.norm.sf(z)
        for j in range(k - m):
            threshold = exact[k - m - 1]
            here = math.hypot(sigmas[j], relative * max(0, threshold))
            there = math.hypot(sigmas[j], relative * max(0, exact[j]))
            total += stats.norm.sf((exact[j] - threshold + z * here) / there)
        if total > delta * m:
            failing.append(m)
    return max(failing)


@pytest.mark.parametrize("relative", [0.0, 0.1])
@pytest.mark.parametrize("z", [1.6, 1.9, 2.3])
def test_the_bound_on_misses_equals_its_formula(z, relative):
    generator = np.random.default_rng(int(10 * z))
    for _ in range(20):
        k = int(generator.integers(1, 25))
        exact = np.sort(generator.exponential(2.0, k))[::-1]
        sigmas = generator.uniform(0.5, 2, k)
        top = FoundTop(exact=exact, sigmas=sigmas, relative=relative)
        wanted = bound_by_the_formula(z, 0.05, exact, sigmas, relative)
        assert misses_bound(Level(z=z, delta=0.05), top, "gaussian") == wanted


def test_spread_scores_are_certified_where_equal_ones_are_not():
    level = plan_levels(10, 0.9, 0.95, "gaussian")[0]
    equal = FoundTop(exact=np.ones(10), sigmas=np.ones(10))
    spread = FoundTop(exact=np.arange(40.0, 0, -4), sigmas=np.ones(10))
    assert misses_bound(level, equal, "gaussian") > 1
    assert misses_bound(level, spread, "gaussian") <= 1
    certain = FoundTop(exact=np.ones(10), sigmas=np.zeros(10))  # proxies that are exact
    assert misses_bound(level, certain, "gaussian") == 0


def test_scales_below_by_hand():
    proxies = np.array([0.0, 3.0, 2.0, 1.0, 2.0])
    scales = np.array([0.5, 0.5, 0.0, 0.0, 4.0])
    depths = scales_below(2.0, proxies, scales)
    np.testing.assert_array_equal(depths, [4.0, -2.0, -math.inf, math.inf, 0.0])
    assert (scales_below(-math.inf, proxies, scales) == -math.inf).all()


def test_calibration_leaves_out_what_it_cannot_use():
    exact = np.array([1.0, 2.0, np.nan, 4.0, 9.0])
    proxies = np.array([0.0, 2.0, 0.0, 1.0, 0.0])
    sigmas = np.array([1.0, 2.0, 1.0, 1.5, 0.0])
    check = check_calibration(exact, proxies, sigmas)
    assert check.rows == 3
    assert check.mean_square == pytest.approx((1 + 0 + 4) / 3)
    assert stats.chi2.sf(check.limit * 3, 3) == pytest.approx(1e-3)
    with pytest.raises(ValueError, match="No row"):
        check_calibration(exact[2:3], proxies[2:3], sigmas[2:3])


def test_calibration_refuses_fair_noise_rarely_and_inflated_noise_mostly():
    generator = np.random.default_rng(0)
    noise = generator.standard_normal((2000, 64))
    ones = np.ones(64)
    fair = sum(not check_calibration(n, 0 * ones, ones).passed for n in noise)
    assert fair <= most_alarms(2000, 1e-3)
    inflated = sum(not check_calibration(1.5 * n, 0 * ones, ones).passed for n in noise)
    assert inflated > 0.95 * 2000


EQUAL = FoundTop(exact=np.ones(10), sigmas=np.ones(10))


def evidence(reached, *, unscorable=0, rescored=50, check=FAIR, top=EQUAL):
    return SketchEvidence(
        reached=reached, top=top, rows=100, rescored=rescored, unscorable=unscorable, check=check
    )


def test_statuses_of_the_sketch_certificate():
    z = plan_levels(10, 0.9, 0.95, "gaussian")[-1].z
    enough = certify_sketch(evidence(z), 10, 0.9, 0.95, "gaussian")
    assert (enough.status, enough.recall_lower_bound, enough.confidence) == ("certified", 0.9, 0.95)
    assert "at least 9 of the 10" in enough.sentence
    assert enough.observed["sufficient_z"] == z
    short = certify_sketch(evidence(z - 1e-9), 10, 0.9, 0.95, "gaussian")
    assert short.status == "not certified"
    assert short.recall_lower_bound is not None
    assert 0 < short.recall_lower_bound < 0.9  # the z before it supports a lower bound
    hopeless = certify_sketch(evidence(-math.inf), 10, 0.9, 0.95, "gaussian")
    assert (hopeless.status, hopeless.recall_lower_bound) == ("not certified", 0.0)
    assert "no recall" in hopeless.sentence
    assert hopeless.observed["reached_z"] == "-inf"
    few = FoundTop(exact=np.ones(9), sigmas=np.ones(9))
    assert certify_sketch(evidence(9.0, top=few), 10, 0.9, 0.95, "gaussian").recall_lower_bound == 0


def test_inflated_residuals_refuse_the_certificate_with_any_tail():
    check = CalibrationCheck(rows=64, mean_square=1.7, limit=1.6)
    for tail in ("gaussian", "hoeffding"):
        refused = certify_sketch(evidence(50.0, check=check), 10, 0.9, 0.95, tail)
        assert (refused.status, refused.recall_lower_bound) == ("refused", None)
        assert "No statement" in refused.sentence
    # what was scored in full needs no proxy
    full = certify_sketch(evidence(math.inf, check=check, rescored=100), 10, 0.9, 0.95, "gaussian")
    assert full.status == "exhaustive"


def test_everything_scored_is_exhaustive_with_certainty():
    full = certify_sketch(evidence(math.inf, rescored=100), 10, 0.9, 0.95, "gaussian")
    assert (full.status, full.recall_lower_bound, full.confidence) == ("exhaustive", 1.0, 1.0)
    assert "All 100 rows were scored exactly" in full.sentence


def test_rows_without_gradient_need_no_scoring_and_are_not_called_scored():
    rest = certify_sketch(evidence(math.inf, rescored=97), 10, 0.9, 0.95, "gaussian")
    assert (rest.status, rest.recall_lower_bound) == ("exhaustive", 1.0)
    assert "All 100 rows were scored" not in rest.sentence
    assert "97 of 100 rows" in rest.sentence


def test_unscorable_rows_lower_the_bound_of_the_sketch_certificate():
    certified = certify_sketch(evidence(9.0, unscorable=2), 10, 0.9, 0.95, "gaussian")
    assert certified.status == "not certified"
    assert certified.recall_lower_bound == pytest.approx(0.7)
    full = certify_sketch(evidence(math.inf, unscorable=1, rescored=100), 10, 0.9, 0.95, "gaussian")
    assert full.status == "certified"
    assert full.recall_lower_bound == pytest.approx(0.9)
    lost = certify_sketch(evidence(math.inf, unscorable=20), 10, 0.9, 0.95, "gaussian")
    assert (lost.status, lost.recall_lower_bound) == ("not certified", 0.0)


def test_the_gaussian_tail_needs_a_check():
    with pytest.raises(ValueError, match="needs a calibration check"):
        certify_sketch(evidence(9.0, check=None), 10, 0.9, 0.95, "gaussian")
    unchecked = certify_sketch(evidence(9.0, check=None), 10, 0.9, 0.95, "hoeffding")
    assert unchecked.status == "certified"
    assert "calibration_rows" not in unchecked.observed


# --- sketch: the coverage ---------------------------------------------------------------------

REDRAWS, K, BITS, WIDTH = 400, 10, 256, 96


def hard_data() -> tuple[np.ndarray, np.ndarray]:
    """A query and 800 unit rows: the top k are near-duplicates, and ties sit at the threshold.

    Nine copies of one vector (cosine 0.3) and one row an inch from it make the top 10; two exact
    ties with the tenth and 40 rows just below compete for their places. All other rows lie about 0.
    """
    generator = np.random.default_rng(5)
    query = np.zeros(WIDTH)
    query[0] = 1

    def row(cosine: float) -> np.ndarray:
        rest = generator.standard_normal(WIDTH - 1)
        rest *= math.sqrt(1 - cosine**2) / np.linalg.norm(rest)
        return np.concatenate([[cosine], rest])

    copy = row(0.3)
    near = row(0.299)
    near[1:] = copy[1:] * math.sqrt(1 - near[0] ** 2) / math.sqrt(1 - copy[0] ** 2)
    ties = [row(float(near[0])) for _ in range(2)]
    rivals = [row(0.297) for _ in range(40)]
    background = generator.standard_normal((748, WIDTH))
    background[:, 0] = np.clip(background[:, 0], -1.5, 1.5)
    background /= np.linalg.norm(background, axis=1, keepdims=True)
    rows = np.stack([*[copy] * 9, near, *ties, *rivals, *background])
    return query, generator.permutation(rows)


def one_search(query: np.ndarray, rows: np.ndarray, tail: str, seed: int) -> tuple[float, float]:
    """One redraw of a dense Gaussian sign sketch, searched by the service's own engine.

    Returns:
        The recall that was stated (NaN if refused) and the true one; a tie with the k-th best
        counts as found.
    """
    projection = np.random.default_rng([7, seed]).standard_normal((BITS, WIDTH))
    y = projection @ query
    codes = np.where(rows @ projection.T > 0, 1.0, -1.0)
    scale = math.sqrt(math.pi / (2 * BITS))
    proxies = Proxies(
        values=codes @ y / np.linalg.norm(y) * scale,
        sigmas=np.full(len(rows), scale),
        relative=0.0,
        divisors=np.ones(len(rows)),
        failed=np.zeros(len(rows), dtype=bool),
    )
    truth = rows @ query
    asked = Query(prompt="p", k=K, budget=len(rows), calibration_rows=32, audit_rows=0, tail=tail)
    search = Search(asked, DenseShard(proxies), seed)
    certificate, _ = search.run(Known(truth), Clock())
    recall = float(np.mean(truth[search.best(K)] >= np.sort(truth)[-K]))
    bound = certificate.recall_lower_bound
    return (math.nan if bound is None else bound), recall


def count_violations(tail: str) -> tuple[int, int]:
    """Redraws whose stated bound exceeds the true recall; redraws that were certified."""
    query, rows = hard_data()
    outcomes = [one_search(query, rows, tail, seed) for seed in range(REDRAWS)]
    wrong = sum(bound > recall + 1e-12 for bound, recall in outcomes)
    return wrong, sum(bound >= 0.9 for bound, _ in outcomes)


@pytest.mark.parametrize("tail", ["gaussian", "hoeffding"])
def test_redrawn_sketches_keep_the_stated_confidence(tail):
    wrong, certified = count_violations(tail)
    assert wrong <= most_alarms(REDRAWS, 0.05)
    assert certified > 0.9 * REDRAWS  # the bound is not kept by stating nothing


def test_the_coverage_test_notices_a_third_of_the_z(monkeypatch):
    quantile = sketch_module._quantile
    tail_of = sketch_module._tail
    monkeypatch.setattr(sketch_module, "_quantile", lambda *given: quantile(*given) / 3)
    monkeypatch.setattr(sketch_module, "_tail", lambda z, tail: tail_of(3 * z, tail))
    wrong, _ = count_violations("gaussian")
    # Copies are missed together, with probability Phi(-2.14 / 3) = 24 % (less where the errors of
    # the rows found raise the scale): more than 5 % by far.
    assert stats.binomtest(wrong, REDRAWS, 0.05, "greater").pvalue < 0.01


def test_a_sketch_that_errs_three_times_as_stated_is_refused():
    query, rows = hard_data()
    truth = rows @ query
    generator = np.random.default_rng(3)
    proxies = Proxies(
        values=truth + 0.15 * generator.standard_normal(len(rows)),
        sigmas=np.full(len(rows), 0.05),
        relative=0.0,
        divisors=np.ones(len(rows)),
        failed=np.zeros(len(rows), dtype=bool),
    )
    asked = Query(prompt="p", k=K, budget=100, calibration_rows=64, audit_rows=0)
    search = Search(asked, DenseShard(proxies), seed=1)
    assert search.run(Known(truth), Clock())[0].status == "refused"


def test_noise_that_was_not_checked_supports_no_bound():
    query, rows = hard_data()
    truth = rows @ query
    proxies = Proxies(
        values=truth,
        sigmas=np.full(len(rows), 1e-6),
        relative=0.0,
        divisors=np.ones(len(rows)),
        failed=np.zeros(len(rows), dtype=bool),
    )
    asked = Query(prompt="p", k=K, budget=len(rows) // 2, calibration_rows=0, audit_rows=0)
    certificate = Search(asked, DenseShard(proxies), seed=1).run(Known(truth), Clock())[0]
    assert (certificate.status, certificate.recall_lower_bound) == ("not certified", 0.0)
    checked = replace(asked, calibration_rows=8)
    certificate = Search(checked, DenseShard(proxies), seed=1).run(Known(truth), Clock())[0]
    assert certificate.status == "certified"
