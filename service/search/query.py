"""What is asked of an index: one query and how sure its answer should be."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from service.conversation import Message as Message
from service.conversation import Messages as Messages
from service.conversation import check_question as check_question

if TYPE_CHECKING:  # it imports scipy, which clients need not have
    from index.certificates.sketch import Tail

Ranking = Literal["score", "normalised"]
"""By influence, or by influence over the whitened norm of the training gradient."""

Until = Literal["sketch", "calibration"]
"""The certificate at which a search stops."""

Direction = Literal["proponents", "opponents", "both"]
"""Examples that raised the measured value, those that lowered it, or the top k of each."""

Side = Literal["proponents", "opponents"]

PATIENCE = 128
"""Rows that are rescored in vain before a search that cannot be certified ends, if left out."""

Value = str | int | float | bool


@dataclass(frozen=True, kw_only=True)
class Condition:
    """What a metadata column must hold; all that is given must be true. None: not asked.

    Attributes:
        any_of: the value is one of these.
        at_least: it is no less than this (numbers, or texts by code point, as ISO dates).
        at_most: it is no more than this.
    """

    any_of: tuple[Value, ...] | None = None
    at_least: float | str | None = None
    at_most: float | str | None = None

    def holds(self, value: Any) -> bool:
        """Whether ``value`` meets it; a value of another type does not."""
        if self.any_of is not None and not any(_same(value, v) for v in self.any_of):
            return False
        if self.at_least is not None and not (
            _ordered(value, self.at_least) and value >= self.at_least
        ):
            return False
        return self.at_most is None or (_ordered(value, self.at_most) and value <= self.at_most)


def _same(value: Any, wanted: Value) -> bool:
    return isinstance(value, bool) == isinstance(wanted, bool) and value == wanted


def _ordered(value: Any, bound: float | str) -> bool:
    if isinstance(bound, str):
        return isinstance(value, str)
    return isinstance(value, (int, float)) and not isinstance(value, bool)


@dataclass(frozen=True, kw_only=True)
class Term:
    """One weighted part of a measurement, in nats.

    ``weight * log p(completion | prompt)``, or with ``against`` the contrast
    ``weight * (log p(completion | prompt) - log p(against | prompt))``.

    Attributes:
        prompt: what the model was asked.
        messages: a conversation in its place; if the last turn is the assistant's, that is the
            completion.
        completion: what it said (begin it with its space); None lets the model complete the prompt.
        against: what it did not say.
        weight: of this term in the sum; may be negative.
    """

    prompt: str = ""
    messages: Messages = ()
    completion: str | None = None
    against: str | None = None
    weight: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Query:
    """What to find, and how sure to be.

    Attributes:
        prompt: what the model was asked.
        messages: a conversation in its place; if the last turn is the assistant's, that is the
            completion.
        completion: what it said (begin it with its space); None lets the model complete the prompt.
        against: what it did not say: asks what made ``completion`` likelier than this.
        batch: several weighted queries as one measurement, their sum, in place of the four above.
        max_new_tokens: most tokens of the model's own completion; None takes what is usual.
        samples: the model's own completions are this many, drawn at temperature 1, and the mean of
            their log p is measured; None takes the greedy one.
        sample_seed: of the samples.
        direction: which examples: proponents of the measured value, opponents, or both.
        filters: conditions on metadata columns; rows that do not meet all of them are no part of
            the question. "id" and "document" are columns too.
        estimator: that scores; None takes the one that the index was built for.
        parameters: of the estimator that are not to be its defaults.
        proposer: whose order of the rows is followed; None takes the index' codes, or for an
            estimator without gradients its own if it has one.
        deadline: seconds after which what is certified so far is returned; None waits.
        tokens: also split each result's score over its tokens.
        layers: also split each result's score over the model's layers.
        clusters: also tell which results are near-duplicates of each other.
        k: how many training examples to return.
        ranking: by "score" or "normalised".
        recall: recall of the exact top k to certify.
        confidence: of each certificate.
        until: the certificate that the search is to satisfy: "sketch", about this answer; or
            "calibration", about queries of the kind that the index was calibrated with, which asks
            for fewer rows. Without a calibration, or with codes that have no law, the other one.
        budget: most rows to rescore exactly because of their proxies; the sampled rows of the two
            checks below come on top.
        patience: where the budget cannot buy the certificate, the search ends as soon as so many
            rows were rescored in vain, i.e. without a change of the top k; None spends the budget.
        calibration_rows: rows drawn uniformly to check the sketch's noise for this query; without
            them a "gaussian" sketch certificate states no bound.
        audit_rows: rows for the audit certificate, drawn uniformly among those not rescored: first
            what is left of the rows above, then as many more as are wanting.
        documents: also score the whole documents that the answer's examples are parts of; needs the
            exact score of all their rows.
        tail: assumed law of the sketch's noise.
        seed: of the two samples; None draws one, which the answer reports.
    """

    prompt: str = ""
    messages: Messages = ()
    completion: str | None = None
    against: str | None = None
    batch: tuple[Term, ...] = ()
    max_new_tokens: int | None = None
    samples: int | None = None
    sample_seed: int = 0
    k: int = 10
    direction: Direction = "proponents"
    filters: Mapping[str, Condition] = field(default_factory=dict)
    estimator: str | None = None
    parameters: Mapping[str, float] = field(default_factory=dict)
    proposer: str | None = None
    deadline: float | None = None
    tokens: bool = False
    layers: bool = False
    clusters: bool = False
    ranking: Ranking = "normalised"
    recall: float = 0.9
    confidence: float = 0.95
    until: Until = "sketch"
    budget: int = 1000
    patience: int | None = PATIENCE
    calibration_rows: int = 64
    audit_rows: int = 64
    documents: bool = False
    tail: "Tail" = "gaussian"
    seed: int | None = None

    @property
    def terms(self) -> tuple[Term, ...]:
        """The measurement's parts."""
        alone = Term(
            prompt=self.prompt,
            messages=self.messages,
            completion=self.completion,
            against=self.against,
        )
        return self.batch or (alone,)
