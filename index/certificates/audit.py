"""Uniform audit: exact scores of a random sample of the rows that were not rescored.

Needs no assumption about proxies: with X of n sampled rows above the threshold, the exact
hypergeometric upper limit U bounds how many of all unscored rows are above it.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int
from scipy import stats

from index.certificates.statement import Certificate, allowed_misses, check_confidence


@dataclass(frozen=True, kw_only=True)
class AuditSample:
    """What the sample showed.

    Attributes:
        population: rows that were not rescored, unscorable ones included.
        sampled: rows drawn from them uniformly without replacement; fixed beforehand.
        above: sampled rows whose exact score exceeds the k-th best exact score found before the
            audit, unscorable ones counted as above.
        merged: of these, how many could be scored and so were merged into the answer.
        unscorable: rows outside the population that gave no finite score; each may be a miss.
    """

    population: int
    sampled: int
    above: int
    merged: int
    unscorable: int = 0


def draw_sample(
    population: Int[np.ndarray, "row"], size: int, seed: int
) -> Int[np.ndarray, "sampled"]:
    """``size`` rows of ``population``, uniformly without replacement (all if there are fewer).

    The same seed draws mostly the same rows from populations that are mostly the same, in the same
    order: rows are drawn among all below a power of two and those that are not of the population,
    or were drawn before, are passed over.

    Args:
        population: row numbers in ascending order.
        size: of the sample.
        seed: of the draws.
    """
    generator = np.random.default_rng(seed)
    size = min(size, len(population))
    if size == 0:
        return population[:0]
    reach = 1 << int(population[-1]).bit_length()
    if 4 * size > len(population) or SPARSE * len(population) < reach:
        return generator.choice(population, size=size, replace=False)
    sample = np.empty(0, dtype=population.dtype)
    while len(sample) < size:
        drawn = generator.integers(0, reach, size=DRAWN_AT_ONCE)
        places = np.minimum(np.searchsorted(population, drawn), len(population) - 1)
        drawn = np.concatenate([sample, drawn[population[places] == drawn]])
        sample = drawn[np.sort(np.unique(drawn, return_index=True)[1])]
    return sample[:size]


SPARSE, DRAWN_AT_ONCE = 16, 512
"""Populations of fewer than one row in so many are drawn from directly; so many draws at a time, so
that the size of a sample does not change its beginning."""


def hypergeometric_upper_limit(population: int, sampled: int, found: int, confidence: float) -> int:
    """The largest number of marked rows in ``population`` that ``found`` does not refute.

    ``max {K : P(Hypergeometric(population, K, sampled) <= found) > 1 - confidence}``, the exact
    one-sided Clopper-Pearson limit; K below it is covered with at least ``confidence``.

    Raises:
        ValueError: more found than sampled, or more sampled than there are.
    """
    check_confidence(confidence)
    if not 0 <= found <= sampled <= population:
        raise ValueError(
            f"Need 0 <= found <= sampled <= population, got {found}, {sampled}, {population}."
        )
    low, high = found, population - (sampled - found)
    while low < high:  # the tail probability falls as K grows
        middle = (low + high + 1) // 2
        if stats.hypergeom.cdf(found, population, middle, sampled) > 1 - confidence:
            low = middle
        else:
            high = middle - 1
    return low


def certify_audit(sample: AuditSample, k: int, recall: float, confidence: float) -> Certificate:
    """Recall bound of an answer after the audit's finds are merged into it.

    With U the upper limit on unscored rows above the threshold, at most
    ``missing = U - merged + unscorable`` rows of the true top k are not in the answer, so that
    ``recall >= 1 - missing / k``.
    """
    upper = hypergeometric_upper_limit(sample.population, sample.sampled, sample.above, confidence)
    missing = upper - sample.merged + sample.unscorable
    exhaustive = missing == 0 and sample.sampled == sample.population
    bound = max(0.0, 1 - missing / k)
    reached = missing <= allowed_misses(k, recall)
    rate = upper / sample.population if sample.population else 0.0
    status = "exhaustive" if exhaustive else "certified" if reached else "not certified"
    return Certificate(
        type="audit",
        status=status,  # type: ignore[arg-type]
        recall_lower_bound=bound,
        recall_target=recall,
        confidence=1.0 if exhaustive else confidence,
        scope="this answer's top k by the exact scorer, over all rows of the index",
        probability_over="the random choice of the audited rows",
        assumptions=(),
        observed={
            "unscored_rows": sample.population,
            "sampled_rows": sample.sampled,
            "sampled_above_threshold": sample.above,
            "upper_limit_above_threshold": upper,
            "upper_limit_share_of_unscored": rate,
        },
        sentence=_sentence(sample, upper, rate, confidence),
    )


def _sentence(sample: AuditSample, upper: int, rate: float, confidence: float) -> str:
    if sample.population == sample.sampled:
        lost = sample.above - sample.merged + sample.unscorable
        but = f" but {lost:,} whose gradient is not finite" if lost else ""
        return f"Every row{but} was scored exactly."
    return (
        f"Of {sample.sampled:,} unscored rows drawn at random and scored exactly, {sample.above} "
        f"beat the k-th result; with {confidence:.0%} confidence at most {rate:.2%} of the "
        f"{sample.population:,} unscored rows ({upper:,}) do."
    )


def count_above(scores: Float[np.ndarray, "sampled"], threshold: float) -> tuple[int, int]:
    """How many scores exceed ``threshold``, NaN counted as above; and how many of these are finite.

    Returns:
        (above, merged) of an ``AuditSample``.
    """
    beat = int(np.sum(scores > threshold))
    return beat + int(np.isnan(scores).sum()), beat
