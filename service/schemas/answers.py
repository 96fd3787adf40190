"""What is answered over HTTP: answers, events on the way to them, problems."""

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field

from estimators.names import RUN_DIRECTION
from index.certificates.statement import Certificate, Share
from service.schemas.queries import QueryRequest, Schema
from service.search.answer import Answer, Effect, JointRemoval, MeasuredTerm, Result
from service.search.query import Side

SIGN_AND_UNIT = (
    "score: an estimate of influence that ranks examples within one question, in units of the "
    "damped quadratic model of the training loss; positive = training on the example raised the "
    "measured value, negative = lowered it. Its size is no change of log p. normalised_score: the "
    "score divided by the whitened norm of the example's gradient."
)

RUN_UNIT = (
    "score: influence through the training run itself, in nats of the measured value to first "
    "order; positive = the example raised it. Leaving the example out of the run changes the "
    "measured value by about minus the score; leaving out many at once can do more or less than "
    "their sum. 0 for examples that the run never read."
)

DIRECTION_UNIT = (
    "score: what reading the example once an epoch in the training run would do to the measured "
    "value, in nats to first order, by the run's own direction; positive = it would raise it. The "
    "example need not have been in the run. Many together can do more or less than their sum. "
    "normalised_score: the score divided by the whitened norm of the example's gradient."
)

NO_UNIT = "score: of an estimator without gradients; no influence, and without unit."


class TokenSchema(Schema):
    """One token of an example, and its share of the example's score."""

    text: str
    score: float = Field(
        description="The part of the score that passes through the position that reads this token; "
        "they sum to the example's score."
    )


class RemovalSchema(Schema):
    """What leaving one result out of the training would do, to first order."""

    nats: float = Field(
        description="Change of the measured value, by the measured scale; negative for a proponent."
    )
    low: float = Field(description="Of its interval.")
    high: float
    confidence: float = Field(
        description="How often the interval holds the effect of one of the strongest rows of "
        "another question, as the run's own trace has it."
    )


class JointRemovalSchema(Schema):
    """What leaving all results of a direction out of the training together would do."""

    direction: Literal["proponents", "opponents"]
    rows: int
    nats: float | None = Field(
        description="Change of the measured value, by retrainings without so many rows; null if "
        "sets of this size were not measured."
    )
    low: float | None = Field(description="Of its interval.")
    high: float | None
    confidence: float = Field(description="Of the interval; 0 if nothing can be said.")
    sentence: str

    @classmethod
    def from_removal(cls, removal: JointRemoval, direction: Side) -> "JointRemovalSchema":
        """The engine's as it is sent."""
        return cls(**vars(removal), direction=direction)


class ResultSchema(Schema):
    """One training example."""

    rank: int = Field(description="1 is best, in its direction.")
    direction: Literal["proponents", "opponents"]
    row: int
    id: str
    document: str
    text: str
    metadata: dict[str, Any]
    score: float
    normalised_score: float | None = Field(
        description="null for estimators without gradients, whose scores have no such norm."
    )
    proxy: float
    gradient_norm: float
    tokens: list[TokenSchema] | None = Field(default=None, description="null unless asked for.")
    layers: dict[str, float] | None = Field(
        default=None,
        description="Parts of the score by layer, which sum to it; null unless asked for.",
    )
    cluster: int | None = Field(
        default=None,
        description="Results of the same number are near-duplicates; null unless asked for.",
    )
    effect_of_removal: RemovalSchema | None = Field(
        default=None, description="null without a measured scale, see effect_reason."
    )

    @classmethod
    def from_result(cls, result: Result) -> "ResultSchema":
        """The engine's result as it is sent."""
        tokens = result.tokens and [TokenSchema(text=t, score=s) for t, s in result.tokens]
        removal = result.effect_of_removal
        effect = removal and RemovalSchema(**vars(removal))
        return cls(**{**vars(result), "tokens": tokens, "effect_of_removal": effect})


class TermSchema(Schema):
    """One weighted part of the measured value."""

    prompt: str = Field(
        description="As asked; of a conversation, as the model's chat template writes it."
    )
    completion: str
    against: str | None
    weight: float
    completed_by_model: bool
    log_probability: float = Field(description="log p(completion | prompt), nats.")
    against_log_probability: float | None = Field(description="log p(against | prompt), nats.")
    completion_tokens: int
    caution: str | None = Field(
        default=None,
        description="Why the scores of such a question mean little, or are about other tokens than "
        "the model would have read; null if nothing speaks against them.",
    )

    @classmethod
    def from_term(cls, term: MeasuredTerm) -> "TermSchema":
        """The engine's term as it is sent."""
        return cls(**{name: getattr(term, name) for name in cls.model_fields})


class MeasurementSchema(Schema):
    """What was explained."""

    value: float = Field(
        description="nats; the sum over terms of weight times log p(completion | prompt), less "
        "log p(against | prompt) in a contrast."
    )
    terms: list[TermSchema]

    @classmethod
    def from_terms(cls, terms: Sequence[MeasuredTerm]) -> "MeasurementSchema":
        """The engine's terms as they are sent."""
        value = sum(term.value for term in terms)
        return cls(value=value, terms=[TermSchema.from_term(term) for term in terms])


class DocumentSchema(Schema):
    """The influence of a whole document: the sum over all its rows."""

    document: str
    rows: int
    found: int = Field(description="How many of its rows are among the results.")
    score: float | None = Field(
        description="The sum of their scores; null if it has more rows than the budget, or one "
        "that cannot be scored."
    )


class EffectSchema(Schema):
    """What one unit of score is worth, measured for the run, the estimator and its parameters."""

    nats_per_unit: float = Field(description="Change of the measured value for one unit of score.")
    low: float = Field(
        description="Of its confidence interval, for another question of the same kind."
    )
    high: float
    confidence: float
    measured_by: str = Field(description="How it was measured.")

    @classmethod
    def from_effect(cls, effect: Effect) -> "EffectSchema":
        """The engine's effect as it is sent."""
        return cls(**{name: getattr(effect, name) for name in cls.model_fields})


class CertificateSchema(Schema):
    """One statement about the recall of this answer, valid by itself at its own confidence."""

    type: Literal["sketch", "audit", "calibration"]
    direction: Literal["proponents", "opponents"]
    status: Literal["certified", "not certified", "refused", "exhaustive"]
    recall_lower_bound: float | None
    recall_target: float
    confidence: float
    scope: str
    probability_over: str
    assumptions: list[str]
    observed: dict[str, float | int | str]
    sentence: str

    @classmethod
    def from_certificate(cls, certificate: Certificate, direction: Side) -> "CertificateSchema":
        """The engine's certificate as it is sent."""
        fields = {**vars(certificate), "assumptions": list(certificate.assumptions)}
        return cls(**fields, direction=direction)


class ShareSchema(Schema):
    """What part of all influence in a direction, over all rows, the results carry together."""

    direction: Literal["proponents", "opponents"]
    estimate: float | None = Field(
        description="The sum of the results' positive scores (opponents: negative ones) over that "
        "of all rows that the filters leave; null if nothing can be said, see sentence."
    )
    low: float | None = Field(description="Of the confidence interval.")
    high: float | None
    confidence: float = Field(description="Of the interval; 1 if every row was scored.")
    sampled: int = Field(
        description="Random rows that the interval stands on; 0 if every row was scored."
    )
    sentence: str

    @classmethod
    def from_share(cls, share: Share, direction: Side) -> "ShareSchema":
        """The engine's share as it is sent."""
        return cls(**vars(share), direction=direction)


class QueryResponse(Schema):
    """Ranked training examples, and what is known about those that were not looked at."""

    measurement: MeasurementSchema
    index: str
    estimator: str
    parameters: dict[str, float] = Field(description="Of the estimator, all of them.")
    estimator_sha256: str = Field(
        description="Of all that its scores depend on besides the question."
    )
    ranking: str
    by_gradients: bool = Field(
        description="Scores are inner products with gradients, and can be split by token and layer."
    )
    influences: bool = Field(
        description="Scores are influences: by gradients, or through the training run itself. "
        "Otherwise they only order examples."
    )
    sign_and_unit: str
    effect: EffectSchema | None = Field(
        description="The measured scale of the scores; null if none was measured."
    )
    effect_reason: str | None = Field(description="Why effect is null.")
    removals: list[JointRemovalSchema] = Field(
        default=[], description="One a direction; empty without a measured scale."
    )
    notes: list[str] = Field(description="What else to know of the scores, a sentence each.")
    results: list[ResultSchema] = Field(description="Proponents first, each direction best first.")
    documents: list[DocumentSchema] = Field(description="Empty unless asked for.")
    certificates: list[CertificateSchema] = Field(
        description="Each holds at its own confidence; they do not share an error probability."
    )
    shares: list[ShareSchema] = Field(description="One a direction.")
    partial: bool = Field(description="The deadline passed before the search had ended.")
    rows_to_certify: int | None = Field(
        default=None,
        description="Further rows whose exact scores would certify what was asked for, about; null "
        "where it was certified, or no number of rows is known to.",
    )
    seconds_to_certify: float | None = Field(
        default=None, description="What these would take at the speed of this answer."
    )
    rescored_rows: int
    sampled_rows: int
    rows: int = Field(description="That the filters leave of the index; all of it without them.")
    seed: int
    seconds: dict[str, float]

    @classmethod
    def from_answer(cls, answer: Answer, request: QueryRequest) -> "QueryResponse":
        """The response to ``request``."""
        fields = {name: getattr(answer, name) for name in cls.model_fields if hasattr(answer, name)}
        fields["measurement"] = MeasurementSchema.from_terms(answer.terms)
        fields["results"] = [ResultSchema.from_result(result) for result in answer.results]
        fields["documents"] = [DocumentSchema(**vars(document)) for document in answer.documents]
        fields["certificates"] = [
            CertificateSchema.from_certificate(c, side) for side, c in answer.sided_certificates
        ]
        fields["shares"] = [ShareSchema.from_share(s, side) for side, s in answer.sided_shares]
        fields["effect"] = answer.effect and EffectSchema.from_effect(answer.effect)
        fields["removals"] = [
            JointRemovalSchema.from_removal(r, side) for side, r in answer.sided_removals
        ]
        fields["sign_and_unit"] = _sign_and_unit(answer)
        fields["notes"] = list(answer.notes)
        return cls(**fields, index=request.index)


def _sign_and_unit(answer: Answer) -> str:
    if answer.estimator == RUN_DIRECTION:
        return DIRECTION_UNIT
    if answer.by_gradients:
        return SIGN_AND_UNIT
    return RUN_UNIT if answer.influences else NO_UNIT


class GradientEvent(Schema):
    """Event ``gradient``: the measured value is known and differentiated."""

    measurement: MeasurementSchema


class CandidatesEvent(Schema):
    """Event ``candidates``: every row has its estimate."""

    rows: int
    seconds: float = Field(description="Since the query arrived.")


class ProgressEvent(Schema):
    """Event ``progress``: rows were rescored. ``results`` are the best so far."""

    direction: Literal["proponents", "opponents"]
    rescored_rows: int
    sampled_rows: int
    recall_lower_bound: float | None = Field(
        description="Of the sketch certificate, were the search to end here; null if it has none."
    )
    rows_to_certify: int | None = Field(
        default=None, description="Further rows that it takes, about; null if that is not known."
    )
    results: list[ResultSchema]
    seconds: float


class ProblemResponse(Schema):
    """A problem document (RFC 9457)."""

    type: str
    title: str
    status: int
    detail: str
    instance: str
