"""Time `make setup`, `make test` and `make demo` in a fresh clone and keep the figures."""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import typer

from scripts.bench.record import FOLDER, write_record
from scripts.console import one_sentence_errors, print_json, stderr
from service.versions import revision

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
@one_sentence_errors
def main() -> None:
    """Run the newcomer's commands as a newcomer would, and write docs/benchmarks/demo_*.json.

    The clone holds what is committed; uncommitted changes are refused. About a quarter of an hour
    on two cores.
    """
    measured = revision()
    if measured.endswith("dirty"):
        raise ValueError("There are uncommitted changes; commit them, the record names a revision.")
    with tempfile.TemporaryDirectory() as folder:
        clone = Path(folder) / "etymon"
        subprocess.run(["git", "clone", "--quiet", FOLDER.parents[1], clone], check=True)
        commands = {}
        for target in ("setup", "test", "demo"):
            stderr.print(f"[bold]make {target}[/bold]")
            commands[f"make {target}"], output = measure(["make", target], clone)
    report = json.loads(output.splitlines()[-1])
    document = {"commit": measured, **report, "commands": commands}
    path = write_record("demo", document)
    stderr.print(f"Figures kept in {path}.", highlight=False)
    print_json(document)


def measure(command: list[str], folder: Path) -> tuple[dict[str, Any], str]:
    """Run a command; its wall time, its largest process' peak memory, and its stdout.

    Raises:
        RuntimeError: it failed.
    """
    environment = {k: v for k, v in os.environ.items() if not k.startswith("OMP_")}
    start = time.perf_counter()
    process = subprocess.Popen(
        command, cwd=folder, stdout=subprocess.PIPE, text=True, env=environment
    )
    assert process.stdout is not None
    lines = []
    with process.stdout:
        for line in process.stdout:
            lines.append(line)
            print(line, end="", file=sys.stderr)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"'{' '.join(command)}' failed with status {process.returncode}.")
    figures = {
        "seconds": time.perf_counter() - start,
        "largest_process_peak_memory_mb": usage.ru_maxrss / 1024,
    }
    return figures, "".join(lines)


if __name__ == "__main__":
    app()
