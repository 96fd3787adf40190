"""How long work shows people how far it is."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

Progress = Callable[[str, Iterable[Any]], Iterable[Any]]
"""``progress(description, items)`` yields the items on, showing people how far it is; how much is
left only for items that have a length."""


def no_progress(description: str, items: Iterable[Any]) -> Iterator[Any]:
    """Show nothing."""
    yield from items
