"""What demonstrations share: commands run as a user would run them, each one measured."""

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from scripts.console import stderr
from scripts.main import COMMANDS, PROGRAM

START_SECONDS = 300
"""How long the service may take to load."""


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a step took.

    Attributes:
        seconds: wall-clock time.
        processor_seconds: of all its commands, over all cores.
        peak_memory_mb: of the largest of its commands; a GPU's own memory is not in it.
    """

    seconds: float
    processor_seconds: float
    peak_memory_mb: float


@dataclass
class Steps:
    """Runs commands of this repository, printing each before it runs.

    Attributes:
        costs: of the steps so far, by name.
    """

    costs: dict[str, Cost] = field(default_factory=dict)
    _largest: float = field(default=0.0, init=False, repr=False)
    _computed: float = field(default=0.0, init=False, repr=False)

    def run(self, name: str, heading: str, command: str, *arguments: str) -> dict[str, Any]:
        """Run a command under a heading; its JSON report.

        Args:
            name: of the step.
            heading: printed before it.
            command: of ``etymon``, or a module of scripts/ that is a command.
            arguments: of the command.

        Raises:
            RuntimeError: it failed.
        """
        say_heading(heading)
        with self.measured(name):
            return self.command(command, *arguments)

    def command(self, command: str, *arguments: str) -> dict[str, Any]:
        """Run a command as ``run`` does, people's output passed on; its JSON report.

        Raises:
            RuntimeError: it failed.
        """
        self._say(command, *arguments)
        process = subprocess.Popen(
            command_line(command, *arguments), stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        with process.stdout:
            output = process.stdout.read()
        self._wait(process)
        if process.returncode:
            raise RuntimeError(
                f"{shlex.join(typed(command))} ended with status {process.returncode}; see above."
            )
        result: dict[str, Any] = json.loads(output.splitlines()[-1])
        return result

    def show(self, command: str, *arguments: str) -> None:
        """Run a command that prints for people and has no report.

        Raises:
            RuntimeError: it failed.
        """
        self._say(command, *arguments)
        done = subprocess.run(command_line(command, *arguments), check=False)
        if done.returncode:
            raise RuntimeError(f"{shlex.join(typed(command))} ended with status {done.returncode}.")

    def _say(self, command: str, *arguments: str) -> None:
        shown = shlex.join([*typed(command), *arguments])
        stderr.print(f"$ {shown}", style="dim", soft_wrap=True, markup=False, highlight=False)

    @contextmanager
    def measured(self, name: str) -> Iterator[None]:
        """Book time and memory of the commands run inside under ``name``."""
        start = time.perf_counter()
        self._largest = self._computed = 0.0
        yield
        self.costs[name] = Cost(
            seconds=time.perf_counter() - start,
            processor_seconds=self._computed,
            peak_memory_mb=self._largest,
        )

    @contextmanager
    def service(self, model: str, index: str, *options: str) -> Iterator[str]:
        """A service of one index on a free port, ended afterwards; yields its address.

        Raises:
            RuntimeError: it does not get ready.
        """
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        url = f"http://127.0.0.1:{port}"
        command = command_line(
            "serve",
            *("--model", model, "--index", f"default={index}", "--port", str(port), *options),
        )
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        try:
            _wait_until_ready(process, url)
            yield url
        finally:
            self._end(process)

    def show_costs(self) -> None:
        """Print what each step took."""
        for name, cost in self.costs.items():
            stderr.print(
                f"  {name:<8} {cost.seconds:6.0f} s ({cost.processor_seconds:5.0f} s of processor "
                f"time), {cost.peak_memory_mb / 1000:4.1f} GB",
                highlight=False,
            )

    def _end(self, process: subprocess.Popen[bytes]) -> None:
        process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline and not self._wait(process, os.WNOHANG):
            time.sleep(0.05)
        if process.returncode is None:
            process.kill()
            self._wait(process)
        assert process.stderr is not None
        process.stderr.close()

    def _wait(self, process: subprocess.Popen[Any], how: int = 0) -> bool:
        """Whether the process has ended; its peak memory counts for the step."""
        if process.returncode is not None:
            return True
        ended, status, usage = os.wait4(process.pid, how)
        if ended == 0:
            return False
        process.returncode = os.waitstatus_to_exitcode(status)
        self._largest = max(self._largest, usage.ru_maxrss / 1024)
        self._computed += usage.ru_utime + usage.ru_stime
        return True


def typed(command: str) -> list[str]:
    """What a user types to run it."""
    return [PROGRAM, command] if command in COMMANDS else ["python", "-m", command]


def command_line(command: str, *arguments: str) -> list[str]:
    """What runs it in this environment, offline."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    module = ["scripts.main", command] if command in COMMANDS else [command]
    return [sys.executable, "-m", *module, *arguments]


def say_heading(text: str) -> None:
    """A heading on stderr."""
    stderr.print(f"\n[bold]{text}[/bold]", highlight=False)


def read_queries(path: Path) -> list[dict[str, Any]]:
    """The queries that a training command wrote, those with an empty completion left out."""
    found = [json.loads(line) for line in path.read_text().splitlines()]
    return [query for query in found if query["completion"].strip()]


def choose_queries(
    pool: Sequence[dict[str, Any]], kinds: Sequence[tuple[str, bool]]
) -> list[dict[str, Any]]:
    """One query for each (relation, answered rightly) that the pool has; else its first one."""
    chosen: list[dict[str, Any]] = []
    for relation, correct in kinds:
        fitting = [q for q in pool if q["relation"] == relation and q["correct"] is correct]
        chosen += fitting[len(fitting) // 2 :][:1]
    return chosen or list(pool[:1])


def ask(steps: Steps, url: str, query: dict[str, Any]) -> dict[str, Any]:
    """Ask the service a query, say whether the model was right, and give what is reported."""
    answer = steps.command("query", query["prompt"], "--url", url, "--k", "5")
    best = answer["results"][0]
    true = best["document"] == query["document"]
    stderr.print(
        f"That is right; the document that states it is '{query['document']}', and the "
        f"best example {'is' if true else 'is not'} of it."
        if query["correct"]
        else f"That is wrong (it is{query['answer']}), so no document states it: the "
        f"examples above are what made the model say it.",
        highlight=False,
        soft_wrap=True,
        markup=False,
    )
    return {
        "prompt": query["prompt"],
        "completion": answer["measurement"]["terms"][0]["completion"],
        "correct": query["correct"],
        "first_example": best["text"],
        "first_is_source": true,
        "rescored_rows": answer["rescored_rows"],
        "seconds": answer["seconds"],
    }


def write_audit_queries(path: Path, pool: Sequence[dict[str, Any]], count: int) -> None:
    """Write ``count`` queries, evenly spread over the pool, as ``etymon audit`` reads them."""
    lines = [
        json.dumps({"prompt": q["prompt"], "completion": q["completion"]})
        for q in pool[:: max(1, len(pool) // count)][:count]
    ]
    path.write_text("\n".join(lines))


def say_what_next(model: str, index: str) -> None:
    """How to go on by hand."""
    program = Path(sys.executable).with_name(PROGRAM)
    shown = program.relative_to(Path.cwd()) if program.is_relative_to(Path.cwd()) else PROGRAM
    request = json.dumps({"prompt": "The capital of France is", "k": 5})
    stderr.print(
        "\nServe this index yourself and query it:\n"
        f"  {shown} serve --model {model} --index default={index}\n"
        f"  curl -s http://127.0.0.1:8000/v1/query -H 'Content-Type: application/json' "
        f"-d '{request}'",
        highlight=False,
        soft_wrap=True,
        markup=False,
    )


def _wait_until_ready(process: subprocess.Popen[bytes], url: str) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            assert process.stderr is not None
            said = process.stderr.read().decode().strip()
            raise RuntimeError(f"The service ended while starting: {said[-500:]}")
        try:
            if httpx.get(f"{url}/readyz", timeout=1).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.2)
    raise RuntimeError(f"The service was not ready within {START_SECONDS} seconds.")
