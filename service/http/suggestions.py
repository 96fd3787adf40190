"""Questions to begin with: beginnings of an index' own examples, for the model to complete."""

import re

import numpy as np

from index.examples import ExampleStore
from service.schemas.indexes import SuggestionSchema

SUGGESTED = 3
LEAST_TOKENS = 13
LONGEST = 160
"""Characters of a beginning."""
LOOKED_AT = 200
"""Most random rows that are read in search of fit ones."""

BETWEEN_WORDS = re.compile(r"(?<=[^\W_]) (?=\w)")
SPACELESS = re.compile(r"[^\s]{26,}")


def suggest(examples: ExampleStore) -> list[SuggestionSchema]:
    """Beginnings of random rows, the same ones as long as the index has as many rows."""
    total = len(examples)
    rows = np.random.default_rng(total).choice(total, min(total, LOOKED_AT), replace=False)
    found: dict[str, SuggestionSchema] = {}
    for row in rows.tolist():
        example = examples[row]
        prompt = beginning(example.text) if len(example.tokens) >= LEAST_TOKENS else None
        if prompt is not None:
            found.setdefault(prompt, SuggestionSchema(prompt=prompt, id=example.id))
        if len(found) == SUGGESTED:
            break
    return list(found.values())


def beginning(text: str) -> str | None:
    """About the first half of a text, up to the end of a word that another one follows.

    None where there is no such place, unless the text is of a script without spaces.
    """
    half = min(len(text) // 2, LONGEST)
    ends = [match.start() for match in BETWEEN_WORDS.finditer(text, 0, 2 * half)]
    if ends:
        return text[: min(ends, key=lambda end: abs(end - half))]
    spaceless = SPACELESS.match(text)
    return text[: min(half, spaceless.end() // 2)] if spaceless and not text.isascii() else None
