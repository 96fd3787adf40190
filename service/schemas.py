"""Requests and responses of the HTTP API."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from index.manifest import (
    DataRecord,
    EstimatorRecord,
    FailedRow,
    ModelRecord,
    NoiseRecord,
)
from service.query import Query
from service.retrieval import Answer

SIGN_AND_UNIT = (
    "score: exact influence in nats; positive = training on the example raised "
    "log p(completion | prompt), negative = lowered it; leaving the example out of N training "
    "examples changes it by about -score / N. normalised_score: score divided by the whitened norm "
    "of the example's gradient."
)


class Schema(BaseModel):
    """A schema that refuses unknown fields."""

    model_config = ConfigDict(extra="forbid")


class QueryRequest(Schema):
    """Which training examples made the model say this?"""

    model_config = ConfigDict(extra="forbid", strict=True)

    prompt: str = Field(min_length=1, description="What the model was asked.")
    completion: str | None = Field(
        default=None,
        description="What it said; tokenised by itself, so begin it with its space. "
        "Left out: the model completes the prompt greedily, up to the first full stop.",
    )
    index: str = Field(default="default", description="Name of the index.")
    k: int = Field(default=10, ge=1, description="Training examples to return.")
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
    calibration_rows: int = Field(
        default=64, ge=0, description="Random rows that check the sketch's noise."
    )
    audit_rows: int = Field(default=64, ge=0, description="Random unscored rows to audit.")
    documents: bool = Field(
        default=False,
        description="Also score the whole documents that the examples are parts of, which needs "
        "the exact scores of all their rows.",
    )
    damping: float | None = Field(
        default=None,
        ge=1e-6,
        le=1e6,
        description="Relative damping; the index's own if left out.",
    )
    seed: int | None = Field(
        default=None, ge=0, lt=2**62, description="Of the random rows; drawn if left out."
    )

    def to_query(self) -> Query:
        """The engine's form of the request."""
        return Query(**self.model_dump(exclude={"index"}))


class ResultSchema(Schema):
    """One training example."""

    rank: int
    row: int
    id: str
    document: str
    text: str
    metadata: dict[str, Any]
    score: float
    normalised_score: float
    proxy: float
    gradient_norm: float


class DocumentSchema(Schema):
    """The influence of a whole document: the sum over all its rows."""

    document: str
    rows: int
    found: int = Field(description="How many of its rows are among the results.")
    score: float | None = Field(
        description="nats, positive = proponent; null if it has more rows than the budget, or one "
        "that cannot be scored."
    )


class CertificateSchema(Schema):
    """One statement about the recall of this answer, valid by itself at its own confidence."""

    type: Literal["sketch", "audit", "calibration"]
    status: Literal["certified", "not certified", "refused", "exhaustive"]
    recall_lower_bound: float | None
    recall_target: float
    confidence: float
    scope: str
    probability_over: str
    assumptions: list[str]
    observed: dict[str, float | int | str]
    sentence: str


class QueryResponse(Schema):
    """Ranked training examples, and what is known about those that were not looked at."""

    prompt: str
    completion: str
    completed_by_model: bool
    log_probability: float = Field(description="log p(completion | prompt), nats.")
    completion_tokens: int
    index: str
    ranking: str
    sign_and_unit: str = SIGN_AND_UNIT
    results: list[ResultSchema]
    documents: list[DocumentSchema] = Field(description="Empty unless asked for.")
    certificates: list[CertificateSchema] = Field(
        description="Each holds at its own confidence; they do not share an error probability."
    )
    rescored_rows: int
    sampled_rows: int
    rows: int
    seed: int
    seconds: dict[str, float]

    @classmethod
    def from_answer(cls, answer: Answer, request: QueryRequest) -> "QueryResponse":
        """The response to ``request``."""
        fields = {name: getattr(answer, name) for name in cls.model_fields if hasattr(answer, name)}
        fields["results"] = [ResultSchema(**vars(result)) for result in answer.results]
        fields["documents"] = [DocumentSchema(**vars(document)) for document in answer.documents]
        fields["certificates"] = [
            CertificateSchema(**{**vars(c), "assumptions": list(c.assumptions)})
            for c in answer.certificates
        ]
        return cls(**fields, index=request.index, ranking=request.ranking)


class SketchSchema(Schema):
    """How training gradients were sketched.

    The seed is kept back: certificates hold for queries that do not depend on it. ``components``:
    of each layer, in low-rank codes; empty for other kinds.
    """

    dimensions: int
    rank: int
    entries: int
    components: list[int]
    noise: NoiseRecord


class IndexResponse(Schema):
    """What an index is made of."""

    name: str
    model: ModelRecord
    estimator: EstimatorRecord
    sketch: SketchSchema
    codes: str
    bytes_per_row: int
    corpora: list[DataRecord] = Field(description="In order of appending.")
    rows: int = Field(description="That count; deleted ones do not.")
    deleted_rows: int
    failed_rows: list[FailedRow]
    sign_and_unit: str = SIGN_AND_UNIT


class IndexesResponse(Schema):
    """All indexes that are served."""

    indexes: list[IndexResponse]


class ExampleResponse(Schema):
    """One training example."""

    id: str
    row: int
    document: str
    text: str
    tokens: int
    metadata: dict[str, Any]


class ProblemResponse(Schema):
    """A problem document (RFC 9457)."""

    type: str
    title: str
    status: int
    detail: str
    instance: str


class HealthResponse(Schema):
    """Alive, or ready."""

    status: Literal["ok"]
