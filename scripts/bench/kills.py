"""Kill the fit and the build at random moments, resume, and compare with an undisturbed run."""

import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import typer

from scripts.bench.record import write_record
from scripts.console import one_sentence_errors, print_json, stderr
from scripts.demo.model import demo_model
from service.versions import revision

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
@one_sentence_errors
def main(
    folder: Annotated[Path, typer.Option(help="Where to work; removed first.")] = Path(
        "runs/kills"
    ),
    model: Annotated[str | None, typer.Option(help="Model; the demo's by default.")] = None,
    data: Annotated[str | None, typer.Option(help="Corpus; the demo's by default.")] = None,
    limit: Annotated[int, typer.Option(help="Rows of the corpus.")] = 1024,
    kills: Annotated[int, typer.Option(help="How many kills.")] = 25,
    seed: Annotated[int, typer.Option(help="Of the moments.")] = 0,
) -> None:
    """Fit and build once undisturbed; then again and again with SIGKILL at random moments.

    A round is one fit and build from nothing to the end, resumed after every kill by the same
    command; rounds go on until there were enough kills. All files of every round must equal the
    undisturbed run's byte for byte, the factors included.
    """
    if model is None or data is None:
        demo = demo_model()
        model, data = str(demo.model), str(demo.corpus)
    shutil.rmtree(folder, ignore_errors=True)
    job = Job(model=model, data=data, limit=limit, folder=folder / "undisturbed")
    undisturbed = job.run_to_end()
    wanted = contents(job.folder)
    rounds, identical = 0, True
    tally = Tally(wanted=kills, longest=undisturbed, random=random.Random(seed))  # noqa: S311
    while tally.kills < kills:
        round_job = Job(model=model, data=data, limit=limit, folder=folder / f"round-{rounds}")
        round_job.run_to_end(tally)
        same = contents(round_job.folder) == wanted
        identical &= same
        rounds += 1
        stderr.print(
            f"round {rounds}: {tally.kills} of {kills} kills so far, "
            f"{'identical' if same else 'DIFFERENT'}",
            highlight=False,
        )
        shutil.rmtree(round_job.folder)
    document = {
        "kills": tally.kills,
        "identical": identical,
        "rounds": rounds,
        "moments": dict(tally.moments),
        "rows": limit,
        "files": len(wanted),
        "undisturbed_seconds": [round(seconds, 1) for seconds in undisturbed],
        "command": f"python -m scripts.bench.kills --limit {limit} --kills {kills} --seed {seed}",
        "commit": revision(),
    }
    stderr.print(f"written: {write_record('kills', document)}", highlight=False)
    print_json(document)
    raise typer.Exit(0 if identical else 1)


@dataclass
class Tally:
    """Kills that hit a running process, by what was on the disk before the command and after.

    Attributes:
        wanted: how many in all.
        longest: seconds that each command takes undisturbed; a kill comes within them.
        random: decides when.
        moments: kills so far.
    """

    wanted: int
    longest: list[float]
    random: random.Random
    moments: Counter[str] = field(default_factory=Counter)

    @property
    def kills(self) -> int:
        """So many so far."""
        return self.moments.total()


@dataclass(frozen=True, kw_only=True)
class Job:
    """The two commands, as a user would type them."""

    model: str
    data: str
    limit: int
    folder: Path

    @property
    def factors(self) -> Path:
        """What the first command writes."""
        return self.folder / "ekfac.safetensors"

    def commands(self) -> list[tuple[Path, list[str]]]:
        """Each command with the file whose presence means that it is done."""
        shared = ["--model", self.model, "--data", self.data, "--limit", str(self.limit)]
        fit = ["scripts.fit_estimator", *shared, "--out", str(self.factors)]
        fit += ["--examples", str(self.limit), "--checkpoint-seconds", "1"]
        index = self.folder / "index"
        build = ["scripts.build_index", *shared, "--factors", str(self.factors)]
        build += ["--out", str(index), "--id-column", "id", "--rows-per-shard", "128"]
        build += ["--seed", "7"]
        return [(self.factors, fit), (index / "manifest.json", build)]

    def run_to_end(self, tally: Tally | None = None) -> list[float]:
        """Run both commands, killed and resumed as ``tally`` says; seconds of their last runs."""
        seconds = []
        for number, (done, command) in enumerate(self.commands()):
            killed = True
            while killed:
                delay = None
                if tally is not None and tally.kills < tally.wanted:
                    delay = tally.random.uniform(0, tally.longest[number])
                before, start = self.state(), time.monotonic()
                killed = run(command, delay)
                if killed and tally is not None:
                    name = command[0].removeprefix("scripts.")
                    tally.moments[f"{name}: {before} -> {self.state()}"] += 1
            if not done.is_file():
                raise RuntimeError(f"{command[0]} ended without {done}.")
            seconds.append(time.monotonic() - start)
        return seconds

    def state(self) -> str:
        """How far it is, in a few words."""
        if not self.factors.is_file():
            checkpoints = list(self.folder.glob("*.partial/[!.]*"))
            return "checkpoint" if checkpoints else "nothing"
        receipts = len(list(self.folder.glob("index/parts/*/shards/*.json")))
        if (self.folder / "index" / "manifest.json").is_file():
            return "manifest"
        read = list(self.folder.glob("index/parts/*/corpus.json"))
        return f"{receipts} shards" if read else "factors"


def run(command: list[str], delay: float | None) -> bool:
    """Run a command; True if it was killed after ``delay`` seconds, False if it ended well.

    Raises:
        RuntimeError: it failed.
    """
    process = subprocess.Popen(
        [sys.executable, "-m", *command],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        _, said = process.communicate(timeout=delay)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return True
    if process.returncode != 0:
        raise RuntimeError(f"{command[0]} failed: {said.decode()[-2000:]}")
    return False


def contents(folder: Path) -> dict[str, str]:
    """SHA-256 of every file by its path; locks aside."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.startswith(".") and path.suffix != ".lock"
    }


if __name__ == "__main__":
    app()
