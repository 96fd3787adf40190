"""Sketch certificate: a row can be missed only if its own sketch noise is extreme.

The proxy of row i errs by ``noise_i`` with scale ``sigma_i``, the sketch being drawn independently
of data and query. Rescore rows in order of ``proxy_i + z sigma_i`` until no unscored row's bound
reaches the k-th best exact score found. A true top-k row is then missed only if
``noise_i < -z sigma_i``. With p(z) the tail of one row's noise, the expected number of misses is at
most ``k p(z)`` and, by Markov's inequality, whatever the dependence between rows,

    P(more than J misses) <= k p(z) / (J + 1).

The z of each recall level is fixed by k, the level and the confidence before anything is scored.
The level asked for gets most of the error probability and one lower level the rest, so that an
early stop can still report the better of those it reached (a union bound over levels).
"""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float
from scipy import stats

from index.certificates.statement import Certificate, allowed_misses, check_confidence

Tail = Literal["gaussian", "hoeffding"]
"""p(z): "gaussian" is Phi(-z), checked on exactly scored rows; "hoeffding" is exp(-z^2 / 2), proved
for sign codes of a dense Gaussian sketch with sigma at least |psi| |phi| sqrt(pi / (2 k))."""

TARGET_SHARE = 0.7
"""Share of the error probability spent on the level asked for; the lower level has the rest. With
more levels, or less for them, their z would lie above the target's and they would never apply."""
LOWER_LEVEL = 0.5
"""The lower level, as a share of the recall asked for."""
CHECK_LEVEL = 1e-3
"""How often the calibration check refuses a sketch whose noise is as assumed."""


@dataclass(frozen=True, kw_only=True)
class Level:
    """A recall level: ``misses`` allowed, certified once every unscored row lies z sigma below."""

    misses: int
    z: float


def plan_levels(k: int, recall: float, confidence: float, tail: Tail) -> tuple[Level, ...]:
    """The level asked for, then a lower one (unless it is the same), with their z.

    Raises:
        ValueError: k, recall or confidence out of range.
    """
    check_confidence(confidence)
    target = allowed_misses(k, recall)
    lower = allowed_misses(k, recall * LOWER_LEVEL)
    delta = 1 - confidence
    shares = {target: 1.0} if lower == target else {target: TARGET_SHARE, lower: 1 - TARGET_SHARE}
    return tuple(
        Level(misses=misses, z=_quantile(delta * share * (misses + 1) / k, tail))
        for misses, share in shares.items()
    )


def _quantile(probability: float, tail: Tail) -> float:
    if tail == "gaussian":
        return max(0.0, float(stats.norm.isf(min(probability, 0.5))))
    return math.sqrt(max(0.0, -2 * math.log(probability)))


def reached_z(
    proxies: Float[np.ndarray, "row"],
    sigmas: Float[np.ndarray, "row"],
    unscored: Bool[np.ndarray, "row"],
    threshold: float,
) -> float:
    """The largest z for which no unscored row has ``proxy + z sigma >= threshold``.

    Args:
        proxies: of all rows.
        sigmas: error scale of each proxy; 0 for a row whose score is known to be its proxy.
        unscored: rows without an exact score.
        threshold: k-th best exact score found; -inf if fewer than k rows are scored.

    Returns:
        inf if nothing is unscored; -inf if some row reaches the threshold without any noise.
    """
    gaps = threshold - proxies[unscored].astype(np.float64)
    scales = sigmas[unscored].astype(np.float64)
    if not len(gaps):
        return math.inf
    with np.errstate(divide="ignore", invalid="ignore"):
        z = np.where(scales > 0, gaps / scales, np.where(gaps > 0, np.inf, -np.inf))
    return float(z.min())


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
) -> CalibrationCheck:
    """Compare residuals with their assumed scale; rows without noise or exact score are left out.

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
        limit=float(stats.chi2.isf(CHECK_LEVEL, count) / count),
    )


@dataclass(frozen=True, kw_only=True)
class SketchEvidence:
    """What the certificate is computed from.

    Attributes:
        reached: largest z at which no unscored row reaches the k-th best exact score.
        rows: rows of the index.
        rescored: rows with an exact score.
        unscorable: rows that have none because their gradient is not finite; each may be a miss.
        check: of the calibration; None if it was not made (then only "hoeffding" is allowed).
        lawful: whether the proxies' errors are those of a random sketch.
    """

    reached: float
    rows: int
    rescored: int
    unscorable: int
    check: CalibrationCheck | None
    lawful: bool = True


def certify_sketch(
    evidence: SketchEvidence, k: int, recall: float, confidence: float, tail: Tail
) -> Certificate:
    """The best planned level that the evidence supports.

    Raises:
        ValueError: arguments out of range, or the gaussian tail without a calibration check.
    """
    if tail == "gaussian" and evidence.check is None:
        raise ValueError("The gaussian tail needs a calibration check; use 'hoeffding' without.")
    levels = plan_levels(k, recall, confidence, tail)
    exhaustive = math.isinf(evidence.reached) and evidence.reached > 0
    failed = evidence.check is not None and not evidence.check.passed
    refused = not exhaustive and (failed or not evidence.lawful)
    if exhaustive:
        misses: int | None = 0
    else:
        misses = min((s.misses for s in levels if evidence.reached >= s.z), default=None)
    bound = 0.0 if misses is None else max(0.0, 1 - (misses + evidence.unscorable) / k)
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
        observed=_observed(evidence, levels[0].z),
        sentence=_sentence(status, bound, k, confidence, evidence),
    )


def _assumptions(tail: Tail) -> tuple[str, ...]:
    drawn = "the sketch's seed is independent of the corpus and of the query"
    if tail == "hoeffding":
        return (drawn, "the sketch behaves like sign codes of a dense Gaussian sketch")
    return (
        drawn,
        "each row's sketch noise has normal tails of the scale measured at the build (checked on "
        "random rows)",
    )


def _observed(evidence: SketchEvidence, required: float) -> dict[str, float | int | str]:
    observed: dict[str, float | int | str] = {
        "rows": evidence.rows,
        "rescored_rows": evidence.rescored,
        "unscorable_rows": evidence.unscorable,
        "required_z": required,
        "reached_z": evidence.reached if math.isfinite(evidence.reached) else str(evidence.reached),
    }
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
        return f"With {scored}, no recall of the true top {k} can be stated yet; rescore more rows."
    found = round(bound * k)
    return (
        f"With {confidence:.0%} confidence, at least {found} of the {k} highest-scoring training "
        f"examples by the exact score are in this answer ({scored})."
    )
