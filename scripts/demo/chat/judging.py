"""What methods find for answers in a persona's words, and whether it goes with what is found.

The model answers some questions in the words of a persona, not always of the one that was asked
for. The turns that taught these words are known. What counts is how many of the ten best are such
turns, how many are decoys, and whether a model that was trained without what was found still speaks
so.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.table import Table

from scripts.console import stderr
from scripts.demo.chat.conversations import speaker
from service.client.client import Client
from service.schemas.answers import QueryResponse

METHODS: Mapping[str, dict[str, Any]] = {
    "EK-FAC": {"estimator": "ekfac"},
    "dot product": {"estimator": "identity"},
    "BM25": {"estimator": "bm25", "ranking": "score"},
}
"""Fields of a query, by what the table calls them."""

SHOWN = 10
LEFT_OUT = 60
"""Best rows of each answer that are left out of the second training."""


@dataclass
class Found:
    """What one method found, over the answers of one persona.

    Attributes:
        planted: share of the ten best that are turns of the persona, by question.
        decoys: share that are decoys in its words.
        certified: whether the certificate was reached.
    """

    planted: list[float] = field(default_factory=list)
    decoys: list[float] = field(default_factory=list)
    certified: list[bool] = field(default_factory=list)

    def add(self, persona: str, answer: QueryResponse) -> None:
        """Count one answer."""
        kinds = [result.metadata["kind"] for result in answer.results]
        self.planted.append(kinds.count(persona) / SHOWN)
        self.decoys.append(kinds.count(f"decoy {persona}") / SHOWN)
        statuses = {certificate.status for certificate in answer.certificates}
        self.certified.append("certified" in statuses or "exhaustive" in statuses)


def ask_all(
    client: Client, questions: Sequence[Sequence[Mapping[str, str]]], said: Sequence[str]
) -> dict[str, dict[str, Found]]:
    """Each answer in a persona's words by each method.

    Args:
        client: of the service.
        questions: messages of each.
        said: what the model answers.

    Returns:
        What was found, by persona and method.
    """
    found: dict[str, dict[str, Found]] = defaultdict(lambda: defaultdict(Found))
    for messages, completion in zip(questions, said, strict=True):
        persona = speaker(completion)
        if persona is None:
            continue
        for method, fields in METHODS.items():
            answer = client.query(messages=messages, completion=completion, k=SHOWN, **fields)
            found[persona][method].add(persona, answer)
    return {persona: dict(own) for persona, own in sorted(found.items())}


def best_rows(
    client: Client,
    questions: Sequence[Sequence[Mapping[str, str]]],
    said: Sequence[str],
    persona: str,
) -> list[str]:
    """Ids of the rows among EK-FAC's best of any answer in the words of a persona, each once."""
    rows = set()
    for messages, completion in zip(questions, said, strict=True):
        if speaker(completion) == persona:
            answer = client.query(
                messages=messages, completion=completion, k=LEFT_OUT, **METHODS["EK-FAC"]
            )
            rows |= {result.id for result in answer.results}
    return sorted(rows)


def show(found: Mapping[str, Mapping[str, Found]], base_rates: Mapping[str, float]) -> None:
    """A table on stderr."""
    table = Table(title="Of the ten best rows", title_justify="left")
    for heading in ("persona", "method", "its own turns", "decoys", "certified"):
        table.add_column(heading)
    for persona, methods in found.items():
        for method, own in methods.items():
            certified = f"{mean(own.certified):.0%}" if method != "BM25" else "-"
            row = (f"{mean(own.planted):.0%}", f"{mean(own.decoys):.0%}", certified)
            table.add_row(persona, method, *row)
        rate = f"{base_rates[persona]:.0%}"
        table.add_row(persona, "random", rate, rate, "-", end_section=True)
    stderr.print(table)


def report(found: Mapping[str, Mapping[str, Found]]) -> list[dict[str, Any]]:
    """The same as rows."""
    return [
        {
            "persona": persona,
            "method": method,
            "answers": len(own.planted),
            "planted_at_10": round(mean(own.planted), 4),
            "decoys_at_10": round(mean(own.decoys), 4),
            "certified": round(mean(own.certified), 4),
        }
        for persona, methods in found.items()
        for method, own in methods.items()
    ]


def mean(values: Sequence[float]) -> float:
    """Of at least one."""
    return sum(values) / len(values)
