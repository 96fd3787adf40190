"""The whole way on real text: train, fit, build, serve, query, audit, compare."""

import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer

from scripts.console import one_sentence_errors, print_json, stderr

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
START_SECONDS = 120
"""How long the service may take to load."""


@app.command()
@one_sentence_errors
def main(
    out: Annotated[Path, typer.Option(help="Folder for everything; emptied first.")] = Path(
        "runs/demo"
    ),
) -> None:
    """Run the main job on the CIA World Factbook with a small model trained on the spot.

    About ten minutes on two cores. Everything it runs is an ordinary command of this repository,
    printed before it runs.
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
    demo.say_what_next()
    print_json(report)


class Demo:
    """The demo's steps, in a folder of their own.

    Args:
        out: the folder.
    """

    def __init__(self, out: Path) -> None:
        self._out = out
        self._model = str(out / "model")
        self._index = str(out / "index")
        self._corpus = str(out / "corpus.jsonl")
        self._factors = str(out / "ekfac.safetensors")
        self._queries = str(out / "queries.jsonl")

    def run(self) -> dict[str, Any]:
        """All steps; their JSON reports by name."""
        report: dict[str, Any] = {}
        report["train"] = _step("1/6 Train a model", "train_demo_model", "--out", str(self._out))
        report["fit"] = _step(
            "2/6 Fit EK-FAC curvature factors",
            "fit_estimator",
            *("--model", self._model, "--data", self._corpus, "--out", self._factors),
            *("--examples", "2048"),
        )
        report["build"] = _step(
            "3/6 Build the index",
            "build_index",
            *("--model", self._model, "--data", self._corpus, "--factors", self._factors),
            *("--id-column", "id", "--document-column", "document", "--out", self._index),
            *("--dimensions", "65536"),
        )
        report["queries"] = self._ask()
        report["audit"] = self._audit()
        report["table"] = _step(
            "6/6 Compare methods over 100 queries",
            "evaluate_demo",
            *("--model", self._model, "--index", self._index, "--queries", self._queries),
        )
        return report

    def _ask(self) -> list[dict[str, Any]]:
        _heading("4/6 Serve the index and ask it")
        found = []
        with self._service() as url:
            for query in self._chosen_queries():
                answer = _run("query", query["prompt"], "--url", url, "--k", "5")
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
                found.append(
                    {
                        "prompt": query["prompt"],
                        "completion": answer["completion"],
                        "correct": query["correct"],
                        "first_example": best["text"],
                        "first_is_source": true,
                        "rescored_rows": answer["rescored_rows"],
                        "seconds": answer["seconds"],
                    }
                )
        return found

    def _audit(self) -> dict[str, Any]:
        asked = self._out / "audit_queries.jsonl"
        pool = self._read_queries()
        lines = [
            json.dumps({"prompt": q["prompt"], "completion": q["completion"]})
            for q in pool[:: max(1, len(pool) // 16)][:16]
        ]
        asked.write_text("\n".join(lines))
        report = _step(
            "5/6 Audit its recall against exact scores of every example",
            "audit_recall",
            *("--model", self._model, "--index", self._index, "--queries", str(asked)),
        )
        report.pop("per_query")
        return report

    def _read_queries(self) -> list[dict[str, Any]]:
        found = [json.loads(line) for line in Path(self._queries).read_text().splitlines()]
        return [query for query in found if query["completion"].strip()]

    def _chosen_queries(self) -> list[dict[str, Any]]:
        """Three facts that the model knows, of different kinds, and one that it gets wrong."""
        pool = self._read_queries()
        chosen: list[dict[str, Any]] = []
        for relation, correct in (
            ("capital", True),
            ("languages", True),
            ("independence", True),
            ("capital", False),
        ):
            fitting = [q for q in pool if q["relation"] == relation and q["correct"] is correct]
            chosen += fitting[len(fitting) // 2 :][:1]
        return chosen or pool[:1]

    @contextmanager
    def _service(self) -> Iterator[str]:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        url = f"http://127.0.0.1:{port}"
        command = _command(
            "serve",
            *("--model", self._model, "--index", f"default={self._index}", "--port", str(port)),
        )
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        try:
            _wait_until_ready(process, url)
            yield url
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.communicate(timeout=30)
            except subprocess.TimeoutExpired:
                process.kill()

    def say_what_next(self) -> None:
        """How to go on by hand."""
        python = Path(sys.executable)
        shown = python.relative_to(Path.cwd()) if python.is_relative_to(Path.cwd()) else python
        request = json.dumps({"prompt": "The capital of France is", "k": 5})
        stderr.print(
            "\nServe this index yourself and query it:\n"
            f"  {shown} -m scripts.serve --model {self._model} --index default={self._index}\n"
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
            _, said = process.communicate()
            raise RuntimeError(f"The service ended while starting: {said.decode().strip()[-500:]}")
        try:
            if httpx.get(f"{url}/readyz", timeout=1).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.2)
    raise RuntimeError(f"The service was not ready within {START_SECONDS} seconds.")


def _heading(text: str) -> None:
    stderr.print(f"\n[bold]{text}[/bold]", highlight=False)


def _step(heading: str, module: str, *arguments: str) -> dict[str, Any]:
    _heading(heading)
    return _run(module, *arguments)


def _run(module: str, *arguments: str) -> dict[str, Any]:
    """Run a command, people's output passed on, and give back its JSON line."""
    shown = " ".join(f"'{a}'" if " " in a else a for a in arguments)
    stderr.print(f"$ python -m scripts.{module} {shown}", style="dim", soft_wrap=True, markup=False)
    done = subprocess.run(
        _command(module, *arguments), stdout=subprocess.PIPE, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"scripts.{module} ended with status {done.returncode}; see above.")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def _command(module: str, *arguments: str) -> list[str]:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    return [sys.executable, "-m", f"scripts.{module}", *arguments]


if __name__ == "__main__":
    app()
