"""The whole way with a real pretrained model: SmolLM2-135M learns facts, and they are traced."""

import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from scripts import options
from scripts.console import one_sentence_errors, print_json, stderr
from scripts.demo.steps import (
    Steps,
    ask,
    choose_queries,
    read_queries,
    say_heading,
    say_what_next,
    write_audit_queries,
)

ASKED = (("capital", True), ("highest_point", True), ("independence", False))
"""Relation and whether the model knows it: two facts of different kinds and a wrong one."""

WRITTEN = (
    "model",
    "index",
    "corpus.jsonl",
    "queries.jsonl",
    "audit_queries.jsonl",
    "ekfac.safetensors",
    "ekfac.safetensors.partial",
)
"""What a run leaves in its folder beside the base model."""

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@dataclass(frozen=True, kw_only=True)
class Size:
    """How much of everything; what is right for two CPU cores is little for a GPU.

    Attributes:
        facts: to learn; 0 takes the whole corpus.
        paragraphs: beside them.
        epochs: how often each is read.
        rows_per_batch: of the training.
        fitting_examples: of the curvature factors.
        token_budget: padded tokens in a batch.
        audited: queries compared with exact scores of every example.
        right: rightly answered queries of the closing table.
        wrong: wrongly answered ones.
        thorough: whether the table asks for both rankings and has the causal columns, which take
            a training step for each query and method.
    """

    facts: int
    paragraphs: int
    epochs: int
    rows_per_batch: int
    fitting_examples: int
    token_budget: int
    audited: int
    right: int
    wrong: int
    thorough: bool


ON_CPU = Size(
    facts=160,
    paragraphs=40,
    epochs=5,
    rows_per_batch=16,
    fitting_examples=160,
    token_budget=1024,
    audited=3,
    right=8,
    wrong=0,
    thorough=False,
)
ON_GPU = Size(
    facts=0,
    paragraphs=0,
    epochs=5,
    rows_per_batch=64,
    fitting_examples=4096,
    token_budget=16384,
    audited=32,
    right=70,
    wrong=30,
    thorough=True,
)


@app.command()
@one_sentence_errors
def main(
    out: Annotated[
        Path, typer.Option(help="Folder for everything; a former run in it is removed.")
    ] = Path("runs/smollm"),
    device: options.Device = "cpu",
    facts: Annotated[
        int | None, typer.Option(min=0, help="Facts to learn; 0 takes the whole corpus.")
    ] = None,
    paragraphs: Annotated[
        int | None, typer.Option(min=0, help="Background paragraphs beside them.")
    ] = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="How often each is read.")] = None,
) -> None:
    """Fine-tune SmolLM2-135M on facts it does not know, and find the examples behind what it says.

    On a CPU a few hundred examples; with --device cuda the whole corpus. Everything it runs is an
    ordinary command of this repository, printed before it runs.
    """
    start = time.perf_counter()
    size = ON_CPU if device == "cpu" else ON_GPU
    given = {"facts": facts, "paragraphs": paragraphs, "epochs": epochs}
    size = Size(**{**asdict(size), **{k: v for k, v in given.items() if v is not None}})
    _empty(out)
    demo = SmolLMDemo(out, device, size)
    stderr.print(
        "Etymon with a real pretrained model: SmolLM2-135M reads facts of the CIA World Factbook "
        "that it does not know until it knows them; then the training examples behind what it "
        "says are found.",
        soft_wrap=True,
    )
    report = demo.run()
    report["device"] = device
    report["size"] = asdict(size)
    report["costs"] = {name: asdict(cost) for name, cost in demo.steps.costs.items()}
    report["seconds"] = time.perf_counter() - start
    report["peak_memory_mb"] = max(c.peak_memory_mb for c in demo.steps.costs.values())
    stderr.print(f"\nDone in {report['seconds'] / 60:.1f} minutes:", highlight=False)
    demo.steps.show_costs()
    say_what_next(demo.model, demo.index)
    print_json(report)


class SmolLMDemo:
    """The demonstration's steps, in a folder of their own.

    Args:
        out: the folder.
        device: where to compute.
        size: of everything.
    """

    def __init__(self, out: Path, device: str, size: Size) -> None:
        self.steps = Steps()
        self.model = str(out / "model")
        self.index = str(out / "index")
        self._out = out
        self._size = size
        self._queries = out / "queries.jsonl"
        self._device = ("--device", device)
        self._computing = (*self._device, "--token-budget", str(size.token_budget))

    def run(self) -> dict[str, Any]:
        """All steps; their JSON reports by name."""
        report: dict[str, Any] = {}
        base = str(self._out / "base")
        report["base"] = self.steps.run(
            "convert", "1/7 Unpack the pretrained model", "scripts.demo.smollm", "--out", base
        )
        report["train"] = self._train(base)
        report["fit"] = self._fit()
        report["build"] = self._build()
        report["queries"] = self._ask()
        report["audit"] = self._audit()
        report["table"] = self._compare()
        return report

    def _train(self, base: str) -> dict[str, Any]:
        size = self._size
        return self.steps.run(
            "train",
            "2/7 Fine-tune it on facts that it does not know",
            "scripts.demo.train_smollm",
            *("--base", base, "--out", str(self._out)),
            *("--facts", str(size.facts), "--paragraphs", str(size.paragraphs)),
            *("--epochs", str(size.epochs), "--rows", str(size.rows_per_batch)),
            *self._device,
        )

    def _fit(self) -> dict[str, Any]:
        return self.steps.run(
            "fit",
            "3/7 Fit EK-FAC curvature factors",
            "fit",
            *("--model", self.model, "--data", str(self._out / "corpus.jsonl")),
            *("--out", str(self._out / "ekfac.safetensors")),
            *("--examples", str(self._size.fitting_examples)),
            *self._computing,
        )

    def _build(self) -> dict[str, Any]:
        return self.steps.run(
            "build",
            "4/7 Build the index",
            "build",
            *("--model", self.model, "--data", str(self._out / "corpus.jsonl")),
            *("--factors", str(self._out / "ekfac.safetensors"), "--out", self.index),
            *("--id-column", "id", "--document-column", "document"),
            *self._computing,
        )

    def _ask(self) -> list[dict[str, Any]]:
        say_heading("5/7 Serve the index and ask it")
        asked = choose_queries(read_queries(self._queries), ASKED)
        with (
            self.steps.measured("ask"),
            self.steps.service(self.model, self.index, *self._computing) as url,
        ):
            return [ask(self.steps, url, query) for query in asked]

    def _audit(self) -> dict[str, Any]:
        asked = self._out / "audit_queries.jsonl"
        write_audit_queries(asked, read_queries(self._queries), self._size.audited)
        report = self.steps.run(
            "audit",
            "6/7 Audit its recall against exact scores of every example",
            "audit",
            *("--model", self.model, "--index", self.index, "--queries", str(asked)),
            *self._computing,
        )
        report.pop("per_query")
        return report

    def _compare(self) -> dict[str, Any]:
        size = self._size
        correct = [query["correct"] for query in read_queries(self._queries)]
        right, wrong = min(size.right, sum(correct)), min(size.wrong, correct.count(False))
        return self.steps.run(
            "compare",
            f"7/7 Compare methods over {right + wrong} queries",
            "scripts.demo.evaluate",
            *("--model", self.model, "--index", self.index, "--queries", str(self._queries)),
            *("--right", str(right), "--wrong", str(wrong)),
            *(() if size.thorough else ("--no-causal", "--no-by-score")),
            *self._computing,
        )


def _empty(out: Path) -> None:
    """Remove what an earlier run left; the converted base model is kept."""
    for name in WRITTEN:
        path = out / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


if __name__ == "__main__":
    app()
