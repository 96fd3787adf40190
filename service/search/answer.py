"""What is answered: training examples, certificates, and what it took."""

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from index.certificates.statement import Certificate, Share
from service.scoring.effect import Effect as Effect
from service.scoring.effect import JointRemoval as JointRemoval
from service.scoring.effect import Removal
from service.scoring.scale import NO_SCALE as NO_SCALE
from service.search.query import Ranking, Side

if TYPE_CHECKING:  # it imports torch, which clients need not have
    from estimators.model.tokens import Sequence1D


@dataclass(frozen=True, kw_only=True)
class Result:
    """One training example of an answer.

    Attributes:
        rank: 1 is best, in its direction.
        direction: "proponents" or "opponents".
        row: in the index.
        id: of the example.
        document: that it belongs to.
        text: of the example.
        metadata: further columns of the corpus.
        score: the estimator's exact score; positive = training on it raised the measured value. It
            ranks examples within one question and is no change of the measured value.
        normalised_score: score divided by ``gradient_norm`` (0 where that is 0); None for
            estimators without gradients.
        proxy: the sketch's estimate of the value that the answer is ranked by.
        gradient_norm: whitened norm of the example's gradient.
        tokens: its tokens as text, each with the part of the score that passes through the
            position that reads it; None unless asked for.
        layers: parts of the score by layer; None unless asked for.
        cluster: near-duplicates have the same number; None unless asked for.
        effect_of_removal: what leaving it out would do, where the scale was measured.
    """

    rank: int
    direction: Side
    row: int
    id: str
    document: str
    text: str
    metadata: dict[str, object]
    score: float
    normalised_score: float | None
    proxy: float
    gradient_norm: float
    tokens: tuple[tuple[str, float], ...] | None = None
    layers: dict[str, float] | None = None
    cluster: int | None = None
    effect_of_removal: Removal | None = None


@dataclass(frozen=True, kw_only=True)
class DocumentScore:
    """The influence of a whole document: the sum over all its rows.

    Attributes:
        document: that some of the answer's examples belong to.
        rows: that it has in the index, windows of long texts counted singly.
        found: how many of them are among the answer's examples.
        score: sum of their exact scores, positive = proponent; None if it has more rows than the
            query's budget, or a row that cannot be scored.
    """

    document: str
    rows: int
    found: int
    score: float | None


@dataclass(frozen=True, kw_only=True)
class MeasuredTerm:
    """One weighted part of a measurement, as it was measured.

    Attributes:
        prompt: as asked; of a conversation, as the model's chat template writes it.
        completion: as asked, or the model's own.
        against: as asked.
        weight: in the sum.
        completed_by_model: whether the completion is the model's own.
        log_probability: ``log p(completion | prompt)`` in nats.
        against_log_probability: ``log p(against | prompt)`` in nats, if asked.
        completion_tokens: how many tokens of the completion count.
        caution: why the scores of such a question mean little, or are about other tokens than the
            model reads; None if nothing speaks against them.
        sequence: the tokens of prompt and completion.
    """

    prompt: str
    completion: str
    against: str | None
    weight: float
    completed_by_model: bool
    log_probability: float
    against_log_probability: float | None
    completion_tokens: int
    caution: str | None = None
    sequence: "Sequence1D | None" = field(default=None, repr=False)

    @property
    def value(self) -> float:
        """Its part of the measured value, in nats."""
        return self.weight * (self.log_probability - (self.against_log_probability or 0.0))


@dataclass(frozen=True, kw_only=True)
class Answer:
    """Ranked training examples and what is known about those that were not looked at.

    Attributes:
        terms: what was measured.
        estimator: that scored.
        parameters: of the estimator, all of them.
        estimator_sha256: of all that its scores depend on besides the question.
        by_gradients: whether its scores are influences by gradients.
        ranking: by which results are ordered.
        results: proponents before opponents, each best first.
        documents: those of the results in order of their best one; empty unless asked for.
        sided_certificates: of each direction "sketch", "audit" and, if the index is calibrated,
            "calibration"; each a statement by itself at its own confidence.
        sided_shares: of each direction, what part of all its influence the results carry.
        partial: whether the deadline ended the search.
        rescored_rows: rows rescored because of their proxies.
        sampled_rows: further rows scored exactly for the checks.
        rows: rows that the filters leave of the index.
        seed: of the samples.
        seconds: by stage; queries that are answered together wait for each other.
        effect: the measured scale of its scores; None if none was measured.
        effect_reason: why there is none; None if there is one.
        sided_removals: of each direction, all its results together; empty without a scale.
        traced: whether its scores are influences through the run itself.
        notes: what else to know of the scores, a sentence each.
    """

    terms: tuple[MeasuredTerm, ...]
    estimator: str
    parameters: dict[str, float]
    estimator_sha256: str
    by_gradients: bool
    ranking: Ranking
    results: list[Result]
    documents: list[DocumentScore]
    sided_certificates: list[tuple[Side, Certificate]]
    sided_shares: list[tuple[Side, Share]]
    partial: bool
    rescored_rows: int
    sampled_rows: int
    rows: int
    seed: int
    seconds: dict[str, float] = field(default_factory=dict)
    effect: Effect | None = None
    effect_reason: str | None = NO_SCALE
    sided_removals: list[tuple[Side, JointRemoval]] = field(default_factory=list)
    traced: bool = False
    notes: tuple[str, ...] = ()

    @property
    def influences(self) -> bool:
        """Whether its scores are influences: by gradients, or through the run itself."""
        return self.by_gradients or self.traced

    @property
    def value(self) -> float:
        """The measured value, in nats."""
        return sum(term.value for term in self.terms)

    @property
    def certificates(self) -> list[Certificate]:
        """All certificates, without their directions."""
        return [certificate for _, certificate in self.sided_certificates]

    @property
    def rows_to_certify(self) -> int | None:
        """Further rows whose exact scores would certify what was asked for; None if not known."""
        found = [c.open_rows for c in self.certificates if c.open_rows is not None]
        return sum(found) if found else None

    @property
    def seconds_to_certify(self) -> float | None:
        """What these would take at the speed of this answer; None if not known."""
        rows, spent = self.rows_to_certify, self.seconds.get("rescore", 0.0)
        return None if rows is None or not self.rescored_rows else rows * spent / self.rescored_rows

    @property
    def prompt(self) -> str:
        """Of the first term."""
        return self.terms[0].prompt

    @property
    def completion(self) -> str:
        """Of the first term."""
        return self.terms[0].completion

    @property
    def completed_by_model(self) -> bool:
        """Of the first term."""
        return self.terms[0].completed_by_model

    @property
    def log_probability(self) -> float:
        """Of the first term, in nats."""
        return self.terms[0].log_probability

    @property
    def completion_tokens(self) -> int:
        """Of the first term."""
        return self.terms[0].completion_tokens


class Clock:
    """Wall-clock seconds of the stages of an answer."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def stop(self, stage: str) -> None:
        """Add the time since the last stop to ``stage``."""
        now = time.perf_counter()
        self.seconds[stage] = self.seconds.get(stage, 0.0) + now - self._last
        self._last = now
