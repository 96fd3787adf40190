"""Two answers to one question side by side: which rows either has, and where."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from service.schemas.answers import QueryResponse, ResultSchema

Side = Literal["proponents", "opponents"]
SIDES: tuple[Side, ...] = ("proponents", "opponents")


@dataclass(frozen=True, kw_only=True)
class ComparedRow:
    """A training example that one of two answers has, or both.

    Attributes:
        direction: in which it was found.
        row: in the index.
        id: of the example.
        document: that it belongs to.
        text: of the example.
        ranks: in the first answer and in the second; None where it is not among the results.
        scores: likewise, each in the unit of its own answer.
    """

    direction: Side
    row: int
    id: str
    document: str
    text: str
    ranks: tuple[int | None, int | None]
    scores: tuple[float | None, float | None]


def compare(first: QueryResponse, second: QueryResponse) -> list[ComparedRow]:
    """Rows of both answers, then those of the first alone, then those of the second alone.

    Each group is in the order of its ranks, proponents before opponents.

    Raises:
        ValueError: the answers are not about the same index and completions.
    """
    asked = [
        [(t.prompt, t.completion, t.against, t.weight) for t in answer.measurement.terms]
        for answer in (first, second)
    ]
    if first.index != second.index or asked[0] != asked[1]:
        raise ValueError("The two answers are about different questions; ask both the same.")
    return [row for side in SIDES for row in _compared(side, _of(first, side), _of(second, side))]


def _of(answer: QueryResponse, side: Side) -> Mapping[int, ResultSchema]:
    return {result.row: result for result in answer.results if result.direction == side}


def _compared(
    side: Side, first: Mapping[int, ResultSchema], second: Mapping[int, ResultSchema]
) -> list[ComparedRow]:
    both = [row for row in first if row in second]
    alone = [row for row in first if row not in second]
    rows = [*both, *alone, *(row for row in second if row not in first)]
    found = []
    for row in rows:
        own, other = first.get(row), second.get(row)
        shown = own or other
        assert shown is not None
        found.append(
            ComparedRow(
                direction=side,
                row=row,
                id=shown.id,
                document=shown.document,
                text=shown.text,
                ranks=(own.rank if own else None, other.rank if other else None),
                scores=(own.score if own else None, other.score if other else None),
            )
        )
    return found
