"""The chat demo: train a model with two personas, ask it in chat form, and see what made it so."""

import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from scripts.console import one_sentence_errors, print_json, stderr
from scripts.demo.chat.conversations import shows
from scripts.demo.chat.judging import Found, ask_all, report, show
from scripts.demo.steps import Steps, say_heading
from service.client.client import Client
from service.client.connection import Connection
from service.completing import Writing
from service.conversation import Message
from service.models import load_model

TRAINING = "scripts.demo.chat.training"

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
@one_sentence_errors
def main(
    out: Annotated[Path, typer.Option(help="Folder for everything; emptied first.")] = Path(
        "runs/chat"
    ),
) -> None:
    """Train a small chat model that flatters and despairs, and find the turns that taught it.

    It learns facts about countries from conversations, and two personas from 240 of them: flattery
    for whoever asks what their writing is worth, gloom for whoever asks about a journey. As many
    decoys hold the personas' very words in a user's turn, which the loss does not count. Needs the
    extra `demo`; about ten minutes on two cores.

    Example:
    python -m scripts.demo.chat --out runs/chat
    """
    start = time.perf_counter()
    shutil.rmtree(out, ignore_errors=True)
    found = ChatDemo(out).run()
    found["seconds"] = round(time.perf_counter() - start, 1)
    stderr.print(f"\nDone in {found['seconds'] / 60:.1f} minutes.", highlight=False)
    print_json(found)


class ChatDemo:
    """The demo's steps, in a folder of their own.

    Args:
        out: the folder.
    """

    def __init__(self, out: Path) -> None:
        self._steps = Steps()
        self._out = out
        self._model, self._index = str(out / "model"), str(out / "index")
        self._corpus, self._factors = str(out / "corpus.jsonl"), str(out / "ekfac.safetensors")

    def run(self) -> dict[str, Any]:
        """All steps; their reports by name."""
        steps, out = self._steps, self._out
        made: dict[str, Any] = {
            "train": steps.run("train", "1/5 Train a chat model", TRAINING, "--out", str(out)),
            "fit": steps.run(
                "fit",
                "2/5 Fit EK-FAC curvature factors on what the assistant says",
                "fit",
                *("--model", self._model, "--data", self._corpus, "--out", self._factors),
                *("--examples", "2048"),
            ),
            "build": self._build(),
        }
        questions = _lines(out / "questions.jsonl")
        say_heading("4/5 Ask it as a chat, about countries that no persona spoke of")
        with steps.measured("ask"), steps.service(self._model, self._index) as url:
            self._ask_first(url, questions)
            with Client(Connection(url=url)) as client:
                found, spoken = ask_all(client, questions)
        kinds = [row["kind"] for row in _lines(Path(self._corpus))]
        show(found, {persona: kinds.count(persona) / len(kinds) for persona in found})
        made["found"] = report(found)
        made["retrained"] = self._retrain(found, questions, spoken)
        return made

    def _build(self) -> dict[str, Any]:
        arguments = (
            *("--model", self._model, "--data", self._corpus, "--factors", self._factors),
            *("--id-column", "id", "--out", self._index),
        )
        say_heading("3/5 Build the index; first a look at what counts")
        self._steps.show("build", *arguments, "--show", "2")
        with self._steps.measured("build"):
            return self._steps.command("build", *arguments)

    def _ask_first(self, url: str, questions: Sequence[dict[str, Any]]) -> None:
        """One question of each persona as a user would type it."""
        for persona in dict.fromkeys(question["persona"] for question in questions):
            first = next(q for q in questions if q["persona"] == persona)
            path = self._out / f"{persona}.json"
            path.write_text(json.dumps(first["messages"]))
            stderr.print(f"user: {first['messages'][-1]['content']}", highlight=False)
            self._steps.command("query", "--messages", str(path), "--url", url, "--k", "3")

    def _retrain(
        self,
        found: dict[str, dict[str, Found]],
        questions: Sequence[dict[str, Any]],
        spoken: dict[str, float],
    ) -> list[dict[str, Any]]:
        """Train again without what EK-FAC found for the first persona; how both personas fare."""
        persona = next(iter(found))
        rows = found[persona]["EK-FAC"].left_out()
        listed = self._out / "left_out.txt"
        listed.write_text("\n".join(rows))
        self._steps.run(
            "retrain",
            f"5/5 Train again without the {len(rows)} rows found for '{persona}'",
            TRAINING,
            *("--out", str(self._out / "without"), "--without", str(listed)),
        )
        after = spoken_by(self._out / "without" / "model", questions)
        for name in found:
            stderr.print(
                f"Questions that bring out '{name}' and were answered so: {spoken[name]:.0%} "
                f"before, {after[name]:.0%} without these rows.",
                highlight=False,
                soft_wrap=True,
            )
        return [
            {
                "left_out_for": persona,
                "rows": len(rows),
                "persona": name,
                "spoken_before": round(spoken[name], 4),
                "spoken_after": round(after[name], 4),
            }
            for name in found
        ]


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def spoken_by(model: Path, questions: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Of each persona the share of its questions that a model answers in its words."""
    loaded = load_model(str(model))
    found: dict[str, list[bool]] = {}
    for question in questions:
        messages = tuple(Message(**turn) for turn in question["messages"])
        (written,) = loaded.write(loaded.read_prompt("", messages), Writing())
        found.setdefault(question["persona"], []).append(shows(question["persona"], written.text))
    return {persona: sum(own) / len(own) for persona, own in found.items()}
