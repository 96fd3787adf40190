"""From errors to HTTP problem documents (RFC 9457), in one table."""

from dataclasses import dataclass

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from estimators.rescoring import NonFiniteGradientError
from index.errors import IndexCorrupt, IndexFault, IndexMismatch, IndexMissing
from service.models import BadQuery


class UnknownIndex(ValueError):  # noqa: N818 - named for what is wrong
    """No index is served under this name."""


class Overloaded(RuntimeError):  # noqa: N818
    """As many queries are under way as the service accepts."""


class NotReady(RuntimeError):  # noqa: N818
    """The model or an index is not loaded yet."""


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
    Overloaded: Problem(status=503, title="Too many queries at once", retry_after=1),
    NotReady: Problem(status=503, title="Not ready", retry_after=5),
}
"""The nearest class in an error's ancestry counts."""

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
        parts = [
            f"{'.'.join(str(p) for p in e['loc'] if p != 'body') or 'body'}: {e['msg']}"
            for e in error.errors()
        ]
        return _document(request, Problem(status=422, title="Invalid request"), "; ".join(parts))

    async def http(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        problem = Problem(status=error.status_code, title=str(error.detail))
        response = _document(request, problem, f"{request.method} {request.url.path}")
        response.headers.update(error.headers or {})
        return response

    for kind in PROBLEMS:
        app.add_exception_handler(kind, known)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(Exception, unexpected)


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
