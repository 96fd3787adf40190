"""How much a request may send, how slowly, and in what form."""

import asyncio
from contextlib import suppress

from fastapi import FastAPI
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.errors import ClientGone, HeadTooLarge, TooLarge, TooSlow, WrongContentType
from service.http.problems import problem_response
from service.settings import Settings

JOBS_PATH = "/v1/jobs"

BODY_METHODS = ("POST", "PUT", "PATCH")

HEAD_BYTES = 2**14
"""Largest head of a request: its address and its headers."""

LINGER_SECONDS = 1.0
"""After a refusal, what still arrives is thrown away for so long: a client that is still sending
when the connection closes may lose the response."""


def install(app: FastAPI, settings: Settings) -> None:
    """Refuse bodies that are too large, too slow, compressed or not called JSON."""
    app.add_middleware(Limits, settings=settings)


class Limits:
    """ASGI middleware: reads the body within its limits, then passes the request on whole.

    Args:
        app: what is guarded.
        settings: of the service.
    """

    def __init__(self, app: ASGIApp, *, settings: Settings) -> None:
        self._app = app
        self._settings = settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass an HTTP request on or refuse it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        try:
            _check_head(scope)
            if _has_body(headers):
                _check_form(scope["method"], headers)
                body = await self._read(scope["path"], headers, receive)
                receive = _replay(body, receive)
        except ClientGone as error:
            await problem_response(scope["path"], error)(scope, receive, send)
        except (HeadTooLarge, TooLarge, TooSlow, WrongContentType) as error:
            await refuse(error, scope, receive, send)
        else:
            await self._app(scope, receive, send)

    async def _read(self, path: str, headers: Headers, receive: Receive) -> bytes:
        """The whole body: it is at most the limit, and JSON is parsed whole anyway."""
        settings = self._settings
        of_job = path.rstrip("/") == JOBS_PATH
        most = settings.max_job_body_bytes if of_job else settings.max_body_bytes
        _check_length(headers, most)
        body = bytearray()
        more = True
        try:
            async with asyncio.timeout(settings.body_seconds):
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ClientGone("The client hung up before its body was complete.")
                    body += message.get("body", b"")
                    if len(body) > most:
                        raise TooLarge(f"The body is larger than {most:,} bytes, the most here.")
                    more = message.get("more_body", False)
        except TimeoutError as error:
            raise TooSlow(
                f"The body was not complete after {settings.body_seconds:g} seconds; send it at "
                f"once."
            ) from error
        return bytes(body)


async def refuse(error: Exception, scope: Scope, receive: Receive, send: Send) -> None:
    """Answer with the error's problem document, then read on for a moment to no end."""
    end: Message = {"type": "http.response.body", "body": b"", "more_body": False}

    async def send_but_the_end(message: Message) -> None:
        if message["type"] == "http.response.body":
            message = {**message, "more_body": True}
        await send(message)

    await problem_response(scope["path"], error)(scope, receive, send_but_the_end)
    if _has_body(Headers(scope=scope)):
        with suppress(TimeoutError):
            async with asyncio.timeout(LINGER_SECONDS):
                while (await receive()).get("more_body", False):
                    pass
    await send(end)


def _has_body(headers: Headers) -> bool:
    return headers.get("content-length", "0") != "0" or "transfer-encoding" in headers


def _check_head(scope: Scope) -> None:
    parts = [part for header in scope["headers"] for part in header]
    size = sum(map(len, (*parts, scope.get("raw_path", b""), scope["query_string"])))
    if size > HEAD_BYTES:
        raise HeadTooLarge(
            f"The request's address and headers have {size:,} bytes, of at most {HEAD_BYTES:,}."
        )


def _check_form(method: str, headers: Headers) -> None:
    encoding = headers.get("content-encoding", "identity")
    if encoding.strip().lower() != "identity":
        raise WrongContentType(
            f"The body has Content-Encoding {encoding[:40]}; send it as it is, without one."
        )
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    if method in BODY_METHODS and kind != "application/json":
        raise WrongContentType(
            f"The body has Content-Type '{kind[:40]}'; send JSON as application/json."
        )


def _check_length(headers: Headers, most: int) -> None:
    given = headers.get("content-length", "0")
    if given.isascii() and given.isdigit() and len(given) < 16 and int(given) <= most:
        return
    raise TooLarge(f"The body has {given[:40]} bytes; this service takes at most {most:,}.")


def _replay(body: bytes, receive: Receive) -> Receive:
    """The body in one piece, then what else arrives, as that the client hangs up."""
    first: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return first.pop() if first else await receive()

    return replay
