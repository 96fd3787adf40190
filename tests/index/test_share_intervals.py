"""The share of the results: against a slow reference, and how often its interval holds."""

import math
import statistics

import numpy as np
import pytest
from scipy import stats

from index.certificates.share import (
    FEWEST_SAMPLED,
    ShareEvidence,
    estimate_share,
    total_of_others,
    unskewed,
)
from index.certificates.statement import no_share


def evidence(scores, guesses, sample, *, shown=(), known=0.0, influence="positive influence"):
    """Of a population of rows that were not scored, some of which were sampled."""
    return ShareEvidence(
        shown=np.array(shown, dtype=float),
        known=known,
        others=len(scores),
        guessed=float(guesses.sum()),
        sample=scores[sample],
        guesses=guesses[sample],
        influence=influence,
    )


def by_hand(given: ShareEvidence, confidence: float) -> tuple[float, float, float]:
    """The same as ``total_of_others``, a row at a time, Hall's equation solved by bisection."""
    x, g = given.sample.tolist(), given.guesses.tolist()
    n = len(x)
    x_mean, g_mean = statistics.fmean(x), statistics.fmean(g)
    squares = math.fsum((b - g_mean) ** 2 for b in g)
    slope = math.fsum((b - g_mean) * a for a, b in zip(x, g, strict=True)) / squares
    middle = given.known + given.others * (x_mean + slope * (given.guessed / given.others - g_mean))
    errors = [
        (a - x_mean - slope * (b - g_mean)) / (1 - 1 / n - (b - g_mean) ** 2 / squares)
        for a, b in zip(x, g, strict=True)
    ]
    centre, spread = statistics.fmean(errors), statistics.stdev(errors)
    third = statistics.fmean((e - centre) ** 3 for e in errors)
    skewness = third / statistics.pstdev(errors) ** 3
    scale = given.others * spread / math.sqrt(n) * math.sqrt(1 - n / given.others)
    student = float(stats.t.ppf((1 + confidence) / 2, n - 1))

    def transformed(t: float) -> float:
        s = t / math.sqrt(n)
        bent = s + skewness * s**2 / 3 + skewness**2 * s**3 / 27 + skewness / (6 * n)
        return math.sqrt(n) * bent

    def solved(wanted: float) -> float:
        low, high = -1e3, 1e3
        for _ in range(200):
            between = (low + high) / 2
            low, high = (between, high) if transformed(between) < wanted else (low, between)
        return low

    below, above = max(student, solved(student)), max(student, -solved(-student))
    return middle - scale * below, middle, middle + scale * above


@pytest.mark.parametrize("confidence", [0.5, 0.95])
@pytest.mark.parametrize("size", [30, 128])
def test_the_total_equals_a_slow_reference(size: int, confidence: float) -> None:
    generator = np.random.default_rng(size)
    scores = generator.lognormal(sigma=1.2, size=900)
    guesses = np.maximum(scores + generator.normal(scale=2.0, size=900), 0)
    given = evidence(scores, guesses, generator.permutation(900)[:size], known=17.0)
    np.testing.assert_allclose(
        total_of_others(given, confidence), by_hand(given, confidence), rtol=1e-9
    )


@pytest.mark.parametrize("bend", [-0.8, -0.01, 0.0, 1e-5, 0.3, 1.0])
@pytest.mark.parametrize("quantile", [-2.0, 0.0, 2.0])
def test_halls_transformation_is_inverted(quantile: float, bend: float) -> None:
    t = unskewed(quantile, bend)
    back = t + bend * t**2 / 3 + bend**2 * t**3 / 27 + bend / 6
    assert back == pytest.approx(quantile, abs=1e-4)


def test_a_whole_sample_is_exact() -> None:
    scores = np.array([1.0, 2.0, 3.0])
    share = estimate_share(evidence(scores, scores, [0, 1, 2], shown=[4.0], known=4.0), 0.95)
    assert (share.estimate, share.low, share.high) == (0.4, 0.4, 0.4)
    assert (share.confidence, share.sampled) == (1.0, 0)
    wanted = "The one result carries 40% of all positive influence; every row was scored exactly."
    assert share.sentence == wanted


def test_perfect_guesses_leave_nothing_open() -> None:
    scores = np.random.default_rng(0).lognormal(size=500)
    given = evidence(scores, scores, np.arange(40), shown=[50.0, 30.0], known=100.0)
    share = estimate_share(given, 0.95)
    truth = 80 / (100 + scores.sum())
    assert share.estimate == pytest.approx(truth)
    assert share.low == pytest.approx(truth)
    assert share.high == pytest.approx(truth)


def test_good_guesses_narrow_the_interval_and_useless_ones_do_no_harm() -> None:
    generator = np.random.default_rng(1)
    scores = generator.lognormal(sigma=1.0, size=2000)
    sample = generator.permutation(2000)[:128]
    good = np.maximum(scores + generator.normal(scale=0.3, size=2000), 0)
    useless = generator.permutation(good)
    widths = {}
    for name, guesses in (("good", good), ("useless", useless), ("none", 0 * scores)):
        share = estimate_share(evidence(scores, guesses, sample, shown=[900.0], known=900.0), 0.95)
        assert share.low is not None
        assert share.high is not None
        widths[name] = share.high - share.low
    assert widths["good"] < 0.6 * widths["none"]
    assert widths["useless"] < 1.3 * widths["none"]


def test_a_share_is_never_more_than_what_was_seen_allows() -> None:
    """One large row in the sample makes the lower end of the whole meaningless."""
    scores = np.zeros(1000)
    scores[:8] = [0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.4, 99.0]
    given = evidence(scores, 0 * scores, np.arange(40), shown=[100.0], known=20.0)
    share = estimate_share(given, 0.95)
    assert share.high == pytest.approx(100 / 120)
    assert share.low is not None
    assert share.estimate is not None
    assert 0 < share.low < share.estimate < share.high


@pytest.mark.parametrize("law", ["lognormal", "half of it zero", "pareto"])
def test_the_interval_holds_the_truth_about_as_often_as_it_says(law: str) -> None:
    """In 400 draws each: 95 % would be 380 of them; the bounds are far from what is seen."""
    generator = np.random.default_rng(5)
    scores = {
        "lognormal": generator.lognormal(sigma=1.0, size=3000),
        "half of it zero": np.maximum(generator.standard_t(5, size=3000), 0),
        "pareto": generator.pareto(3.0, size=3000),
    }[law]
    scores = np.sort(scores)[:-30]  # the largest were scored already
    guesses = np.maximum(scores + generator.normal(scale=scores.std(), size=len(scores)), 0)
    truth, held = 500 / (500 + scores.sum()), 0
    for _ in range(400):
        sample = generator.permutation(len(scores))[:128]
        share = estimate_share(evidence(scores, guesses, sample, shown=[500.0], known=500.0), 0.95)
        assert share.low is not None
        assert share.high is not None
        held += share.low <= truth <= share.high
    assert 366 <= held <= 398  # 378, 376 and 375


def test_what_cannot_be_said_has_its_reason() -> None:
    scores = np.ones(100)
    few = evidence(scores, scores, np.arange(FEWEST_SAMPLED - 1), shown=[1.0])
    share = estimate_share(few, 0.95)
    assert share.estimate is share.low is share.high is None
    assert "29 were scored at random; at least 30 are needed" in share.sentence
    rare = np.zeros(1000)
    rare[::100] = 50.0  # a sample of 64 that sees none of ten would be certain of them
    unseen = evidence(rare, rare * 0, np.arange(1, 65), shown=[1.0])
    told = "only 0 of 64 rows drawn at random have positive influence; at least 8 are needed"
    assert told in estimate_share(unseen, 0.95).sentence
    negative = evidence(scores, scores, np.arange(40), shown=[0.0, 0.0])
    assert "none of the results has positive" in estimate_share(negative, 0.95).sentence
    nothing = evidence(0 * scores, scores, np.arange(100), influence="negative influence")
    said = "No share is stated: no row has negative influence."
    assert estimate_share(nothing, 0.95) == no_share("no row has negative influence")
    assert estimate_share(nothing, 0.95).sentence == said
    with pytest.raises(ValueError, match="confidence"):
        estimate_share(few, 1.0)
