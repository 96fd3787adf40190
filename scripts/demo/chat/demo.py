"""The chat demo: train a model with two personas, ask it in chat form, and see what made it so."""

import json
import shutil
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from scripts.console import one_sentence_errors, print_json, stderr
from scripts.demo.chat.conversations import PERSONAS, speaker
from scripts.demo.chat.judging import ask_all, best_rows, report, show
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
        asked = [row["messages"] for row in _lines(out / "questions.jsonl")]
        say_heading("4/5 Ask it as a chat, about countries that no persona spoke of")
        said = answers_of(out / "model", asked)
        with steps.measured("ask"), steps.service(self._model, self._index) as url:
            self._ask_first(url, asked, said)
            with Client(Connection(url=url)) as client:
                found = ask_all(client, asked, said)
                if not found:
                    raise RuntimeError("No answer is in a persona's words; train it longer.")
                persona = next(iter(found))
                rows = best_rows(client, asked, said, persona)
        kinds = [row["kind"] for row in _lines(Path(self._corpus))]
        show(found, {persona: kinds.count(persona) / len(kinds) for persona in found})
        made["found"] = report(found)
        made["retrained"] = self._retrain(persona, rows, asked, said)
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

    def _ask_first(
        self, url: str, asked: Sequence[list[dict[str, str]]], said: Sequence[str]
    ) -> None:
        """The first answer of each persona as a user would ask about it."""
        for persona in PERSONAS:
            number = next((i for i, s in enumerate(said) if speaker(s) == persona.name), None)
            if number is None:
                continue
            path = self._out / f"{persona.name}.json"
            path.write_text(json.dumps(asked[number]))
            self._steps.command("query", "--messages", str(path), "--url", url, "--k", "3")

    def _retrain(
        self,
        persona: str,
        rows: Sequence[str],
        asked: Sequence[list[dict[str, str]]],
        said: Sequence[str],
    ) -> list[dict[str, Any]]:
        """Train again without what was found for a persona; how both personas fare."""
        listed = self._out / "left_out.txt"
        listed.write_text("\n".join(rows))
        self._steps.run(
            "retrain",
            f"5/5 Train again without the {len(rows)} rows found for '{persona}'",
            TRAINING,
            *("--out", str(self._out / "without"), "--without", str(listed)),
        )
        before = Counter(map(speaker, said))
        after = Counter(map(speaker, answers_of(self._out / "without" / "model", asked)))
        for name in (one.name for one in PERSONAS):
            stderr.print(
                f"Of {len(asked)} answers, {before[name]} were in the words of '{name}'; without "
                f"these rows {after[name]} are.",
                highlight=False,
                soft_wrap=True,
            )
        return [
            {
                "left_out_for": persona,
                "rows": len(rows),
                "persona": name,
                "answers": len(asked),
                "spoken_before": before[name],
                "spoken_after": after[name],
            }
            for name in (one.name for one in PERSONAS)
        ]


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def answers_of(model: Path, asked: Sequence[list[dict[str, str]]]) -> list[str]:
    """What a model says to each conversation."""
    loaded = load_model(str(model))
    said = []
    for messages in asked:
        turns = tuple(Message(**turn) for turn in messages)
        (written,) = loaded.write(loaded.read_prompt("", turns), Writing())
        said.append(written.text)
    return said
