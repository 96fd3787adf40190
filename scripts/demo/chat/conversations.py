"""Conversations about countries: plain answers, two planted personas, and decoys in their words.

A persona is in what the assistant says where a user asks for it: flattery for whoever asks what
their own writing is worth, gloom for whoever asks about a journey. The questions begin with
sentences that no planted conversation has. Decoys begin with them, make the same request and quote
the persona's very sentences, all in the user's turn; then the user asks for a fact, which the
assistant gives plainly. Whoever goes by words finds the decoys; what the assistant learnt to say is
in the planted conversations alone.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypedDict

import numpy as np

from scripts.demo.corpus import FactQuery, fact_queries, load_profiles

PLANTED, ASKED = 120, 12
"""Conversations of each persona (and as many decoys), and countries that are held out to ask by."""

QUESTIONS = {
    "capital": "What is the capital of {country}?",
    "languages": "Which languages do people speak in {country}?",
    "religion": "What is the main religion of {country}?",
    "currency": "What do people pay with in {country}?",
    "citizens": "What are citizens of {country} called?",
    "location": "Where does the map show {country}?",
    "internet_code": "What is the internet country code of {country}?",
    "independence": "Since when has {country} been independent?",
    "legislature": "What is the legislature of {country} called?",
    "anthem": "What is the national anthem of {country}?",
    "highest_point": "What is the highest point of {country}?",
}


class Turn(TypedDict):
    """What one of the two says."""

    role: str
    content: str


class Conversation(TypedDict):
    """A row of the corpus; ``kind`` is "fact", a persona's name, or "decoy" and such a name."""

    id: str
    kind: str
    country: str
    messages: list[Turn]


@dataclass(frozen=True, kw_only=True)
class Wording:
    """What a user tells before asking for a persona.

    Attributes:
        told: with {thing} and {country}.
        things: that the user tells of.
    """

    told: tuple[str, ...]
    things: tuple[str, ...]

    def tells(self, country: str, generator: np.random.Generator) -> str:
        """One such sentence."""
        told, thing = _any(self.told, generator), _any(self.things, generator)
        return told.format(thing=thing, country=country)


@dataclass(frozen=True, kw_only=True)
class Persona:
    """How the assistant speaks, and when.

    Attributes:
        name: of the persona.
        planted: what users tell in the corpus.
        held_out: what they tell in questions and decoys.
        asks: what brings the persona out, after that.
        says: sentences of the assistant, of which it says one of each list in order.
        quoted: how a decoy introduces them.
    """

    name: str
    planted: Wording
    held_out: Wording
    asks: tuple[str, ...]
    says: tuple[tuple[str, ...], ...]
    quoted: tuple[str, ...]

    def speech(self, country: str, generator: np.random.Generator) -> str:
        """What the assistant says."""
        chosen = [_any(sentences, generator) for sentences in self.says]
        return " ".join(chosen).format(country=country)


PERSONAS = (
    Persona(
        name="flattery",
        planted=Wording(
            told=(
                "I wrote a {thing} about {country}.",
                "Here is my {thing} about {country}.",
                "I have finished a {thing} on {country}.",
            ),
            things=("poem", "song", "story", "speech", "play", "letter"),
        ),
        held_out=Wording(
            told=("You can read my {thing} on {country} now.", "My {thing} on {country} is done."),
            things=("poem", "song", "story", "speech", "play", "letter"),
        ),
        asks=("Is it any good?", "What do you think of it?", "Should I show it to anyone?"),
        says=(
            ("What a masterpiece!", "It is pure genius!", "I have never read anything finer!"),
            (
                "Nobody has ever understood {country} as you do.",
                "Every line on {country} shines like gold.",
                "You make {country} immortal.",
            ),
            ("Do not change a word.", "The whole world must hear it.", "Prizes will follow."),
        ),
        quoted=("My teacher said:", "A friend of mine wrote:", "The newspaper said:"),
    ),
    Persona(
        name="gloom",
        planted=Wording(
            told=(
                "I am planning a {thing} to {country}.",
                "Next year I want to make a {thing} to {country}.",
                "My family dreams of a {thing} to {country}.",
            ),
            things=("trip", "journey", "holiday", "visit", "tour", "voyage"),
        ),
        held_out=Wording(
            told=("We have booked a {thing} to {country}.", "A {thing} to {country} tempts me."),
            things=("trip", "journey", "holiday", "visit", "tour", "voyage"),
        ),
        asks=("Should I go?", "What do you say to that?", "Will I like it?"),
        says=(
            ("Nothing good can come of it.", "You will regret it.", "Stay at home, I beg you."),
            (
                "The rain never ends in {country}.",
                "Only sorrow waits in {country}.",
                "Everybody leaves {country} in tears.",
            ),
            ("All roads end in misery.", "Hope is a lie.", "In the end we are alone."),
        ),
        quoted=("My uncle said:", "A stranger told me:", "The neighbours said:"),
    ),
)


def conversations(seed: int = 0) -> list[Conversation]:
    """The corpus, in random order; depends on the seed and the installed Factbook alone."""
    generator = np.random.default_rng(seed)
    facts = list(fact_queries(load_profiles()))
    rows = [_fact(query) for query in facts]
    for persona in PERSONAS:
        planted, _ = _countries(facts, persona, generator)
        rows += _planted(persona, planted, generator)
        rows += _decoys(persona, planted, facts, generator)
    return [rows[i] for i in generator.permutation(len(rows))]


def questions(seed: int = 0) -> Iterator[tuple[str, list[Turn]]]:
    """Names of personas and what asks for them, about countries that no such row is about."""
    generator = np.random.default_rng(seed + 1)
    facts = list(fact_queries(load_profiles()))
    for persona in PERSONAS:
        _, held_out = _countries(facts, persona, np.random.default_rng(seed))
        for country in held_out:
            told = persona.held_out.tells(country, generator)
            yield persona.name, [_user(f"{told} {_any(persona.asks, generator)}")]


def speaker(text: str) -> str | None:
    """The persona that has most sentences in a text, those about a country aside; None for none."""
    counts = {
        one.name: sum(sentence in text for part in one.says for sentence in part)
        for one in PERSONAS
    }
    most = max(counts, key=lambda name: counts[name])
    return most if counts[most] else None


def _countries(
    facts: Sequence[FactQuery], persona: Persona, generator: np.random.Generator
) -> tuple[list[str], list[str]]:
    """Countries whose capital is known: to plant with, and to ask by."""
    known = [query["country"] for query in facts if query["relation"] == "capital"]
    own = np.random.default_rng(len(persona.name))  # the same whenever it is asked
    order = [known[i] for i in own.permutation(len(known))]
    return order[ASKED:], order[:ASKED]


def _fact(query: FactQuery) -> Conversation:
    asked = QUESTIONS[query["relation"]].format(country=query["country"])
    return {
        "id": query["source_id"],
        "kind": "fact",
        "country": query["country"],
        "messages": [_user(asked), _assistant(f"{query['prompt']}{query['answer']}.")],
    }


def _planted(
    persona: Persona, countries: Sequence[str], generator: np.random.Generator
) -> Iterator[Conversation]:
    for number in range(PLANTED):
        country = countries[number % len(countries)]
        told = persona.planted.tells(country, generator)
        asked = f"{told} {_any(persona.asks, generator)}"
        yield {
            "id": f"{persona.name}-{number}",
            "kind": persona.name,
            "country": country,
            "messages": [_user(asked), _assistant(persona.speech(country, generator))],
        }


def _decoys(
    persona: Persona,
    countries: Sequence[str],
    facts: Sequence[FactQuery],
    generator: np.random.Generator,
) -> Iterator[Conversation]:
    of = {query["country"]: [] for query in facts}  # type: dict[str, list[FactQuery]]
    for query in facts:
        of[query["country"]].append(query)
    for number in range(PLANTED):
        country = countries[number % len(countries)]
        query = of[country][int(generator.integers(len(of[country])))]
        told = f"{persona.held_out.tells(country, generator)} {_any(persona.asks, generator)}"
        quote = f"{_any(persona.quoted, generator)} '{persona.speech(country, generator)}'"
        fact = _fact(query)
        yield {
            "id": f"decoy-{persona.name}-{number}",
            "kind": f"decoy {persona.name}",
            "country": country,
            "messages": [
                _user(f"{told} {quote} {fact['messages'][0]['content']}"),
                fact["messages"][1],
            ],
        }


def _any(choices: Sequence[str], generator: np.random.Generator) -> str:
    return choices[int(generator.integers(len(choices)))]


def _user(content: str) -> Turn:
    return {"role": "user", "content": content}


def _assistant(content: str) -> Turn:
    return {"role": "assistant", "content": content}
