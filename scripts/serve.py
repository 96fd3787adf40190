"""Serve indexes over HTTP: the model and every index are loaded and checked before it listens."""

import copy
import json
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, NoReturn

import typer
import uvicorn
from pydantic import ValidationError
from pydantic_settings import SettingsError
from uvicorn.config import LOGGING_CONFIG

from scripts.console import one_sentence_errors, print_json, stderr
from service.app import create_app
from service.settings import Settings

GRACE_SECONDS = 8
"""How long a query under way may take to finish after SIGTERM; docker kills after 10 seconds."""

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
            help="Queries accepted at once, more are refused with 503; else ETYMON_MAX_IN_FLIGHT."
        ),
    ] = None,
) -> None:
    """Serve queries over HTTP until SIGTERM or Ctrl-C, in one process.

    Settings that are left out come from the environment (ETYMON_MODEL, ETYMON_INDEXES as JSON, and
    so on), then from their defaults. One JSON line with the address is printed once it answers.

    Example: python -m scripts.serve --model runs/demo/model --index default=runs/demo/index
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _end)
    settings = read_settings(
        model=model,
        indexes=parse_indexes(index) if index else None,
        device=device,
        dtype=dtype,
        token_budget=token_budget,
        max_in_flight=max_in_flight,
    )
    service = create_app(settings)
    _tell(f"loading {settings.model} and {', '.join(map(str, settings.indexes.values()))}")
    service.state.engine.load()
    listener = listen(host, port)
    url = _address(host, listener.getsockname()[1])
    config = uvicorn.Config(
        service, log_config=_log_to_stderr(), timeout_graceful_shutdown=GRACE_SECONDS
    )
    Server(config, lambda: _announce(url, settings)).run(sockets=[listener])


class Server(uvicorn.Server):
    """A uvicorn server that says when it answers.

    Args:
        config: of uvicorn.
        when_ready: called once the sockets are served.
    """

    def __init__(self, config: uvicorn.Config, when_ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._when_ready = when_ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start serving ``sockets``."""
        await super().startup(sockets=sockets)
        self._when_ready()


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
    body: dict[str, Any] = {"prompt": "The capital of France is"}
    first = next(iter(settings.indexes))
    if "default" not in settings.indexes:
        body["index"] = first
    _tell(
        f"ready; try: curl -s {url}/v1/query -H 'content-type: application/json' "
        f"-d '{json.dumps(body)}'"
    )
    print_json({"url": url, "indexes": list(settings.indexes)})
    sys.stdout.flush()


def _tell(sentence: str) -> None:
    stderr.print(sentence, markup=False, highlight=False, soft_wrap=True)


def _log_to_stderr() -> dict[str, Any]:
    config = copy.deepcopy(LOGGING_CONFIG)
    config["handlers"]["access"]["stream"] = "ext://sys.stderr"
    return config


def _end(number: int, frame: FrameType | None) -> NoReturn:
    # While it serves, uvicorn catches the signal, finishes what is under way and raises it again.
    raise SystemExit(0)


if __name__ == "__main__":
    app()
