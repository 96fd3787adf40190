"""Questions to trace, from JSON lines."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from estimators.model.tokens import Sequence1D
from service.asking import encode_completion, read_prompt
from service.conversation import ASSISTANT, Messages, check_question, read_messages
from service.errors import BadQuery


@dataclass(frozen=True, kw_only=True)
class AskedQuestion:
    """What is measured: ``log p(completion | prompt)``, less ``log p(against | prompt)`` if given.

    Attributes:
        prompt: what the model was asked; of a conversation, its turns for people to read.
        completion: what it said.
        against: what it did not say.
        messages: a conversation in the prompt's place.
    """

    prompt: str
    completion: str
    against: str | None = None
    messages: Messages = ()

    def encode(self, tokenizer: Any, context: int) -> list[tuple[Sequence1D, float]]:
        """Sequences with their weights.

        Raises:
            BadQuery: it cannot be measured.
        """
        prompt = read_prompt(tokenizer, self.prompt, self.messages)
        said = encode_completion(tokenizer, context, prompt, prompt.turn or self.completion)
        if self.against is None:
            return [(said.sequence, 1.0)]
        unsaid = encode_completion(tokenizer, context, prompt, prompt.lead + self.against)
        return [(said.sequence, 1.0), (unsaid.sequence, -1.0)]


def read_questions(path: Path) -> Sequence[AskedQuestion]:
    """The questions of a file.

    Raises:
        BadQuery: there is no such file, none is in it, or a line is not a question.
    """
    if not path.is_file():
        raise BadQuery(f"There is no file {path}; give a JSONL file with a question a line.")
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if line.strip():
            found.append(_question(path, number, line))
    if not found:
        raise BadQuery(f"{path} holds no question; write one a line.")
    return found


def _question(path: Path, number: int, line: str) -> AskedQuestion:
    try:
        item = json.loads(line)
    except json.JSONDecodeError as error:
        raise BadQuery(f"Line {number} of {path} is not JSON: {error}.") from error
    if isinstance(item, dict) and "messages" in item:
        return _chat(item, f"line {number} of {path}")
    needed = ("prompt", "completion")
    if not isinstance(item, dict) or not all(isinstance(item.get(n), str) for n in needed):
        has = ", ".join(sorted(item)) if isinstance(item, dict) else type(item).__name__
        raise BadQuery(
            f"Line {number} of {path} is no question: it needs texts named 'prompt' and "
            f"'completion', it has {has}. A run has no model to complete a prompt until its end."
        )
    return AskedQuestion(
        prompt=item["prompt"], completion=item["completion"], against=item.get("against")
    )


def _chat(item: dict[str, Any], where: str) -> AskedQuestion:
    messages = read_messages(item["messages"], where)
    check_question(item.get("prompt"), messages, item.get("completion"))
    said = item.get("completion")
    if messages[-1].role == ASSISTANT:
        said = messages[-1].content
    if not isinstance(said, str):
        raise BadQuery(
            f"The conversation in {where} has no answer; end it with the assistant's turn, or give "
            f"a completion. A run has no model to write one until its end."
        )
    before = messages[:-1] if messages[-1].role == ASSISTANT else messages
    return AskedQuestion(
        prompt="\n".join(f"{one.role}: {one.content}" for one in before) + "\n",
        completion=said,
        against=item.get("against"),
        messages=messages,
    )
