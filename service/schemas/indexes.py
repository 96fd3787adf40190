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
from service.schemas.queries import SIGN_AND_UNIT, Schema


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


class EstimatorSchema(Schema):
    """One way of estimating influence."""

    name: str
    summary: str
    indexes: list[str] = Field(description="Served indexes that were built for it.")


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


class HealthResponse(Schema):
    """Alive, or ready."""

    status: Literal["ok"]
