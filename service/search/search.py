"""One query's search: adaptive exact rescoring of the best proxies, then the certificates."""

import math
import time
from collections.abc import Generator, Sequence
from typing import Literal, Protocol, TypeAlias, TypeVar

import numpy as np
from jaxtyping import Float, Int

from index.certificates.audit import AuditSample, certify_audit, count_above, draw_sample
from index.certificates.calibration import (
    SHARE,
    CalibrationEvidence,
    certify_calibration,
    tolerance_limit,
)
from index.certificates.share import ShareEvidence, estimate_share
from index.certificates.sketch import (
    FoundTop,
    SketchEvidence,
    certify_sketch,
    check_calibration,
    fewest_misses,
    plan_levels,
)
from index.certificates.statement import Certificate, Share, allowed_misses, no_share
from index.codes.vectors import best_rows
from service.search.proxies import Proxies
from service.search.query import Query, Ranking

T = TypeVar("T")
Steps: TypeAlias = Generator[Int[np.ndarray, "wanted"], Float[np.ndarray, "scored"], T]
"""Work that stops whenever it needs exact scores of rows, and gives a T."""


class RowScores(Protocol):
    """Exact scores of rows for the one query of a search."""

    def score(self, rows: Sequence[int]) -> Float[np.ndarray, "rows"]:
        """Scores in the order of ``rows``; NaN where there is none."""
        ...


class Calibration(Protocol):
    """What calibration queries needed; for a query of their kind, see ``certify_calibration``."""

    def stale(self, query: Query) -> str | None:
        """Why it says nothing of such queries; None if it does."""
        ...

    def needed(self, k: int, ranking: Ranking, misses: int) -> list[float]:
        """Depth that each calibration query needed to miss at most so many of its top k.

        Only asked where it is not stale.
        """
        ...


FEWEST_NEIGHBOURS = 30
"""Best rows found, on which the errors near the query are measured."""


class Search:
    """One query's adaptive rescoring and its certificates.

    Args:
        query: what to find and how sure to be.
        proxies: of all rows.
        seed: of the random rows.
        calibration: of the index, if it has one.
    """

    def __init__(
        self,
        query: Query,
        proxies: Proxies,
        seed: int,
        calibration: Calibration | None = None,
    ) -> None:
        self.query = query
        self.proxies = proxies
        self.exact = np.full(len(proxies.values), np.nan)
        self.scored = np.zeros(len(proxies.values), dtype=bool)
        self.rescored = 0
        self.ended = False
        self.stage: Literal["calibrate", "rescore", "audit"] = "calibrate"
        self._sample = np.empty(0, dtype=np.int64)
        self._unscored = self._audited = self._sample
        self._begun = math.inf
        self._seed = seed
        self._calibration = calibration
        self._levels = plan_levels(query.k, query.recall, query.confidence, query.tail)

    def run(self, scorer: RowScores, clock: "Clock") -> list[Certificate]:
        """Go through all ``steps``, with exact scores from ``scorer``."""
        steps = self.steps(clock)
        try:
            rows = next(steps)
            while True:
                rows = steps.send(scorer.score(rows.tolist()))
        except StopIteration as ended:
            certificates: list[Certificate] = ended.value
            return certificates

    def steps(self, clock: "Clock") -> Steps[list[Certificate]]:
        """Check the noise, rescore until certified or out of budget, audit.

        Yields rows and is sent their exact scores: of all of them, or only of the first ones after
        ``end``.

        Returns:
            The certificates "sketch", "audit" and, if there is a calibration, "calibration".
        """
        query, proxies = self.query, self.proxies
        everything = np.arange(len(proxies.values))
        self._sample = draw_sample(everything, query.calibration_rows, self._seed)
        yield from self._rescore(self._sample)
        self.stage = "rescore"
        clock.stop("calibrate")
        yield from self._adapt()
        clock.stop("rescore")
        before = [self.sketch_certificate()]
        after = [] if self._calibration is None else [self._calibration_certificate()]
        audit = yield from self._audit_certificate()
        clock.stop("audit")
        return [*before, audit, *after]

    def end(self) -> None:
        """Ask for no more rows: certify what was found so far."""
        self.ended = True

    def best(self, k: int) -> Int[np.ndarray, "best"]:
        """The best k exactly scored rows by ranking value; ties go to the lower row."""
        rows = np.flatnonzero(np.isfinite(self.exact))
        found: np.ndarray = rows[best_rows(self._values(rows), k)]
        return found

    def _values(self, rows: Int[np.ndarray, "row"]) -> Float[np.ndarray, "row"]:
        """Exact ranking values; NaN for rows without a score."""
        values: np.ndarray = self.exact[rows] / self.proxies.divisors[rows]
        return values

    def _threshold(self) -> float:
        """The k-th best exact ranking value found; -inf while fewer are."""
        rows = self.best(self.query.k)
        return float(self._values(rows[-1:])[0]) if len(rows) == self.query.k else -math.inf

    def _rescore(self, rows: Int[np.ndarray, "row"]) -> Steps[int]:
        """Have rows scored that are not yet; how many were."""
        fresh = rows[~self.scored[rows]]
        if self.ended or not len(fresh):
            return 0
        scores = yield fresh
        done = fresh[: len(scores)]
        self.exact[done] = scores
        self.scored[done] = True
        return len(done)

    def _adapt(self) -> Steps[None]:
        """Rescore the best proxies, then deeper and deeper until certified or out of budget."""
        query, proxies = self.query, self.proxies
        open_rows = ~self.scored & ~proxies.failed
        rows = best_rows(np.where(open_rows, proxies.values, -np.inf), max(32, 2 * query.k))
        rows = rows[open_rows[rows]]
        self._begun = float(proxies.values[rows].min(initial=math.inf))
        chunk = len(rows)
        while len(rows) and self.rescored < query.budget and not self.ended:
            rows = rows[: query.budget - self.rescored]
            self.rescored += yield from self._rescore(rows)
            chunk = min(2 * chunk, 256)
            rows = self._next_rows(chunk)

    def _next_rows(self, count: int) -> Int[np.ndarray, "next"]:
        """The shallowest unscored rows that the certificate asked for may need; none if it holds.

        The first of the fixed depths that is not reached is gone to before it is looked at whether
        its bound suffices, then the next.
        """
        candidates = np.flatnonzero(~self.scored & ~self.proxies.failed)
        calibrated = self._by_calibration()
        ruler = self.proxies.with_slack() if calibrated else self.proxies
        depths = ruler.depths(self._threshold())[candidates]
        reached = min(float(depths.min(initial=math.inf)), ruler.deepest)
        goal = self._calibrated_goal(reached) if calibrated else self._goal(reached)
        if goal is None:
            return candidates[:0]
        wanted = depths <= goal
        found: np.ndarray = candidates[wanted][best_rows(-depths[wanted], count)]
        return found

    def _by_calibration(self) -> bool:
        """Whether the search goes until the calibration is satisfied, not the sketch's law."""
        wanted = self.query.until == "calibration" or not self.proxies.lawful
        known = self._calibration
        return wanted and known is not None and known.stale(self.query) is None

    def _calibrated_goal(self, reached: float) -> float | None:
        query, calibration = self.query, self._calibration
        assert calibration is not None
        misses = allowed_misses(query.k, query.recall) - self._unscorable()
        needed = calibration.needed(query.k, query.ranking, misses)
        limit = tolerance_limit(needed, SHARE, query.confidence)
        return limit if reached <= limit < math.inf else None

    def _goal(self, reached: float) -> float | None:
        """The depth to go to; None if the sketch certificate that was asked for holds."""
        query = self.query
        misses = allowed_misses(query.k, query.recall) - self._unscorable()
        inflation = self._inflation()
        top = self._found_top(inflation)
        for level in self._levels:
            if reached <= inflation * level.z:
                return inflation * level.z
            if fewest_misses(top, reached / inflation, [level], query.k, query.tail) <= misses:
                return None
        return None

    def _found_top(self, inflation: float) -> FoundTop:
        rows = self.best(self.query.k)
        return FoundTop(
            exact=self._values(rows),
            sigmas=inflation * self.proxies.sigmas[rows],
            relative=inflation * self.proxies.relative,
        )

    def _inflation(self) -> float:
        """How much larger the proxies' errors are among the best rows found than their scales say.

        Rows that are like the query err more than random ones (their gradients share factors with
        the query's, which the sketch's first stage mixes), by an amount that differs by query.
        Those found with the highest exact values are nearly free of selection: a row as good is
        left out only if its error is extreme.
        """
        rows = self.best(max(self.query.k, FEWEST_NEIGHBOURS))
        exact, near = self._values(rows), self.proxies.at(rows)
        scales = near.scales(exact)
        noisy = scales > 0
        if not noisy.any():
            return 1.0
        residuals = (exact - near.values)[noisy] / scales[noisy]
        return max(1.0, float(np.sqrt(np.mean(residuals**2))))

    def _unscorable(self) -> int:
        return int((self.proxies.failed | (self.scored & np.isnan(self.exact))).sum())

    def sketch_certificate(self) -> Certificate:
        """What the sketch's law says of the rows that are unscored at this moment."""
        query, proxies = self.query, self.proxies
        sampled = self._sample[self.scored[self._sample] & ~proxies.failed[self._sample]]
        drawn, exact = proxies.at(sampled), self._values(sampled)
        usable = (drawn.sigmas > 0) & np.isfinite(exact)
        check = None
        if usable.any():
            check = check_calibration(exact, drawn.values, drawn.scales(np.nan_to_num(exact)))
        unscored = ~self.scored & ~proxies.failed
        inflation = self._inflation()
        reached = self._reached(proxies) / inflation
        tail = query.tail
        if tail == "gaussian" and check is None:  # unchecked noise supports no bound
            tail = "hoeffding"
            reached = -math.inf if unscored.any() else reached
        evidence = SketchEvidence(
            reached=reached,
            top=self._found_top(inflation),
            inflation=inflation,
            rows=len(proxies.values),
            rescored=int(self.scored.sum()),
            unscorable=self._unscorable(),
            check=check,
            lawful=proxies.lawful,
        )
        return certify_sketch(evidence, query.k, query.recall, query.confidence, tail)

    def _reached(self, ruler: Proxies) -> float:
        """The depth above which no unscored row lies; inf if there is none."""
        unscored = ~self.scored & ~self.proxies.failed
        if not unscored.any():
            return math.inf
        depths = ruler.depths(self._threshold())[unscored]
        return min(float(depths.min()), ruler.deepest)

    def _calibration_certificate(self) -> Certificate:
        query, calibration = self.query, self._calibration
        assert calibration is not None
        misses = allowed_misses(query.k, query.recall) - self._unscorable()
        stale = calibration.stale(query)
        needed = [] if stale else calibration.needed(query.k, query.ranking, misses)
        evidence = CalibrationEvidence(
            needed=needed,
            reached=self._reached(self.proxies.with_slack()),
            unit=self.proxies.unit,
            unscorable=self._unscorable(),
            stale=stale,
        )
        return certify_calibration(evidence, query.k, query.recall, query.confidence)

    def _audit_certificate(self) -> Steps[Certificate]:
        query = self.query
        threshold = self._threshold()
        population = np.flatnonzero(~self.scored)
        unscorable = int((self.scored & np.isnan(self.exact)).sum())
        sample = draw_sample(population, query.audit_rows, self._seed + 1)
        self.stage = "audit"
        scorable = sample[~self.proxies.failed[sample]]
        done = yield from self._rescore(scorable)
        if done < len(scorable):  # ended on the way: what was drawn and not looked at is left out
            sample = sample[:0]
        self._unscored, self._audited = population, sample
        above, merged = count_above(self._values(sample), threshold)
        audit = AuditSample(
            population=len(population),
            sampled=len(sample),
            above=above,
            merged=merged,
            unscorable=unscorable,
        )
        return certify_audit(audit, query.k, query.recall, query.confidence)

    def share(self) -> Share:
        """What part of all positive scores the best k carry; to be asked when the steps have ended.

        Opponents are searched with the opposite scores, so theirs is of all negative ones.
        """
        failed, query = self.proxies.failed, self.query
        live = self._unscored[~failed[self._unscored]]
        if self.ended and len(live):
            return no_share("the deadline ended the search")
        untouched = self._untouched(live)
        others = np.concatenate([live, untouched])
        audited = self._audited[~failed[self._audited]]
        sample = np.concatenate([audited, untouched])
        positive = np.maximum(np.nan_to_num(self.exact), 0)
        guesses = np.maximum(self.proxies.scores(), 0)
        evidence = ShareEvidence(
            shown=positive[self.best(query.k)],
            known=float(positive.sum() - positive[sample].sum()),
            others=len(others),
            guessed=float(guesses[others].sum()),
            sample=positive[sample],
            guesses=guesses[sample],
            influence=f"{'negative' if query.direction == 'opponents' else 'positive'} influence",
        )
        return estimate_share(evidence, query.confidence)

    def _untouched(self, live: Int[np.ndarray, "row"]) -> Int[np.ndarray, "row"]:
        """Rows of the first sample that would not have been scored because of their proxies.

        Among the rows left out they are as random as those of the audit: their proxies lie below
        those that were begun with, and no less deep than the shallowest row that is unscored.
        """
        threshold = self._threshold()
        if threshold == -math.inf:  # not k rows were scored: none was left out
            return self._sample[:0]
        ruler = self.proxies.with_slack() if self._by_calibration() else self.proxies
        depths = ruler.depths(threshold)
        reached = depths[live].min(initial=math.inf)
        rows = self._sample[~self.proxies.failed[self._sample]]
        left_out = (depths[rows] >= reached) & (self.proxies.values[rows] < self._begun)
        found: np.ndarray = rows[left_out]
        return found


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
