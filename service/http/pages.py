"""The page that people ask with: ``install_page(app)`` serves it at ``/``."""

from pathlib import Path

from fastapi import FastAPI, Request, Response
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

FOLDER = Path(__file__).parent / "page"

SECURITY_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self' data:; connect-src 'self'; font-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
"""Corpus text is anybody's: nothing in it can run, be fetched, or tell where it was read."""


class _PageFiles(StaticFiles):
    async def get_response(self, path: str, scope: Scope) -> Response:
        response = await super().get_response(path, scope)
        response.headers.update(SECURITY_HEADERS)
        return response


def install_page(app: FastAPI) -> None:
    """Serve the page at ``/`` and its files below ``/page/``.

    The page needs the service that it comes from and nothing else: no build step, no network.

    Raises:
        RuntimeError: the page's folder is not in the installed package.
    """
    files = _PageFiles(directory=FOLDER)

    @app.api_route("/", methods=["GET", "HEAD"], include_in_schema=False)
    async def page(request: Request) -> Response:
        """Return the page."""
        return await files.get_response("index.html", request.scope)

    app.mount("/page", files, name="page")
