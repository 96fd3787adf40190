"""The service from Python: ``Client`` and ``AsyncClient``. Needs neither model nor torch."""

import asyncio
import json
import math
import time
import uuid
from collections.abc import AsyncIterator, Iterator, Mapping
from typing import Any, Self, TypeVar
from urllib.parse import quote

import httpx
from httpx_sse import EventSource
from pydantic import BaseModel, ValidationError

from service.client.connection import (
    Connection,
    ServiceError,
    ServiceProblem,
    ServiceUnreachable,
    check,
    read,
)
from service.schemas.answers import CandidatesEvent, GradientEvent, ProgressEvent, QueryResponse
from service.schemas.indexes import (
    EstimatorsResponse,
    ExampleResponse,
    IndexesResponse,
    SuggestionSchema,
    SuggestionsResponse,
)
from service.schemas.jobs import (
    JobRequest,
    JobResponse,
    JobResultSchema,
    JobResultsResponse,
    JobsResponse,
)
from service.schemas.queries import QueryRequest

__all__ = [
    "AsyncClient",
    "Client",
    "Connection",
    "ServiceError",
    "ServiceProblem",
    "ServiceUnreachable",
]

EVENTS: dict[str, type[BaseModel]] = {
    "gradient": GradientEvent,
    "candidates": CandidatesEvent,
    "progress": ProgressEvent,
    "result": QueryResponse,
}

Event = tuple[str, GradientEvent | CandidatesEvent | ProgressEvent | QueryResponse]

M = TypeVar("M", bound=BaseModel)


def read_event(name: str, data: str) -> Event | None:
    """An event of a stream; None for one that this version does not know.

    Raises:
        ServiceProblem: the event is a refusal, or cannot be read.
    """
    try:
        if name == "error":
            raise ServiceProblem(json.loads(data))
        if name not in EVENTS:
            return None
        return name, EVENTS[name].model_validate_json(data, extra="ignore")  # type: ignore[return-value]
    except (ValueError, KeyError, TypeError) as error:
        detail = f"the event '{name}' of the stream is none of this version's."
        document = {"status": 0, "title": "Not understood", "detail": detail}
        raise ServiceProblem(document) from error


def _valid(model: type[M], fields: Mapping[str, Any]) -> M:
    try:
        return model(**fields)
    except ValidationError as error:
        fault = error.errors()[0]
        name = ".".join(str(part) for part in fault["loc"]) or "the query"
        raise ValueError(f"{name}: {fault['msg']}.") from error


def _post(path: str, body: BaseModel) -> dict[str, Any]:
    return {"method": "POST", "url": path, "json": body.model_dump(exclude_unset=True)}


def _get(path: str, **parameters: str | int) -> dict[str, Any]:
    return {"method": "GET", "url": path, "params": parameters}


def _query(
    request: QueryRequest | None, fields: Mapping[str, Any], path: str = "/v1/query"
) -> dict[str, Any]:
    if request is not None and fields:
        raise ValueError(f"Give a request or its fields, not both; got {', '.join(fields)} too.")
    return _post(path, _valid(QueryRequest, fields) if request is None else request)


def _job(queries: list[QueryRequest], key: str | None) -> dict[str, Any]:
    asked = _post("/v1/jobs", _valid(JobRequest, {"queries": queries}))
    # So that it is safe to send it again.
    return {**asked, "headers": {"Idempotency-Key": key or uuid.uuid4().hex}}


def _at(folder: str, name: str) -> str:
    """The path of something, whatever its name; dots of their own would climb."""
    return f"{folder}/{quote(name, safe='').replace('.', '%2E')}"


def _results(job: str, start: int) -> dict[str, Any]:
    return _get(f"{_at('/v1/jobs', job)}/results", start=start)


def _pauses(every: float, most: float | None) -> Iterator[float]:
    """How long to sleep between looks, until ``most`` seconds have passed."""
    until = math.inf if most is None else time.monotonic() + most
    while (left := until - time.monotonic()) > 0:
        yield min(every, left)


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
        response = self._send(_query(request, fields, "/v1/query/stream"), stream=True)
        try:
            check(response)
            with self.connection.reaching():
                for event in EventSource(response).iter_sse():
                    if (news := read_event(event.event, event.data)) is not None:
                        yield news
                        if news[0] == "result":
                            return
            raise self.connection.broken_off()
        finally:
            response.close()

    def submit(self, queries: list[QueryRequest], key: str | None = None) -> JobResponse:
        """Have many queries answered in the background; the same ``key`` twice is the same job."""
        return read(self._send(_job(queries, key)), JobResponse)

    def job(self, job: str) -> JobResponse:
        """How far a job is."""
        return read(self._send(_get(_at("/v1/jobs", job))), JobResponse)

    def jobs(self) -> list[JobResponse]:
        """All jobs, newest first."""
        return read(self._send(_get("/v1/jobs")), JobsResponse).jobs

    def wait(self, job: str, every: float = 1.0, most: float | None = None) -> JobResponse:
        """Wait until a job has ended, or at most so many seconds; look at its ``state``."""
        for pause in _pauses(every, most):
            if (found := self.job(job)).state == "finished":
                return found
            time.sleep(pause)
        return self.job(job)

    def results(self, job: str) -> Iterator[JobResultSchema]:
        """Outcomes of a job's queries that there are already, page after page."""
        start: int | None = 0
        while start is not None:
            page = read(self._send(_results(job, start)), JobResultsResponse)
            yield from page.results
            start = page.next

    def delete(self, job: str) -> None:
        """End and forget a job."""
        check(self._send({"method": "DELETE", "url": _at("/v1/jobs", job)}))

    def ready(self) -> bool:
        """Whether model and indexes are loaded."""
        with self.connection.reaching():
            return self._http.get("/readyz").is_success

    def indexes(self) -> IndexesResponse:
        """What is served."""
        return read(self._send(_get("/v1/index")), IndexesResponse)

    def estimators(self) -> EstimatorsResponse:
        """Estimators, with the parameters and defaults that each index answers for."""
        return read(self._send(_get("/v1/estimators")), EstimatorsResponse)

    def suggestions(self, index: str = "default") -> list[SuggestionSchema]:
        """Questions to begin with."""
        asked = _get("/v1/suggestions", index=index)
        return read(self._send(asked), SuggestionsResponse).suggestions

    def example(self, identifier: str, index: str = "default") -> ExampleResponse:
        """One training example."""
        asked = _get(_at("/v1/examples", identifier), index=index)
        return read(self._send(asked), ExampleResponse)

    def _send(self, asked: dict[str, Any], *, stream: bool = False) -> httpx.Response:
        asking = 1
        with self.connection.reaching():
            while True:
                response = self._http.send(self._http.build_request(**asked), stream=stream)
                if not response.is_success:
                    response.read()
                if (pause := self.connection.pause(response, asking)) is None:
                    return response
                time.sleep(pause)
                asking += 1


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
        response = await self._send(_query(request, fields, "/v1/query/stream"), stream=True)
        try:
            check(response)
            with self.connection.reaching():
                async for event in EventSource(response).aiter_sse():
                    if (news := read_event(event.event, event.data)) is not None:
                        yield news
                        if news[0] == "result":
                            return
            raise self.connection.broken_off()
        finally:
            await response.aclose()

    async def submit(self, queries: list[QueryRequest], key: str | None = None) -> JobResponse:
        """Have many queries answered in the background; the same ``key`` twice is the same job."""
        return read(await self._send(_job(queries, key)), JobResponse)

    async def job(self, job: str) -> JobResponse:
        """How far a job is."""
        return read(await self._send(_get(_at("/v1/jobs", job))), JobResponse)

    async def jobs(self) -> list[JobResponse]:
        """All jobs, newest first."""
        return read(await self._send(_get("/v1/jobs")), JobsResponse).jobs

    async def wait(self, job: str, every: float = 1.0, most: float | None = None) -> JobResponse:
        """Wait until a job has ended, or at most so many seconds; look at its ``state``."""
        for pause in _pauses(every, most):
            if (found := await self.job(job)).state == "finished":
                return found
            await asyncio.sleep(pause)
        return await self.job(job)

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
        check(await self._send({"method": "DELETE", "url": _at("/v1/jobs", job)}))

    async def ready(self) -> bool:
        """Whether model and indexes are loaded."""
        with self.connection.reaching():
            return (await self._http.get("/readyz")).is_success

    async def indexes(self) -> IndexesResponse:
        """What is served."""
        return read(await self._send(_get("/v1/index")), IndexesResponse)

    async def estimators(self) -> EstimatorsResponse:
        """Estimators, with the parameters and defaults that each index answers for."""
        return read(await self._send(_get("/v1/estimators")), EstimatorsResponse)

    async def suggestions(self, index: str = "default") -> list[SuggestionSchema]:
        """Questions to begin with."""
        asked = _get("/v1/suggestions", index=index)
        return read(await self._send(asked), SuggestionsResponse).suggestions

    async def example(self, identifier: str, index: str = "default") -> ExampleResponse:
        """One training example."""
        asked = _get(_at("/v1/examples", identifier), index=index)
        return read(await self._send(asked), ExampleResponse)

    async def _send(self, asked: dict[str, Any], *, stream: bool = False) -> httpx.Response:
        asking = 1
        with self.connection.reaching():
            while True:
                response = await self._http.send(self._http.build_request(**asked), stream=stream)
                if not response.is_success:
                    await response.aread()
                if (pause := self.connection.pause(response, asking)) is None:
                    return response
                await asyncio.sleep(pause)
                asking += 1
