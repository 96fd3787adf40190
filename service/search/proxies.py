"""Estimates of all rows' ranking values, and how far they may be off."""

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
from jaxtyping import Bool, Float, Int

from index.certificates.sketch import scales_below

CALIBRATION_SLACK = 0.1
"""Least error scale of a proxy, as a share of the exact value, where depths are calibrated."""


@dataclass(frozen=True, kw_only=True)
class Proxies:
    """Sketch estimates of all rows' ranking values.

    Attributes:
        values: estimates; -inf for failed rows.
        sigmas: their error scales for rows that have nothing in common with the query.
        relative: error scale that comes on top, as a share of a row's exact value.
        divisors: what an exact score is divided by to give the ranking value.
        failed: rows that have no finite gradient.
        lawful: whether the errors are those of a random sketch; otherwise no law bounds them.
    """

    values: Float[np.ndarray, "row"]
    sigmas: Float[np.ndarray, "row"]
    relative: float
    divisors: Float[np.ndarray, "row"]
    failed: Bool[np.ndarray, "row"]
    lawful: bool = True

    unit: ClassVar[str] = "error scales below the k-th best"

    def scales(self, exact: float | Float[np.ndarray, "row"]) -> Float[np.ndarray, "row"]:
        """Error scale of each row's proxy if its exact value is ``exact``; 0 for empty rows.

        For a row whose exact value is at least ``exact``, ``(exact - proxy) / scale`` is the least
        number of error scales that it can be off by (up to ``1 / relative``, its limit for large
        values), since that ratio grows with the exact value.
        """
        with np.errstate(invalid="ignore"):
            scales = np.sqrt(self.sigmas**2 + np.square(self.relative * np.maximum(exact, 0)))
        return np.where((self.sigmas > 0) & np.isfinite(scales), scales, self.sigmas)

    def depths(self, threshold: float) -> Float[np.ndarray, "row"]:
        """How deep a search must go to rescore each row, given the k-th best exact value found.

        In error scales by which its proxy lies below that value. Rows are rescored in this order,
        which raises the reached depth fastest, and does not spend a short budget on rows whose
        bound is high only because their norm is. Certificates hold for any order.
        """
        return scales_below(threshold, self.values, self.scales(threshold))

    def scores(self) -> Float[np.ndarray, "row"]:
        """Estimates of all rows' scores, whatever they are ranked by; 0 for failed rows."""
        usable = np.isfinite(self.divisors) & ~self.failed
        return np.where(usable, self.values, 0.0) * np.where(usable, self.divisors, 0.0)

    def at(self, rows: Int[np.ndarray, "kept"] | slice) -> "Proxies":
        """Those of some rows, in that order."""
        return replace(
            self,
            values=self.values[rows],
            sigmas=self.sigmas[rows],
            divisors=self.divisors[rows],
            failed=self.failed[rows],
        )

    def among(self, rows: Int[np.ndarray, "kept"]) -> "Proxies":
        """Those of some rows that are then all there are."""
        return self.at(rows)

    def after(self, others: "Proxies") -> "Proxies":
        """Those of other rows, then these; all else is as it is here."""
        return replace(
            self,
            values=np.concatenate([others.values, self.values]),
            sigmas=np.concatenate([others.sigmas, self.sigmas]),
            divisors=np.concatenate([others.divisors, self.divisors]),
            failed=np.concatenate([others.failed, self.failed]),
        )

    def negated(self) -> "Proxies":
        """Estimates of the opposite values, by which the lowest exact ones come first."""
        return replace(self, values=np.where(self.failed, -np.inf, -self.values))

    def with_slack(self) -> "Proxies":
        """The same with larger error scales for larger values, as depths by calibration use.

        By them the depths that queries need differ less, whatever the sketch; see
        docs/decisions/2026-11-25-certificates.md.
        """
        return replace(self, relative=max(self.relative, CALIBRATION_SLACK))

    @property
    def deepest(self) -> float:
        """Beyond this the depth says nothing: the relative error would explain any value."""
        return 1 / self.relative if self.relative > 0 else math.inf


@dataclass(frozen=True, kw_only=True)
class RankedProxies(Proxies):
    """Values that only order the rows, in any unit, as BM25's; the depth is the place in the order.

    No law bounds their errors: give zeros as ``sigmas`` and False as ``lawful``.
    """

    places: Float[np.ndarray, "row"] | None = None
    """Of each row in the proposer's order, from 1; those among all rows given, if left out."""

    unit: ClassVar[str] = "rows"

    def __post_init__(self) -> None:
        if self.places is None:
            places = np.empty(len(self.values))
            places[np.argsort(-self.values, kind="stable")] = np.arange(1, len(places) + 1)
            object.__setattr__(self, "places", places)

    def at(self, rows: Int[np.ndarray, "kept"] | slice) -> Proxies:
        """Those of some rows, which keep their places among all."""
        assert self.places is not None
        return self._placed(super().at(rows), self.places[rows])

    def among(self, rows: Int[np.ndarray, "kept"]) -> Proxies:
        """Those of some rows, which take the places of the others."""
        return self._placed(self.at(rows), None)

    def negated(self) -> Proxies:
        """The opposite order."""
        return self._placed(super().negated(), None)

    @staticmethod
    def _placed(proxies: Proxies, places: Float[np.ndarray, "row"] | None) -> Proxies:
        assert isinstance(proxies, RankedProxies)
        return replace(proxies, places=places)

    def scores(self) -> Float[np.ndarray, "row"]:
        """Zeros: an order estimates nothing."""
        return np.zeros(len(self.values))

    def with_slack(self) -> Proxies:
        """Itself: places have no scale."""
        return self

    def depths(self, threshold: float) -> Float[np.ndarray, "row"]:
        """The place of each row in the proposer's order, from 1; the threshold does not matter."""
        assert self.places is not None
        return self.places
