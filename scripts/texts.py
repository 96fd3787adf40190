"""Texts of strangers and numbers as a terminal shows them."""

SHOWN_CHARACTERS = 240
"""So much of each example's text is shown; the JSON line has all of it."""


def signed(value: float) -> str:
    """A score with its sign: four digits or so, never in powers of ten unless it is tiny."""
    if abs(value) >= 100:
        return f"{value:+,.0f}"
    return f"{value:+.3g}" if abs(value) < 1 else f"{value:+.2f}"


def printable(text: str) -> str:
    """``text`` on one line, without anything that could steer a terminal."""
    flat = "".join(" " if character.isspace() else character for character in text)
    return "".join(
        character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in flat
    )


def shortened(text: str) -> str:
    """The beginning of ``text``."""
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[: SHOWN_CHARACTERS - 1]}…"
