"""One query's search: adaptive exact rescoring of the best proxies, then the certificates."""

import math
from collections.abc import Generator, Sequence
from typing import Literal, Protocol, TypeAlias, TypeVar

import numpy as np
from jaxtyping import Bool, Float, Int

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
    Scales,
    SketchEvidence,
    certify_sketch,
    fewest_misses,
    plan_levels,
    with_open_rows,
)
from index.certificates.statement import Certificate, Share, allowed_misses, no_share
from service.search.answer import Clock
from service.search.looks import Looks
from service.search.query import Query, Ranking
from service.search.shards import Found, Shard

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


COUNTED = 10_000
"""Most rows that are counted to say what a certificate would take."""
FEWEST_NEIGHBOURS = 30
"""Best rows found, on which the errors near the query are measured."""


class Search:
    """One query's adaptive rescoring and its certificates.

    Args:
        query: what to find and how sure to be.
        shard: estimates of all rows.
        seed: of the random rows.
        calibration: of the index, if it has one.
    """

    def __init__(
        self,
        query: Query,
        shard: Shard,
        seed: int,
        calibration: Calibration | None = None,
    ) -> None:
        self.query = query
        self.shard = shard
        self.scored = np.zeros(len(shard), dtype=bool)
        self.rescored = 0
        self.ended = False
        self.stage: Literal["calibrate", "rescore", "audit"] = "calibrate"
        self._found = Found()
        self._drawn = Found()
        self._looks = Looks(shard)
        self._sample = self._audited = np.empty(0, dtype=np.int64)
        self._before_audit = self.scored
        self._seed = seed
        self._calibration = calibration
        self._levels = plan_levels(query.k, query.recall, query.confidence, query.tail, shard.looks)

    def run(self, scorer: RowScores, clock: Clock) -> list[Certificate]:
        """Go through all ``steps``, with exact scores from ``scorer``."""
        steps = self.steps(clock)
        try:
            rows = next(steps)
            while True:
                rows = steps.send(scorer.score(rows.tolist()))
        except StopIteration as ended:
            certificates: list[Certificate] = ended.value
            return certificates

    def steps(self, clock: Clock) -> Steps[list[Certificate]]:
        """Check the noise, rescore until certified or out of budget, audit.

        Which rows are rescored because of their proxies does not depend on what the random ones
        turned out to be, but for the check of the noise. So those of them that are left over are
        random among all rows that are, and the audit begins with them.

        Yields rows and is sent their exact scores: of all of them, or only of the first ones after
        ``end``.

        Returns:
            The certificates "sketch", "audit" and, if there is a calibration, "calibration".
        """
        yield from self._draw()
        self.stage = "rescore"
        clock.stop("calibrate")
        yield from self._adapt()
        clock.stop("rescore")
        self._reveal_if_whole()
        before = [self.sketch_certificate()]
        after = [] if self._calibration is None else [self._calibration_certificate()]
        audit = yield from self._audit_certificate()
        clock.stop("audit")
        return [*before, audit, *after]

    def end(self) -> None:
        """Ask for no more rows: certify what was found so far."""
        self.ended = True

    @property
    def sampled(self) -> int:
        """Rows scored so far that are not rescored because of their proxies."""
        drawn = self._drawn.rows
        return int(self.scored.sum()) + int((~self.scored[drawn]).sum()) - self.rescored

    def best(self, k: int) -> Int[np.ndarray, "best"]:
        """The best k exactly scored rows by ranking value; ties go to the lower row."""
        return self._found.best(k)[0]

    def estimates(self, rows: Int[np.ndarray, "row"]) -> Float[np.ndarray, "row"]:
        """Ranking values of rows as estimated from all of their codes."""
        return self._looks.last(rows).values

    def _threshold(self) -> float:
        """The k-th best exact ranking value found; -inf while fewer are."""
        values = self._found.best(self.query.k)[1]
        return float(values[-1]) if len(values) == self.query.k else -math.inf

    def _draw(self) -> Steps[None]:
        """Have the random rows scored that the noise is checked on; the search does not see them.

        If it is ended on the way, what it has of them serves no audit.
        """
        everything = np.arange(len(self.shard))
        sample = draw_sample(everything, self.query.calibration_rows, self._seed)
        rows = sample[~self.shard.failed[sample]]
        if self.ended or not len(rows):
            return
        scores = yield rows
        done = rows[: len(scores)]
        self._drawn.add(done, scores, self.shard.at(done).divisors)
        self._sample = sample if len(done) == len(rows) else self._sample
        self._reveal_if_whole()

    def _rescore(self, rows: Int[np.ndarray, "row"]) -> Steps[int]:
        """Have rows scored that are not yet; how many were."""
        if self.ended:
            return 0
        fresh = rows[~self.scored[rows]]
        drawn = np.isin(fresh, self._drawn.rows)
        self._reveal(fresh[drawn])
        if drawn.all():
            return len(fresh)
        scores = yield fresh[~drawn]
        done = fresh[~drawn][: len(scores)]
        self._found.add(done, scores, self.shard.at(done).divisors)
        self.scored[done] = True
        return int(drawn.sum()) + len(done)

    def _reveal(self, rows: Int[np.ndarray, "drawn"]) -> None:
        """Let the search see scores of random rows."""
        fresh = rows[~self.scored[rows]]
        self._found.add(fresh, self._drawn.scores_of(fresh), self.shard.at(fresh).divisors)
        self.scored[fresh] = True

    def _reveal_if_whole(self) -> None:
        """Where every row was scored for some reason, none is left to be estimated or audited."""
        seen = self.scored | self.shard.failed
        seen[self._drawn.rows] = True
        if seen.all():
            self._reveal(self._drawn.rows)

    def _adapt(self) -> Steps[None]:
        """Rescore the best proxies, then deeper and deeper until certified or out of budget.

        Or until rows enough were scored in vain, where the budget cannot buy the certificate.
        """
        query = self.query
        rows = self._looks.first(max(32, 2 * query.k), self.scored)
        chunk, unchanged = len(rows), 0
        while len(rows) and self.rescored < query.budget and not self.ended:
            rows = rows[: query.budget - self.rescored]
            best = self.best(query.k)
            done = yield from self._rescore(rows)
            self.rescored += done
            same = np.array_equal(np.sort(best), np.sort(self.best(query.k)))
            unchanged = unchanged + done if same else 0
            if query.patience is not None and unchanged >= query.patience and self._hopeless():
                break
            chunk = min(2 * chunk, 256)
            rows = self._next_rows(chunk)

    def _hopeless(self) -> bool:
        """Whether the certificate takes more rows than are left of the budget, by what is known."""
        left = self.query.budget - self.rescored
        return not self._by_calibration() and self._open_rows(left + 1) > left

    def _next_rows(self, count: int) -> Int[np.ndarray, "next"]:
        """The shallowest unscored rows that the certificate asked for may need; none if it holds.

        The first of the fixed depths that is not reached is gone to before it is looked at whether
        its bound suffices, then the next.
        """
        threshold = self._threshold()
        if self._by_calibration():
            limit = self._calibrated_limit()
            if limit == math.inf:
                return np.empty(0, dtype=np.int64)
            return self.shard.contenders(threshold, limit, self.scored, count, slack=True).rows
        query, inflations = self.query, self._inflations()
        misses = allowed_misses(query.k, query.recall) - self._unscorable()
        top = self._found_top(inflations)
        for level in self._levels:
            goal = inflations[0] * level.z
            rows = self._looks.contenders(threshold, goal, inflations, self.scored, count)
            if len(rows) or self._looks.deepest(inflations) <= goal:
                return rows
            if fewest_misses(top, level.z, [level], query.k, query.tail) <= misses:
                break
        return np.empty(0, dtype=np.int64)

    def _by_calibration(self) -> bool:
        """Whether the search goes until the calibration is satisfied, not the sketch's law."""
        wanted = self.query.until == "calibration" or not self.shard.lawful
        known = self._calibration
        return wanted and known is not None and known.stale(self.query) is None

    def _calibrated_limit(self) -> float:
        """The depth that is enough for most queries; inf where calibration cannot tell."""
        query, calibration = self.query, self._calibration
        assert calibration is not None
        misses = allowed_misses(query.k, query.recall) - self._unscorable()
        needed = calibration.needed(query.k, query.ranking, misses)
        return tolerance_limit(needed, SHARE, query.confidence)

    def _found_top(self, inflations: Sequence[float]) -> FoundTop:
        rows, values = self._found.best(self.query.k)
        each = [
            (inflation * near.sigmas, inflation * near.relative)
            for inflation, near in zip(inflations, self._looks.each(rows), strict=True)
        ]
        return FoundTop(
            exact=values,
            sigmas=each[0][0],
            relative=each[0][1],
            later=tuple(Scales(sigmas=sigmas, relative=share) for sigmas, share in each[1:]),
        )

    def _inflations(self) -> list[float]:
        """How much larger errors are among the best rows found than their scales say, by look.

        Rows that are like the query err more than random ones (their gradients share factors with
        the query's, which the sketch's first stage mixes), by an amount that differs by query.
        Those found with the highest exact values are nearly free of selection: a row as good is
        left out only if its error is extreme.
        """
        return self._looks.inflations(*self._found.best(max(self.query.k, FEWEST_NEIGHBOURS)))

    def _unscorable(self, *, drawn: bool = False) -> int:
        """Rows that gave no finite score; with random ones that the search has not seen."""
        failed = self.shard.failed
        seen = (self._found, self._drawn) if drawn else (self._found,)
        lost = np.concatenate([found.rows[np.isnan(found.scores)] for found in seen])
        return int(failed.sum()) + len(np.unique(lost[~failed[lost]]))

    def sketch_certificate(self) -> Certificate:
        """What the sketch's law says of the rows that are unscored at this moment."""
        query, shard = self.query, self.shard
        sampled = self._drawn.rows
        check = self._looks.check(sampled, self._drawn.values_of(sampled))
        inflations = self._inflations()
        reached = self._reached(self.scored) / inflations[0]
        tail = query.tail
        if tail == "gaussian" and check is None:  # unchecked noise supports no bound
            tail = "hoeffding"
            reached = reached if reached == math.inf else -math.inf
        evidence = SketchEvidence(
            reached=reached,
            top=self._found_top(inflations),
            inflation=inflations[0],
            rows=len(shard),
            rescored=int(self.scored.sum()),
            unscorable=self._unscorable(drawn=True),
            check=check,
            lawful=shard.lawful,
        )
        found = certify_sketch(evidence, query.k, query.recall, query.confidence, tail)
        count = self._open_rows(COUNTED) if found.status == "not certified" else 0
        return with_open_rows(found, count, COUNTED) if count else found

    def _open_rows(self, most: int) -> int:
        """Unscored rows within the least depth that suffices by now, counted up to ``most``.

        0 also where no depth is known to suffice.
        """
        query, inflations = self.query, self._inflations()
        top, threshold = self._found_top(inflations), self._threshold()
        misses = allowed_misses(query.k, query.recall) - self._unscorable()
        goals = (
            inflations[0] * level.z
            for level in self._levels
            if fewest_misses(top, level.z, [level], query.k, query.tail) <= misses
        )
        goal = next(goals, math.inf)
        if threshold == -math.inf or goal >= self._looks.deepest(inflations):
            return 0
        return len(self._looks.contenders(threshold, goal, inflations, self.scored, most))

    def _reached(self, scored: Bool[np.ndarray, "row"], *, slack: bool = False) -> float:
        """The depth above which no row lies that was not ``scored``; inf if there is none."""
        shard, threshold = self.shard, self._threshold()
        if (scored | shard.failed).all():
            return math.inf
        if slack:
            least = shard.contenders(threshold, -math.inf, scored, 0, slack=True).beyond
            return min(least, shard.deepest(slack=True))
        inflations = self._inflations()
        goal = inflations[0] * self._levels[-1].z
        return self._looks.reached(threshold, goal, inflations, scored)

    def _calibration_certificate(self) -> Certificate:
        query, calibration = self.query, self._calibration
        assert calibration is not None
        misses = allowed_misses(query.k, query.recall) - self._unscorable(drawn=True)
        stale = calibration.stale(query)
        needed = [] if stale else calibration.needed(query.k, query.ranking, misses)
        evidence = CalibrationEvidence(
            needed=needed,
            reached=self._reached(self.scored, slack=True),
            unit=self.shard.unit,
            unscorable=self._unscorable(drawn=True),
            stale=stale,
        )
        return certify_calibration(evidence, query.k, query.recall, query.confidence)

    def _audit_certificate(self) -> Steps[Certificate]:
        query = self.query
        threshold = self._threshold()
        population = np.flatnonzero(~self.scored)
        unscorable = int(np.isnan(self._found.scores).sum())
        self._before_audit = self.scored.copy()
        left = self._sample[~self.scored[self._sample]]
        others = np.setdiff1d(population, left, assume_unique=True)
        sample = draw_sample(others, max(0, query.audit_rows - len(left)), self._seed + 1)
        self.stage = "audit"
        scorable = sample[~self.shard.failed[sample]]
        done = yield from self._rescore(scorable)
        if done < len(scorable):  # ended on the way: what was drawn and not looked at is left out
            sample = sample[:0]
        self._reveal(self._drawn.rows)
        sample = np.concatenate([left, sample])
        self._audited = sample
        above, merged = count_above(self._found.values_of(sample), threshold)
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
        query, shard = self.query, self.shard
        live = int((~self._before_audit & ~shard.failed).sum())
        if self.ended and live:
            return no_share("the deadline ended the search")
        sample = self._audited[~shard.failed[self._audited]]
        guesses = np.maximum(shard.at(sample).scores(), 0)
        drawn, positive = _positive(self._found.scores_of(sample)), _positive(self._found.scores)
        evidence = ShareEvidence(
            shown=_positive(self._found.scores_of(self.best(query.k))),
            known=float(positive.sum() - drawn.sum()),
            others=live,
            guessed=shard.guessed(self._before_audit),
            sample=drawn,
            guesses=guesses,
            influence=f"{'negative' if query.direction == 'opponents' else 'positive'} influence",
        )
        return estimate_share(evidence, query.confidence)


def _positive(scores: Float[np.ndarray, "row"]) -> Float[np.ndarray, "row"]:
    positive: np.ndarray = np.maximum(np.nan_to_num(scores), 0)
    return positive
