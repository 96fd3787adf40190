"""Retrainings that were measured, kept beside the trace, so that none is made twice."""

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from service.run.errors import RunFault

FILE_NAME = "retrainings.jsonl"


class MeasuredValues:
    """Values of a trace's questions after the run without some of its rows, by these rows.

    Lines are appended as they are measured; one that was cut short, or of another trace, counts for
    nothing.

    Args:
        folder: of the trace.
        trace_sha256: of the trace that the folder holds.
    """

    def __init__(self, folder: Path, trace_sha256: str) -> None:
        self._path, self._trace = folder / FILE_NAME, trace_sha256
        self._known = dict(self._read())

    def of(self, left_out: Iterable[int]) -> list[float] | None:
        """Of each question, after the run without these rows; None if that was not measured."""
        return self._known.get(_key(left_out))

    def keep(self, left_out: Iterable[int], values: Sequence[float]) -> None:
        """Append what was measured.

        Raises:
            RunFault: the folder cannot be written to.
        """
        key = _key(left_out)
        line = json.dumps({"trace": self._trace, "left_out": key, "values": list(values)})
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(f"\n{line}" if self._is_cut() else line)
                file.write("\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise RunFault(f"Cannot keep a retraining in {self._path}: {error}.") from error
        self._known[key] = list(values)

    def _is_cut(self) -> bool:
        content = self._path.read_bytes()
        return bool(content) and not content.endswith(b"\n")

    def _read(self) -> Iterator[tuple[tuple[int, ...], list[float]]]:
        if not self._path.is_file():
            return
        for line in self._path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                item = json.loads(line)
            except json.JSONDecodeError:
                continue
            if item["trace"] == self._trace:
                yield tuple(item["left_out"]), item["values"]


def _key(left_out: Iterable[int]) -> tuple[int, ...]:
    return tuple(sorted(map(int, left_out)))
