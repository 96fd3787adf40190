"""Kill traces at random moments, resume, and compare with undisturbed ones."""

import json
import random
import shutil
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from index.files import sha256_of
from scripts.bench.kills import run as run_command
from scripts.bench.record import write_record
from scripts.console import one_sentence_errors, print_json, stderr
from service.tracing.directions import MANIFEST as DIRECTIONS
from service.tracing.trace import INFLUENCES, MANIFEST
from service.versions import revision

KINDS: dict[str, list[str]] = {"trace": [], "direction": ["--direction"]}

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
@one_sentence_errors
def main(
    run: Annotated[Path, typer.Argument(help="Folder of a recorded run.")],
    questions: Annotated[Path, typer.Argument(help="JSONL of questions.")],
    folder: Annotated[Path, typer.Option(help="Where to work; removed first.")] = Path(
        "runs/trace-kills"
    ),
    tokenizer: Annotated[str | None, typer.Option(help="Where the model has none.")] = None,
    kills: Annotated[int, typer.Option(help="How many, of each kind of trace.")] = 10,
    seed: Annotated[int, typer.Option(help="Of the moments.")] = 0,
) -> None:
    """Trace once undisturbed; then with SIGKILL at random moments until there were enough.

    What a trace resumed after every kill has found must be the undisturbed one's, bit by bit.
    """
    shutil.rmtree(folder, ignore_errors=True)
    moments = random.Random(seed)  # noqa: S311
    found = {}
    for kind, options in KINDS.items():
        command = ["scripts.run.trace_run", str(run), str(questions), *options]
        command += ["--checkpoint-seconds", "0"]
        command += [] if tokenizer is None else ["--tokenizer", tokenizer]
        found[kind] = _killed(command, folder / kind, kills, moments)
        stderr.print(f"{kind}: {json.dumps(found[kind])}", highlight=False)
    document = {"run": str(run), "kinds": found, "commit": revision()}
    stderr.print(f"written: {write_record('trace_kills', document)}", highlight=False)
    print_json(document)
    raise typer.Exit(0 if all(one["identical"] for one in found.values()) else 1)


def _killed(command: list[str], folder: Path, kills: int, moments: random.Random) -> dict[str, Any]:
    whole, done, resumed, rounds, identical = folder / "whole", 0, 0, 0, True
    start = time.monotonic()
    run_command([*command, "--out", str(whole)], None)
    longest = time.monotonic() - start
    wanted = _contents(whole)
    while done < kills:
        out = folder / f"round-{rounds}"
        while run_command(
            [*command, "--out", str(out)], moments.uniform(0, longest) if done < kills else None
        ):
            done += 1
            resumed += any(out.glob("*partial*"))
        identical &= _contents(out) == wanted
        rounds += 1
    return {"kills": done, "resumed": resumed, "rounds": rounds, "identical": identical}


def _contents(folder: Path) -> dict[str, str]:
    """Hashes of what was found; of the manifests, which tell the time too, what tells of values."""
    found = {
        path.name: sha256_of(path)
        for path in sorted(folder.glob("*.safetensors"))
        if path.name == INFLUENCES or path.name.startswith("direction-")
    }
    for name in (MANIFEST, DIRECTIONS):
        if (folder / name).is_file():
            found[name] = json.dumps(json.loads((folder / name).read_text())["values"])
    return found


if __name__ == "__main__":
    app()
