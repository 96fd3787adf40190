"""How long work shows people how far it is."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

Progress = Callable[[str, Sequence[Any]], Iterable[Any]]
"""``progress(description, items)`` yields the items on, showing people how far it is."""


def no_progress(description: str, items: Sequence[Any]) -> Iterator[Any]:
    """Show nothing."""
    yield from items
