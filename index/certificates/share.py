"""Cumulative share: what part of all positive scores the examples shown carry.

A score has no size of its own, but a share has: with ``x_i = max(score_i, 0)``, the sum of x over
the rows shown divided by the sum of x over all rows. The numerator is known exactly, and of the
denominator what was scored. The rest is estimated from rows drawn uniformly among the others.

**Claim.** With about the stated confidence the share lies in the interval; the probability is over
the draw of the sample.

**How.** Let U be the rows that were not scored because of their proxies, n of them drawn at random
and scored, and ``g_i`` the proxy of the score, 0 if that is negative. The regression estimator
(Cochran 1977, chapter 7)

    sum of x over U  =  |U| * (mean of x over the sample
                               + b * (mean of g over U - mean of g over the sample)),

with the slope b of x on g in the sample, holds however bad the proxies are; good ones make it
narrower. Its residuals are weighted by their leverage (MacKinnon and White 1985, HC3), since a row
with a large proxy decides the slope. They are skewed: many scores are near 0 and few are large. So
each end of the interval is the wider of two: of Student's, and of Student's after Hall's
transformation, which removes the skewness (Hall 1992, On the removal of skewness by transformation,
``g_1``); both with the correction for a finite population. The whole is at least the sum of x over
the rows that were scored, so that a share is never above 1.

**Assumes** that n residuals show how skewed their law is, so the coverage is approximate.
docs/decisions/2026-11-30-share-of-the-results.md has what was measured, for this and for others.
"""

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from scipy import stats

from index.certificates.statement import Share, check_confidence, no_share

FEWEST_SAMPLED = 30
"""From fewer random rows no interval is stated: they say little of a skewed law."""


FEWEST_POSITIVE = 8
"""As many of these must have a score of the sign asked for: fewer, or none at the worst, do not
tell the law of the scores, and an interval would be too narrow."""


@dataclass(frozen=True, kw_only=True)
class ShareEvidence:
    """What a share is computed from; scores and guesses are 0 where negative or not finite.

    Attributes:
        shown: scores of the results.
        known: sum of the scores over the rows that were scored and are not in the sample.
        others: rows that the sample was drawn from, itself included.
        guessed: sum of the guesses over these.
        sample: scores of the rows drawn.
        guesses: of the same rows.
        influence: what positive scores are, in words.
    """

    shown: Float[np.ndarray, "result"]
    known: float
    others: int
    guessed: float
    sample: Float[np.ndarray, "sampled"]
    guesses: Float[np.ndarray, "sampled"]
    influence: str = "positive influence"


def estimate_share(evidence: ShareEvidence, confidence: float) -> Share:
    """The share of the results, with its interval.

    Raises:
        ValueError: confidence out of range.
    """
    check_confidence(confidence)
    shown, seen = float(evidence.shown.sum()), evidence.known + float(evidence.sample.sum())
    sampled = len(evidence.sample)
    everything = sampled == evidence.others
    if shown <= 0:
        who = "no row" if everything else "none of the results"
        return no_share(f"{who} has {evidence.influence}")
    if not everything and sampled < FEWEST_SAMPLED:
        return no_share(
            f"of the rows that were not looked for, {sampled} were scored at random; at least "
            f"{FEWEST_SAMPLED} are needed (audit_rows)"
        )
    positive = int(np.count_nonzero(evidence.sample))
    if not everything and positive < FEWEST_POSITIVE:
        return no_share(
            f"only {positive} of {sampled} rows drawn at random have {evidence.influence}; at "
            f"least {FEWEST_POSITIVE} are needed (audit_rows)"
        )
    least, middle, most = (seen,) * 3 if everything else total_of_others(evidence, confidence)
    share, low, high = (min(shown / max(whole, seen), 1.0) for whole in (middle, most, least))
    count = len(evidence.shown)
    carry = "The one result carries" if count == 1 else f"The {count:,} results carry"
    how = (
        "; every row was scored exactly"
        if everything
        else f" ({low:.0%} to {high:.0%} at {confidence:.0%} confidence, from {sampled:,} random "
        f"rows of {evidence.others:,})"
    )
    return Share(
        estimate=share,
        low=low,
        high=high,
        confidence=1.0 if everything else confidence,
        sampled=0 if everything else sampled,
        sentence=f"{carry} {share:.0%} of all {evidence.influence}{how}.",
    )


def total_of_others(evidence: ShareEvidence, confidence: float) -> tuple[float, float, float]:
    """Lower end, estimate and upper end of the sum of the scores over all rows."""
    scores, guesses, count = evidence.sample, evidence.guesses, evidence.others
    sampled = len(scores)
    centred = guesses - guesses.mean()
    squares = float(np.sum(centred**2))
    slope = float(np.sum(centred * scores)) / squares if squares > 0 else 0.0
    moved = slope * (evidence.guessed / count - float(guesses.mean()))
    middle = evidence.known + count * (float(scores.mean()) + moved)
    leverage = 1 / sampled + (centred**2 / squares if squares > 0 else 0.0)
    residuals = (scores - scores.mean() - slope * centred) / np.maximum(1 - leverage, 1 / sampled)
    residuals = residuals - residuals.mean()
    deviation = float(residuals.std(ddof=1))
    if deviation == 0:
        return middle, middle, middle
    error = count * deviation * math.sqrt((1 - sampled / count) / sampled)
    bend = float(np.mean((residuals / residuals.std()) ** 3)) / math.sqrt(sampled)
    quantile = float(stats.t.ppf(0.5 + confidence / 2, sampled - 1))
    below, above = (max(quantile, sign * unskewed(sign * quantile, bend)) for sign in (1, -1))
    return middle - error * below, middle, middle + error * above


def unskewed(quantile: float, bend: float) -> float:
    """Where a studentised mean lies whose value after Hall's transformation is ``quantile``.

    Args:
        quantile: of Student's law.
        bend: skewness over the square root of the sample's size; 0 changes nothing.
    """
    if abs(bend) < 1e-6:
        return quantile
    return float(np.cbrt(1 + bend * (quantile - bend / 6)) - 1) * 3 / bend
