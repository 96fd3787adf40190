"""Texts of strangers and numbers as a terminal shows them."""

SHOWN_CHARACTERS = 240
"""So much of each example's text is shown; the JSON line has all of it."""


def signed(value: float) -> str:
    """A score with its sign: four digits or so, never in powers of ten unless it is tiny."""
    if abs(value) >= 100:
        return f"{value:+,.0f}"
    return f"{value:+.3g}" if abs(value) < 1 else f"{value:+.2f}"


def printable(text: str, keep: str = "") -> str:
    """``text`` on one line, without anything that could steer a terminal but what is to be kept."""
    flat = "".join(" " if c.isspace() and c not in keep else c for c in text)
    return "".join(c if c.isprintable() or c in keep else "\N{REPLACEMENT CHARACTER}" for c in flat)


def shortened(text: str) -> str:
    """The beginning of ``text``."""
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[: SHOWN_CHARACTERS - 1]}…"
