"""One query's search: adaptive exact rescoring of the best proxies, then the certificates."""

import math
import time
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from estimators.contracts import Scorer
from index.certificates.audit import AuditSample, certify_audit, count_above, draw_sample
from index.certificates.sketch import (
    SketchEvidence,
    certify_sketch,
    check_calibration,
    plan_levels,
    reached_z,
)
from index.certificates.statement import Certificate
from index.vectors import best_rows
from service.query import Query


@dataclass(frozen=True, kw_only=True)
class Proxies:
    """Sketch estimates of all rows' ranking values.

    Attributes:
        values: estimates; -inf for failed rows.
        sigmas: their error scales for rows that have nothing in common with the query.
        relative: error scale that comes on top, as a share of a row's exact value.
        divisors: what an exact score is divided by to give the ranking value.
        failed: rows that have no finite gradient.
        lawful: whether the errors are those of a random sketch; otherwise no law bounds them.
    """

    values: Float[np.ndarray, "row"]
    sigmas: Float[np.ndarray, "row"]
    relative: float
    divisors: Float[np.ndarray, "row"]
    failed: Bool[np.ndarray, "row"]
    lawful: bool = True

    def scales(self, exact: float | Float[np.ndarray, "row"]) -> Float[np.ndarray, "row"]:
        """Error scale of each row's proxy if its exact value is ``exact``; 0 for empty rows.

        For a row whose exact value is at least ``exact``, ``(exact - proxy) / scale`` is the least
        number of error scales that it can be off by (up to ``1 / relative``, its limit for large
        values), since that ratio grows with the exact value.
        """
        with np.errstate(invalid="ignore"):
            scales = np.sqrt(self.sigmas**2 + np.square(self.relative * np.maximum(exact, 0)))
        return np.where((self.sigmas > 0) & np.isfinite(scales), scales, self.sigmas)


class Search:
    """One query's adaptive rescoring and its two certificates."""

    def __init__(
        self,
        query: Query,
        proxies: Proxies,
        scorer: Scorer,
        seed: int,
    ) -> None:
        self.query = query
        self.proxies = proxies
        self.exact = np.full(len(proxies.values), np.nan)
        self.scored = np.zeros(len(proxies.values), dtype=bool)
        self.rescored = 0
        self._scorer = scorer
        self._seed = seed

    def run(self, clock: "Clock") -> list[Certificate]:
        """Calibrate, rescore until certified or out of budget, audit."""
        query, proxies = self.query, self.proxies
        everything = np.arange(len(proxies.values))
        sample = draw_sample(everything, query.calibration_rows, self._seed)
        self._rescore(sample)
        clock.stop("calibrate")
        self._adapt()
        clock.stop("rescore")
        sketch = self._sketch_certificate(sample)
        audit = self._audit_certificate()
        clock.stop("audit")
        return [sketch, audit]

    def best(self, k: int) -> Int[np.ndarray, "best"]:
        """The best k exactly scored rows by ranking value; ties go to the lower row."""
        values = self._values()
        rows = best_rows(values, k)
        found: np.ndarray = rows[np.isfinite(values[rows])]
        return found

    def total(self, rows: Int[np.ndarray, "row"]) -> float | None:
        """Sum of the rows' exact scores; None if one is not finite."""
        unscored = rows[~self.scored[rows]]
        scores = self.exact[rows]
        scores[~self.scored[rows]] = self._scorer.score(unscored.tolist())
        return float(scores.sum()) if np.isfinite(scores).all() else None

    def _values(self) -> Float[np.ndarray, "row"]:
        values: np.ndarray = self.exact / self.proxies.divisors
        values[~np.isfinite(values)] = -np.inf
        return values

    def _threshold(self) -> float:
        values = self._values()
        k = self.query.k
        return float(np.partition(values, len(values) - k)[len(values) - k])

    def _rescore(self, rows: Int[np.ndarray, "row"]) -> None:
        fresh = rows[~self.scored[rows]]
        self.exact[fresh] = self._scorer.score(fresh.tolist())
        self.scored[fresh] = True

    def _adapt(self) -> None:
        """Rescore until no unscored row's upper bound reaches the k-th best, or out of budget.

        The first rows are those with the best proxies. Then, given the k-th best exact value found
        so far, rows come in order of how many error scales their proxy lies above it (or least
        below it): this order raises the reached z fastest, and does not spend a short budget on
        rows whose bound is high only because their norm is. The certificate holds for any order.
        """
        query, proxies = self.query, self.proxies
        target = plan_levels(query.k, query.recall, query.confidence, query.tail)[0]
        open_rows = ~self.scored & ~proxies.failed
        rows = best_rows(np.where(open_rows, proxies.values, -np.inf), max(32, 2 * query.k))
        rows = rows[open_rows[rows]]
        chunk = len(rows)
        while len(rows) and self.rescored < query.budget:
            rows = rows[: query.budget - self.rescored]
            self._rescore(rows)
            self.rescored += len(rows)
            chunk = min(2 * chunk, 256)
            candidates = np.flatnonzero(~self.scored & ~proxies.failed)
            excess = self._excess(candidates)
            wanted = excess >= -target.z
            rows = candidates[wanted][best_rows(excess[wanted], chunk)]

    def _excess(self, rows: Int[np.ndarray, "row"]) -> Float[np.ndarray, "row"]:
        """Error scales by which the rows' proxies exceed the k-th best exact value found."""
        threshold = self._threshold()
        gaps = self.proxies.values[rows] - threshold
        scales = self.proxies.scales(threshold)[rows]
        sure = np.where(gaps >= 0, np.inf, -np.inf)
        np.divide(gaps, scales, out=sure, where=scales > 0)
        return sure

    def _unscorable(self) -> int:
        return int((self.proxies.failed | (self.scored & np.isnan(self.exact))).sum())

    def _sketch_certificate(self, sample: Int[np.ndarray, "row"]) -> Certificate:
        query, proxies = self.query, self.proxies
        sampled = sample[~proxies.failed[sample]]
        exact = self.exact[sampled] / proxies.divisors[sampled]
        usable = (proxies.sigmas[sampled] > 0) & np.isfinite(exact)
        check = None
        if usable.any():
            known = np.zeros(len(proxies.values))
            known[sampled] = exact
            scales = proxies.scales(np.nan_to_num(known))[sampled]
            check = check_calibration(exact, proxies.values[sampled], scales)
        threshold = self._threshold()
        unscored = ~self.scored & ~proxies.failed
        reached = reached_z(proxies.values, proxies.scales(threshold), unscored, threshold)
        if proxies.relative > 0 and unscored.any():
            reached = min(reached, 1 / proxies.relative)
        tail = query.tail
        if tail == "gaussian" and check is None:  # unchecked noise supports no bound
            tail = "hoeffding"
            reached = -math.inf if unscored.any() else reached
        evidence = SketchEvidence(
            reached=reached,
            rows=len(proxies.values),
            rescored=int(self.scored.sum()),
            unscorable=self._unscorable(),
            check=check,
            lawful=proxies.lawful,
        )
        return certify_sketch(evidence, query.k, query.recall, query.confidence, tail)

    def _audit_certificate(self) -> Certificate:
        query = self.query
        threshold = self._threshold()
        population = np.flatnonzero(~self.scored)
        unscorable = int((self.scored & np.isnan(self.exact)).sum())
        sample = draw_sample(population, query.audit_rows, self._seed + 1)
        self._rescore(sample[~self.proxies.failed[sample]])
        values = self.exact[sample] / self.proxies.divisors[sample]
        above, merged = count_above(values, threshold)
        audit = AuditSample(
            population=len(population),
            sampled=len(sample),
            above=above,
            merged=merged,
            unscorable=unscorable,
        )
        return certify_audit(audit, query.k, query.recall, query.confidence)


class Clock:
    """Wall-clock seconds of the stages of an answer."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def stop(self, stage: str) -> None:
        """Book the time since the last stop under ``stage``."""
        now = time.perf_counter()
        self.seconds[stage] = now - self._last
        self._last = now
