"""Who may ask: keys, and the pages and host names from which a request may come."""

import base64
import binascii
import hashlib
import hmac
import logging
import re
from collections.abc import Iterable

from fastapi import FastAPI
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.errors import Forbidden, Unauthorised, WrongHost
from service.http.limits import refuse
from service.settings import Settings

SHORTEST_KEY = 16
"""Characters; one of random letters and digits has 95 bits, beyond guessing over a network."""

OPEN_PATHS = ("/livez", "/readyz")
"""They tell nothing, and probes have neither key nor host name."""

LOOPBACK = ("localhost", "127.0.0.1", "[::1]")

SAFE_METHODS = ("GET", "HEAD", "OPTIONS")

OWN_PAGES = ("same-origin", "none")
"""``Sec-Fetch-Site`` of the service's own page, and of addresses that were typed."""

RESPONSE_HEADERS = {
    "Cache-Control": "no-store",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}
"""On every response that does not set them itself: training text is kept from other pages' reach
and from caches."""


def install(app: FastAPI, settings: Settings) -> None:
    """Ask every request for a key; without keys, for a host name of this machine.

    Raises:
        ValueError: a key is unfit, or the file of keys cannot be read.
    """
    app.add_middleware(Access, keys=read_keys(settings), hosts=settings.allowed_hosts)


def read_keys(settings: Settings) -> tuple[bytes, ...]:
    """SHA-256 digests of all keys.

    Raises:
        ValueError: a key is too short or has characters that no header can carry (the message
            does not tell the key), the file cannot be read, or holds none.
    """
    given = [("ETYMON_API_KEYS", key.get_secret_value()) for key in settings.api_keys]
    if settings.api_keys_file is not None:
        given += [(str(settings.api_keys_file), key) for key in _lines(settings)]
    for number, (source, key) in enumerate(given, start=1):
        if len(key) < SHORTEST_KEY:
            raise ValueError(
                f"Key {number} (of {source}) has {len(key)} characters; give at least "
                f"{SHORTEST_KEY}, e.g. of: openssl rand -hex 24."
            )
        if not re.fullmatch(r"[!-~]+", key):
            raise ValueError(
                f"Key {number} (of {source}) has a space or a character outside ASCII; use letters "
                f"and digits."
            )
    return tuple(_digest(key) for _, key in given)


def has_keys(settings: Settings) -> bool:
    """Whether requests will have to show a key."""
    return bool(settings.api_keys) or settings.api_keys_file is not None


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach what listens at ``host``."""
    return host in ("localhost", "::1") or re.fullmatch(r"127(\.\d{1,3}){3}", host) is not None


class Access:
    """ASGI middleware: refuses what may not ask, and adds ``RESPONSE_HEADERS``.

    Args:
        app: what is guarded.
        keys: SHA-256 digests of the keys.
        hosts: names beside those of this machine that ``Host`` may give if there are no keys.
    """

    def __init__(self, app: ASGIApp, *, keys: tuple[bytes, ...], hosts: Iterable[str]) -> None:
        self._app = app
        self._keys = keys
        self._hosts = {*LOOPBACK, *(host.lower() for host in hosts)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass an HTTP request on or refuse it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in RESPONSE_HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        try:
            self._check(scope)
        except (Forbidden, Unauthorised, WrongHost) as error:
            await refuse(error, scope, receive, send_with_headers)
        else:
            await self._app(scope, receive, send_with_headers)

    def _check(self, scope: Scope) -> None:
        headers = Headers(scope=scope)
        if scope["path"] not in OPEN_PATHS:
            if self._keys:
                self._check_key(headers.get("authorization"))
            else:
                self._check_host(headers.getlist("host"))
        site = headers.get("sec-fetch-site", "none")
        if scope["method"] not in SAFE_METHODS and site not in OWN_PAGES:
            raise Forbidden(
                f"A browser sent this {scope['method']} for a page of another origin ({site}); "
                f"only the service's own page may."
            )

    def _check_key(self, authorisation: str | None) -> None:
        if authorisation is None:
            raise Unauthorised(
                "This service asks for a key; send 'Authorization: Bearer KEY', or give it as the "
                "password with any user name."
            )
        given = _digest(_key_in(authorisation))
        # All keys are compared, so that the time does not tell which one is close.
        if not sum([hmac.compare_digest(given, key) for key in self._keys]):
            raise Unauthorised("This is none of the service's keys.")

    def _check_host(self, given: list[str]) -> None:
        host = re.sub(r":\d*$", "", given[0]).lower() if len(given) == 1 else None
        if host not in self._hosts:
            raise WrongHost(
                "Without keys this service answers to localhost, 127.0.0.1 and [::1] only; "
                "ETYMON_ALLOWED_HOSTS can name further hosts."
            )


def _key_in(authorisation: str) -> str:
    scheme, _, credentials = authorisation.partition(" ")
    credentials = credentials.strip()
    if scheme.lower() == "bearer":
        return credentials
    if scheme.lower() == "basic":
        try:
            decoded = base64.b64decode(credentials, validate=True).decode()
        except (binascii.Error, UnicodeDecodeError):
            decoded = ""
        return decoded.partition(":")[2]
    return ""


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode(errors="surrogatepass")).digest()


def _lines(settings: Settings) -> list[str]:
    path = settings.api_keys_file
    assert path is not None
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
        mode = path.stat().st_mode
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8"
        raise ValueError(
            f"The keys in {path} cannot be read ({reason}); correct ETYMON_API_KEYS_FILE."
        ) from None
    keys = [line for line in lines if line and not line.startswith("#")]
    if not keys:
        raise ValueError(f"{path} holds no key; write one a line, or leave it out.")
    if mode & 0o077:
        logging.getLogger(__name__).warning(
            "%s can be read by other users of this machine; chmod 600 keeps it to yours.", path
        )
    return keys
