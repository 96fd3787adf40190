"""Responses about indexes, estimators and examples."""

from typing import Any, Literal

from pydantic import Field

from index.manifest import (
    DataRecord,
    EstimatorRecord,
    FailedRow,
    ModelRecord,
    NoiseRecord,
)
from service.schemas.answers import SIGN_AND_UNIT
from service.schemas.queries import Schema


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
    slices: int = Field(description="Independent codes of each row; the first is scanned.")


class TraceSchema(Schema):
    """The trace of the model's training run that an index is served with."""

    questions: int = Field(description="Traced so far; the estimator run answers them at once.")
    run_rows: int = Field(description="That the run read.")
    lacking_rows: int = Field(description="Of these, not in the index; they cannot be listed.")
    unread_rows: int = Field(description="Of the index, that the run never read: influence 0.")
    notes: list[str] = Field(description="The same in sentences.")


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
    trace: TraceSchema | None = Field(description="null if it is served without one.")
    chat_template: bool = Field(
        default=False, description="The model has one, so that it can be asked by messages."
    )


class IndexesResponse(Schema):
    """All indexes that are served."""

    indexes: list[IndexResponse]


class ParameterSchema(Schema):
    """A number that a query may set."""

    summary: str
    default: float
    least: float
    most: float


class OfferSchema(Schema):
    """Whether an index answers for an estimator."""

    index: str
    own: bool = Field(description="The index was built for it: the default of queries.")
    parameters: dict[str, ParameterSchema] = Field(description="With the index' own defaults.")
    unavailable: str | None = Field(description="Why it does not; null if it does.")


class EstimatorSchema(Schema):
    """One way of scoring training examples."""

    name: str
    summary: str
    by_gradients: bool = Field(
        description="Scores are influences by gradients: they split by token and layer, and the "
        "sketch certificate speaks of them."
    )
    influences: bool = Field(
        description="Scores are influences: by gradients, or through the training run itself."
    )
    indexes: list[OfferSchema] = Field(description="One for each index that is served.")


class EstimatorsResponse(Schema):
    """All estimators that this version has."""

    estimators: list[EstimatorSchema]


class ExampleResponse(Schema):
    """One training example."""

    id: str
    row: int
    document: str
    text: str
    tokens: int
    metadata: dict[str, Any]


class SuggestionSchema(Schema):
    """A question to begin with."""

    prompt: str = Field(description="The beginning of an example; let the model complete it.")
    id: str = Field(description="Of the example.")


class SuggestionsResponse(Schema):
    """Questions to begin with."""

    suggestions: list[SuggestionSchema] = Field(
        description="Three, or fewer if the index has no more examples that are long enough."
    )


class HealthResponse(Schema):
    """Alive, or ready."""

    status: Literal["ok"]
