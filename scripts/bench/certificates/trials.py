"""Trials of certificates against full truth: how often they are wrong, and what they cost."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy import stats

from index.certificates.audit import AuditSample, certify_audit, count_above, draw_sample
from index.certificates.calibration import effort_needed, tolerance_limit
from index.certificates.statement import Certificate, allowed_misses
from scripts.bench.certificates.data import NOISE_QUERIES, Estimates, Redraws
from scripts.bench.certificates.worlds import Change, Known, World, plain
from service.search.answer import Clock
from service.search.proxies import Proxies, RankedProxies
from service.search.query import Query, Until
from service.search.search import Search
from service.search.shards import DenseShard

CONFIDENCE, RECALL, SHARE = 0.95, 0.9, 0.95
ALARM = 1e-3
"""A valid certificate is called invalid so seldom, in one configuration."""


# --- coverage -----------------------------------------------------------------------------------


def sketch_coverage(
    redraws: Redraws, rows: Bool[np.ndarray, "row"], change: Change, k: int, queries: int
) -> dict[str, Any]:
    """Violations of the sketch certificate over redraws of the sketch, judged by draws.

    Trials of one draw are dependent, so that the share of violations is compared with its standard
    error over draws.
    """
    wrong = np.zeros((len(redraws.proxies), queries), dtype=bool)
    certified = refused = 0
    for draw, noise in enumerate(redraws.noise):
        scale = max(noise.predicted, noise.measured)
        for query in range(queries):
            world = plain(
                redraws.exact[query, rows],
                redraws.proxies[draw, query, rows],
                scale,
                noise.relative,
            )
            world = change(world, np.random.default_rng([query, 5]))  # the same in every draw
            asked = Query(prompt="", k=k, budget=len(world.truth) // 5, audit_rows=0)
            search = Search(asked, DenseShard(world.proxies), 1000 * draw + query)
            certificate = search.run(Known(world.scores), Clock())[0]
            bound = certificate.recall_lower_bound
            refused += bound is None
            certified += certificate.status in ("certified", "exhaustive")
            recall = world.recall(search.best(k).tolist(), k)
            wrong[draw, query] = bound is not None and bound > recall + 1e-9
    shares = wrong.mean(1)
    error = float(shares.std(ddof=1) / np.sqrt(len(shares))) if len(shares) > 1 else 0.0
    limit = 1 - CONFIDENCE + stats.norm.isf(ALARM) * error
    return {
        "certificate": "sketch",
        "trials": int(wrong.size),
        "draws": len(shares),
        "violations": int(wrong.sum()),
        "certified": int(certified),
        "refused": int(refused),
        "nominal": 1 - CONFIDENCE,
        "valid": bool(shares.mean() <= limit),
    }


def audit_coverage(
    worlds: Sequence[World], k: int, sampled: int, redraws: int, budget: int
) -> dict[str, Any]:
    """Violations of the audit over redraws of its sample, after searches that stop early."""
    violations = certified = trials = 0
    for number, world in enumerate(worlds):
        asked = Query(prompt="", k=k, budget=budget, calibration_rows=0, audit_rows=0)
        search = Search(asked, DenseShard(world.proxies), number)
        search.run(Known(world.scores), Clock())
        best = search.best(k)
        values = world.scores / world.proxies.divisors
        threshold = float(values[best[-1]]) if len(best) == k else -np.inf
        population = np.flatnonzero(~search.scored)
        unscorable = int((search.scored & np.isnan(world.scores)).sum())
        for draw in range(redraws):
            sample = draw_sample(population, sampled, 10_000 * number + draw)
            seen = np.where(world.proxies.failed[sample], np.nan, values[sample])
            above, merged = count_above(seen, threshold)
            certificate = certify_audit(
                AuditSample(
                    population=len(population),
                    sampled=len(sample),
                    above=above,
                    merged=merged,
                    unscorable=unscorable,
                ),
                k,
                RECALL,
                CONFIDENCE,
            )
            finds = sample[np.isfinite(seen) & (seen > threshold)]
            pool = np.concatenate([best, finds])
            answer = pool[np.argsort(-values[pool], kind="stable")[:k]]
            violations += _bound(certificate) > world.recall(answer.tolist(), k) + 1e-9
            certified += certificate.status in ("certified", "exhaustive")
            trials += 1
    allowed = stats.binom.isf(ALARM, trials, 1 - CONFIDENCE)
    return {
        "certificate": "audit",
        "trials": trials,
        "violations": int(violations),
        "certified": int(certified),
        "nominal": 1 - CONFIDENCE,
        "valid": bool(violations <= allowed),
    }


def _bound(certificate: Certificate) -> float:
    bound = certificate.recall_lower_bound
    return 0.0 if bound is None else bound


def calibration_coverage(
    needed: Float[np.ndarray, "query"],
    of_kind: Float[np.ndarray, "query"],
    splits: int,
    calibrating: int,
) -> dict[str, Any]:
    """Draws of calibration queries whose limit fails more of the others' kind than it may.

    Args:
        needed: effort of each query that calibration queries are drawn from, with replacement, so
            that these queries are all of their kind.
        of_kind: efforts of the queries that the limit is then used for; the same if they are of
            the same kind.
        splits: draws.
        calibrating: queries in a draw.
    """
    generator = np.random.default_rng(7)
    violations = 0
    for _ in range(splits):
        drawn = generator.choice(needed, calibrating)
        limit = tolerance_limit(drawn.tolist(), SHARE, CONFIDENCE)
        violations += float(np.mean(of_kind > limit)) > 1 - SHARE
    allowed = stats.binom.isf(ALARM, splits, 1 - CONFIDENCE)
    return {
        "certificate": "calibration",
        "trials": splits,
        "violations": int(violations),
        "nominal": 1 - CONFIDENCE,
        "valid": bool(violations <= allowed),
    }


# --- usefulness ---------------------------------------------------------------------------------


def proxies_of(estimates: Estimates, query: int, rows: Bool[np.ndarray, "row"]) -> Proxies:
    """One query's proxies for some rows; those without scales only rank."""
    values = estimates.cosines[query, rows].astype(np.float64)
    ranked = estimates.noise == 0
    kind = RankedProxies if ranked else Proxies
    return kind(
        values=values,
        sigmas=np.zeros(len(values)) if ranked else estimates.noise * (values != 0),
        relative=estimates.relative,
        divisors=np.ones(len(values)),
        failed=np.zeros(len(values), dtype=bool),
        lawful=estimates.lawful,
    )


def depths_needed(
    estimates: Estimates,
    cosines: Float[np.ndarray, "query row"],
    rows: Bool[np.ndarray, "row"],
    k: int,
) -> Float[np.ndarray, "query"]:
    """Depth by calibration that each query needs to miss no more of its top k than it may."""
    misses = allowed_misses(k, RECALL)
    found = []
    for query, truth in enumerate(cosines[:, rows]):
        best = np.argsort(-truth, kind="stable")[:k]
        ruler = proxies_of(estimates, query, rows).with_slack()
        depths = ruler.depths(float(truth[best[-1]]))[best]
        found.append(effort_needed(depths, k, misses))
    return np.array(found)


class Fixed:
    """A calibration whose efforts are known already."""

    def __init__(self, needed: Sequence[float]) -> None:
        self._needed = list(needed)

    def stale(self, query: Query) -> str | None:
        """It always holds."""
        return None

    def needed(self, k: int, ranking: str, misses: int) -> list[float]:
        """As known."""
        return self._needed


def usefulness(
    estimates: Estimates,
    cosines: Float[np.ndarray, "query row"],
    rows: Bool[np.ndarray, "row"],
    k: int,
    budget_share: float,
    until: Until,
    calibrating: int,
) -> dict[str, Any]:
    """What share of the corpus is rescored for a certificate, and what would have sufficed.

    The first ``calibrating`` queries (after those of the noise) calibrate, the others are asked.
    Rows that check the noise are counted, up to the budget and beyond it.
    """
    total = int(rows.sum())
    needed = depths_needed(estimates, cosines, rows, k)
    start = NOISE_QUERIES + calibrating
    calibration = Fixed(needed[NOISE_QUERIES:start].tolist())
    shares, sufficient, held = [], [], []
    for query in range(start, len(cosines)):
        truth = cosines[query, rows].astype(np.float64)
        proxies = proxies_of(estimates, query, rows)
        asked = Query(
            prompt="",
            k=k,
            until=until,
            budget=int(budget_share * total),
            calibration_rows=64 if until == "sketch" else 0,
            audit_rows=0,
        )
        search = Search(asked, DenseShard(proxies), query, calibration)
        by_type = {c.type: c for c in search.run(Known(truth), Clock())}
        certified = by_type[until].status in ("certified", "exhaustive")
        share = search.scored.sum() / total
        shares.append(share if certified and share <= budget_share else np.inf)
        best = np.argsort(-truth, kind="stable")[:k]
        sufficient.append(_sufficient_share(proxies, best))
        held.append(np.isin(best, search.best(k)).mean() >= RECALL - 1e-9)
    found = np.array(shares)
    return {
        "corpus_rows": total,
        "bytes_per_example": estimates.bytes_per_example,
        "k": k,
        "target": RECALL,
        "certificate": until,
        "queries": len(found),
        "certified_share": float(np.isfinite(found).mean()),
        "reached_share": float(np.mean(held)),
        "rescored_share_max": budget_share,
        "rescored_share_median": _quantile(found, 0.5),
        "rescored_share_p80": _quantile(found, 0.8),
        "sufficient_share_median": float(np.median(sufficient)),
        "sufficient_share_p95": float(np.quantile(sufficient, 0.95)),
    }


def _sufficient_share(proxies: Proxies, best: Int[np.ndarray, "best"]) -> float:
    """Share of the rows, in the proxies' order, among which enough of the best are."""
    order = np.argsort(-proxies.values, kind="stable")
    places = np.flatnonzero(np.isin(order, best)) + 1
    return float(places[len(best) - allowed_misses(len(best), RECALL) - 1] / len(order))


def _quantile(values: Float[np.ndarray, "query"], q: float) -> float | None:
    """A quantile of the rescored shares; None if that query was not certified."""
    found = float(np.quantile(values, q, method="inverted_cdf"))
    return found if np.isfinite(found) else None
