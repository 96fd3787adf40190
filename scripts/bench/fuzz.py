"""Fuzz a service from its description: no answer may be an error of its own or undocumented."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from scripts.console import one_sentence_errors, print_json, stderr

CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
    "negative_data_rejection",
    "unsupported_method",
    "allow_header_conformance",
)
"""Of schemathesis. Left out: positive_data_acceptance, because no schema can say that a completion
must fit the model's context; and those about keys, which the tests of the keys cover."""

SERVER_ERRORS = ("ST101", "ST102")
"""Schemathesis's codes of answers of 500 and more."""

ENDED = (0, 1)
"""Statuses with which schemathesis has done all its work: without failures, or with some."""

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
@one_sentence_errors
def main(
    openapi: Annotated[Path, typer.Option(help="The description to test against.")] = Path(
        "docs/openapi.json"
    ),
    url: Annotated[
        str | None, typer.Option(help="Of a running service; else give --model and --index.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Start a service with this model (a tiny one is best).")
    ] = None,
    index: Annotated[
        list[str] | None, typer.Option(help="And with this index, as NAME=FOLDER.")
    ] = None,
    keys_file: Annotated[
        Path | None, typer.Option(help="File whose first line is a key of the service.")
    ] = None,
    examples: Annotated[int, typer.Option(min=1, help="Random cases for each operation.")] = 100,
    seed: Annotated[int, typer.Option(min=0, help="Of the cases.")] = 0,
) -> None:
    """Send a service valid and invalid requests, as its OpenAPI description allows them.

    The cases are schemathesis's: limits and violations of every schema, then random ones. A table
    of failures goes to stderr, with schemathesis's own report of each; the JSON line counts them.
    The exit status is 1 if there is any failure.

    Example: python -m scripts.bench.fuzz --url http://127.0.0.1:8000
    """
    if not openapi.is_file():
        raise ValueError(f"There is no file {openapi}; give the description with --openapi.")
    key = _first_key(keys_file)
    if url is not None:
        report = fuzz(openapi, url, key, examples, seed)
    elif model is not None and index:
        with _service(model, index, keys_file) as started:
            report = fuzz(openapi, started, key, examples, seed)
    else:
        raise ValueError("Name the service: give --url, or --model and --index to start one.")
    counts = count(report)
    show(report)
    print_json(counts)
    if counts["failures"] or counts["errors"]:
        raise typer.Exit(1)


def fuzz(openapi: Path, url: str, key: str | None, examples: int, seed: int) -> dict[str, Any]:
    """The JSON report of one run of schemathesis.

    Raises:
        RuntimeError: it did not run to its end.
    """
    with tempfile.TemporaryDirectory() as folder:
        # In a file that only its owner can read: the arguments of a command are public.
        authorisation = json.dumps(f"Bearer {key}")
        headers = f"[headers]\nAuthorization = {authorisation}\n" if key else ""
        (Path(folder) / "schemathesis.toml").write_text(headers)
        report = Path(folder) / "report.json"
        command = [
            *(sys.executable, "-m", "schemathesis.cli", "run", str(openapi.resolve())),
            *("--url", url, "--checks", ",".join(CHECKS), "--continue-on-failure"),
            *("--max-examples", str(examples), "--seed", str(seed), "--no-color"),
            *("--generation-database", "none", "--suppress-health-check", "all"),
            *("--report", "json", "--report-json-path", str(report)),
        ]
        done = subprocess.run(command, cwd=folder, stdout=2, check=False)
        if done.returncode not in ENDED or not report.is_file():
            raise RuntimeError(
                f"schemathesis ended with status {done.returncode}; what it said is above. It must "
                f"be installed: pip install schemathesis."
            )
        found: dict[str, Any] = json.loads(report.read_text())
        return found


def count(report: Mapping[str, Any]) -> dict[str, int]:
    """What the JSON line says.

    ``cases``: requests sent; ``server_errors``: kinds of 5xx; ``undocumented``: other kinds of
    failure, i.e. a status, type or form that the description does not have, or bad input that was
    accepted; ``failures``: both together; ``errors``: operations that could not be tested.
    """
    failures = report["failures"]
    server = sum(f["count"] for f in failures if f["code"] in SERVER_ERRORS)
    everything = sum(f["count"] for f in failures)
    return {
        "cases": report["test_cases"]["generated"],
        "operations": report["operations"]["tested"],
        "server_errors": server,
        "undocumented": everything - server,
        "failures": everything,
        "errors": sum(e["count"] for e in report["errors"]),
    }


def show(report: Mapping[str, Any]) -> None:
    """Print the failures as a table."""
    table = Table("failure", "operations", "count")
    for failure in report["failures"]:
        operations = failure["operations"]
        named = operations if isinstance(operations, list) else [operations]
        table.add_row(failure["title"], ", ".join(map(str, named)), str(failure["count"]))
    for error in report["errors"]:
        table.add_row(error["title"], "", str(error["count"]))
    if not table.row_count:
        table.add_row("none", "", "0")
    stderr.print(table)


def _first_key(file: Path | None) -> str | None:
    if file is None:
        return None
    lines = [line.strip() for line in file.read_text().splitlines()]
    keys = [line for line in lines if line and not line.startswith("#")]
    if not keys:
        raise ValueError(f"{file} holds no key.")
    return keys[0]


@contextmanager
def _service(model: str, index: list[str], keys_file: Path | None) -> Iterator[str]:
    """A service of its own on a free port, at this address once it is ready."""
    command = [sys.executable, "-m", "scripts.serve", "--model", model, "--port", "0"]
    command += [part for folder in index for part in ("--index", folder)]
    command += ["--keys-file", str(keys_file)] if keys_file else []
    with tempfile.TemporaryFile() as log, tempfile.TemporaryDirectory() as jobs:
        settings = {**os.environ, "ETYMON_JOBS_PATH": f"{jobs}/jobs.sqlite"}
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, env=settings)
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            if not line:
                log.seek(0)
                said = log.read().decode(errors="replace").strip()
                raise RuntimeError(f"The service did not start: {said[-500:]}")
            yield json.loads(line)["url"]
        finally:
            process.terminate()
            process.wait()


if __name__ == "__main__":
    app()
