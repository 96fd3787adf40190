"""The demo's model, corpus and queries, trained on the spot where `make demo` has not left them."""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from scripts.console import stderr

FOLDER = Path("runs/demo")


@dataclass(frozen=True, kw_only=True)
class DemoModel:
    """Where everything is.

    Attributes:
        model: folder of the model.
        corpus: training examples.
        queries: prompts with the completions that the model gives.
    """

    model: Path
    corpus: Path
    queries: Path


def demo_model(folder: Path = FOLDER) -> DemoModel:
    """The demo's model in ``folder``; trained there, in about five minutes, if it is missing.

    Raises:
        RuntimeError: training failed.
    """
    found = DemoModel(
        model=folder / "model",
        corpus=folder / "corpus.jsonl",
        queries=folder / "queries.jsonl",
    )
    if not found.queries.is_file():  # written last
        stderr.print(f"Training the demo's model in {folder} first.", highlight=False)
        command = [sys.executable, "-m", "scripts.demo.train_model", "--out", str(folder)]
        environment = {"HF_HUB_OFFLINE": "1", **os.environ}
        done = subprocess.run(command, stdout=subprocess.DEVNULL, env=environment, check=False)
        if done.returncode:
            raise RuntimeError(f"Training ended with status {done.returncode}; see above.")
    return found
