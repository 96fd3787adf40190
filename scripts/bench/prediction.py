"""What dry runs predict against what fit and build then take: memory, disk, time."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from scripts.bench.record import write_record
from scripts.console import one_sentence_errors, print_json, stderr
from scripts.demo.model import demo_model
from service.versions import revision

LIMITS = {"memory_bytes": 0.15, "disk_bytes": 0.15, "seconds": 0.30}
"""Largest relative error that is accepted."""

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
@one_sentence_errors
def main(
    folder: Annotated[Path, typer.Option(help="Where to work; removed first.")] = Path(
        "runs/prediction"
    ),
    model: Annotated[str | None, typer.Option(help="Model; the demo's by default.")] = None,
    data: Annotated[str | None, typer.Option(help="Corpus; the demo's by default.")] = None,
) -> None:
    """Predict a fit and three builds, run them, and compare; exits with 1 beyond the limits."""
    if model is None or data is None:
        demo = demo_model()
        model, data = str(demo.model), str(demo.corpus)
    shutil.rmtree(folder, ignore_errors=True)
    inputs = ["--model", model, "--data", data]
    factors = folder / "ekfac.safetensors"
    arguments = [*inputs, "--out", str(factors), "--examples", "4096"]
    predicted = run("fit_estimator", *arguments, "--dry-run")
    actual = run("fit_estimator", *arguments)
    actual["disk_bytes"] = factors.stat().st_size
    rows = [compare(f"fit {q}", q, predicted, actual) for q in LIMITS]
    for dimensions, limit in ((16384, 2048), (16384, 8192), (65536, 8192)):
        index = folder / f"{dimensions}-{limit}"
        arguments = [*inputs, "--factors", str(factors), "--out", str(index), "--id-column", "id"]
        arguments += ["--dimensions", str(dimensions), "--limit", str(limit)]
        predicted = run("build_index", *arguments, "--dry-run")
        actual = run("build_index", *arguments)
        actual["disk_bytes"] = sum(p.stat().st_size for p in index.rglob("*") if p.is_file())
        name = f"build, {dimensions} dimensions"
        rows += [compare(f"{name}, {q}", q, predicted, actual) for q in LIMITS]
    show(rows)
    document = {"rows": rows, "command": "python -m scripts.bench.prediction"}
    stderr.print(f"written: {write_record('prediction', document)}", highlight=False)
    print_json(document)
    raise typer.Exit(0 if all(row["within_limit"] for row in rows) else 1)


def run(module: str, *arguments: str) -> dict[str, Any]:
    """A command's JSON line."""
    command = [sys.executable, "-m", f"scripts.{module}", *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"scripts.{module} ended with status {done.returncode}; see above.")
    document: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return document


def compare(
    name: str, quantity: str, predicted: dict[str, Any], actual: dict[str, Any]
) -> dict[str, Any]:
    """One row of the record."""
    error = predicted[quantity] / actual[quantity] - 1
    return {
        "quantity": name,
        "rows": predicted["rows"],
        "predicted": predicted[quantity],
        "actual": actual[quantity],
        "relative_error": error,
        "limit": LIMITS[quantity],
        "within_limit": abs(error) <= LIMITS[quantity],
        "commit": revision(),
    }


def show(rows: list[dict[str, Any]]) -> None:
    """The table for people."""
    table = Table("quantity", "rows", "predicted", "actual", "error", "limit")
    for row in rows:
        unit, scale = ("s", 1) if row["quantity"].endswith("seconds") else ("MB", 1e6)
        table.add_row(
            row["quantity"],
            f"{row['rows']:,}",
            f"{row['predicted'] / scale:,.1f} {unit}",
            f"{row['actual'] / scale:,.1f} {unit}",
            f"{row['relative_error']:+.1%}",
            f"{row['limit']:.0%}",
        )
    stderr.print(table)


if __name__ == "__main__":
    app()
