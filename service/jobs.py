"""Jobs: many queries, answered in the background, whatever happens to the process meanwhile."""

import asyncio
import json
import logging
import sqlite3
import traceback
from collections.abc import Callable
from contextlib import suppress
from typing import Annotated, Any, Protocol

from fastapi import Depends, FastAPI, Header, Path, Query, Request, Response
from pydantic import ValidationError
from pydantic_core import to_json
from starlette.concurrency import run_in_threadpool

from estimators.memory import OutOfMemory
from service import errors
from service.errors import (
    JobsOff,
    NotReady,
    ProcessEnded,
    ShuttingDown,
    UnknownEstimator,
    UnknownIndex,
)
from service.job_store import Job, JobState, JobStore, OpenQuery
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

NOT_OUTCOMES = (NotReady, ShuttingDown)
"""Errors that say nothing of the query: it is asked again."""

MOST_TRIES = 3
"""So often a query is tried for which memory ran out, or the process ended: with others it may
have been their fault, again and again it is its own."""

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
        self._turn = asyncio.Lock()

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
            with suppress(sqlite3.Error):
                await run_in_threadpool(self.store.forgive)

    def wake(self) -> None:
        """There is something to do."""
        self._changed.set()

    async def forget(self, job: str) -> None:
        """Drop what is under way of a job that was deleted."""
        async with self._turn:  # so that none of it is about to begin
            await self._drop([place for place in self._tasks if place[0] == job])

    async def _start_some(self) -> bool:
        """Fill up to ``together``; whether all are at work."""
        async with self._turn:
            before = set(self._tasks)  # they may get their outcome while the file is read
            for query in await run_in_threadpool(self.store.open_queries, self._together):
                place = (query.job, query.number)
                if place not in before and len(self._tasks) < self._together:
                    self._tasks[place] = asyncio.create_task(self._answer(query))
        return len(self._tasks) >= self._together

    async def _answer(self, query: OpenQuery) -> None:
        try:
            await run_in_threadpool(self.store.begin, query.job, query.number)
            answer, problem = await self._outcome(query)
            await run_in_threadpool(
                self.store.record, query.job, query.number, answer=answer, problem=problem
            )
        except sqlite3.Error:
            log.exception("no outcome can be kept of query %d of job %s", query.number, query.job)
            await asyncio.sleep(IDLE_SECONDS)
        finally:
            self._tasks.pop((query.job, query.number), None)
            self._changed.set()

    async def _outcome(self, query: OpenQuery) -> tuple[str | None, str | None]:
        """An answer or a problem document, as JSON."""
        try:
            if query.begun >= MOST_TRIES:
                raise ProcessEnded(f"The process ended {query.begun} times during this query.")
            response = await self._patiently(_stored(query))
            return to_json(response, inf_nan_mode="constants").decode(), None
        except Exception as error:  # noqa: BLE001 - it is the query's outcome
            if errors.problem_for(error) is errors.UNEXPECTED:
                _log_failure(query, error)
            return None, json.dumps(errors.problem_document("/v1/query", error))

    async def _patiently(self, request: QueryRequest) -> QueryResponse:
        tries = 1
        while True:
            try:
                answer = await self._engine.answer(request, background=True)
                if answer.partial and request.deadline is None:
                    raise ShuttingDown("The search was cut short because the service ends.")
                return answer
            except NOT_OUTCOMES as error:
                log.info("a query of a job waits: %s", error)
            except OutOfMemory:
                tries += 1
                if tries > MOST_TRIES:
                    raise
            await asyncio.sleep(IDLE_SECONDS)

    async def _drop(self, places: list[tuple[str, int]]) -> None:
        tasks = [self._tasks[place] for place in places if place in self._tasks]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _stored(query: OpenQuery) -> QueryRequest:
    try:
        return QueryRequest.model_validate_json(query.request)
    except ValidationError as error:
        fault = error.errors()[0]
        name = ".".join(str(part) for part in fault["loc"])
        raise BadQuery(
            f"The job was made by another version of the service, and this one does not take its "
            f"query ({name}: {fault['msg']}); send it anew."
        ) from error


def _log_failure(query: OpenQuery, error: Exception) -> None:
    """Where, and what kind: its message may hold what was asked."""
    frames = [
        f"{f.filename}:{f.lineno} {f.name}" for f in traceback.extract_tb(error.__traceback__)
    ]
    log.error(
        "query %d of job %s failed: %s at %s", query.number, query.job, type(error).__name__, frames
    )


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
            except (BadQuery, UnknownEstimator, UnknownIndex) as error:
                raise type(error)(f"Query {number}: {error}") from error
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

    @app.delete("/v1/jobs/{job_id}", status_code=204, responses=errors.described(404, 422, 503))
    async def delete(job_id: JobId, jobs: Runner) -> None:
        """End and forget a job."""
        await run_in_threadpool(jobs.store.delete, job_id)
        await jobs.forget(job_id)


def _told(job: Job) -> JobResponse:
    return JobResponse(**vars(job))


def _parsed(model: Any, text: str | None) -> Any:
    return None if text is None else model.model_validate_json(text)
