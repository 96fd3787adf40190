"""Weights of rows, for a retraining without some of them."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from estimators.run.recorded import Row

SHOWN = 3
"""Unknown ids that a sentence names."""


def read_weights(path: Path, rows: Sequence[Row]) -> list[float]:
    """A weight for each row, 1 where the file names none.

    Args:
        path: JSON lines, each ``{"id": ..., "weight": ...}`` or ``{"row": ..., "weight": ...}``;
            an id stands for all rows that have it.
        rows: of the run.

    Raises:
        ValueError: a line is something else, or names an unknown row.
    """
    if not path.is_file():
        raise ValueError(f"There is no file {path}; give JSON lines with 'id' and 'weight'.")
    numbers: dict[str, list[int]] = {}
    for number, row in enumerate(rows):
        numbers.setdefault(row.id, []).append(number)
    weights = [1.0] * len(rows)
    unknown: list[str] = []
    for line, text in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not text.strip():
            continue
        item = _item(text, f"Line {line} of {path}")
        found = numbers.get(item["id"], []) if "id" in item else _by_number(item["row"], len(rows))
        if not found:
            unknown.append(str(item.get("id", item.get("row"))))
        for number in found:
            weights[number] = float(item["weight"])
    if unknown:
        more = f" and {len(unknown) - SHOWN} more" if len(unknown) > SHOWN else ""
        raise ValueError(
            f"{path} names rows that the run did not read: {', '.join(unknown[:SHOWN])}{more}; its "
            f"{len(rows)} rows and their ids are in rows.jsonl."
        )
    return weights


def _item(text: str, where: str) -> dict[str, Any]:
    try:
        item = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not JSON: {error}.") from error
    if not isinstance(item, dict) or ("id" in item) == ("row" in item) or "weight" not in item:
        raise ValueError(f"{where} is not an object with 'weight' and either 'id' or 'row'.")
    weight = item["weight"]
    if not isinstance(weight, int | float) or not math.isfinite(weight):
        raise ValueError(f"{where} has the weight {weight}; give a finite number.")
    return item


def _by_number(number: Any, count: int) -> list[int]:
    known = isinstance(number, int) and not isinstance(number, bool) and 0 <= number < count
    return [number] if known else []
