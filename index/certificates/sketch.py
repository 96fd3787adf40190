"""Sketch certificate: a row can be missed only if its own sketch noise is extreme.

The proxy of row i errs by ``noise_i`` with scale ``sigma_i``, the sketch being drawn independently
of data and query. Rescore rows until no unscored row's upper bound ``proxy_i + z sigma_i`` reaches
the k-th best exact score found. A row of the true top k, with exact score ``s_i``, is then missed
only if ``noise_i < -z sigma_i - (s_i - s_(k))``, an event of probability
``p(z + (s_i - s_(k)) / sigma_i)`` that the data fix, p being the tail of one row's noise. So the
number M of missed rows has ``E M <= B``, the sum of these over the true top k, and by Markov's
inequality, whatever the dependence between rows, ``P(M >= m) <= B / m``.

B is not known, but if exactly m rows are missed, the best k - m scores found,
``a_1 >= a_2 >= ...``, are true top-k scores and ``s_(k) <= a_(k-m)``. Hence then ``B <= B_m``, with

    B_m = m p(z) + sum over j <= k - m of p(z + (a_j - a_(k-m)) / sigma_j),

and everything in it was seen. If ``B_m <= delta m`` for every m > J, then at most J rows are
missed, with confidence 1 - delta: let m* be the least m with ``B <= delta m``; to say so wrongly
needs M > J and ``B <= B_M <= delta M``, hence ``M >= m*``, and ``P(M >= m*) <= B / m* <= delta``.
J may therefore be chosen after looking; z may not. The few z that are looked at share the error
probability (a union bound) and are fixed beforehand, by k, recall and confidence.

**Several looks.** Codes may have further slices, drawn independently, which are read for
contenders only; the estimate after look l errs with a smaller scale ``sigma_il``. A row is dropped
at the first look at which its bound ``estimate_il + z_l sigma_il`` lies below the k-th best exact
score found so far; rows that no look drops are rescored. The k-th best score found is at most
``s_(k)`` at any time, so a missed row of the true top k was dropped at some look l with
``noise_il < -z_l sigma_il - (s_i - s_(k))``: one of so many events, whichever looks it was given
and in whatever order the search went. Hence

    E M <= sum over l, sum over the true top k of p(z_l + (s_i - s_(k)) / sigma_il),

and B_m is the sum over the looks of what it was for one; the rest of the argument stands. Looks may
depend on each other (later estimates contain the earlier ones), since expectations add up all the
same. All z_l are fixed beforehand: the first is z, the later ones ``LATER`` times z.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from jaxtyping import Float
from scipy import optimize, special, stats

from index.certificates.statement import Certificate, allowed_misses, check_confidence

Tail = Literal["gaussian", "hoeffding"]
"""p(z): "gaussian" is Phi(-z), checked on exactly scored rows; "hoeffding" is exp(-z^2 / 2), proved
for sign codes of a dense Gaussian sketch with sigma at least |psi| |phi| sqrt(pi / (2 k))."""

SHARES = (0.8, 0.2)
"""Of the error probability, for the z that are looked at, in ascending order."""
LEEWAY = (2.0, 1.0)
"""By how much, at each z, ``k p(z) / (J + 1)`` exceeds its share: to how small a part of this, the
bound if all of the top k had one score, their spread is expected to reduce B. At the last z nothing
is expected, so that it always suffices."""
LATER = 1.0
"""z of the later looks over that of the first: as measured, one z for all. A larger one leaves the
first look more of the error probability and fewer contenders, but more rows to be scored exactly
after the last look, which cost more; see docs/decisions/2026-11-30-progressive-codes.md."""
CHECK_LEVEL = 1e-3
"""How often the calibration check refuses a sketch whose noise is as assumed."""


@dataclass(frozen=True, kw_only=True)
class Level:
    """A z that is tried once every unscored row lies z sigma below, and its share of delta.

    At later looks ``LATER`` times as many of their scales.
    """

    z: float
    delta: float


@dataclass(frozen=True, kw_only=True)
class Scales:
    """Error scales of some rows' estimates after a later look; as in ``FoundTop``."""

    sigmas: Float[np.ndarray, "k"]
    relative: float = 0.0


@dataclass(frozen=True, kw_only=True)
class FoundTop:
    """The k best rows that were found.

    Attributes:
        exact: their exact scores, descending.
        sigmas: error scales of their proxies for rows that have nothing in common with the query;
            0 for a row whose score is known to be its proxy.
        relative: error scale that comes on top, as a share of a row's exact score.
        later: error scales after each look that rows may have had beyond the first.
    """

    exact: Float[np.ndarray, "k"]
    sigmas: Float[np.ndarray, "k"]
    relative: float = 0.0
    later: tuple[Scales, ...] = ()


def plan_levels(
    k: int, recall: float, confidence: float, tail: Tail, looks: int = 1
) -> tuple[Level, ...]:
    """The z that are tried, ascending, for so many looks at each row.

    Raises:
        ValueError: k, recall or confidence out of range.
    """
    check_confidence(confidence)
    together = (allowed_misses(k, recall) + 1) / k
    if 2 * together > 1:  # p(z) itself must not exceed delta: no leeway
        z = _quantile((1 - confidence) * together, tail, looks)
        return (Level(z=z, delta=1 - confidence),)
    levels = []
    for share, leeway in zip(SHARES, LEEWAY, strict=True):
        delta = (1 - confidence) * share
        z = _quantile(delta * min(1.0, leeway * together), tail, looks)
        levels.append(Level(z=z, delta=delta))
    return tuple(levels)


def _quantile(probability: float, tail: Tail, looks: int = 1) -> float:
    """The least z at which a row on the threshold is missed at one of the looks so seldom."""
    if looks > 1:
        at_most = min(probability, 0.5)
        return float(optimize.brentq(lambda z: _missed(z, tail, looks) - at_most, 0, 40))
    if tail == "gaussian":
        return max(0.0, float(stats.norm.isf(min(probability, 0.5))))
    return math.sqrt(max(0.0, -2 * math.log(min(probability, 1.0))))


def _missed(z: float, tail: Tail, looks: int) -> float:
    """Probability, at most, that a row on the threshold is dropped at one of the looks."""
    return float(_tail(np.array([z, *[LATER * z] * (looks - 1)]), tail).sum())


def _tail(z: Float[np.ndarray, "row"], tail: Tail) -> Float[np.ndarray, "row"]:
    tails: np.ndarray = (
        special.ndtr(-z) if tail == "gaussian" else np.exp(-(np.maximum(z, 0) ** 2) / 2)
    )
    return tails


def misses_bound(level: Level, top: FoundTop, tail: Tail) -> int:
    """The least J such that at most J of the true top k are missed, at the level's confidence.

    ``B_m <= delta m`` for every m above it; k if not even ``B_k`` is, i.e. nothing can be said.
    """
    k = len(top.exact)
    alone = _missed(level.z, tail, 1 + len(top.later))
    for m in range(k, 0, -1):
        spread = float(_tail(_distances(level.z, top, k - m), tail).sum())
        for look in top.later:
            later = FoundTop(exact=top.exact, sigmas=look.sigmas, relative=look.relative)
            spread += float(_tail(_distances(LATER * level.z, later, k - m), tail).sum())
        if m * alone + spread > level.delta * m * (1 + 1e-9):  # rounding of z itself
            return m
    return 0


def _distances(z: float, top: FoundTop, count: int) -> Float[np.ndarray, "count"]:
    """Error scales that the best ``count`` rows must err by to be missed, if the last is the k-th.

    Row j is missed if its proxy lies z scales (those of a row at the threshold) below it.
    """
    exact, sigmas = top.exact[:count].astype(np.float64), top.sigmas[:count].astype(np.float64)
    threshold = exact[-1] if count else 0.0
    here, there = (
        np.sqrt(sigmas**2 + np.square(top.relative * np.maximum(x, 0))) for x in (threshold, exact)
    )
    far = np.full(count, np.inf)  # a proxy without noise is never missed
    np.divide(exact - threshold + z * here, there, out=far, where=sigmas > 0)
    return far


def scales_below(
    threshold: float, proxies: Float[np.ndarray, "row"], scales: Float[np.ndarray, "row"]
) -> Float[np.ndarray, "row"]:
    """Error scales by which each proxy lies below a threshold.

    Where the scale is 0, i.e. the proxy is the exact score: inf below the threshold, otherwise
    -inf. With a threshold of -inf (fewer than k rows scored) -inf for all.
    """
    gaps = threshold - proxies.astype(np.float64)
    depths = np.where(gaps > 0, np.inf, -np.inf)
    np.divide(gaps, scales.astype(np.float64), out=depths, where=scales > 0)
    return depths


@dataclass(frozen=True, kw_only=True)
class CalibrationCheck:
    """Residuals ``(exact - proxy) / sigma`` of uniformly drawn rows against the assumed law.

    Attributes:
        rows: how many.
        mean_square: their mean square; 1 if sigma is right.
        limit: what the mean square of that many normal residuals exceeds once in a thousand times.
    """

    rows: int
    mean_square: float
    limit: float

    @property
    def passed(self) -> bool:
        """Whether the noise is no larger than assumed, as far as the sample can tell."""
        return self.mean_square <= self.limit


def check_calibration(
    exact: Float[np.ndarray, "row"],
    proxies: Float[np.ndarray, "row"],
    sigmas: Float[np.ndarray, "row"],
    looks: int = 1,
) -> CalibrationCheck:
    """Compare residuals with their assumed scale; rows without noise or exact score are left out.

    Where each of several looks is checked, they share ``CHECK_LEVEL``.

    Raises:
        ValueError: no row is left.
    """
    usable = (sigmas > 0) & np.isfinite(exact)
    count = int(usable.sum())
    if count == 0:
        raise ValueError("No row with a finite exact score and a positive error scale to check.")
    residuals = (exact[usable] - proxies[usable]) / sigmas[usable]
    return CalibrationCheck(
        rows=count,
        mean_square=float(np.mean(np.square(residuals, dtype=np.float64))),
        limit=float(stats.chi2.isf(CHECK_LEVEL / looks, count) / count),
    )


@dataclass(frozen=True, kw_only=True)
class SketchEvidence:
    """What the certificate is computed from.

    Attributes:
        reached: largest z at which no unscored row reaches the k-th best exact score.
        inflation: factor by which the errors of rows near the query exceed their scales; it is
            contained in ``reached`` and ``top``.
        top: the best k rows found; fewer if fewer are scored, and then nothing can be said.
        rows: rows of the index.
        rescored: rows with an exact score.
        unscorable: rows that have none because their gradient is not finite; each may be a miss.
        check: of the calibration, at the look that fares worst; None if it was not made (then only
            "hoeffding" is allowed).
        lawful: whether the proxies' errors are those of a random sketch.
    """

    reached: float
    top: FoundTop
    rows: int
    rescored: int
    unscorable: int
    check: CalibrationCheck | None
    lawful: bool = True
    inflation: float = 1.0


def certify_sketch(
    evidence: SketchEvidence, k: int, recall: float, confidence: float, tail: Tail
) -> Certificate:
    """The best bound that the evidence supports.

    Raises:
        ValueError: arguments out of range, or the gaussian tail without a calibration check.
    """
    if tail == "gaussian" and evidence.check is None:
        raise ValueError("The gaussian tail needs a calibration check; use 'hoeffding' without.")
    looks = 1 + len(evidence.top.later)
    levels = plan_levels(k, recall, confidence, tail, looks)
    exhaustive = math.isinf(evidence.reached) and evidence.reached > 0
    failed = evidence.check is not None and not evidence.check.passed
    refused = not exhaustive and (failed or not evidence.lawful)
    misses = 0 if exhaustive else fewest_misses(evidence.top, evidence.reached, levels, k, tail)
    bound = max(0.0, 1 - (misses + evidence.unscorable) / k)
    if refused:
        status = "refused"
    elif exhaustive and not evidence.unscorable:
        status = "exhaustive"
    else:
        status = "certified" if bound >= recall - 1e-12 else "not certified"
    return Certificate(
        type="sketch",
        status=status,  # type: ignore[arg-type]
        recall_lower_bound=None if refused else bound,
        recall_target=recall,
        confidence=1.0 if status == "exhaustive" else confidence,
        scope="this answer's top k by the exact scorer, over all rows of the index",
        probability_over="the random draw of the sketch",
        assumptions=_assumptions(tail),
        observed=_observed(evidence, levels),
        sentence=_sentence(status, bound, k, confidence, evidence),
    )


def with_open_rows(certificate: Certificate, rows: int, most: int) -> Certificate:
    """The certificate with how many unscored rows keep it from what was asked for.

    Scoring these exactly is enough as far as is known, since beyond that z its bound suffices for
    the best rows found so far. Better ones found on the way make them fewer; if errors near the
    query turn out to be larger, they become more.

    Args:
        certificate: that was not reached.
        rows: no deeper than the least z that suffices; at most ``most``.
        most: how many were looked for.
    """
    many = f"more than {most:,}" if rows == most else f"about {rows:,}"
    told = f"To certify it, {many} more rows would have to be scored exactly."
    return replace(
        certificate,
        observed={**certificate.observed, "open_rows": rows},
        sentence=f"{certificate.sentence} {told}",
    )


def fewest_misses(
    top: FoundTop, reached: float, levels: Sequence[Level], k: int, tail: Tail
) -> int:
    """The least J that any level supports whose z is reached; k if none does."""
    if len(top.exact) < k:
        return k
    bounds = (misses_bound(level, top, tail) for level in levels if reached >= level.z)
    return min(bounds, default=k)


def _assumptions(tail: Tail) -> tuple[str, ...]:
    drawn = "the sketch's seed is independent of the corpus and of the query"
    if tail == "hoeffding":
        return (drawn, "the sketch behaves like sign codes of a dense Gaussian sketch")
    return (
        drawn,
        "each row's sketch noise has normal tails of the scale measured at the build, checked on "
        "random rows and raised to that of the best rows found",
    )


def _observed(evidence: SketchEvidence, levels: Sequence[Level]) -> dict[str, float | int | str]:
    observed: dict[str, float | int | str] = {
        "rows": evidence.rows,
        "error_inflation": evidence.inflation,
        "rescored_rows": evidence.rescored,
        "unscorable_rows": evidence.unscorable,
        "sufficient_z": levels[-1].z,
        "reached_z": evidence.reached if math.isfinite(evidence.reached) else str(evidence.reached),
    }
    if evidence.top.later:
        observed["looks"] = 1 + len(evidence.top.later)
    if evidence.check is not None:
        observed["calibration_rows"] = evidence.check.rows
        observed["calibration_mean_square"] = evidence.check.mean_square
        observed["calibration_limit"] = evidence.check.limit
    return observed


def _sentence(
    status: str, bound: float, k: int, confidence: float, evidence: SketchEvidence
) -> str:
    scored = f"{evidence.rescored:,} of {evidence.rows:,} rows scored exactly"
    if status == "refused" and not evidence.lawful:
        return (
            f"No statement: what these codes leave out of a gradient is not random, so that no "
            f"sketch's law bounds it ({scored})."
        )
    if status == "refused":
        return (
            f"No statement: the proxies err more than the sketch's law allows ({scored}), so "
            f"their bounds cannot be relied on."
        )
    if status == "exhaustive" and evidence.rescored < evidence.rows:
        return f"Every row that has a gradient was scored ({scored}), so nothing was missed."
    if status == "exhaustive":
        return f"All {evidence.rows:,} rows were scored exactly, so nothing was missed."
    if bound == 0:
        return f"With {scored}, no recall of the true top {k} can be stated yet."
    found = round(bound * k)
    return (
        f"With {confidence:.0%} confidence, at least {found} of the {k} highest-scoring training "
        f"examples by the exact score are in this answer ({scored})."
    )
