"""Requests and responses of jobs."""

from typing import Literal

from pydantic import Field

from service.schemas.answers import ProblemResponse, QueryResponse
from service.schemas.queries import QueryRequest, Schema


class JobRequest(Schema):
    """Many queries, answered in the background."""

    queries: list[QueryRequest] = Field(min_length=1, max_length=10_000)


class JobResponse(Schema):
    """A job and how far it is."""

    id: str
    state: Literal["queued", "running", "finished"]
    queries: int
    answered: int = Field(description="Queries that have an answer.")
    failed: int = Field(description="Queries that were refused; their problem is their result.")
    created: str = Field(description="ISO 8601, UTC.")
    updated: str = Field(description="ISO 8601, UTC.")


class JobsResponse(Schema):
    """All jobs, newest first."""

    jobs: list[JobResponse]


class JobResultSchema(Schema):
    """The outcome of one query of a job: an answer or a problem."""

    number: int = Field(description="Of the query in the job, from 0.")
    answer: QueryResponse | None = None
    problem: ProblemResponse | None = None


class JobResultsResponse(Schema):
    """Outcomes in order of number; a query without one is still to be answered."""

    results: list[JobResultSchema]
    next: int | None = Field(description="The ``start`` of the next page; null at the end.")
