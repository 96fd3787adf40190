"""Jobs: many queries, answered in the background, whatever happens to the process meanwhile."""

import asyncio
import json
import logging
import sqlite3
from collections.abc import Callable
from contextlib import suppress
from typing import Annotated, Any, Protocol

from fastapi import Depends, FastAPI, Header, Path, Query, Request, Response
from starlette.concurrency import run_in_threadpool

from estimators.memory import OutOfMemory
from service import errors
from service.errors import JobsOff, NotReady, ShuttingDown
from service.job_store import Job, JobState, JobStore
from service.models import BadQuery
from service.schemas import (
    JobRequest,
    JobResponse,
    JobResultSchema,
    JobResultsResponse,
    JobsResponse,
    ProblemResponse,
    QueryRequest,
    QueryResponse,
)

IDLE_SECONDS = 0.5
"""So often it is looked for work when there was none, or it could not be done."""

NOT_OUTCOMES = (NotReady, ShuttingDown, OutOfMemory)
"""Errors that say nothing of the query: it stays open."""

log = logging.getLogger(__name__)


class Answering(Protocol):
    """What answers queries; ``service.engine.Engine``."""

    def check(self, request: QueryRequest) -> object:
        """Raise what a request would be refused for at once."""
        ...

    async def answer(self, request: QueryRequest, *, background: bool) -> QueryResponse:
        """Answer a query."""
        ...


class JobRunner:
    """Answers the queries of jobs, oldest job first, giving way to others.

    Args:
        store: of the jobs.
        engine: that answers.
        together: queries at a time.
        tell: told how many jobs are in each state, now and then.
    """

    def __init__(
        self,
        store: JobStore,
        engine: Answering,
        together: int,
        tell: Callable[[dict[JobState, int]], None],
    ) -> None:
        self.store = store
        self._engine = engine
        self._together = together
        self._tell = tell
        self._tasks: dict[tuple[str, int], asyncio.Task[None]] = {}
        self._changed = asyncio.Event()

    async def run(self) -> None:
        """Work for ever; what is under way is dropped when this is cancelled, and stays open."""
        try:
            while True:
                self._changed.clear()
                busy = False
                try:
                    busy = await self._start_some()
                    self._tell(await run_in_threadpool(self.store.counts))
                except sqlite3.Error:  # a full disk, say: it may have room again
                    log.exception("the file of jobs cannot be read or written")
                with suppress(TimeoutError):
                    async with asyncio.timeout(None if busy else IDLE_SECONDS):
                        await self._changed.wait()
        finally:
            await self._drop(list(self._tasks))

    def wake(self) -> None:
        """There is something to do."""
        self._changed.set()

    async def forget(self, job: str) -> None:
        """Drop what is under way of a job."""
        await self._drop([place for place in self._tasks if place[0] == job])

    async def _start_some(self) -> bool:
        """Fill up to ``together``; whether all are at work."""
        for job, number, request in await run_in_threadpool(
            self.store.open_queries, self._together
        ):
            if len(self._tasks) >= self._together:
                break
            if (job, number) not in self._tasks:
                work = self._answer(job, number, QueryRequest.model_validate_json(request))
                self._tasks[job, number] = asyncio.create_task(work)
        return len(self._tasks) >= self._together

    async def _answer(self, job: str, number: int, request: QueryRequest) -> None:
        try:
            await run_in_threadpool(self.store.begin, job)
            answer, problem = await self._outcome(job, number, request)
            if answer is not None or problem is not None:
                await run_in_threadpool(
                    self.store.record, job, number, answer=answer, problem=problem
                )
        finally:
            self._tasks.pop((job, number), None)
            self._changed.set()

    async def _outcome(
        self, job: str, number: int, request: QueryRequest
    ) -> tuple[str | None, str | None]:
        """An answer or a problem document, as JSON; neither if the query is to stay open."""
        try:
            response = await self._engine.answer(request, background=True)
        except NOT_OUTCOMES as error:
            log.info("query %d of job %s waits: %s", number, job, error)
            await asyncio.sleep(IDLE_SECONDS)
            return None, None
        except Exception as error:
            if errors.problem_for(error) is errors.UNEXPECTED:
                log.exception("query %d of job %s failed", number, job)
            return None, json.dumps(errors.problem_document("/v1/query", error))
        return response.model_dump_json(), None

    async def _drop(self, places: list[tuple[str, int]]) -> None:
        tasks = [self._tasks[place] for place in places if place in self._tasks]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


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
        responses={202: {"headers": LOCATION}, **errors.described(404, 409, 422, 429, 503)},
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
            except BadQuery as error:
                raise BadQuery(f"Query {number}: {error}") from error
        requests = [query.model_dump_json(exclude_unset=True) for query in body.queries]
        job = await run_in_threadpool(jobs.store.add, requests, idempotency_key)
        jobs.wake()
        response.headers["Location"] = f"/v1/jobs/{job.id}"
        return _told(job)

    @app.get("/v1/jobs", responses=errors.described(503))
    async def every(jobs: Runner) -> JobsResponse:
        """All jobs, newest first."""
        return JobsResponse(jobs=[_told(job) for job in await run_in_threadpool(jobs.store.all)])

    @app.get("/v1/jobs/{job_id}", responses=errors.described(404, 422, 503))
    async def one(job_id: JobId, jobs: Runner) -> JobResponse:
        """How far a job is."""
        return _told(await run_in_threadpool(jobs.store.get, job_id))

    @app.get("/v1/jobs/{job_id}/results", responses=errors.described(404, 422, 503))
    async def results(
        job_id: JobId,
        jobs: Runner,
        start: Annotated[int, Query(ge=0, le=2**31, description="First query.")] = 0,
        limit: Annotated[int, Query(ge=1, le=1000, description="Most outcomes.")] = 100,
    ) -> JobResultsResponse:
        """Outcomes that there are already, in order of their queries."""
        found = await run_in_threadpool(jobs.store.outcomes, job_id, start, limit)
        return JobResultsResponse(
            results=[
                JobResultSchema(
                    number=outcome.number,
                    answer=_parsed(QueryResponse, outcome.answer),
                    problem=_parsed(ProblemResponse, outcome.problem),
                )
                for outcome in found
            ],
            next=found[-1].number + 1 if len(found) == limit else None,
        )

    @app.delete("/v1/jobs/{job_id}", status_code=204, responses=errors.described(404, 422, 503))
    async def delete(job_id: JobId, jobs: Runner) -> None:
        """End and forget a job."""
        await run_in_threadpool(jobs.store.delete, job_id)
        await jobs.forget(job_id)


def _told(job: Job) -> JobResponse:
    return JobResponse(**vars(job))


def _parsed(model: Any, text: str | None) -> Any:
    return None if text is None else model.model_validate_json(text)
