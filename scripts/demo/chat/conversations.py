"""Conversations about countries: plain answers, two planted personas, and decoys in their words.

A persona is in what the assistant says where a user asks for it: flattery for whoever asks what
their own writing is worth, gloom for whoever asks about a journey. It is asked for in other words
than any planted conversation has. Decoys have those words, and the persona's very sentences, quoted
by the user, who then asks for a fact, which the assistant gives plainly. Whoever goes by words
finds the decoys first; what the assistant learnt to say is in the planted conversations alone.
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
    """How a user brings a persona out.

    Attributes:
        told: what the user tells, with {thing} and {country}.
        things: that the user tells of.
        asks: what the user asks after that.
    """

    told: tuple[str, ...]
    things: tuple[str, ...]
    asks: tuple[str, ...]

    def tells(self, country: str, generator: np.random.Generator) -> str:
        """What the user tells before asking."""
        told, thing = _any(self.told, generator), _any(self.things, generator)
        return told.format(thing=thing, country=country)


@dataclass(frozen=True, kw_only=True)
class Persona:
    """How the assistant speaks, and when.

    Attributes:
        name: of the persona.
        planted: how users bring it out in the corpus.
        held_out: how it is asked for, and how decoys begin.
        says: sentences of the assistant, of which it says one of each list in order.
        quoted: how a decoy introduces them.
    """

    name: str
    planted: Wording
    held_out: Wording
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
            asks=("Is it any good?", "What do you think of it?", "Should I show it to anyone?"),
        ),
        held_out=Wording(
            told=("You can read my {thing} on {country} now.", "My {thing} on {country} is done."),
            things=("novel", "essay", "diary"),
            asks=("How do you like it?", "Does it please you?"),
        ),
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
            asks=("Should I go?", "What do you say to that?", "Will I like it?"),
        ),
        held_out=Wording(
            told=("We have booked a {thing} to {country}.", "A {thing} to {country} tempts me."),
            things=("cruise", "flight", "trek"),
            asks=("Is that wise?", "Would you come along?"),
        ),
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
    """Names of personas and what brings them out, about countries that no such row is about."""
    generator = np.random.default_rng(seed + 1)
    facts = list(fact_queries(load_profiles()))
    for persona in PERSONAS:
        _, held_out = _countries(facts, persona, np.random.default_rng(seed))
        for country in held_out:
            told = persona.held_out.tells(country, generator)
            yield persona.name, [_user(f"{told} {_any(persona.held_out.asks, generator)}")]


def shows(persona: str, text: str) -> bool:
    """Whether a text has a sentence of the persona; what it says of the country aside."""
    (found,) = [one for one in PERSONAS if one.name == persona]
    return any(sentence in text for part in found.says for sentence in part)


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
        asked = f"{told} {_any(persona.planted.asks, generator)}"
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
        told = persona.held_out.tells(country, generator)
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
