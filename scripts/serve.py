"""Serve indexes over HTTP: it listens at once and is ready when all is loaded and checked."""

import asyncio
import json
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, NoReturn

import h11
import typer
import uvicorn
from pydantic import ValidationError
from pydantic_settings import SettingsError
from uvicorn.protocols.http.h11_impl import H11Protocol

from scripts import options
from scripts.console import one_sentence_errors, print_json, stderr
from service.http.access import has_keys, is_loopback
from service.http.app import create_app
from service.http.limits import HEAD_BYTES
from service.http.telemetry import log_config
from service.settings import Settings

REFUSING_SECONDS = 1.0
"""After SIGTERM it goes on listening for so long, so that who asks is told rather than cut off."""
GRACE_SECONDS = 8
"""How long a query under way may then take to finish; docker kills 10 seconds after SIGTERM."""
DRAIN_SECONDS = 5.0
"""What is under way then answers with what it has found within so long."""

HEADER_SECONDS = 10.0
"""A connection that has not sent the whole head of a request by then is closed."""

CONNECTIONS = 256
"""Connections held open at once; a request on one more is refused with 503."""

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
@one_sentence_errors
def main(
    model: Annotated[
        str | None,
        typer.Option(help="Folder or name of the causal language model; else ETYMON_MODEL."),
    ] = None,
    index: Annotated[
        list[str] | None,
        typer.Option(
            help="An index as NAME=FOLDER, e.g. default=runs/demo/index; may be repeated; else "
            "ETYMON_INDEXES."
        ),
    ] = None,
    trace: Annotated[
        list[str] | None,
        typer.Option(
            help="Folder that etymon trace wrote for the run that trained the model; with several "
            "indexes NAME=FOLDER, and it may be repeated; else ETYMON_TRACES."
        ),
    ] = None,
    run: Annotated[
        list[str] | None,
        typer.Option(
            help="Folder of that run, where it no longer lies where it was traced; named as "
            "--trace is; else ETYMON_RUNS."
        ),
    ] = None,
    revision: options.Revision = None,
    tokenizer: options.Tokenizer = None,
    base_model: options.BaseModel = None,
    unused_weights: options.UnusedWeights = False,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port to listen on; 0 takes a free one.")
    ] = 8000,
    device: Annotated[
        str | None, typer.Option(help="Where to compute, e.g. cpu or cuda; else ETYMON_DEVICE.")
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="auto (as stored), float32, bfloat16 or float16; else ETYMON_DTYPE."),
    ] = None,
    token_budget: Annotated[
        int | None, typer.Option(help="Padded tokens in a batch; else ETYMON_TOKEN_BUDGET.")
    ] = None,
    max_in_flight: Annotated[
        int | None,
        typer.Option(
            help="Queries accepted at once, more are refused with 429; else ETYMON_MAX_IN_FLIGHT."
        ),
    ] = None,
    keys_file: Annotated[
        Path | None,
        typer.Option(
            help="File with the keys that requests must show, one a line; else "
            "ETYMON_API_KEYS_FILE, ETYMON_API_KEYS."
        ),
    ] = None,
    allowed_host: Annotated[
        list[str] | None,
        typer.Option(
            help="Without keys: a name beside localhost that requests may give as their Host; may "
            "be repeated; else ETYMON_ALLOWED_HOSTS."
        ),
    ] = None,
) -> None:
    """Serve queries over HTTP until SIGTERM or Ctrl-C, in one process.

    Settings that are left out come from the environment (ETYMON_MODEL,
    ETYMON_INDEXES as JSON, and so on), then from their defaults. It prints
    one JSON line with its address as soon as it is ready.

    Example:
    etymon serve --model runs/demo/model --index default=runs/demo/index
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _end)
    settings = read_settings(
        model=model,
        revision=revision,
        tokenizer=tokenizer,
        base_model=base_model,
        unused_weights=unused_weights or None,
        indexes=(indexes := parse_indexes(index) if index else None),
        traces=parse_of_indexes("--trace", trace, indexes) if trace else None,
        runs=parse_of_indexes("--run", run, indexes) if run else None,
        device=device,
        dtype=dtype,
        token_budget=token_budget,
        max_in_flight=max_in_flight,
        api_keys_file=keys_file,
        allowed_hosts=tuple(allowed_host) if allowed_host else None,
    )
    check_exposure(host, settings)
    service = create_app(settings, load=False)
    listener = listen(host, port)
    url = _address(host, listener.getsockname()[1])
    _tell(f"loading {settings.model} and {', '.join(map(str, settings.indexes.values()))}")
    serve(
        Server(
            configure(service),
            load=service.state.engine.load,
            when_ready=lambda: _announce(url, settings),
            drain=lambda: service.state.engine.close(DRAIN_SECONDS),
        ),
        listener,
    )


def configure(service: Any) -> uvicorn.Config:
    """How uvicorn serves the app."""
    return uvicorn.Config(
        service,
        http=TimedProtocol,
        ws="none",
        log_config=log_config(),
        access_log=False,
        server_header=False,
        limit_concurrency=CONNECTIONS,
        backlog=CONNECTIONS,
        h11_max_incomplete_event_size=HEAD_BYTES,
        timeout_graceful_shutdown=GRACE_SECONDS,
    )


def serve(server: "Server", listener: socket.socket) -> None:
    """Serve until told to end.

    Raises:
        Exception: what went wrong while loading.
    """
    try:
        server.run(sockets=[listener])
    finally:
        if server.loading:
            # The loading thread cannot be stopped, and would run into the ending interpreter.
            os._exit(0)
    if server.failure is not None:
        raise server.failure


class Server(uvicorn.Server):
    """A uvicorn server that listens, then loads what it serves.

    Args:
        config: of uvicorn.
        load: loads what is served; called in a thread once the sockets are served.
        when_ready: called in the same thread afterwards.
        drain: called when it is told to end, before what is under way is waited for.

    Attributes:
        loading: whether ``load`` is under way.
        failure: what ``load`` raised; the server ends then.
    """

    def __init__(
        self,
        config: uvicorn.Config,
        *,
        load: Callable[[], None],
        when_ready: Callable[[], None],
        drain: Callable[[], None],
    ) -> None:
        super().__init__(config)
        self.loading = False
        self.failure: Exception | None = None
        self._load = load
        self._when_ready = when_ready
        self._drain = drain

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start serving ``sockets``."""
        await super().startup(sockets=sockets)
        self.loading = True
        threading.Thread(target=self._prepare, daemon=True).start()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Refuse what waits, have what is under way answer with what it has, then end."""
        self._drain()
        if not self.loading:
            await asyncio.sleep(REFUSING_SECONDS)
        await super().shutdown(sockets=sockets)

    def _prepare(self) -> None:
        try:
            self._load()
            if not self.should_exit:
                self._when_ready()
        except Exception as error:  # noqa: BLE001 - raised again where the command ends
            self.failure = error
            self.should_exit = True
        finally:
            self.loading = False


class TimedProtocol(H11Protocol):
    """HTTP/1.1 that does not wait for ever for the head of a request, which uvicorn's own does."""

    _overdue: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client has connected."""
        super().connection_made(transport)
        self._overdue = self.loop.call_later(HEADER_SECONDS, transport.close)

    def data_received(self, data: bytes) -> None:
        """A part of a request has come."""
        super().data_received(data)
        if self.conn.their_state is not h11.IDLE:
            self._stop()
        elif self._overdue is None:
            self._overdue = self.loop.call_later(HEADER_SECONDS, self.transport.close)

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is closed."""
        self._stop()
        super().connection_lost(exc)

    def _stop(self) -> None:
        if self._overdue is not None:
            self._overdue.cancel()
            self._overdue = None


def check_exposure(host: str, settings: Settings) -> None:
    """Refuse to let other machines ask without a key.

    Raises:
        ValueError: ``host`` can be reached from elsewhere and there are no keys.
    """
    if not has_keys(settings) and not is_loopback(host):
        raise ValueError(
            f"Without keys the service listens on this machine only, and --host {host} can be "
            f"reached from others; give --keys-file FILE or set ETYMON_API_KEYS."
        )


def parse_indexes(values: list[str]) -> dict[str, Path]:
    """Folders by name from NAME=FOLDER.

    Raises:
        ValueError: a value of another form, or a name that comes twice.
    """
    indexes: dict[str, Path] = {}
    for value in values:
        name, equals, folder = value.partition("=")
        if not (name and equals and folder):
            raise ValueError(f"--index must be NAME=FOLDER, e.g. default={value}; got '{value}'.")
        if name in indexes:
            raise ValueError(f"--index names '{name}' twice; give each index its own name.")
        indexes[name] = Path(folder)
    return indexes


def parse_of_indexes(
    flag: str, values: list[str], indexes: Mapping[str, Path] | None
) -> dict[str, Path]:
    """Folders by the name of their index, from FOLDER or NAME=FOLDER.

    Args:
        flag: that they were given with.
        values: of the flag.
        indexes: that were named by flags; None if they come from the environment.

    Raises:
        ValueError: a folder without a name where it could belong to several indexes, or two for
            one index.
    """
    names = ["default"] if indexes is None else list(indexes)
    found: dict[str, Path] = {}
    for value in values:
        name, equals, folder = value.partition("=")
        if not equals or (name not in names and Path(value).exists()):
            if len(names) > 1:
                raise ValueError(
                    f"{flag} must be NAME=FOLDER where several indexes are served, e.g. "
                    f"{names[0]}={value}; got '{value}'."
                )
            name, folder = names[0], value
        if name in found:
            raise ValueError(f"{flag} names '{name}' twice; give each index one folder.")
        found[name] = Path(folder)
    return found


def read_settings(**flags: Any) -> Settings:
    """The settings: flags that are not None, then the environment, then the defaults.

    Raises:
        ValueError: one is missing or wrong.
    """
    try:
        return Settings(**{name: value for name, value in flags.items() if value is not None})
    except SettingsError as error:
        raise ValueError(
            f"A variable of the environment is wrong: {error}; ETYMON_INDEXES must be JSON, "
            f'e.g. {{"default": "runs/demo/index"}}.'
        ) from error
    except ValidationError as error:
        found = [(".".join(map(str, e["loc"])), e["msg"]) for e in error.errors()]
        listing = "; ".join(f"{name} (flag or ETYMON_{name.upper()}): {m}" for name, m in found)
        raise ValueError(f"The settings are incomplete or wrong: {listing}.") from error


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens.

    Raises:
        ValueError: the address cannot be had.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except OSError as error:
        raise ValueError(
            f"Cannot listen on {host}, port {port} ({error.strerror}); choose another --host or "
            f"--port."
        ) from error


def _address(host: str, port: int) -> str:
    reachable = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104
    return f"http://[{reachable}]:{port}" if ":" in reachable else f"http://{reachable}:{port}"


def _announce(url: str, settings: Settings) -> None:
    key = " -H 'authorization: Bearer KEY'" if has_keys(settings) else ""
    body: dict[str, Any] = {"prompt": "The capital of France is"}
    first = next(iter(settings.indexes))
    if "default" not in settings.indexes:
        body["index"] = first
    _tell(
        f"ready; try: curl -s {url}/v1/query{key} -H 'content-type: application/json' "
        f"-d '{json.dumps(body)}'"
    )
    print_json({"url": url, "indexes": list(settings.indexes)})
    sys.stdout.flush()


def _tell(sentence: str) -> None:
    stderr.print(sentence, markup=False, highlight=False, soft_wrap=True)


def _end(number: int, frame: FrameType | None) -> NoReturn:
    # While it serves, uvicorn catches the signal, finishes what is under way and raises it again.
    raise SystemExit(0)


if __name__ == "__main__":
    app()
