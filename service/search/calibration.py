"""The calibration of an index: what queries with known truth needed, beside its manifest."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

import numpy as np
from jaxtyping import Float
from pydantic import ValidationError

from estimators.chosen import GradientEstimator
from estimators.registry import CODES
from index.certificates.calibration import effort_needed
from index.errors import IndexCorrupt
from index.files import read_sealed, sha256_of
from index.manifest import FILE_NAME as MANIFEST
from index.manifest import Record
from service.search.proxies import Proxies
from service.search.query import Query, Ranking

FILE_NAME = "calibration.json"
DEEPEST = 500
"""Best rows that are kept of each query, i.e. the largest k that is calibrated."""
REMEMBERED = 64
"""Choices of k, ranking and misses whose depths are kept in memory."""
RANKINGS: tuple[Ranking, ...] = get_args(Ranking)


class TopRecord(Record):
    """A query's best rows by exact value, best first.

    Attributes:
        exact: values that they are ranked by.
        proxies: their estimates.
        sigmas: error scales of the proxies.
    """

    exact: list[float]
    proxies: list[float]
    sigmas: list[float]


class CalibrationRecord(Record):
    """The whole calibration of an index.

    Attributes:
        schema_version: of this file.
        manifest_sha256: of the manifest that it was made with.
        relative: error scale that comes on top, as a share of the exact value.
        tops: by ranking, one for each query.
        seconds: that it took.
    """

    schema_version: Literal[1] = 1
    manifest_sha256: str
    relative: float
    tops: dict[Ranking, list[TopRecord]]
    seconds: float


@dataclass(frozen=True, eq=False)
class IndexCalibration:
    """A calibration as a search asks for it; implements ``service.search.search.Calibration``.

    Attributes:
        record: what was kept.
        changed: whether the index has been changed since.
        own: the estimator that it was made for.
    """

    record: CalibrationRecord
    changed: bool
    own: GradientEstimator
    _known: dict[tuple[int, Ranking, int], list[float]] = field(default_factory=dict)

    def stale(self, query: Query) -> str | None:
        """Why the calibration says nothing of such queries; None if it does."""
        if self.changed:
            return (
                "rows were added to the index or deleted since it was calibrated; run the build "
                "again with --calibration-queries"
            )
        if query.estimator not in (None, self.own.name):
            return (
                f"the index was calibrated for the estimator '{self.own.name}', not for "
                f"'{query.estimator}'"
            )
        if {**self.own.values, **query.parameters} != self.own.values:
            return "the index was calibrated with its own parameters, not with those of the query"
        if query.proposer not in (None, CODES):
            return "the index was calibrated for its codes as proposer, not for another"
        if query.direction != "proponents":
            return "the index was calibrated for proponents, not for opponents"
        if query.filters:
            return "the index was calibrated as a whole, not for what filters leave of it"
        if query.batch or query.against is not None:
            return "the index was calibrated for single completions, not contrasts or batches"
        kept = min(len(top.exact) for top in self.record.tops[query.ranking])
        if query.k > kept:
            return f"the index was calibrated for up to {kept} results, not {query.k}"
        return None

    def needed(self, k: int, ranking: Ranking, misses: int) -> list[float]:
        """Error scales below the k-th best that each calibration query needed."""
        key = (k, ranking, misses)
        if key not in self._known:
            if len(self._known) >= REMEMBERED:  # whoever asks chooses k and recall
                self._known.clear()
            self._known[key] = [
                effort_needed(self._depths(top, k), k, misses) for top in self.record.tops[ranking]
            ]
        return self._known[key]

    def _depths(self, top: TopRecord, k: int) -> Float[np.ndarray, "k"]:
        """As a search measures them, at the k-th best exact value."""
        proxies = Proxies(
            values=np.array(top.proxies[:k]),
            sigmas=np.array(top.sigmas[:k]),
            relative=self.record.relative,
            divisors=np.ones(k),
            failed=np.zeros(k, dtype=bool),
        )
        return proxies.depths(top.exact[k - 1])


def find_calibration(folder: Path, own: GradientEstimator) -> IndexCalibration | None:
    """The calibration of the index in ``folder``, if it has one, made for its own estimator.

    Raises:
        IndexCorrupt: it was edited or has another schema.
    """
    path = folder / FILE_NAME
    if not path.is_file():
        return None
    content = read_sealed(path, "delete it, or run the build again with --calibration-queries")
    try:
        record = CalibrationRecord.model_validate(content)
    except ValidationError as error:
        raise IndexCorrupt(f"{path} has an unexpected form: {error}") from error
    return IndexCalibration(record, record.manifest_sha256 != sha256_of(folder / MANIFEST), own)
