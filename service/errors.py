"""From errors to HTTP problem documents (RFC 9457), in one table."""

from collections.abc import Mapping
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from estimators.memory import OutOfMemory
from estimators.rescoring import NonFiniteGradientError
from index.errors import IndexCorrupt, IndexFault, IndexMismatch, IndexMissing
from service.models import BadQuery


class UnknownIndex(ValueError):  # noqa: N818 - named for what is wrong
    """No index is served under this name."""


class Overloaded(RuntimeError):  # noqa: N818
    """As many queries are under way as the service accepts."""


class NotReady(RuntimeError):  # noqa: N818
    """The model or an index is not loaded yet."""


class ClientGone(RuntimeError):  # noqa: N818
    """The client hung up before its query's turn came; nobody reads this."""


@dataclass(frozen=True, kw_only=True)
class Problem:
    """How an error appears over HTTP."""

    status: int
    title: str
    retry_after: int | None = None


PROBLEMS: dict[type[Exception], Problem] = {
    BadQuery: Problem(status=422, title="The query cannot be measured"),
    NonFiniteGradientError: Problem(status=422, title="The query's gradient is not finite"),
    UnknownIndex: Problem(status=404, title="Unknown index"),
    IndexMissing: Problem(status=404, title="Not found"),
    IndexMismatch: Problem(status=503, title="The index does not fit the model"),
    IndexCorrupt: Problem(status=503, title="The index is damaged"),
    IndexFault: Problem(status=503, title="The index cannot be used"),
    OutOfMemory: Problem(status=503, title="Not enough memory for this query"),
    Overloaded: Problem(status=503, title="Too many queries at once", retry_after=1),
    NotReady: Problem(status=503, title="Not ready", retry_after=5),
    ClientGone: Problem(status=499, title="Client closed the connection"),
}
"""The nearest class in an error's ancestry counts."""

SHOWN_ERRORS = 5
"""So many of a request's errors are listed."""

UNEXPECTED = Problem(status=500, title="Internal error")


def problem_for(error: Exception) -> Problem:
    """The table's entry for an error."""
    return next((PROBLEMS[c] for c in type(error).__mro__ if c in PROBLEMS), UNEXPECTED)


def install(app: FastAPI) -> None:
    """Answer every error with a problem document and never with a stack trace."""

    async def known(request: Request, error: Exception) -> JSONResponse:
        return _document(request, problem_for(error), str(error))

    async def unexpected(request: Request, error: Exception) -> JSONResponse:
        detail = "The service met an error of its own; its log has the details."
        return _document(request, UNEXPECTED, detail)

    async def invalid(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        found = [_clause(e) for e in error.errors()]
        more = f"; and {len(found) - SHOWN_ERRORS} more" if len(found) > SHOWN_ERRORS else ""
        detail = "; ".join(found[:SHOWN_ERRORS]) + more + "."
        return _document(request, Problem(status=422, title="Invalid request"), detail)

    async def http(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        problem = Problem(status=error.status_code, title=HTTPStatus(error.status_code).phrase)
        response = _document(request, problem, _refusal(request, error))
        response.headers.update(error.headers or {})
        return response

    for kind in PROBLEMS:
        app.add_exception_handler(kind, known)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(Exception, unexpected)


def _clause(error: Mapping[str, Any]) -> str:
    if error["type"] == "json_invalid":
        return f"The body is not JSON: {error['ctx']['error']} at character {error['loc'][-1]}"
    name = ".".join(str(part) for part in error["loc"] if part != "body")
    return f"{name or 'The body'}: {error['msg']}"


def _refusal(request: Request, error: HTTPException) -> str:
    if error.status_code == HTTPStatus.NOT_FOUND:
        return f"There is nothing at {request.url.path}; /openapi.json lists all routes."
    if error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
        allowed = (error.headers or {}).get("Allow", "another method")
        return f"{request.url.path} does not take {request.method}; use {allowed}."
    return f"{str(error.detail).rstrip('.')}."


def _document(request: Request, problem: Problem, detail: str) -> JSONResponse:
    headers = {} if problem.retry_after is None else {"Retry-After": str(problem.retry_after)}
    return JSONResponse(
        {
            "type": "about:blank",
            "title": problem.title,
            "status": problem.status,
            "detail": detail,
            "instance": request.url.path,
        },
        status_code=problem.status,
        headers=headers,
        media_type="application/problem+json",
    )
