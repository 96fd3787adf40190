"""Commands in processes of their own, forked from one that has imported what they need.

Importing PyTorch and the service takes seconds of computing. ``Nursery`` starts one process that
does so once; every command is a fork of it that runs a module as ``python -m`` does, with its own
arguments, environment and streams.
"""

import importlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO

ROOT = Path(__file__).parents[1]
IMPORTED = (
    "service.http.app",
    "service.indexing.building",
    "service.indexing.fitting",
    "transformers.models.gpt2.modeling_gpt2",
    "typer.core",
)
"""What takes long to import of what commands need."""
PATIENCE = 120.0
"""Seconds for a process to begin or to end on a busy machine."""


class Command:
    """A process that was begun, as ``subprocess.Popen`` has it.

    Attributes:
        stdout: what it prints.
        stderr: what it says.
    """

    def __init__(self, channel: socket.socket, pid: int, stdout: TextIO, stderr: TextIO) -> None:
        self.stdout = stdout
        self.stderr = stderr
        self.returncode: int | None = None
        self._pid = pid
        self._channel = channel

    def send_signal(self, number: int) -> None:
        """Send a signal, unless it has ended."""
        if self.poll() is None:
            os.kill(self._pid, number)

    def poll(self) -> int | None:
        """The exit status if it has ended, negative for the signal that ended it."""
        self._channel.setblocking(False)
        try:
            return self._status()
        except BlockingIOError:
            return None

    def wait(self, timeout: float = PATIENCE) -> int:
        """The exit status, as soon as it has ended."""
        self._channel.settimeout(timeout)
        return self._status()

    def _status(self) -> int:
        if self.returncode is None:
            answer = self._channel.recv(100)
            assert answer, "The process that commands are forked from has ended."
            self.returncode = json.loads(answer)
        return self.returncode

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Whatever happened, nothing of it is left."""
        self.send_signal(signal.SIGKILL)
        self.wait()
        self.stdout.close()
        self.stderr.close()


class Nursery:
    """The process that commands are forked from, one command at a time."""

    def __init__(self) -> None:
        self._channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.commands", str(theirs.fileno())],
                cwd=ROOT,
                env={**os.environ, "HF_HUB_OFFLINE": "1"},
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
            )

    def start(
        self,
        module: str,
        *arguments: object,
        environment: Mapping[str, str] | None = None,
        quiet: bool = False,
    ) -> Command:
        """Run ``python -m module``, with another environment than this process' own if given.

        With ``quiet`` what it says is dropped; else somebody must read it, or it waits when a pipe
        is full.
        """
        asked = {
            "module": module,
            "arguments": [str(argument) for argument in arguments],
            "environment": dict(os.environ if environment is None else environment),
        }
        out, child_out = os.pipe()
        err, child_err = os.pipe()
        if quiet:
            os.close(child_err)
            child_err = os.open(os.devnull, os.O_WRONLY)
        self._channel.settimeout(PATIENCE)
        socket.send_fds(self._channel, [json.dumps(asked).encode()], [child_out, child_err])
        os.close(child_out)
        os.close(child_err)
        pid = json.loads(self._channel.recv(100))
        return Command(self._channel, pid, os.fdopen(out), os.fdopen(err))

    def close(self) -> None:
        """End it."""
        self._channel.close()
        self._process.wait(PATIENCE)


def _serve(channel: socket.socket) -> None:
    """Fork a command for each message and tell its id, then its exit status, until nobody asks."""
    for module in IMPORTED:
        importlib.import_module(module)
    while True:
        message, streams, _, _ = socket.recv_fds(channel, 1 << 17, 2)
        if not message:
            os._exit(0)  # an orderly end of so much takes seconds
        child = os.fork()
        if child == 0:
            channel.close()
            _become(json.loads(message), streams)
            return
        for stream in streams:
            os.close(stream)
        channel.send(json.dumps(child).encode())
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        try:
            channel.send(json.dumps(status).encode())
        except BrokenPipeError:
            os._exit(0)


def _become(asked: Mapping[str, Any], streams: list[int]) -> None:
    """Run the module in this process, as if it had been started for it."""
    for number, stream in enumerate(streams, start=1):
        os.dup2(stream, number)
        os.close(stream)
    os.environ.clear()
    os.environ.update(asked["environment"])
    sys.argv = [asked["module"], *asked["arguments"]]
    runpy.run_module(asked["module"], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    _serve(socket.socket(fileno=int(sys.argv[1])))
