"""Measure fit, build, rescoring and scan on a GPU; at most eight minutes, without a network."""

import dataclasses
import shlex
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.table import Table

from scripts.bench.gpu.measuring import Row
from scripts.bench.gpu.parts import PARTS
from scripts.bench.gpu.running import Failed, run_part
from scripts.bench.gpu.sizes import FULL, SMALL
from scripts.bench.record import FOLDER, hardware, write_record
from scripts.console import one_sentence_errors, print_json, print_plain, stderr
from service.versions import revision, versions

HELP = """Measure fit, build, rescoring and scan on a GPU, over floors of the same run.

Models have random weights and read random tokens. Each part runs in a process of its own; a part
that fails or takes too long is recorded with its reason, and the next one runs. The record is
written after every row. With --small the steps are the same, at sizes for any processor.

It needs PyTorch 2.11 or newer, which should be there already, and some packages, which can be
carried as wheels (57 MB; for Python 3.12 on x86-64 Linux). To make that folder, where there is a
network:

\b
python -m pip download --no-deps --only-binary=:all: \\
  --python-version 3.12 -d wheels faiss-cpu==1.15.1 numpy==2.5.5 \\
  transformers==5.24.0 tokenizers==0.23.3 safetensors==0.8.0 \\
  huggingface-hub==2.4.0 httpx2==2.16.2 httpcore2==2.16.2 h11==0.16.0 \\
  idna==3.20 anyio==4.16.0 truststore==0.10.5 packaging==26.4 \\
  pyyaml==6.0.4 regex==2026.11.19 tqdm==4.70.1 typer==0.24.2 \\
  click==8.5.1 rich==15.0.0 markdown-it-py==4.3.0 mdurl==0.1.2 \\
  pygments==2.21.0 shellingham==1.5.4 annotated-doc==0.0.7 \\
  jaxtyping==0.3.11 wadler-lindig==0.1.8 threadpoolctl==3.8.0

To use it there, beside the PyTorch that python3 has, in a virtual environment or not:

\b
python3 -m pip install --no-index --no-deps --target site wheels/*.whl
PYTHONPATH=site python3 -m scripts.bench.gpu
"""
DEFINITIONS = {
    "ratio": "seconds / floor_seconds, all of this run; medians",
    "fit": "EK-FAC of all linear layers in blocks of at most `widest`; floor: forward and backward "
    "of the same batches, only the embeddings' output requires a gradient; once",
    "build": "the sketch of every gradient, then with one-bit codes made on the host; same floor",
    "rescoring": "exact scores of all sequences; floor: a forward pass to the losses",
    "scan": "all estimates of all rows, copied to the host, by the kernel for one-bit codes, or, "
    "once, by matrix products; floor: a copy of the codes from device "
    "to device, whose bytes are counted once; difference to the host's scan, whose tables have 8 "
    "bits, over the largest estimate",
    "peak_device_bytes": "most that PyTorch held at once; a stage's since the fit began",
    "agreement": "EK-FAC scores on the device against the CPU's, float32: largest difference over "
    "the largest score, least rank correlation of any query",
}

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command(help=HELP)
@one_sentence_errors
def main(
    device: Annotated[str, typer.Option(help="cuda, cuda:N, or cpu with --small.")] = "cuda",
    small: Annotated[bool, typer.Option(help="The same steps at sizes for any processor.")] = False,
    part: Annotated[
        list[str] | None, typer.Option(help=f"One of {', '.join(PARTS)}; may be repeated.")
    ] = None,
    seconds: Annotated[float, typer.Option(help="That all parts together may take.")] = 450,
    out: Annotated[
        Path, typer.Option(help="Folder of the record; docs/benchmarks.", show_default=False)
    ] = FOLDER,
) -> None:
    """Run all parts, or some."""
    begun, commit = time.monotonic(), revision()
    chosen = check_device(device, small=small)
    names = check_parts(part or list(PARTS))
    sizes = SMALL if small else FULL
    rows: list[Row] = []
    errors: list[dict[str, str]] = []
    document = {
        "command": shlex.join(["python", "-m", "scripts.bench.gpu", *sys.argv[1:]]),
        "small": small,
        **describe(chosen),
        "sizes": dataclasses.asdict(sizes),
        "definitions": DEFINITIONS,
        "rows": rows,
        "errors": errors,
    }

    def keep() -> Path:
        name = "gpu_small" if small else "gpu"
        document["seconds"] = round(time.monotonic() - begun, 1)
        return write_record(name, document, folder=out, machine=hardware(chosen.type))

    for name in names:
        print_plain(f"{name} ...")
        left = seconds - (time.monotonic() - begun)
        limit = min(PARTS[name].seconds, left)
        run = partial(PARTS[name].run, sizes, chosen)
        for found in run_part(run, limit) if limit > 1 else [Failed("No time was left for it.")]:
            if isinstance(found, Failed):
                errors.append({"part": name, "error": found.reason})
                print_plain(f"{name}: {found.reason}")
            else:
                rows.append({**found, "device": chosen.type, "commit": commit})
                print_plain(", ".join(f"{key} {value}" for key, value in found.items()))
            keep()
    show(rows)
    stderr.print(f"written: {keep()}", highlight=False, soft_wrap=True)
    print_json(document)
    if errors:
        raise typer.Exit(1)


def check_device(name: str, *, small: bool) -> torch.device:
    """The device, if it is there.

    Raises:
        ValueError: it is not, or it is a CPU and the sizes are not small.
    """
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"Unknown device '{name}'; choose cuda, cuda:N or cpu.") from error
    if device.type == "cpu":
        if not small:
            raise ValueError("A CPU would take hours at these sizes; add --small.")
        return device
    if device.type != "cuda":
        raise ValueError(f"Unknown device '{name}'; choose cuda, cuda:N or cpu.")
    if not torch.backends.cuda.is_built():  # type: ignore[no-untyped-call]
        raise ValueError(
            f"PyTorch {torch.__version__} is built without CUDA; install one that has it, or use "
            f"--device cpu --small."
        )
    count = torch.cuda.device_count()
    if (device.index or 0) >= count:
        raise ValueError(
            f"Device '{name}' was asked for, PyTorch sees {count} NVIDIA GPUs; use --device cpu "
            f"--small to try the steps without one."
        )
    return device


def check_parts(names: Sequence[str]) -> Sequence[str]:
    """The names, if all are known.

    Raises:
        ValueError: one is not.
    """
    for name in names:
        if name not in PARTS:
            raise ValueError(f"Unknown part '{name}'; choose one of {', '.join(PARTS)}.")
    return names


def describe(device: torch.device) -> dict[str, Any]:
    """The device and the libraries, for the record."""
    found: dict[str, Any] = {"versions": versions(), "cuda": torch.version.cuda}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {"card": properties.name, "device_bytes": properties.total_memory}
    return found


def show(rows: Sequence[Row]) -> None:
    """The table for people."""
    table = Table("part", "of", "seconds", "floor", "ratio", "peak, GB", "agreement")
    for row in rows:
        of = [row[key] for key in ("model", "what", "factors", "by") if key in row]
        of += [f"{row['queries']} queries"] if "queries" in row else []
        memory, difference = row.get("peak_device_bytes"), row.get("largest_relative_difference")
        table.add_row(
            row["part"],
            ", ".join(of),
            f"{row['seconds']:.4f}" if "seconds" in row else "",
            f"{row['floor_seconds']:.4f}" if "floor_seconds" in row else "",
            f"{row['ratio']:.2f}" if "ratio" in row else "",
            "" if memory is None else f"{memory / 1e9:.1f}",
            "" if difference is None else f"{difference:.1e}",
        )
    stderr.print(table)


if __name__ == "__main__":
    app()
