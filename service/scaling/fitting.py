"""From scores and traced influences of the same rows to what one unit of score is worth.

A row's score s and its influence t (nats; leaving the row out changes f by -t) are two views of one
thing: ``t = c s`` with one factor c for a run, an estimator and its parameters, if the estimator is
right. c is fitted for each question by itself, so that questions left out can judge it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int
from scipy import stats

from estimators.chosen import GradientEstimator
from service.scoring.scale import Interval, Scale, SignTest, SizeScale

CONFIDENCE = 0.95
LEAST_QUESTIONS = 4
"""Fewer give no interval that is worth its name: with four, t has three degrees of freedom."""
TOP = 20
SET_SHARE = 0.05
"""Of the rows that a random set has."""
PAIRS = 10
"""Of disjoint random sets, a question."""
LEVELS = (0.95, 0.9, 0.8)
"""Confidences of the spread, the first that the number of questions allows."""
ALPHA = 0.05
"""Largest p-value with which a scale is used."""


@dataclass(frozen=True, kw_only=True)
class Retraining:
    """What the run became without some rows.

    Attributes:
        rows: left out, by their places among the shared rows.
        question: whose strongest rows they are; None if they are random.
        changes: of each question's f, in nats.
    """

    rows: Int[np.ndarray, "left"]
    question: int | None
    changes: Float[np.ndarray, "question"]


def fit_scale(
    chosen: GradientEstimator,
    scores: Float[np.ndarray, "question row"],
    influences: Float[np.ndarray, "question row"],
    retrainings: Sequence[Retraining] = (),
    seed: int = 0,
) -> Scale:
    """Everything that scores and influences of the same rows say of an estimator's scale.

    Args:
        chosen: the estimator.
        scores: its exact ones.
        influences: through the run, in nats.
        retrainings: of the run.
        seed: of random sets.

    Raises:
        ValueError: too few questions, or scores that are all 0.
    """
    check_enough(len(scores))
    for number, row in enumerate(scores, start=1):
        if not row.any():
            raise ValueError(
                f"All scores of traced question {number} by '{chosen.name}' are 0, so that no unit "
                f"of them is worth anything; leave this estimator or this question out."
            )
    factors = np.array([factor(s, t) for s, t in zip(scores, influences, strict=True)])
    worth = for_another(factors)
    spread, spread_confidence = spread_of_results(scores, influences, factors)
    test = sign_test(scores, influences, seed)
    return Scale(
        estimator=chosen.name,
        parameters=dict(chosen.values),
        fingerprint=chosen.fingerprint,
        nats_per_unit=worth,
        spread=spread,
        spread_confidence=spread_confidence,
        sign_test=test,
        held_out_slope=for_another(held_out_slopes(scores, influences, factors, seed)),
        rank_correlation=mean_of(rank_correlations(scores, influences)),
        shared_top=mean_of(shared_tops(scores, influences)),
        by_size=scales_by_size(scores, retrainings),
        random_sets=scale_of_random_sets(scores, retrainings),
        refused=_refusal(chosen, worth, test),
    )


def check_enough(questions: int) -> None:
    """Raise ValueError if questions are too few for an interval."""
    if questions < LEAST_QUESTIONS:
        raise ValueError(
            f"A scale needs at least {LEAST_QUESTIONS} traced questions, so that it can be said "
            f"how it differs between them; the trace has {questions}."
        )


def factor(scores: Float[np.ndarray, "row"], influences: Float[np.ndarray, "row"]) -> float:
    """The c of least absolute deviations ``sum |t - c s|``: the median of t / s, weighted by |s|.

    Few rows carry most of a question, so rows must not count alike; and a row whose influence is
    far off must not carry all. Of eight ways this one predicted questions left out about as well as
    any for EK-FAC, and best for a poor estimator: docs/decisions/2026-11-30-scale.md.
    """
    used = scores != 0
    ratios, weights = influences[used] / scores[used], np.abs(scores[used])
    order = np.argsort(ratios)
    reached = np.cumsum(weights[order])
    return float(ratios[order][np.searchsorted(reached, reached[-1] / 2)])


def for_another(factors: Float[np.ndarray, "question"]) -> Interval:
    """Median over questions, with a prediction interval for another question's factor.

    By Student's t on logarithms, ``exp(mean +- t s sqrt(1 + 1/n))``, exact if factors are
    log-normal; on the factors themselves if one of them is not positive.
    """
    n = len(factors)
    logs = bool((factors > 0).all())
    values = np.log(factors) if logs else factors
    half = stats.t.ppf((1 + CONFIDENCE) / 2, n - 1) * values.std(ddof=1) * np.sqrt(1 + 1 / n)
    ends = np.array([values.mean() - half, values.mean() + half])
    low, high = (np.exp(ends) if logs else ends).tolist()
    return Interval(value=float(np.median(factors)), low=low, high=high)


def mean_of(values: Float[np.ndarray, "question"]) -> Interval:
    """Mean over questions with its confidence interval, by Student's t."""
    n = len(values)
    half = stats.t.ppf((1 + CONFIDENCE) / 2, n - 1) * values.std(ddof=1) / np.sqrt(n)
    mean = float(values.mean())
    return Interval(value=mean, low=mean - float(half), high=mean + float(half))


def spread_of_results(
    scores: Float[np.ndarray, "question row"],
    influences: Float[np.ndarray, "question row"],
    factors: Float[np.ndarray, "question"],
) -> tuple[float, float]:
    """How far off a single strong row may be, and how often it is not farther.

    In units of the geometric mean of the row's own prediction and the question's largest one:
    strong rows are off by more, but less than in proportion.

    Conformal with questions as groups (Lee, Barber and Willett 2023, HCP): of each question the
    ``TOP`` rows of the largest scores, predicted with the factor of the others, share the weight
    1 / (n + 1), and the question to come has as much at infinity. So it holds for a row drawn from
    the strongest of another question, whatever the laws, if questions are exchangeable (but for
    what a factor from n instead of n - 1 questions differs). n questions allow n / (n + 1) at most.
    """
    n, top = len(scores), min(TOP, scores.shape[1])
    errors = []
    for place, (s, t) in enumerate(zip(scores, influences, strict=True)):
        rows = np.argsort(-np.abs(s), kind="stable")[:top]
        rows = rows[s[rows] != 0]
        worth = float(np.median(np.delete(factors, place)))
        unit = abs(worth) * np.sqrt(np.abs(s[rows]) * np.abs(s).max())
        off = np.abs(t[rows] - worth * s[rows])
        errors.append(np.divide(off, unit, out=np.full(len(rows), np.inf), where=unit > 0))
    weights = np.concatenate([np.full(len(own), 1 / (n + 1) / len(own)) for own in errors])
    values = np.concatenate(errors)
    level = next((level for level in LEVELS if n / (n + 1) >= level - 1e-9), LEVELS[-1])
    order = np.argsort(values)
    reached = np.cumsum(weights[order])
    place = min(int(np.searchsorted(reached, level - 1e-9)), len(values) - 1)
    return float(values[order][place]), level


def sign_test(
    scores: Float[np.ndarray, "question row"],
    influences: Float[np.ndarray, "question row"],
    seed: int,
) -> SignTest:
    """Disjoint random sets in pairs, others for each question: which one weighs more?

    Differences of two sets have either sign with probability 1/2 if scores say nothing, however
    skewed both are; that sums have a sign by themselves would make chance look like knowledge.
    """
    size = max(1, round(SET_SHARE * scores.shape[1]))
    pairs = min(PAIRS, scores.shape[1] // (2 * size))
    right = count = 0
    for place, (s, t) in enumerate(zip(scores, influences, strict=True)):
        order = np.random.default_rng([seed, place]).permutation(len(s))[: 2 * pairs * size]
        sets = order.reshape(pairs, 2, size)
        by_score, by_run = (np.subtract(*values[sets].sum(2).T) for values in (s, t))
        right += int((by_score * by_run > 0).sum())
        count += pairs
    p_value = stats.binomtest(right, count, alternative="greater").pvalue if count else 1.0
    return SignTest(right=right, pairs=count, p_value=float(p_value))


def held_out_slopes(
    scores: Float[np.ndarray, "question row"],
    influences: Float[np.ndarray, "question row"],
    factors: Float[np.ndarray, "question"],
    seed: int,
) -> Float[np.ndarray, "question"]:
    """Of each question, sums over random sets by the run regressed on those that others predict."""
    generator = np.random.default_rng(seed)
    size = max(1, round(SET_SHARE * scores.shape[1]))
    sets = np.array([generator.permutation(scores.shape[1])[:size] for _ in range(100)])
    found = []
    for place, (s, t) in enumerate(zip(scores, influences, strict=True)):
        predicted = float(np.median(np.delete(factors, place))) * s[sets].sum(1)
        found.append(_slope(predicted, t[sets].sum(1)))
    return np.array(found)


def rank_correlations(
    scores: Float[np.ndarray, "question row"], influences: Float[np.ndarray, "question row"]
) -> Float[np.ndarray, "question"]:
    """Spearman's, over rows; 0 where the run says the same of all."""
    pairs = zip(scores, influences, strict=True)
    return np.array([stats.spearmanr(s, t).statistic if np.ptp(t) else 0.0 for s, t in pairs])


def shared_tops(
    scores: Float[np.ndarray, "question row"], influences: Float[np.ndarray, "question row"]
) -> Float[np.ndarray, "question"]:
    """Part of the run's ``TOP`` strongest proponents that are among those by score."""
    top = min(TOP, scores.shape[1])
    best = [np.argsort(-values, axis=1, kind="stable")[:, :top] for values in (scores, influences)]
    return np.array([len(np.intersect1d(a, b)) / top for a, b in zip(*best, strict=True)])


def scales_by_size(
    scores: Float[np.ndarray, "question row"], retrainings: Sequence[Retraining]
) -> list[SizeScale]:
    """By the number of a question's strongest rows that were left out together."""
    ratios: dict[int, list[float]] = {}
    for one in retrainings:
        if one.question is not None:
            predicted = -scores[one.question, one.rows].sum()
            if predicted:
                ratio = float(one.changes[one.question] / predicted)
                ratios.setdefault(len(one.rows), []).append(ratio)
    return [
        SizeScale(rows=rows, nats_per_unit=for_another(np.array(found)), sets=len(found))
        for rows, found in sorted(ratios.items())
        if len(found) >= LEAST_QUESTIONS
    ]


def scale_of_random_sets(
    scores: Float[np.ndarray, "question row"], retrainings: Sequence[Retraining]
) -> SizeScale | None:
    """Of each question the slope over retrainings without random rows; None without them."""
    random = [one for one in retrainings if one.question is None]
    if not random:
        return None
    predicted = np.array([-scores[:, one.rows].sum(1) for one in random])
    changes = np.array([one.changes for one in random])
    slopes = np.array([_slope(p, c) for p, c in zip(predicted.T, changes.T, strict=True)])
    return SizeScale(rows=len(random[0].rows), nats_per_unit=for_another(slopes), sets=len(random))


def _slope(x: Float[np.ndarray, "set"], y: Float[np.ndarray, "set"]) -> float:
    squares = float((x * x).sum())
    return float((x * y).sum()) / squares if squares else 0.0


def _refusal(chosen: GradientEstimator, worth: Interval, test: SignTest) -> str | None:
    if test.p_value > ALPHA:
        return (
            f"Scores by '{chosen.name}' with these parameters say no more of the run than chance "
            f"(of {test.pairs} pairs of random sets of rows {test.right} in the right order), so "
            f"that a unit of them is worth nothing that is known; choose another estimator."
        )
    if worth.low <= 0:
        return (
            f"What one unit of score by '{chosen.name}' with these parameters is worth differs so "
            f"much between the traced questions that not even its sign is known for another one; "
            f"choose another estimator, or trace more questions."
        )
    return None
