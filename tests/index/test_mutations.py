"""Tests of the tests: certificates that are subtly wrong fail the trials that right ones pass."""

import functools
import math
from collections.abc import Callable

import numpy as np
import pytest
from scipy import stats

from index.certificates import audit as audit_module
from index.certificates.audit import AuditSample, certify_audit, count_above, draw_sample
from index.certificates.sketch import FoundTop, Level, misses_bound
from tests.index.test_certificates import most_alarms

TRIALS = 4000
POPULATION, SAMPLED, K = 20, 10, 10
"""Few rows, so that the exact limit's steps are large."""


@functools.cache
def stated(above: int, merged: int, limit: Callable[..., int]) -> float:
    """The bound of an audit that found so much; ``limit`` is the limit that it uses."""
    assert audit_module.hypergeometric_upper_limit is limit
    found = AuditSample(population=POPULATION, sampled=SAMPLED, above=above, merged=merged)
    bound = certify_audit(found, K, 0.9, 0.95).recall_lower_bound
    assert bound is not None
    return bound


def audited(seed: int, beating: int = 3) -> float:
    """By how much the bound of an audit exceeds the recall; so many rows beat the threshold."""
    values = np.zeros(POPULATION)
    values[:beating] = 2.0
    sample = draw_sample(np.arange(POPULATION), SAMPLED, seed)
    above, merged = count_above(values[sample], 1.0)
    bound = stated(above, merged, audit_module.hypergeometric_upper_limit)
    # The answer lacks what is above the threshold and was not in the sample.
    return bound - (1 - (beating - merged) / K)


def audit_violations(beating: int = 3) -> int:
    return sum(audited(seed, beating) > 1e-9 for seed in range(TRIALS))


@pytest.mark.parametrize("beating", [1, 3, 4, 6])
def test_the_audit_passes(beating):
    assert audit_violations(beating) <= most_alarms(TRIALS, 0.05)


def test_a_normal_limit_instead_of_the_exact_one_is_noticed(monkeypatch):
    def wald(population: int, sampled: int, found: int, confidence: float) -> int:
        share = found / sampled
        error = math.sqrt(share * (1 - share) / sampled * (1 - sampled / population))
        return math.ceil(population * (share + stats.norm.ppf(confidence) * error))

    monkeypatch.setattr(audit_module, "hypergeometric_upper_limit", wald)
    assert audit_violations() > most_alarms(TRIALS, 0.05)


def test_a_limit_that_is_one_too_low_is_noticed(monkeypatch):
    exact = audit_module.hypergeometric_upper_limit
    monkeypatch.setattr(
        audit_module, "hypergeometric_upper_limit", lambda *given: max(given[2], exact(*given) - 1)
    )
    assert audit_violations() > most_alarms(TRIALS, 0.05)


def test_the_best_of_several_audits_is_noticed():
    def best_of_five(seed: int) -> float:
        return max(audited(5 * seed + again, beating=4) for again in range(5))

    violations = sum(best_of_five(seed) > 1e-9 for seed in range(TRIALS))
    assert violations > most_alarms(TRIALS, 0.05)


def test_sampling_until_it_passes_is_noticed():
    """400 rows, 30 of which beat the threshold; 5 more are sampled until fewer than 30 are left."""
    sizes = range(20, 201, 5)
    limits = {
        (n, x): audit_module.hypergeometric_upper_limit(400, n, x, 0.95)
        for n in sizes
        for x in range(31)
        if x <= n
    }
    generator = np.random.default_rng(9)
    fixed = until = 0
    for _ in range(TRIALS):
        found = np.cumsum(generator.permutation(400) < 30)
        low = [limits[n, int(found[n - 1])] < 30 for n in sizes]
        fixed += low[-1]
        until += any(low)
    assert fixed <= most_alarms(TRIALS, 0.05)
    assert until > most_alarms(TRIALS, 0.05)


# --- the sketch's bound on misses ---------------------------------------------------------------

TIED = 3
LEVEL = Level(z=float(stats.norm.isf(0.024)), delta=0.04)


def sketch_violations(lower: int = 0) -> int:
    """Redraws in which more rows are missed than stated, ``lower`` fewer being stated than found.

    Seven rows of the top ten lie far above the rest; three have the tenth score; many lie below.
    """
    exact = np.concatenate([np.linspace(90, 30, K - TIED), np.zeros(TIED), np.full(20, -9.0)])
    generator = np.random.default_rng(6)
    wrong = 0
    for _ in range(TRIALS):
        found = generator.standard_normal(len(exact)) >= -LEVEL.z - exact  # the error scale is 1
        found[K:] = True
        top = FoundTop(exact=exact[np.flatnonzero(found)[:K]], sigmas=np.ones(K))
        stated = max(0, misses_bound(LEVEL, top, "gaussian") - lower)
        wrong += int((~found[:K]).sum()) > stated
    return wrong


def test_the_bound_on_misses_passes():
    assert sketch_violations() <= most_alarms(TRIALS, LEVEL.delta)


def test_one_miss_too_few_is_noticed():
    """Stating one miss less where each of three tied rows may be missed: 7 % instead of 4 %."""
    assert sketch_violations(lower=1) > most_alarms(TRIALS, LEVEL.delta)


@pytest.mark.parametrize("delta", [0.01, 0.05, 0.2])
def test_the_bound_on_misses_passes_for_correlated_errors(delta):
    """All rows of the top err together, as near-duplicates do."""
    level = Level(z=float(stats.norm.isf(0.8 * delta)), delta=delta)
    generator = np.random.default_rng(8)
    exact = np.concatenate([np.linspace(3, 0, K), np.full(20, -9.0)])
    wrong = 0
    for _ in range(TRIALS):
        found = generator.standard_normal() >= -level.z - exact
        found[K:] = True
        rows = np.flatnonzero(found)[:K]
        top = FoundTop(exact=exact[rows], sigmas=np.ones(K))
        wrong += int((~found[:K]).sum()) > misses_bound(level, top, "gaussian")
    assert wrong <= most_alarms(TRIALS, delta)
