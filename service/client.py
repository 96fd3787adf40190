"""The service from Python: ``Client`` and ``AsyncClient``. Needs neither model nor torch."""

import asyncio
import json
import math
import time
import uuid
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Self, TypeVar
from urllib.parse import quote

import httpx
from httpx_sse import EventSource
from pydantic import BaseModel, ValidationError

from service.index_schemas import EstimatorsResponse, ExampleResponse, IndexesResponse
from service.schemas import (
    CandidatesEvent,
    GradientEvent,
    JobRequest,
    JobResponse,
    JobResultSchema,
    JobResultsResponse,
    JobsResponse,
    ProgressEvent,
    QueryRequest,
    QueryResponse,
)

BUSY = (429, 503)
"""Statuses after which it helps to ask again."""

EVENTS: dict[str, type[BaseModel]] = {
    "gradient": GradientEvent,
    "candidates": CandidatesEvent,
    "progress": ProgressEvent,
    "result": QueryResponse,
}

Event = tuple[str, GradientEvent | CandidatesEvent | ProgressEvent | QueryResponse]

M = TypeVar("M", bound=BaseModel)


class ServiceError(Exception):
    """No answer; the message says why, in one sentence."""


class ServiceUnreachable(ServiceError):  # noqa: N818 - named for what is wrong
    """Nothing answers there, or not in time."""


class ServiceProblem(ServiceError):  # noqa: N818
    """The service refused, or what answers is no such service.

    Attributes:
        status: of HTTP; 0 if the refusal came within a stream without one.
        title: the same for all refusals of the kind.
        detail: what was wrong with this request.
    """

    def __init__(self, status: int, title: str, detail: str) -> None:
        super().__init__(f"{title}: {detail}")
        self.status = status
        self.title = title
        self.detail = detail


@dataclass(frozen=True, kw_only=True)
class Connection:
    """Where the service is and how patient to be.

    Attributes:
        url: of the service.
        key: that it asks for, if any.
        timeout: seconds to wait for an answer.
        retries: how often to ask again when it is busy, as long as it says to wait.
        longest_wait: most seconds to wait before asking again.
    """

    url: str = "http://127.0.0.1:8000"
    key: str | None = field(default=None, repr=False)
    timeout: float = 600.0
    retries: int = 3
    longest_wait: float = 30.0

    def options(self) -> dict[str, Any]:
        """For a client of httpx."""
        headers = {} if self.key is None else {"Authorization": f"Bearer {self.key}"}
        return {"base_url": self.url, "timeout": self.timeout, "headers": headers}

    def broken_off(self) -> ServiceUnreachable:
        """For a stream that ended without an answer."""
        return ServiceUnreachable(f"{self.url} ended its stream without an answer; ask again.")

    def pause(self, response: httpx.Response, asked: int) -> float | None:
        """Seconds after which to ask again; None if that would not help or was done enough."""
        after = response.headers.get("retry-after", "")
        if response.status_code not in BUSY or asked > self.retries or not after.isdecimal():
            return None
        return min(float(after), self.longest_wait)

    @contextmanager
    def reaching(self) -> Iterator[None]:
        """Say what is wrong if nothing answers."""
        try:
            yield
        except httpx.TimeoutException as error:
            raise ServiceUnreachable(
                f"No answer from {self.url} within {self.timeout:g} seconds."
            ) from error
        except (httpx.HTTPError, httpx.InvalidURL, UnicodeError) as error:
            raise ServiceUnreachable(
                f"Cannot ask the service at {self.url} ({str(error).rstrip('.')}); start it with "
                f"python -m scripts.serve, or name another."
            ) from error


def read(response: httpx.Response, model: type[M]) -> M:
    """The answer as its schema.

    Raises:
        ServiceProblem: a refusal, or no answer of such a service.
    """
    check(response)
    try:
        return model.model_validate_json(response.content)
    except ValidationError as error:
        raise _stranger(response) from error


def check(response: httpx.Response) -> None:
    """Raise ServiceProblem unless it was a success."""
    if response.is_success:
        return
    try:
        document = response.json()
        raise ServiceProblem(response.status_code, document["title"], document["detail"])
    except (ValueError, KeyError, TypeError) as error:
        raise _stranger(response) from error


def _stranger(response: httpx.Response) -> ServiceProblem:
    detail = f"it answered with HTTP status {response.status_code} and is no service of this kind."
    return ServiceProblem(response.status_code, str(response.url), detail)


def read_event(name: str, data: str) -> Event | None:
    """An event of a stream; None for one that this version does not know.

    Raises:
        ServiceProblem: the event is a refusal, or cannot be read.
    """
    try:
        if name == "error":
            problem = json.loads(data)
            raise ServiceProblem(problem["status"], problem["title"], problem["detail"])
        return (name, EVENTS[name].model_validate_json(data)) if name in EVENTS else None  # type: ignore[return-value]
    except (ValueError, KeyError, TypeError) as error:
        raise ServiceProblem(
            0, "Not understood", f"the event '{name}' of the stream is none of this version's."
        ) from error


def first_fault(error: ValidationError) -> str:
    """What is wrong with a query, as one sentence."""
    fault = error.errors()[0]
    name = ".".join(str(part) for part in fault["loc"]) or "the query"
    return f"{name}: {fault['msg']}."


def _query(request: QueryRequest | None, fields: Mapping[str, Any]) -> dict[str, Any]:
    try:
        asked = QueryRequest(**fields) if request is None else request
    except ValidationError as error:
        raise ValueError(first_fault(error)) from error
    return {"method": "POST", "url": "/v1/query", "json": asked.model_dump(exclude_unset=True)}


def _job(queries: list[QueryRequest]) -> dict[str, Any]:
    body = JobRequest(queries=queries).model_dump(exclude_unset=True)
    headers = {"Idempotency-Key": uuid.uuid4().hex}  # so that it is safe to send it again
    return {"method": "POST", "url": "/v1/jobs", "json": body, "headers": headers}


def _example(identifier: str, index: str) -> dict[str, Any]:
    url = f"/v1/examples/{quote(identifier, safe='')}"
    return {"method": "GET", "url": url, "params": {"index": index}}


def _results(job: str, start: int) -> dict[str, Any]:
    return {"method": "GET", "url": f"/v1/jobs/{job}/results", "params": {"start": start}}


class Client:
    """The service, asked by functions that wait.

    Every method raises ServiceProblem if it refuses and ServiceUnreachable if nothing answers.

    Args:
        connection: where it is.
        transport: of httpx, in place of the network.
    """

    def __init__(
        self, connection: Connection | None = None, transport: httpx.BaseTransport | None = None
    ) -> None:
        self.connection = connection or Connection()
        with self.connection.reaching():
            self._http = httpx.Client(**self.connection.options(), transport=transport)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._http.close()

    def query(self, request: QueryRequest | None = None, **fields: Any) -> QueryResponse:
        """The answer to a query, given whole or by its fields."""
        return read(self._send(_query(request, fields)), QueryResponse)

    def stream(self, request: QueryRequest | None = None, **fields: Any) -> Iterator[Event]:
        """News of a query; the last is ``("result", answer)``."""
        asked = {**_query(request, fields), "url": "/v1/query/stream"}
        asking = 1
        while True:
            with self.connection.reaching(), self._http.stream(**asked) as response:
                pause = self.connection.pause(response, asking)
                if pause is None:
                    if not response.is_success:
                        response.read()
                        check(response)
                    for event in EventSource(response).iter_sse():
                        if (news := read_event(event.event, event.data)) is not None:
                            yield news
                            if news[0] == "result":
                                return
                    raise self.connection.broken_off()
            time.sleep(pause)
            asking += 1

    def submit(self, queries: list[QueryRequest]) -> JobResponse:
        """Have many queries answered in the background."""
        return read(self._send(_job(queries)), JobResponse)

    def job(self, job: str) -> JobResponse:
        """How far a job is."""
        return read(self._send({"method": "GET", "url": f"/v1/jobs/{job}"}), JobResponse)

    def jobs(self) -> list[JobResponse]:
        """All jobs, newest first."""
        return read(self._send({"method": "GET", "url": "/v1/jobs"}), JobsResponse).jobs

    def wait(self, job: str, every: float = 1.0, most: float | None = None) -> JobResponse:
        """Wait until a job has ended, or at most so many seconds; look at its ``state``."""
        until = math.inf if most is None else time.monotonic() + most
        while (found := self.job(job)).state != "finished" and time.monotonic() < until:
            time.sleep(every)
        return found

    def results(self, job: str) -> Iterator[JobResultSchema]:
        """Outcomes of a job's queries that there are already, page after page."""
        start: int | None = 0
        while start is not None:
            page = read(self._send(_results(job, start)), JobResultsResponse)
            yield from page.results
            start = page.next

    def delete(self, job: str) -> None:
        """End and forget a job."""
        check(self._send({"method": "DELETE", "url": f"/v1/jobs/{job}"}))

    def ready(self) -> bool:
        """Whether model and indexes are loaded."""
        with self.connection.reaching():
            return self._http.get("/readyz").is_success

    def indexes(self) -> IndexesResponse:
        """What is served."""
        return read(self._send({"method": "GET", "url": "/v1/index"}), IndexesResponse)

    def estimators(self) -> EstimatorsResponse:
        """Estimators, and the indexes that were built for each."""
        return read(self._send({"method": "GET", "url": "/v1/estimators"}), EstimatorsResponse)

    def example(self, identifier: str, index: str = "default") -> ExampleResponse:
        """One training example."""
        return read(self._send(_example(identifier, index)), ExampleResponse)

    def _send(self, asked: dict[str, Any]) -> httpx.Response:
        asking = 1
        with self.connection.reaching():
            while (
                pause := self.connection.pause(response := self._http.request(**asked), asking)
            ) is not None:
                time.sleep(pause)
                asking += 1
            return response


class AsyncClient:
    """The service, asked by coroutines; the same methods as ``Client``."""

    def __init__(
        self,
        connection: Connection | None = None,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self.connection = connection or Connection()
        with self.connection.reaching():
            self._http = httpx.AsyncClient(**self.connection.options(), transport=transport)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._http.aclose()

    async def query(self, request: QueryRequest | None = None, **fields: Any) -> QueryResponse:
        """The answer to a query, given whole or by its fields."""
        return read(await self._send(_query(request, fields)), QueryResponse)

    async def stream(
        self, request: QueryRequest | None = None, **fields: Any
    ) -> AsyncIterator[Event]:
        """News of a query; the last is ``("result", answer)``."""
        asked = {**_query(request, fields), "url": "/v1/query/stream"}
        asking = 1
        while True:
            with self.connection.reaching():
                async with self._http.stream(**asked) as response:
                    pause = self.connection.pause(response, asking)
                    if pause is None:
                        if not response.is_success:
                            await response.aread()
                            check(response)
                        async for event in EventSource(response).aiter_sse():
                            if (news := read_event(event.event, event.data)) is not None:
                                yield news
                                if news[0] == "result":
                                    return
                        raise self.connection.broken_off()
            await asyncio.sleep(pause)
            asking += 1

    async def submit(self, queries: list[QueryRequest]) -> JobResponse:
        """Have many queries answered in the background."""
        return read(await self._send(_job(queries)), JobResponse)

    async def job(self, job: str) -> JobResponse:
        """How far a job is."""
        return read(await self._send({"method": "GET", "url": f"/v1/jobs/{job}"}), JobResponse)

    async def jobs(self) -> list[JobResponse]:
        """All jobs, newest first."""
        return read(await self._send({"method": "GET", "url": "/v1/jobs"}), JobsResponse).jobs

    async def wait(self, job: str, every: float = 1.0, most: float | None = None) -> JobResponse:
        """Wait until a job has ended, or at most so many seconds; look at its ``state``."""
        until = math.inf if most is None else time.monotonic() + most
        while (found := await self.job(job)).state != "finished" and time.monotonic() < until:
            await asyncio.sleep(every)
        return found

    async def results(self, job: str) -> AsyncIterator[JobResultSchema]:
        """Outcomes of a job's queries that there are already, page after page."""
        start: int | None = 0
        while start is not None:
            page = read(await self._send(_results(job, start)), JobResultsResponse)
            for outcome in page.results:
                yield outcome
            start = page.next

    async def delete(self, job: str) -> None:
        """End and forget a job."""
        check(await self._send({"method": "DELETE", "url": f"/v1/jobs/{job}"}))

    async def ready(self) -> bool:
        """Whether model and indexes are loaded."""
        with self.connection.reaching():
            return (await self._http.get("/readyz")).is_success

    async def indexes(self) -> IndexesResponse:
        """What is served."""
        return read(await self._send({"method": "GET", "url": "/v1/index"}), IndexesResponse)

    async def estimators(self) -> EstimatorsResponse:
        """Estimators, and the indexes that were built for each."""
        sent = await self._send({"method": "GET", "url": "/v1/estimators"})
        return read(sent, EstimatorsResponse)

    async def example(self, identifier: str, index: str = "default") -> ExampleResponse:
        """One training example."""
        return read(await self._send(_example(identifier, index)), ExampleResponse)

    async def _send(self, asked: dict[str, Any]) -> httpx.Response:
        asking = 1
        with self.connection.reaching():
            while (
                pause := self.connection.pause(
                    response := await self._http.request(**asked), asking
                )
            ) is not None:
                await asyncio.sleep(pause)
                asking += 1
            return response
