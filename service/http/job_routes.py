"""The routes of jobs."""

import json
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Header, Path, Query, Request, Response
from starlette.concurrency import run_in_threadpool

from service.errors import JobsOff, UnknownEstimator, UnknownIndex
from service.http import problems
from service.jobs.runner import JobRunner
from service.jobs.store import Job
from service.models import BadQuery
from service.schemas.answers import ProblemResponse, QueryResponse
from service.schemas.jobs import (
    JobRequest,
    JobResponse,
    JobResultSchema,
    JobResultsResponse,
    JobsResponse,
)


def describe(error: Exception) -> tuple[str, bool]:
    """What a job keeps of a query's error, see ``service.jobs.runner.Describe``."""
    document = json.dumps(problems.problem_document("/v1/query", error))
    return document, problems.problem_for(error) is not problems.UNEXPECTED


def _runner(request: Request) -> JobRunner:
    runner: JobRunner | None = request.app.state.jobs
    if runner is None:
        raise JobsOff(
            "This service keeps no jobs; start it with ETYMON_JOBS_PATH, a file for them."
        )
    return runner


Runner = Annotated[JobRunner, Depends(_runner)]
JobId = Annotated[str, Path(pattern=r"^[0-9a-f]{32}$", description="Of the job.")]
Key = Annotated[
    str | None,
    Header(
        pattern=r"^[A-Za-z0-9._-]{1,128}$",
        description="The same key with the same body gives the same job, however often it is sent.",
    ),
]
LOCATION = {"Location": {"description": "Of the job.", "schema": {"type": "string"}}}


def add_job_routes(app: FastAPI) -> None:
    """Add the routes; ``app.state.jobs`` is the runner, or None."""

    @app.post(
        "/v1/jobs",
        status_code=202,
        responses={202: {"headers": LOCATION}, **problems.described(404, 409, 422, 429, 503)},
    )
    async def submit(
        body: JobRequest,
        request: Request,
        response: Response,
        jobs: Runner,
        idempotency_key: Key = None,
    ) -> JobResponse:
        """Have many queries answered in the background."""
        for number, query in enumerate(body.queries):
            try:
                request.app.state.engine.check(query)
            except (BadQuery, UnknownEstimator, UnknownIndex) as error:
                raise type(error)(f"Query {number}: {error}") from error
        requests = [query.model_dump_json(exclude_unset=True) for query in body.queries]
        job = await run_in_threadpool(jobs.store.add, requests, idempotency_key)
        jobs.wake()
        response.headers["Location"] = f"/v1/jobs/{job.id}"
        return _told(job)

    @app.get("/v1/jobs", responses=problems.described(503))
    async def every(jobs: Runner) -> JobsResponse:
        """All jobs, newest first."""
        return JobsResponse(jobs=[_told(job) for job in await run_in_threadpool(jobs.store.all)])

    @app.get("/v1/jobs/{job_id}", responses=problems.described(404, 422, 503))
    async def one(job_id: JobId, jobs: Runner) -> JobResponse:
        """How far a job is."""
        return _told(await run_in_threadpool(jobs.store.get, job_id))

    @app.get("/v1/jobs/{job_id}/results", responses=problems.described(404, 422, 503))
    async def results(
        job_id: JobId,
        jobs: Runner,
        start: Annotated[int, Query(ge=0, le=2**31, description="First query.")] = 0,
        limit: Annotated[int, Query(ge=1, le=1000, description="Most outcomes.")] = 100,
    ) -> JobResultsResponse:
        """Outcomes that there are already, in order of their queries."""
        found, following = await run_in_threadpool(jobs.store.outcomes, job_id, start, limit)
        return JobResultsResponse(
            results=[
                JobResultSchema(
                    number=outcome.number,
                    answer=_parsed(QueryResponse, outcome.answer),
                    problem=_parsed(ProblemResponse, outcome.problem),
                )
                for outcome in found
            ],
            next=following,
        )

    @app.delete("/v1/jobs/{job_id}", status_code=204, responses=problems.described(404, 422, 503))
    async def delete(job_id: JobId, jobs: Runner) -> None:
        """End and forget a job."""
        await run_in_threadpool(jobs.store.delete, job_id)
        await jobs.forget(job_id)


def _told(job: Job) -> JobResponse:
    return JobResponse(**vars(job))


def _parsed(model: Any, text: str | None) -> Any:
    return None if text is None else model.model_validate_json(text)
