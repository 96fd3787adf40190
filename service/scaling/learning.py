"""Learning the scales of an index' estimators from the trace of a run, and keeping them."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from torch import nn

from estimators.chosen import GradientEstimator
from estimators.model.progress import Progress, no_progress
from index.files import sha256_of, write_sealed
from service.run.errors import RunMismatch
from service.run.folder import FINISHED
from service.scaling.evidence import (
    Common,
    TracedRun,
    check_same_model,
    common_rows,
    scores_of_questions,
)
from service.scaling.fitting import CONFIDENCE, TOP, check_enough, fit_scale
from service.scaling.retraining import (
    check_count,
    measure_retrainings,
    plan_retrainings,
    seconds_of_a_retraining,
)
from service.scoring.exhaustive import queries_at_once
from service.scoring.scale import FILE_NAME, ScaleRecord
from service.search.opening import OpenIndex

TIMED_ROWS = 32
"""Random rows by which the time of exact scores is predicted."""


@dataclass(frozen=True, kw_only=True)
class ScalePrice:
    """What learning takes.

    Attributes:
        passes: over the rows, forward and backward.
        rows: that run and index share.
        retrainings: of the run, the one with all rows included.
        seconds: in all, without loading.
    """

    passes: int
    rows: int
    retrainings: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Learner:
    """An index with a traced run.

    Attributes:
        index: opened.
        traced: the run.
        estimators: to learn the scales of; the first one says which rows are left out together.
        model: the run's before its first step; None if the run is not repeated.
        retrainings: of the run, without some rows.
        token_budget: padded tokens in a batch.
        seed: of random sets of rows.
    """

    index: OpenIndex
    traced: TracedRun
    estimators: Sequence[GradientEstimator]
    model: nn.Module | None = None
    retrainings: int = 0
    token_budget: int = 1024
    seed: int = 0

    def learn(self, progress: Progress = no_progress) -> ScaleRecord:
        """Learn all scales and keep them beside the manifest, in place of what was kept.

        Raises:
            RunMismatch: run, trace and index do not belong together, or retrainings are too few.
            ValueError: questions are too few, or scores are all 0.
        """
        start = time.perf_counter()
        common = self._common()
        influences = common.of_run(self.traced.trace.totals)
        rows = common.index_rows.tolist()
        scores = [common.of_index(one) for one in self._scores(rows, progress)]
        measured = []
        if self.model is not None:
            plans = plan_retrainings(scores[0], self.retrainings, self.seed)
            measured = measure_retrainings(self.traced, common, self.model, plans, progress)
        pairs = zip(self.estimators, scores, strict=True)
        record = ScaleRecord(
            model_sha256=self.index.loaded.model_sha256,
            grounds_sha256=self.estimators[0].grounds_sha256,
            run_sha256=sha256_of(self.traced.run.folder / FINISHED),
            trace_sha256=self.traced.sha256,
            questions=len(influences),
            rows=common.count,
            run_rows=len(self.traced.run.rows),
            partly_counted=common.partly_counted,
            top=min(TOP, common.count),
            retrainings=len(measured),
            confidence=CONFIDENCE,
            scales=[fit_scale(one, s, influences, measured, self.seed) for one, s in pairs],
            seconds=time.perf_counter() - start,
        )
        write_sealed(self.index.folder / FILE_NAME, record.model_dump(mode="json"))
        return record

    def predict(self) -> ScalePrice:
        """Time some rows and some steps, and count them for all; nothing is written.

        Raises:
            RunMismatch: run, trace and index do not belong together.
            ValueError: questions are too few.
        """
        common = self._common()
        rows = len(common.index_rows)
        generator = np.random.default_rng(self.seed)
        tried = common.index_rows[generator.permutation(rows)[:TIMED_ROWS]].tolist()
        seconds = []
        for chosen in (tried[:1], tried):  # directions and the first pass are paid once
            start = time.perf_counter()
            self._scores(chosen, no_progress)
            seconds.append(time.perf_counter() - start)
        more = max(seconds[1] - seconds[0], 0.0) / max(len(tried) - 1, 1)
        parts = sum(len(question) for question in self.traced.questions)
        at_once = queries_at_once(self.index.loaded, estimators=len(self.estimators))
        times, training = 0, 0.0
        if self.model is not None:
            times = self.retrainings + 1
            training = seconds_of_a_retraining(self.traced, self.model)
        return ScalePrice(
            passes=-(-parts // at_once),
            rows=common.count,
            retrainings=times,
            seconds=seconds[0] + more * rows + times * training,
        )

    def _common(self) -> Common:
        """The rows that run and index share, after a check that all belong together."""
        check_enough(len(self.traced.questions))
        if not np.isfinite(self.traced.trace.influences).all():
            raise RunMismatch(
                "Some influences of the trace are not finite: the run is not smooth in its "
                "weights. Trace a run of a smaller rate or a larger epsilon of Adam."
            )
        common = common_rows(self.traced.run, self.index.examples)
        if self.model is not None:
            check_count(self.retrainings, common.count)
        check_same_model(self.traced, self.index.loaded, self.token_budget)
        return common

    def _scores(
        self, rows: Sequence[int], progress: Progress
    ) -> list[Float[np.ndarray, "question row"]]:
        named = {one.fingerprint: one for one in self.estimators}
        given = (self.index, named, self.traced.questions, rows, self.token_budget, progress)
        found = scores_of_questions(*given)
        return [found[one.fingerprint] for one in self.estimators]
