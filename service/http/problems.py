"""From errors to HTTP problem documents (RFC 9457), in one table."""

import sqlite3
from collections.abc import Mapping
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.routing import Match, Route

from estimators.grounds import Unavailable, Untraced
from estimators.model.memory import OutOfMemory
from estimators.rescoring import NonFiniteGradientError
from index.errors import IndexCorrupt, IndexFault, IndexMismatch, IndexMissing
from service.checkpoints import UnusableModel
from service.errors import (
    ClientGone,
    Conflict,
    DeadlinePassed,
    Forbidden,
    HeadTooLarge,
    JobsOff,
    MalformedBody,
    NotReady,
    Overloaded,
    ProcessEnded,
    RunFault,
    ShuttingDown,
    TooLarge,
    TooManyJobs,
    TooSlow,
    Unauthorised,
    UnknownEstimator,
    UnknownIndex,
    UnknownJob,
    WrongContentType,
    WrongHost,
)
from service.models import BadQuery
from service.schemas.answers import ProblemResponse


@dataclass(frozen=True, kw_only=True)
class Problem:
    """How an error appears over HTTP.

    Attributes:
        status: of the response.
        title: the same for all errors of the kind.
        retry_after: seconds after which to ask again; None if that would not help.
        challenges: ways to show a key, as in ``WWW-Authenticate``.
        closes: the connection is closed, so that what is left of the body is not read.
    """

    status: int
    title: str
    retry_after: int | None = None
    challenges: tuple[str, ...] = ()
    closes: bool = False


CHALLENGES = ('Basic realm="Etymon", charset="UTF-8"', 'Bearer realm="Etymon"')

PROBLEMS: dict[type[Exception], Problem] = {
    MalformedBody: Problem(status=400, title="The body is not JSON"),
    Unauthorised: Problem(status=401, title="A key is needed", challenges=CHALLENGES, closes=True),
    Forbidden: Problem(status=403, title="Not from another site", closes=True),
    UnknownIndex: Problem(status=404, title="Unknown index"),
    UnknownEstimator: Problem(status=404, title="Unknown estimator"),
    UnknownJob: Problem(status=404, title="Unknown job"),
    JobsOff: Problem(status=404, title="No jobs here"),
    IndexMissing: Problem(status=404, title="Not found"),
    TooSlow: Problem(status=408, title="The body came too slowly", closes=True),
    Conflict: Problem(status=409, title="Contradicts an earlier request"),
    TooLarge: Problem(status=413, title="The body is too large", closes=True),
    WrongContentType: Problem(status=415, title="Not JSON by its headers", closes=True),
    WrongHost: Problem(status=421, title="Another host", closes=True),
    BadQuery: Problem(status=422, title="The query cannot be measured"),
    Unavailable: Problem(status=422, title="The index lacks what the estimator needs"),
    Untraced: Problem(status=422, title="The question was not traced"),
    NonFiniteGradientError: Problem(status=422, title="The query's gradient is not finite"),
    Overloaded: Problem(status=429, title="Too many queries at once", retry_after=1),
    DeadlinePassed: Problem(status=429, title="Too many queries for the deadline", retry_after=1),
    TooManyJobs: Problem(status=429, title="Too many jobs", retry_after=60),
    HeadTooLarge: Problem(status=431, title="Address and headers are too large", closes=True),
    ClientGone: Problem(status=499, title="Client closed the connection"),
    ProcessEnded: Problem(status=500, title="The process ended during this query"),
    UnusableModel: Problem(status=503, title="The model cannot be used"),
    RunFault: Problem(status=503, title="The recorded run cannot be used"),
    IndexMismatch: Problem(status=503, title="The index does not fit the model"),
    IndexCorrupt: Problem(status=503, title="The index is damaged"),
    IndexFault: Problem(status=503, title="The index cannot be used"),
    sqlite3.OperationalError: Problem(
        status=503, title="The file of jobs cannot be used", retry_after=60
    ),
    OutOfMemory: Problem(status=503, title="Not enough memory for this query"),
    NotReady: Problem(status=503, title="Not ready", retry_after=5),
    ShuttingDown: Problem(status=503, title="Shutting down", retry_after=10),
}
"""The nearest class in an error's ancestry counts."""

SHOWN_ERRORS = 5
"""So many of a request's errors are listed."""

LONGEST_NAME = 64
"""Characters of a field's name that an error repeats."""

GUARDS = (400, 401, 403, 408, 413, 415, 421, 431)
"""Statuses with which a request can be refused before it reaches its route."""

UNEXPECTED = Problem(status=500, title="Internal error")
INVALID = Problem(status=422, title="Invalid request")


def problem_for(error: Exception) -> Problem:
    """The table's entry for an error."""
    return next((PROBLEMS[c] for c in type(error).__mro__ if c in PROBLEMS), UNEXPECTED)


def problem_document(path: str, error: Exception) -> dict[str, Any]:
    """The problem document of an error, as ``ProblemResponse``: for streams and jobs.

    Args:
        path: of the request, the document's ``instance``.
        error: any; one that is not in the table tells nothing of itself.
    """
    return _document(path, *_describe(error))


def problem_response(path: str, error: Exception) -> JSONResponse:
    """The response for an error, with the headers that belong to it."""
    return _response(path, *_describe(error))


def described(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """For a route's ``responses``: its problem documents, and those of the guards before it."""
    schema = ProblemResponse.model_json_schema()
    every = sorted({*statuses, *GUARDS})
    return {
        status: {
            "description": "; or: ".join(titles) + ".",
            "content": {"application/problem+json": {"schema": schema}},
        }
        for status in every
        if (titles := [p.title for p in (*PROBLEMS.values(), INVALID) if p.status == status])
    }


def install(app: FastAPI) -> None:
    """Answer every error with a problem document and never with a stack trace."""

    async def answer(request: Request, error: Exception) -> JSONResponse:
        return problem_response(request.url.path, error)

    async def http(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        if error.status_code == HTTPStatus.BAD_REQUEST and error.__cause__:
            return problem_response(request.url.path, MalformedBody(_unreadable(error.__cause__)))
        problem = Problem(status=error.status_code, title=HTTPStatus(error.status_code).phrase)
        headers = dict(error.headers or {})
        if "allow" in {name.lower() for name in headers}:
            headers = {"Allow": _allowed(app, request)}
        response = _response(request.url.path, problem, _refusal(request, error, headers))
        response.headers.update(headers)
        return response

    for kind in (*PROBLEMS, RequestValidationError, Exception):
        app.add_exception_handler(kind, answer)
    app.add_exception_handler(HTTPException, http)


def _describe(error: Exception) -> tuple[Problem, str]:
    if isinstance(error, RequestValidationError):
        return _invalid(error)
    problem = problem_for(error)
    if problem is UNEXPECTED:
        return problem, "The service met an error of its own; its log has the details."
    return problem, str(error)


def _invalid(error: RequestValidationError) -> tuple[Problem, str]:
    errors = error.errors()
    if errors and errors[0]["type"] == "json_invalid":
        said, place = errors[0]["ctx"]["error"], errors[0]["loc"][-1]
        return PROBLEMS[MalformedBody], f"The body is not JSON: {said} at character {place}."
    found = [_clause(e) for e in errors]
    more = f"; and {len(found) - SHOWN_ERRORS} more" if len(found) > SHOWN_ERRORS else ""
    return INVALID, "; ".join(found[:SHOWN_ERRORS]) + more + "."


def _clause(error: Mapping[str, Any]) -> str:
    name = ".".join(str(part)[:LONGEST_NAME] for part in error["loc"] if part != "body")
    return f"{name or 'The body'}: {error['msg']}"


def _unreadable(cause: BaseException) -> str:
    if isinstance(cause, RecursionError):
        return "The body cannot be read: it is nested too deeply."
    if isinstance(cause, UnicodeDecodeError):
        return f"The body is not UTF-8: there is no such character at byte {cause.start}."
    return "The body cannot be read: a number in it has too many digits."


def _allowed(app: FastAPI, request: Request) -> str:
    """Methods that an address takes, of all its routes and not only of the first."""
    methods = {
        method
        for route in app.routes
        if isinstance(route, Route) and route.matches(request.scope)[0] is not Match.NONE
        for method in route.methods or ()
    }
    return ", ".join(sorted(methods))


def _refusal(request: Request, error: HTTPException, headers: Mapping[str, str]) -> str:
    if error.status_code == HTTPStatus.NOT_FOUND:
        return f"There is nothing at {request.url.path}; /openapi.json lists all routes."
    if error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
        allowed = headers.get("Allow", "another method")
        return f"{request.url.path} does not take {request.method}; use {allowed}."
    return f"{str(error.detail).rstrip('.')}."


def _document(path: str, problem: Problem, detail: str) -> dict[str, Any]:
    return {
        "type": "about:blank",
        "title": problem.title,
        "status": problem.status,
        # JSON can spell half of a character, which UTF-8 cannot.
        "detail": detail.encode(errors="replace").decode(),
        "instance": path,
    }


def _response(path: str, problem: Problem, detail: str) -> JSONResponse:
    response = JSONResponse(
        _document(path, problem, detail),
        status_code=problem.status,
        media_type="application/problem+json",
    )
    if problem.retry_after is not None:
        response.headers["Retry-After"] = str(problem.retry_after)
    for challenge in problem.challenges:
        response.headers.append("WWW-Authenticate", challenge)
    if problem.closes:
        response.headers["Connection"] = "close"
    return response
