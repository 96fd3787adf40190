"""The whole way on real text: train, fit, build, serve, query, audit, compare."""

import resource
import shutil
import time
from pathlib import Path
from typing import Annotated, Any

import typer

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

AUDITED = ("ekfac", "ekfac:damping=0.001", "ekfac:damping=1", "kfac", "identity")
"""Estimators that the one index is asked by."""

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
ASKED = (("capital", True), ("languages", True), ("independence", True), ("capital", False))
"""Relation and whether the model knows it: three facts of different kinds and a wrong one."""


@app.command()
@one_sentence_errors
def main(
    out: Annotated[Path, typer.Option(help="Folder for everything; emptied first.")] = Path(
        "runs/demo"
    ),
) -> None:
    """Run the main job on the CIA World Factbook with a small model trained on the spot.

    It takes ten to fifteen minutes on two cores. Everything it runs is an
    ordinary command, printed before it runs. Needs the extra `demo`.

    Example:
    etymon demo --out runs/demo
    """
    start = time.perf_counter()
    shutil.rmtree(out, ignore_errors=True)
    demo = Demo(out)
    stderr.print(
        "Etymon's demo: train a small GPT-2 on the CIA World Factbook until it knows many facts, "
        "then find the training examples behind what it says.",
        soft_wrap=True,
    )
    report = demo.run()
    report["seconds"] = time.perf_counter() - start
    report["peak_memory_mb"] = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    stderr.print(
        f"\nDone in {report['seconds'] / 60:.1f} minutes, with at most "
        f"{report['peak_memory_mb']:.0f} MB of memory in any one command."
    )
    say_what_next(demo.model, demo.index)
    print_json(report)


class Demo:
    """The demo's steps, in a folder of their own.

    Args:
        out: the folder.
    """

    def __init__(self, out: Path) -> None:
        self.steps = Steps()
        self.model = str(out / "model")
        self.index = str(out / "index")
        self._out = out
        self._corpus = str(out / "corpus.jsonl")
        self._factors = str(out / "ekfac.safetensors")
        self._queries = out / "queries.jsonl"

    def run(self) -> dict[str, Any]:
        """All steps; their JSON reports by name."""
        report: dict[str, Any] = {}
        report["train"] = self.steps.run(
            "train", "1/6 Train a model", "scripts.demo.train_model", "--out", str(self._out)
        )
        report["fit"] = self.steps.run(
            "fit",
            "2/6 Fit EK-FAC curvature factors",
            "fit",
            *("--model", self.model, "--data", self._corpus, "--out", self._factors),
            *("--examples", "2048"),
        )
        report["build"] = self.steps.run(
            "build",
            "3/6 Build the index",
            "build",
            *("--model", self.model, "--data", self._corpus, "--factors", self._factors),
            *("--id-column", "id", "--document-column", "document", "--out", self.index),
        )
        report["queries"] = self._ask()
        report["audit"] = self._audit()
        report["table"] = self.steps.run(
            "compare",
            "6/6 Compare methods over 100 queries",
            "scripts.demo.evaluate",
            *("--model", self.model, "--index", self.index, "--queries", str(self._queries)),
        )
        return report

    def _ask(self) -> list[dict[str, Any]]:
        say_heading("4/6 Serve the index and ask it")
        asked = choose_queries(read_queries(self._queries), ASKED)
        with self.steps.measured("ask"), self.steps.service(self.model, self.index) as url:
            return [ask(self.steps, url, query) for query in asked]

    def _audit(self) -> dict[str, Any]:
        asked = self._out / "audit_queries.jsonl"
        write_audit_queries(asked, read_queries(self._queries), 16)
        report = self.steps.run(
            "audit",
            "5/6 Audit its recall against exact scores of every example",
            "audit",
            *("--model", self.model, "--index", self.index, "--queries", str(asked)),
            *(part for name in AUDITED for part in ("--estimator", name)),
        )
        for one in (report, *report["others"]):
            one.pop("per_query")
        return report
