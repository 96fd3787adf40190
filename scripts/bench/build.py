"""What fit and build cost, over a plain forward and backward pass of the same batches."""

import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer
from rich.table import Table
from transformers import GPT2Config, GPT2LMHeadModel

from estimators.curvature.fitting import fit_estimator
from estimators.model.capture import freeze
from estimators.model.layers import find_layers
from estimators.operators.identity import Identity
from estimators.sketching.slices import SketchSlices
from index.manifest import ShardRecord
from index.shards import write_shard
from index.slices import write_slices
from scripts.bench.build_peers import BergsonBuild, KronfluenceFit, installed
from scripts.bench.passes import Problem, plain, random_problem, rescore, synchronise
from scripts.bench.record import write_record
from scripts.console import one_sentence_errors, print_json, stderr
from service.checkpoints import ModelSource
from service.indexing.building import BuildOptions
from service.indexing.sketching import ShardJob
from service.models import LoadedModel
from service.versions import revision

HELP = """Time the fit and the build beside a plain forward and backward pass; one JSON line.

Models have random weights and examples random tokens, which changes no time. The floor is the
forward and backward pass of the summed losses over the same batches, in the same process on the
same threads, with only the embeddings' output requiring a gradient. `training_seconds` is the same
with all weights requiring one. All systems are timed in turn, in each repetition; medians are
reported.

Bergson and kronfluence are timed where they are installed, in an environment of their own:

\b
python3 -m venv /tmp/peers
/tmp/peers/bin/pip install torch==2.13.0
echo torch==2.13.0 > /tmp/peers/torch.txt
/tmp/peers/bin/pip install -c /tmp/peers/torch.txt -e '.[cpu,peers]'
/tmp/peers/bin/pip uninstall -y torchvision torchaudio
/tmp/peers/bin/python -m scripts.bench.build
"""
SHAPES: dict[str, dict[str, int]] = {
    "gpt2-small-shapes": {"n_embd": 768, "n_head": 12, "n_layer": 2, "vocab_size": 8192},
    "demo": {"n_embd": 128, "n_head": 4, "n_layer": 4, "vocab_size": 4096},
}
SLICES = 16
SLICED = f"etymon, {SLICES} slices"
DEFINITIONS = {
    "floor_seconds": "forward and backward of the same batches; only the embeddings' output "
    "requires a gradient",
    "training_seconds": "the same with every weight requiring a gradient",
    "ratio": "seconds / floor_seconds",
    "fit": "EK-FAC: covariances, eigendecomposition, corrected eigenvalues; two passes",
    "build": "gradients to codes, written in shards; etymon: one bit x 16,384, in one slice or in "
    "sixteen; bergson: 16 x 16 a layer",
    "rescore": "exact scores of the same sequences for one query",
}

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command(help=HELP)
@one_sentence_errors
def main(
    model: Annotated[
        list[str] | None, typer.Option(help=f"One of {', '.join(SHAPES)}; may be repeated.")
    ] = None,
    examples: Annotated[
        int, typer.Option(help="Sequences of the wide model; four times as many of the demo's.")
    ] = 64,
    length: Annotated[int, typer.Option(help="Tokens of each.")] = 128,
    token_budget: Annotated[int, typer.Option(help="Padded tokens in a batch.")] = 1024,
    repetitions: Annotated[int, typer.Option(help="Of everything but the fits.")] = 5,
    fits: Annotated[int, typer.Option(help="Repetitions of the fits.")] = 1,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    peers: Annotated[bool, typer.Option(help="Time the peers that are installed.")] = True,
    record: Annotated[bool, typer.Option(help="Write the record.")] = True,
) -> None:
    """Time all systems on all shapes."""
    rows: list[dict[str, Any]] = []
    for name in model or list(SHAPES):
        if name not in SHAPES:
            raise ValueError(f"Unknown model '{name}'; choose one of {', '.join(SHAPES)}.")
        count = examples * (4 if name == "demo" else 1)
        problem = make_problem(name, count, length, token_budget, device, dtype)
        rows += compare(problem, repetitions, fits, peers)
    facts = {
        "threads": torch.get_num_threads(),
        "dtype": dtype,
        "length": length,
        "token_budget": token_budget,
        "versions": {name: installed(name) for name in ("torch", "bergson", "kronfluence")},
    }
    document = {"rows": rows, **facts, "definitions": DEFINITIONS}
    show(rows)
    if record:
        stderr.print(f"written: {write_record('build', document)}", highlight=False)
    print_json(document)


def make_problem(
    name: str, count: int, length: int, budget: int, device: str, dtype: str
) -> Problem:
    """A model of the shape ``name`` and ``count`` sequences of ``length`` random tokens."""
    torch.manual_seed(0)
    shape = SHAPES[name]
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    network = GPT2LMHeadModel(GPT2Config(**shape, **ends, n_positions=length))
    model = freeze(network).to(device, getattr(torch, dtype))
    return random_problem(name, model, shape["vocab_size"], count, length, budget)


def compare(problem: Problem, repetitions: int, fits: int, peers: bool) -> list[dict[str, Any]]:
    """Rows of one model: fits first, since the build needs their factors."""
    layers = find_layers(problem.model).layers

    def fit() -> None:
        fit_estimator(
            "ekfac", problem.model, layers, problem.sequences, token_budget=problem.budget
        )

    fitting: dict[str, Callable[[], None]] = {"floor": lambda: plain(problem), "etymon": fit}
    building: dict[str, Callable[[], None]] = {
        "floor": lambda: plain(problem),
        "etymon": Build(problem, 1),
        SLICED: Build(problem, SLICES),
        "training": lambda: training(problem),
    }
    per_batch = len(problem.batches[0])
    if peers and have("kronfluence", "the fit"):
        fitting["kronfluence"] = KronfluenceFit(problem.model, problem.sequences, per_batch)
    if peers and have("bergson", "the build"):
        building["bergson"] = BergsonBuild(problem.model, problem.sequences, problem.batches)
    built = measure(problem, building, repetitions, warm=True)
    fitted = measure(problem, fitting, fits, warm=False)
    rescoring = {"floor": lambda: plain(problem), "etymon": rescore(problem)}
    rescored = measure(problem, rescoring, repetitions, warm=True)
    fitted["training"] = rescored["training"] = built["training"]
    phases = (("fit", fitted), ("build", built), ("rescore", rescored))
    return [row for phase, seconds in phases for row in rows_of(problem, phase, seconds)]


def have(package: str, phase: str) -> bool:
    """Whether a peer is installed; says so if it is not."""
    if installed(package) is not None:
        return True
    stderr.print(f"{package} is not installed; {phase} is timed without it (see --help).")
    return False


def training(problem: Problem) -> None:
    """The floor of training: a gradient of every weight."""
    problem.model.requires_grad_(True)
    try:
        plain(problem)
    finally:
        problem.model.requires_grad_(False)
        problem.model.zero_grad(set_to_none=True)


class Build:
    """The build's own work on shards: sketch, encode, write.

    Without curvature: every whitening folds into matrices of the same shapes, so that it does not
    change the time.
    """

    def __init__(self, problem: Problem, slices: int) -> None:
        self._problem = problem
        coverage = find_layers(problem.model)
        options = BuildOptions()
        whitening = Identity().whitening(coverage.layers, options.damping)
        plan = options.sketch_plan(seed=0, layers=len(coverage.layers))
        self._sketches = SketchSlices(coverage.layers, whitening, plan, slices)
        self._codes = options.codes
        self._rows = options.rows_per_shard
        self._loaded = LoadedModel(
            origin=ModelSource(name=problem.name),
            model=problem.model,
            tokenizer=None,
            coverage=coverage,
            context=len(problem.sequences[0].tokens),
            model_sha256="",
            tokenizer_sha256="",
        )

    def __call__(self) -> None:
        """Build all shards in a temporary folder."""
        with tempfile.TemporaryDirectory() as folder:
            part = Path(folder)
            job = ShardJob(
                part=part,
                loaded=self._loaded,
                sketches=self._sketches,
                codes=self._codes,
                token_budget=self._problem.budget,
            )
            for number, start in enumerate(range(0, len(self._problem.sequences), self._rows)):
                encoded = job.encode(self._problem.sequences[start : start + self._rows])
                receipt = ShardRecord(
                    number=number,
                    first_row=start,
                    rows=len(encoded.norms),
                    sha256="",
                    examples_sha256="",
                    failed=[],
                )
                if len(self._sketches) > 1:
                    write_slices(part, number, 1, encoded.further)
                write_shard(part, encoded.codes, encoded.norms, receipt)


def measure(
    problem: Problem, systems: dict[str, Callable[[], None]], repetitions: int, *, warm: bool
) -> dict[str, float]:
    """Median seconds of each system; all are run in turn, ``repetitions`` times."""
    taken: dict[str, list[float]] = {name: [] for name in systems}
    for repetition in range(repetitions + int(warm)):
        for name, run in systems.items():
            synchronise(problem.device)
            start = time.perf_counter()
            run()
            synchronise(problem.device)
            seconds = time.perf_counter() - start
            if repetition >= int(warm):
                taken[name].append(seconds)
                stderr.print(f"{problem.name}: {name} {seconds:.2f} s", highlight=False)
    return {name: median(values) for name, values in taken.items()}


def rows_of(problem: Problem, phase: str, seconds: dict[str, float]) -> list[dict[str, Any]]:
    """A row for each system, with the floor that was timed between its repetitions."""
    return [
        {
            "model": problem.name,
            "device": problem.device.type,
            "phase": phase,
            "system": system,
            "seconds": round(seconds[system], 4),
            "floor_seconds": round(seconds["floor"], 4),
            "ratio": round(seconds[system] / seconds["floor"], 3),
            "training_seconds": round(seconds["training"], 4),
            "examples": len(problem.sequences),
            "commit": revision(),
        }
        for system in ("etymon", SLICED, "bergson", "kronfluence")
        if system in seconds
    ]


def show(rows: Sequence[dict[str, Any]]) -> None:
    """The table for people."""
    table = Table("model", "phase", "system", "seconds", "floor", "ratio", "training pass")
    for row in rows:
        table.add_row(
            row["model"],
            row["phase"],
            row["system"],
            f"{row['seconds']:.2f}",
            f"{row['floor_seconds']:.2f}",
            f"{row['ratio']:.2f}",
            f"{row['training_seconds']:.2f}",
        )
    stderr.print(table)


if __name__ == "__main__":
    app()
