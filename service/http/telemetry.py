"""What the service tells of itself: request ids, log lines and metrics.

Nothing here holds text of prompts, completions or the corpus unless ``log_prompts`` is set.
"""

import logging
import re
import time
import traceback
import uuid
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from typing import Any, Literal

import structlog
from fastapi import FastAPI, Response
from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    generate_latest,
)
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.http.problems import problem_response
from service.schemas.answers import QueryResponse
from service.settings import Settings

Refusal = Literal["overloaded", "deadline", "shutting down", "not ready", "client gone"]
"""Why a query was not computed; as a label it must be one of few."""

JobState = Literal["queued", "running", "finished"]

UNMATCHED = "unmatched"
"""The route of a request that reached none: metrics must not have a label for every path."""

PROBES = ("/livez", "/readyz")
"""Asked every few seconds, so their lines are for level DEBUG only."""

CLIENT_GONE = 499

SECONDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)
ROWS = (0, 10, 30, 100, 300, 1000, 3000, 10_000, 30_000, 100_000)

REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")

_line: ContextVar[dict[str, Any]] = ContextVar("line")
"""What the log line of the present request will say besides; one object, so that tasks and threads
that a request starts add to the same."""

_shared: list[Any] = [
    structlog.contextvars.merge_contextvars,
    structlog.stdlib.add_log_level,
    structlog.stdlib.add_logger_name,
    structlog.processors.TimeStamper(fmt="iso", utc=True),
]

log: Any = structlog.wrap_logger(
    logging.getLogger("etymon"),
    wrapper_class=structlog.stdlib.BoundLogger,
    processors=[*_shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
)
"""For events of the service: ``log.info("event", name=value)``. A command that serves decides with
``log_config`` where they go."""


def log_config() -> dict[str, Any]:
    """For ``logging.config.dictConfig``: every logger, uvicorn's too, as JSON lines on stderr."""
    formatter = {
        "()": structlog.stdlib.ProcessorFormatter,
        "foreign_pre_chain": _shared,
        "processors": [
            structlog.stdlib.ProcessorFormatter.remove_processors_meta,
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(),
        ],
    }
    handler = {"class": "logging.StreamHandler", "formatter": "json", "stream": "ext://sys.stderr"}
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {"json": formatter},
        "handlers": {"stderr": handler},
        "root": {"handlers": ["stderr"], "level": "WARNING"},
        "loggers": {name: {"level": "INFO"} for name in ("etymon", "uvicorn")},
    }


class Telemetry:
    """The metrics of one app, and what its log lines say of queries.

    Args:
        settings: of the service.
    """

    def __init__(self, settings: Settings) -> None:
        self._log_prompts = settings.log_prompts
        self.registry = registry = CollectorRegistry()
        by_route = ("route", "status")
        self.requests = Counter(
            "etymon_requests", "Requests that ended.", by_route, registry=registry
        )
        self.request_seconds = Histogram(
            "etymon_request_seconds",
            "From a request's headers to the end of its response.",
            by_route,
            buckets=SECONDS,
            registry=registry,
        )
        self._stages = Histogram(
            "etymon_stage_seconds",
            "Stages of answered queries.",
            ("stage",),
            buckets=SECONDS,
            registry=registry,
        )
        self._rescored = Histogram(
            "etymon_rescored_rows",
            "Rows that an answered query rescored exactly.",
            buckets=ROWS,
            registry=registry,
        )
        self._certificates = Counter(
            "etymon_certificates", "Certificates issued.", ("type", "status"), registry=registry
        )
        self._refused = Counter(
            "etymon_queries_refused", "Queries not computed.", ("reason",), registry=registry
        )
        self._in_flight = Gauge(
            "etymon_queries_in_flight", "Queries accepted and not yet answered.", registry=registry
        )
        self._waiting = Gauge(
            "etymon_queue_length", "Those of them whose turn has not come.", registry=registry
        )
        self._jobs = Gauge("etymon_jobs", "Jobs that are kept.", ("state",), registry=registry)
        ProcessCollector(registry=registry)

    def install(self, app: FastAPI) -> None:
        """Watch the app's requests; call it after all other middlewares are added."""
        app.add_middleware(Watch, telemetry=self, log_prompts=self._log_prompts)

    def add_metrics_route(self, app: FastAPI) -> None:
        """Add GET /metrics."""

        @app.get("/metrics", response_class=Response, responses={200: {"content": METRICS_CONTENT}})
        def metrics() -> Response:
            """Counters and times for Prometheus."""
            return Response(generate_latest(self.registry), media_type=CONTENT_TYPE_LATEST)

    def watch_queries(self, in_flight: Callable[[], float], waiting: Callable[[], float]) -> None:
        """Ask these whenever metrics are read."""
        self._in_flight.set_function(in_flight)
        self._waiting.set_function(waiting)

    def observe_answer(self, answer: QueryResponse) -> None:
        """Count an answer, and say what it took in the log line of the request under way."""
        for stage, seconds in answer.seconds.items():
            self._stages.labels(stage).observe(seconds)
        self._rescored.observe(answer.rescored_rows)
        for certificate in answer.certificates:
            self._certificates.labels(certificate.type, certificate.status).inc()
        said = {
            "index": answer.index,
            "results": len(answer.results),
            "rows": answer.rows,
            "rescored_rows": answer.rescored_rows,
            "sampled_rows": answer.sampled_rows,
            "partial": answer.partial,
            "stages": {stage: round(seconds, 6) for stage, seconds in answer.seconds.items()},
        }
        if self._log_prompts:
            said["terms"] = [
                {"prompt": t.prompt, "completion": t.completion, "against": t.against}
                for t in answer.measurement.terms
            ]
        add_to_line(**said)

    def refused(self, reason: Refusal) -> None:
        """Count a query that was not computed."""
        self._refused.labels(reason).inc()
        add_to_line(refused=reason)

    def set_jobs(self, counts: Mapping[JobState, int]) -> None:
        """How many jobs are in each state; those left out keep their number."""
        for state, count in counts.items():
            self._jobs.labels(state).set(count)


METRICS_CONTENT: dict[str, Any] = {"text/plain": {"schema": {"type": "string"}}}


def add_to_line(**fields: Any) -> None:
    """Say this too in the log line of the request under way, if there is one."""
    line = _line.get(None)
    if line is not None:
        line.update(fields)


class Watch:
    """ASGI middleware, the outermost: gives a request its id, counts it and logs it.

    Args:
        app: what is watched.
        telemetry: counts.
        log_prompts: whether messages of unexpected errors, which may hold any text, are logged.
    """

    def __init__(self, app: ASGIApp, *, telemetry: Telemetry, log_prompts: bool) -> None:
        self._app = app
        self._telemetry = telemetry
        self._log_prompts = log_prompts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, and answer an error that nothing else has caught."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        response = _Response(_request_id(scope), send)
        token = _line.set({})
        try:
            with structlog.contextvars.bound_contextvars(request_id=response.request_id):
                await self._pass_on(scope, receive, response)
        finally:
            _line.reset(token)

    async def _pass_on(self, scope: Scope, receive: Receive, response: "_Response") -> None:
        try:
            await self._app(scope, receive, response.send)
        except Exception as error:  # noqa: BLE001 - a 500 has an id and a line too
            self._log_error(error)
            if response.status:
                # uvicorn breaks the connection off, and logs what it catches.
                raise RuntimeError("The response broke off; see the line before.") from None
            await problem_response(scope["path"], error)(scope, receive, response.send)
        finally:
            self._ended(scope, response)

    def _log_error(self, error: Exception) -> None:
        frames = [
            f"{f.filename}:{f.lineno} {f.name}" for f in traceback.extract_tb(error.__traceback__)
        ]
        message = {"message": str(error)} if self._log_prompts else {}
        log.error("unexpected error", error=type(error).__name__, **message, frames=frames)

    def _ended(self, scope: Scope, response: "_Response") -> None:
        route = _route(scope)
        status = response.status or CLIENT_GONE
        seconds = time.perf_counter() - response.begin
        self._telemetry.requests.labels(route, status).inc()
        self._telemetry.request_seconds.labels(route, status).observe(seconds)
        tell = log.debug if route in PROBES else log.info
        tell(
            "request",
            method=scope["method"][:16],
            route=route,
            status=status,
            seconds=round(seconds, 6),
            bytes=response.bytes,
            complete=response.complete,
            client=(scope.get("client") or ("unknown",))[0],
            **_line.get({}),
        )


class _Response:
    """Notes what is sent."""

    def __init__(self, request_id: str, send: Send) -> None:
        self.request_id = request_id
        self.begin = time.perf_counter()
        self.status = 0
        self.bytes = 0
        self.complete = False
        self._send = send

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            MutableHeaders(scope=message)["X-Request-ID"] = self.request_id
        elif message["type"] == "http.response.body":
            self.bytes += len(message.get("body", b""))
            self.complete = not message.get("more_body", False)
        await self._send(message)


def _route(scope: Scope) -> str:
    """The template of the route that was reached; of mounted applications their place."""
    mounted = ""
    if "app_root_path" in scope:
        mounted = scope["root_path"].removeprefix(scope["app_root_path"])
    return mounted + getattr(scope.get("route"), "path", "") or UNMATCHED


def _request_id(scope: Scope) -> str:
    given = Headers(scope=scope).get("x-request-id", "")
    return given if REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
