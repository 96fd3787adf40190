"""Folders with what was traced, found by question; more may come while they are served."""

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
from jaxtyping import Float
from safetensors import safe_open
from torch import Tensor

from estimators.grounds import Questions
from index.files import read_sealed, sha256_of
from service.run.errors import RunMismatch
from service.tracing.directions import MANIFEST as DIRECTIONS
from service.tracing.directions import RunDirections, read_directions
from service.tracing.trace import INFLUENCES, MANIFEST
from service.tracing.walk import Question, from_json

MORE = "more"
"""Folder in a trace with traces of further questions, each in a folder of its own."""
AGAIN = "trace the run again"

log = logging.getLogger(__name__)


def fingerprint_of(question: Question) -> str:
    """As questions are known by, see ``Questions.fingerprint``."""
    return Questions(sequences=[question]).fingerprint(0)


@dataclass(frozen=True, kw_only=True)
class TracedFolder:
    """What was traced, on disk.

    Attributes:
        folder: where it is.
        manifest: what it is made of.
    """

    folder: Path
    manifest: Mapping[str, Any]

    @cached_property
    def numbers(self) -> Mapping[str, int]:
        """Of its questions, by their fingerprints."""
        questions = map(from_json, self.manifest["questions"])
        return {fingerprint_of(one): number for number, one in enumerate(questions)}


class TraceFolder(TracedFolder):
    """The influence of every row."""

    NAME = MANIFEST

    @classmethod
    def open(cls, folder: Path) -> "TraceFolder":
        """Read a whole trace.

        Raises:
            RunMismatch: there is none, it was changed, or it carries nothing of its run.
        """
        found = cls(folder=folder, manifest=_manifest(folder / MANIFEST))
        if sha256_of(folder / INFLUENCES) != found.manifest["influences_sha256"]:
            raise RunMismatch(f"{folder / INFLUENCES} was changed; {AGAIN}.")
        return found

    @property
    def smallest_moment(self) -> float:
        """How its second moments were taken, see ``trace_run``; 0 of an earlier version."""
        return float(self.manifest.get("smallest_moment", 0.0))

    def left_out(self, number: int) -> float:
        """Part of the norm of a question's gradient that was not traced, see ``trace_by_basis``."""
        return float(self.manifest["left_out"][number]) if "left_out" in self.manifest else 0.0

    def totals(self, number: int) -> Float[np.ndarray, "run_row"]:
        """``df/dw_i`` of every row of the run over all its readings, in nats of f."""
        with safe_open(self.folder / INFLUENCES, framework="np") as file:
            rows = file.get_tensor("rows")
            values = file.get_slice("influences")[number].astype(np.float64)
        found: np.ndarray = np.bincount(rows, weights=values, minlength=self.manifest["rows"])
        return found


class DirectionFolder(TracedFolder):
    """The run's direction for each question."""

    NAME = DIRECTIONS

    @classmethod
    def open(cls, folder: Path) -> "DirectionFolder":
        """Read whole directions.

        Raises:
            RunMismatch: there are none, they were changed, or carry nothing of their run.
        """
        found = cls(folder=folder, manifest=_manifest(folder / DIRECTIONS))
        found.directions  # noqa: B018 - read and checked here
        return found

    @cached_property
    def directions(self) -> RunDirections:
        """Of all its questions."""
        return read_directions(self.folder)

    def direction(self, number: int) -> Mapping[str, Tensor]:
        """Of a question, by name of parameter."""
        return self.directions.whole(number)

    @cached_property
    def parameters(self) -> Mapping[str, int]:
        """Sizes of the parameters that directions have, by name."""
        name, _ = self.manifest["files"][0]
        with safe_open(self.folder / name, framework="np") as file:
            shapes = {key.split("|", 1)[1]: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118
        return {key: math.prod(shape) for key, shape in shapes.items()}


def _manifest(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        raise RunMismatch(
            f"There is no whole trace in {path.parent} ({path.name} is missing); run etymon trace, "
            f"or repeat it if it was interrupted."
        )
    manifest: Mapping[str, Any] = read_sealed(path, AGAIN)
    if "last_weights_sha256" not in manifest:
        raise RunMismatch(
            f"The trace in {path.parent} is of an earlier version, which kept nothing of the run's "
            f"rows and last weights beside it; {AGAIN}, into another folder."
        )
    return manifest


P = TypeVar("P", TraceFolder, DirectionFolder)


class Parts(Generic[P]):
    """Everything of one kind that was traced beside each other, through the same run.

    Args:
        folder: the first; further ones are below it.
        kind: of them.

    Attributes:
        first: in the folder itself; None if it has none of this kind.

    Raises:
        RunMismatch: the first was changed.
    """

    def __init__(self, folder: Path, kind: type[P]) -> None:
        self._folder = folder
        self._kind: type[P] = kind
        self.first: P | None = kind.open(folder) if (folder / kind.NAME).is_file() else None
        self._parts: list[P] = [] if self.first is None else [self.first]

    @property
    def known(self) -> set[str]:
        """Fingerprints of the questions that were found so far."""
        return {fingerprint for part in self._parts for fingerprint in part.numbers}

    def place(self, fingerprint: str, run_sha256: str) -> tuple[P, int] | None:
        """Where a question is and its number there; None if it was not traced by now."""
        for look_again in (False, True):
            if look_again:
                self.find_more(run_sha256)
            for part in self._parts:
                if fingerprint in part.numbers:
                    return part, part.numbers[fingerprint]
        return None

    def find_more(self, run_sha256: str) -> None:
        """Look for what was traced through the run since then."""
        known = {part.folder for part in self._parts}
        for path in sorted(self._folder.glob(f"{MORE}/*/{self._kind.NAME}")):
            if path.parent in known:
                continue
            try:
                part = self._kind.open(path.parent)
            except ValueError as error:
                log.warning("questions that were traced later are left out: %s", error)
                continue
            if part.manifest["run_sha256"] == run_sha256:
                self._parts.append(part)
