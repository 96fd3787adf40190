"""The rows of a run found again among the rows of an index, by what the model read."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from estimators.grounds import training_sequence
from index.examples import ExampleStore
from service.tracing.carried import CarriedRow, content_hash


@dataclass(frozen=True, kw_only=True)
class Matching:
    """Which row of a run is which row of an index.

    Tokens decide, since a run knows texts by them alone. Rows of the index with the same tokens
    cannot be told apart in a run; they share what it read in equal parts.

    Attributes:
        run_rows: numbers in the run, of each pair.
        index_rows: numbers in the index, of the same pairs.
        shares: part of the run's row that falls to the index' row.
        rows: of the index.
        lacking: of each row of the run, whether the index has it not.
        changed: rows that are lacking although the index has their id, with other tokens.
        otherwise: rows of the index of which other tokens count than the run counted.
    """

    run_rows: Int[np.ndarray, "pair"]
    index_rows: Int[np.ndarray, "pair"]
    shares: Float[np.ndarray, "pair"]
    rows: int
    lacking: Bool[np.ndarray, "run_row"]
    changed: int
    otherwise: int = 0

    @classmethod
    def of(cls, carried: Sequence[CarriedRow], examples: ExampleStore) -> "Matching":
        """By the hashes of their tokens.

        Args:
            carried: rows of the run.
            examples: of the index.
        """
        places: dict[bytes, list[int]] = {row.content: [] for row in carried}
        for number, tokens in enumerate(examples.token_bytes()):
            found = places.get(content_hash(tokens))
            if found is not None:
                found.append(number)
        pairs = [
            (number, place, 1 / len(places[row.content]))
            for number, row in enumerate(carried)
            for place in places[row.content]
        ]
        lacking = np.array([not places[row.content] for row in carried])
        missed = {row.id for row, lacks in zip(carried, lacking, strict=True) if lacks}
        run_rows, index_rows, shares = zip(*pairs, strict=True) if pairs else ((), (), ())
        return cls(
            run_rows=np.array(run_rows, dtype=np.int64),
            index_rows=np.array(index_rows, dtype=np.int64),
            shares=np.array(shares, dtype=np.float64),
            rows=len(examples),
            lacking=lacking,
            changed=len(missed.intersection(examples.ids())) if missed else 0,
            otherwise=sum(
                carried[number].counted
                not in (None, training_sequence(examples, place).target_spans)
                for number, place, _ in pairs
            ),
        )

    @property
    def unread(self) -> int:
        """Rows of the index that the run never read."""
        return self.rows - len(np.unique(self.index_rows))

    @property
    def copies(self) -> int:
        """Rows of the index that share their tokens with others, and were read."""
        return len(np.unique(self.index_rows[self.shares < 1]))

    def over_index(self, totals: Float[np.ndarray, "run_row"]) -> Float[np.ndarray, "row"]:
        """Values of the run's rows as values of the index' rows; 0 where the run never read one."""
        given = totals[self.run_rows] * self.shares
        spread: np.ndarray = np.bincount(self.index_rows, weights=given, minlength=self.rows)
        return spread

    def lost(self, totals: Float[np.ndarray, "run_row"]) -> float:
        """Part of the sum of absolute values that falls to rows which the index lacks."""
        sizes = np.abs(totals)
        whole = float(sizes.sum())
        return float(sizes[self.lacking].sum()) / whole if whole else 0.0


def _otherwise(row: CarriedRow, examples: ExampleStore, place: int) -> bool:
    """Whether other tokens of a row of the index count than the run counted, as far as is known."""
    if row.counted is None:
        return False
    return row.counted != training_sequence(examples, place).target_spans
