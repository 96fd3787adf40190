"""Where a client finds the service, how patient it is, and what the responses mean."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import httpx
from pydantic import BaseModel, ValidationError

BUSY = (429, 503)
"""Statuses after which it helps to ask again."""

M = TypeVar("M", bound=BaseModel)


class ServiceError(RuntimeError):
    """No answer; the message says why, in one sentence."""


class ServiceUnreachable(ServiceError):  # noqa: N818 - named for what is wrong
    """Nothing answers there, or not in time."""


class ServiceProblem(ServiceError):  # noqa: N818
    """The service refused, or what answers is no such service.

    Attributes:
        status: of HTTP; 0 if the refusal came within a stream without one.
        title: the same for all refusals of the kind.
        detail: what was wrong with this request.
        document: the problem document itself.
    """

    def __init__(self, document: Mapping[str, Any]) -> None:
        self.status: int = document["status"]
        self.title: str = document["title"]
        self.detail: str = document["detail"]
        self.document = document
        super().__init__(f"{self.title}: {self.detail}")


@dataclass(frozen=True, kw_only=True)
class Connection:
    """Where the service is and how patient to be.

    Attributes:
        url: of the service.
        key: that it asks for, if any.
        timeout: seconds to wait for an answer.
        retries: how often to ask again when it is busy, as long as it says to wait.
        longest_wait: most seconds to wait before asking again.

    Raises:
        ValueError: no header can carry the key (the message does not tell it).
    """

    url: str = "http://127.0.0.1:8000"
    key: str | None = field(default=None, repr=False)
    timeout: float = 600.0
    retries: int = 3
    longest_wait: float = 30.0

    def __post_init__(self) -> None:
        # Not left to httpx, whose message about such a header repeats it.
        if self.key is not None and not re.fullmatch(r"[!-~]+", self.key):
            raise ValueError(
                "The key is empty or has a space, a line end or a character outside ASCII; give it "
                "exactly as the service has it."
            )

    @property
    def shown_url(self) -> str:
        """The URL without a password."""
        return re.sub(r"(?<=//)[^/]*@", "", self.url)

    def options(self) -> dict[str, Any]:
        """For a client of httpx."""
        headers = {} if self.key is None else {"Authorization": f"Bearer {self.key}"}
        return {"base_url": self.url, "timeout": self.timeout, "headers": headers}

    def broken_off(self) -> ServiceUnreachable:
        """For a stream that ended without an answer."""
        return ServiceUnreachable(
            f"{self.shown_url} ended its stream without an answer; ask again."
        )

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
                f"No answer from {self.shown_url} within {self.timeout:g} seconds."
            ) from error
        except (httpx.HTTPError, httpx.InvalidURL, UnicodeError) as error:
            raise ServiceUnreachable(
                f"Cannot ask the service at {self.shown_url} ({str(error).rstrip('.')}); start it "
                f"with etymon serve, or name another."
            ) from error


def read(response: httpx.Response, model: type[M]) -> M:
    """The answer as its schema.

    Raises:
        ServiceProblem: a refusal, or no answer of such a service.
    """
    check(response)
    try:
        return model.model_validate_json(response.content, extra="ignore")
    except ValidationError as error:
        raise _stranger(response) from error


def check(response: httpx.Response) -> None:
    """Raise ServiceProblem unless it was a success."""
    if response.is_success:
        return
    try:
        raise ServiceProblem({"status": response.status_code, **response.json()})
    except (ValueError, KeyError, TypeError) as error:
        raise _stranger(response) from error


def _stranger(response: httpx.Response) -> ServiceProblem:
    status, title = response.status_code, str(response.url.copy_with(userinfo=b""))
    detail = f"it answered with HTTP status {status} and is no service of this kind."
    return ServiceProblem({"status": status, "title": title, "detail": detail})
