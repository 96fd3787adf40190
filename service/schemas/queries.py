"""Requests and responses of the HTTP API."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from index.certificates.statement import Certificate, Share
from service.search.answer import Answer, MeasuredTerm, Result
from service.search.query import Condition, Query, Side, Term

SIGN_AND_UNIT = (
    "score: an estimate of influence that ranks examples within one question, in units of the "
    "damped quadratic model of the training loss; positive = training on the example raised the "
    "measured value, negative = lowered it. Its size is no change of log p. normalised_score: the "
    "score divided by the whitened norm of the example's gradient."
)

NO_UNIT = "score: of an estimator without gradients; no influence, and without unit."


class Schema(BaseModel):
    """A schema that refuses unknown fields."""

    model_config = ConfigDict(extra="forbid")


class ConditionSchema(Schema):
    """What a metadata column must hold; all that is given must be true."""

    any_of: list[str | int | float | bool] | None = Field(
        default=None, min_length=1, max_length=1000, description="The value is one of these."
    )
    at_least: float | str | None = Field(
        default=None, description="Numbers, or texts by code point."
    )
    at_most: float | str | None = Field(
        default=None, description="Numbers, or texts by code point."
    )

    @model_validator(mode="after")
    def _asks_something(self) -> Self:
        if self.any_of is None and self.at_least is None and self.at_most is None:
            raise ValueError("give any_of, at_least or at_most")
        return self


PROMPT = (
    "What the model was asked; empty for what it says at the beginning of a text, if it has a "
    "token for that."
)
COMPLETION = (
    "What it said; tokenised by itself, so begin it with its space. "
    "Left out: the model completes the prompt greedily, up to the first full stop."
)
AGAINST = (
    "What it did not say: asks what made the completion likelier than this, "
    "log p(completion | prompt) - log p(against | prompt)."
)


def _encodable(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"character {error.start + 1} is half of a pair (a lone surrogate), which is no text"
        ) from error
    return text


Text = Annotated[str, AfterValidator(_encodable)]


class TermRequest(Schema):
    """One weighted part of a measurement."""

    prompt: Text = Field(description=PROMPT)
    completion: Text | None = Field(default=None, description=COMPLETION)
    against: Text | None = Field(default=None, description=AGAINST)
    weight: float = Field(
        default=1.0, ge=-1e6, le=1e6, description="Of this term in the sum; may be negative."
    )


class QueryRequest(Schema):
    """Which training examples made the model say this?"""

    model_config = ConfigDict(extra="forbid", strict=True)

    prompt: Text | None = Field(default=None, description=PROMPT)
    completion: Text | None = Field(default=None, description=COMPLETION)
    against: Text | None = Field(default=None, description=AGAINST)
    batch: list[TermRequest] | None = Field(
        default=None,
        min_length=1,
        max_length=64,
        description="Weighted queries as one measurement, their sum; in place of prompt, "
        "completion and against.",
    )
    index: str = Field(default="default", description="Name of the index.")
    estimator: str | None = Field(
        default=None,
        description="Name of the estimator that scores, see GET /v1/estimators. Left out: the one "
        "that the index was built for.",
    )
    parameters: dict[str, float] = Field(
        default_factory=dict,
        max_length=16,
        description="Of the estimator, e.g. damping; see GET /v1/estimators. Those that are left "
        "out have the index's defaults.",
    )
    proposer: str | None = Field(
        default=None,
        description="Whose order of the rows is followed: codes (the index's own) or bm25. Left "
        "out: codes; for an estimator without gradients its own order, if it has one.",
    )
    k: int = Field(default=10, ge=1, description="Training examples to return, of each direction.")
    direction: Literal["proponents", "opponents", "both"] = Field(
        default="proponents",
        description="proponents raised the measured value, opponents lowered it.",
    )
    filters: dict[str, ConditionSchema] = Field(
        default_factory=dict,
        max_length=16,
        description="Conditions on metadata columns (and id, document); rows that do not meet all "
        "of them are no part of the question, nor of the certificates.",
    )
    ranking: Literal["normalised", "score"] = Field(
        default="normalised",
        description="score: by influence; normalised: by influence over the whitened norm of the "
        "training gradient, which keeps long or odd examples from crowding the top.",
    )
    recall: float = Field(default=0.9, gt=0, le=1, description="Recall of the top k to certify.")
    confidence: float = Field(default=0.95, gt=0, lt=1, description="Of each certificate.")
    until: Literal["sketch", "calibration"] = Field(
        default="sketch",
        description="The certificate at which the search stops: sketch, about this answer; or "
        "calibration, about queries like those that the index was calibrated with (fewer rows).",
    )
    budget: int = Field(default=1000, ge=1, description="Most rows to rescore exactly.")
    deadline: float | None = Field(
        default=None,
        gt=0,
        le=86_400,
        description="Seconds after which the answer so far is returned, marked partial.",
    )
    calibration_rows: int = Field(
        default=64, ge=0, description="Random rows that check the sketch's noise."
    )
    audit_rows: int = Field(default=64, ge=0, description="Random unscored rows to audit.")
    documents: bool = Field(
        default=False,
        description="Also score the whole documents that the examples are parts of, which needs "
        "the exact scores of all their rows.",
    )
    tokens: bool = Field(
        default=False, description="Also split each result's score over its tokens (a heat map)."
    )
    layers: bool = Field(
        default=False, description="Also split each result's score over the model's layers."
    )
    clusters: bool = Field(
        default=False, description="Also tell which results are near-duplicates of each other."
    )
    seed: int | None = Field(
        default=None, ge=0, lt=2**62, description="Of the random rows; drawn if left out."
    )

    @model_validator(mode="after")
    def _asks_one_thing(self) -> Self:
        alone = [n for n in ("prompt", "completion", "against") if getattr(self, n) is not None]
        if self.batch is None and self.prompt is None:
            raise ValueError("give a prompt, or a batch of them")
        if self.batch is not None and alone:
            raise ValueError(f"give either a batch or {' and '.join(alone)}, not both")
        return self

    def to_query(self) -> Query:
        """The engine's form of the request."""
        fields = self.model_dump(exclude={"index", "batch", "filters"})
        fields["prompt"] = self.prompt or ""
        fields["batch"] = tuple(Term(**term.model_dump()) for term in self.batch or ())
        fields["filters"] = {
            column: Condition(
                any_of=None if asked.any_of is None else tuple(asked.any_of),
                at_least=asked.at_least,
                at_most=asked.at_most,
            )
            for column, asked in self.filters.items()
        }
        return Query(**fields)


class TokenSchema(Schema):
    """One token of an example, and its share of the example's score."""

    text: str
    score: float = Field(
        description="The part of the score that passes through the position that reads this token; "
        "they sum to the example's score."
    )


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

    @classmethod
    def from_result(cls, result: Result) -> "ResultSchema":
        """The engine's result as it is sent."""
        tokens = result.tokens and [TokenSchema(text=t, score=s) for t, s in result.tokens]
        return cls(**{**vars(result), "tokens": tokens})


class TermSchema(Schema):
    """One weighted part of the measured value."""

    prompt: str
    completion: str
    against: str | None
    weight: float
    completed_by_model: bool
    log_probability: float = Field(description="log p(completion | prompt), nats.")
    against_log_probability: float | None = Field(description="log p(against | prompt), nats.")
    completion_tokens: int
    caution: str | None = Field(
        default=None,
        description="Why the scores of such a question mean little, in a sentence; null if nothing "
        "speaks against them.",
    )


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
        return cls(value=value, terms=[TermSchema(**vars(term)) for term in terms])


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
    low: float = Field(description="Of its confidence interval.")
    high: float
    confidence: float
    measured_by: str = Field(description="How it was measured.")


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
        description="Scores are influences by gradients; otherwise they have no unit."
    )
    sign_and_unit: str
    effect: EffectSchema | None = Field(
        description="The measured scale of the scores; null if none was measured."
    )
    effect_reason: str | None = Field(description="Why effect is null.")
    results: list[ResultSchema] = Field(description="Proponents first, each direction best first.")
    documents: list[DocumentSchema] = Field(description="Empty unless asked for.")
    certificates: list[CertificateSchema] = Field(
        description="Each holds at its own confidence; they do not share an error probability."
    )
    shares: list[ShareSchema] = Field(description="One a direction.")
    partial: bool = Field(description="The deadline passed before the search had ended.")
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
        fields["effect"] = answer.effect and EffectSchema(**vars(answer.effect))
        fields["sign_and_unit"] = SIGN_AND_UNIT if answer.by_gradients else NO_UNIT
        return cls(**fields, index=request.index)


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
    results: list[ResultSchema]
    seconds: float


class ProblemResponse(Schema):
    """A problem document (RFC 9457)."""

    type: str
    title: str
    status: int
    detail: str
    instance: str
