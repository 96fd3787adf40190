"""Many queries, answered in the background, whatever happens to the process meanwhile."""

import asyncio
import logging
import sqlite3
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Protocol

from pydantic import ValidationError
from pydantic_core import to_json
from starlette.concurrency import run_in_threadpool

from estimators.grounds import Untraced
from estimators.model.memory import OutOfMemory
from service.errors import NotReady, ProcessEnded, ShuttingDown
from service.jobs.store import JobState, JobStore, OpenQuery
from service.models import BadQuery
from service.schemas.answers import QueryResponse
from service.schemas.queries import QueryRequest

IDLE_SECONDS = 0.5
"""So often it is looked for work when there was none, or it could not be done."""

NOT_OUTCOMES = (NotReady, ShuttingDown)
"""Errors that say nothing of the query: it is asked again."""

MOST_TRIES = 3
"""So often a query is tried for which memory ran out, or the process ended: with others it may
have been their fault, again and again it is its own."""

log = logging.getLogger(__name__)


Describe = Callable[[Exception], tuple[str, bool]]
"""The problem document of an error, as JSON, and whether the error was foreseen."""


class Answering(Protocol):
    """What answers queries; ``service.http.engine.Engine``."""

    def check(self, request: QueryRequest) -> object:
        """Raise what a request would be refused for at once."""
        ...

    async def answer(self, request: QueryRequest, *, background: bool) -> QueryResponse:
        """Answer a query."""
        ...

    async def trace(self, requests: Sequence[QueryRequest]) -> None:
        """Trace what they ask through the run, together, where that was not done before."""
        ...


class JobRunner:
    """Answers the queries of jobs, oldest job first, giving way to others.

    Args:
        store: of the jobs.
        engine: that answers.
        together: queries at a time.
        tell: told how many jobs are in each state, now and then.
        describe: how an error is kept as a query's outcome.
    """

    def __init__(
        self,
        store: JobStore,
        engine: Answering,
        together: int,
        tell: Callable[[dict[JobState, int]], None],
        describe: Describe,
    ) -> None:
        self.store = store
        self._engine = engine
        self._together = together
        self._tell = tell
        self._describe = describe
        self._tasks: dict[tuple[str, int], asyncio.Task[None]] = {}
        self._changed = asyncio.Event()
        self._turn = asyncio.Lock()
        self._tracing = asyncio.Lock()
        self._being_traced: set[str] = set()
        self._untraceable: dict[str, Exception] = {}

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
        """Fill up to ``together``; whether all are at work.

        Jobs whose questions are being traced are passed over: that may take hours.
        """
        async with self._turn:
            before = set(self._tasks)  # they may get their outcome while the file is read
            others = sorted(self._being_traced)
            for query in await run_in_threadpool(self.store.open_queries, self._together, others):
                place = (query.job, query.number)
                if place not in before and self._at_work() < self._together:
                    self._tasks[place] = asyncio.create_task(self._answer(query))
        return self._at_work() >= self._together

    def _at_work(self) -> int:
        return sum(job not in self._being_traced for job, _ in self._tasks)

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
            response = await self._traced(query, _stored(query))
            return to_json(response, inf_nan_mode="constants").decode(), None
        except Exception as error:  # noqa: BLE001 - it is the query's outcome
            problem, foreseen = self._describe(error)
            if not foreseen:
                _log_failure(query, error)
            return None, problem

    async def _traced(self, query: OpenQuery, request: QueryRequest) -> QueryResponse:
        """The answer, once the question was traced if it needs that."""
        try:
            return await self._patiently(request)
        except Untraced:
            await self._trace(query.job)
        return await self._patiently(request)

    async def _trace(self, job: str) -> None:
        """Trace the questions of a job, all of them in the turn of the first that needs it."""
        self._being_traced.add(job)
        self._changed.set()
        try:
            async with self._tracing:
                if job in self._untraceable:
                    raise self._untraceable[job]
                requests = []
                for query in await run_in_threadpool(self.store.open_queries_of, job):
                    with suppress(BadQuery):  # its own outcome
                        requests.append(_stored(query))
                await self._engine.trace(requests)
        except Exception as error:
            self._untraceable[job] = error
            raise
        finally:
            self._being_traced.discard(job)

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
