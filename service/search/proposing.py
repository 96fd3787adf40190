"""Which rows are looked at first: estimates by the index' codes, or any other order."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Bool, Float, Float32, Int
from torch import Tensor

from index.certificates.sketch import Tail
from index.codes.signs import estimate_slices
from index.codes.vectors import LAWFUL
from index.manifest import NoiseRecord
from index.slices import SliceStore
from service.search.opening import OpenIndex
from service.search.proxies import Proxies, RankedProxies
from service.search.query import Ranking
from service.search.shards import DenseShard, Rows, Shard


@dataclass(frozen=True, kw_only=True)
class LaterLook:
    """Estimates from the first ``slices`` slices: error scales as in ``CodedShard``."""

    slices: int
    scale: float
    relative: float


@dataclass(frozen=True, kw_only=True, eq=False)
class SlicedCosines:
    """Estimates of one question from further slices of the codes, for the rows that are asked.

    Attributes:
        store: of the codes.
        asked: the question's sketch by each slice, the first one's aside, scaled to unit length.
        looks: after so many slices.
        kept: numbers on disk of the rows; None: as they are.
    """

    store: SliceStore
    asked: Float[np.ndarray, "slice dimension"]
    looks: tuple[LaterLook, ...]
    kept: Int[np.ndarray, "row"] | None

    def cosines(
        self,
        rows: Int[np.ndarray, "asked"],
        scanned: Float32[np.ndarray, "asked"],
        slices: int,
    ) -> Float[np.ndarray, "asked"]:
        """Mean over the first ``slices`` slices, of which ``scanned`` is the first's."""
        on_disk = rows if self.kept is None else self.kept[rows]
        codes = self.store.read(on_disk, slices - 1)
        others = estimate_slices(codes, self.asked[: slices - 1])
        mean: np.ndarray = (scanned + others.sum(0, dtype=np.float64)) / slices
        return mean


@dataclass(frozen=True, kw_only=True, eq=False)
class CodedShard(Shard):
    """Estimates from what a scan of codes gave: 4 bytes a row and question beside the index' own.

    Attributes:
        cosines: of the question's sketch and each row's codes.
        norms: whitened norms of the rows' gradients.
        failed: rows that have no finite gradient.
        psi: norm of the question's whitened direction.
        scale: error scale of a cosine.
        relative: error scale that comes on top, as a share of the cosine.
        ranking: what is estimated.
        lawful: whether the errors are those of a random sketch.
        sign: -1 for the opposite values.
        looks: one at the scanned codes, and those at the further slices.
        slices: further codes of the rows, if there are any.
        numbers: of the rows in ``slices``; None: as they are here.
    """

    cosines: Float32[np.ndarray, "row"]
    norms: Float32[np.ndarray, "row"]
    failed: Bool[np.ndarray, "row"]
    psi: float
    scale: float
    relative: float
    ranking: Ranking
    lawful: bool
    sign: float = 1.0
    looks: int = 1
    slices: SlicedCosines | None = None
    numbers: Int[np.ndarray, "row"] | None = None
    unit: str = Proxies.unit

    def at(self, rows: Rows, look: int = 0) -> Proxies:
        """Estimates of given rows after a look, in that order."""
        cosines, scale, relative = self.cosines[rows], self.scale, self.relative
        if look > 0:
            assert self.slices is not None and not isinstance(rows, slice)
            later = self.slices.looks[look - 1]
            numbers = rows if self.numbers is None else self.numbers[rows]
            cosines = self.slices.cosines(numbers, cosines, later.slices)
            scale, relative = later.scale, later.relative
        norms, failed = self.norms[rows].astype(np.float64), self.failed[rows]
        by_score = self.ranking == "score"
        weights = norms if by_score else (norms > 0).astype(np.float64)
        values = self.sign * (cosines * self.psi * weights)
        values[failed] = -np.inf
        return Proxies(
            values=values,
            sigmas=scale * self.psi * weights,
            relative=relative,
            divisors=np.ones_like(norms) if by_score else np.where(norms > 0, norms, np.inf),
            failed=failed,
            lawful=self.lawful,
        )

    def among(self, rows: Int[np.ndarray, "kept"]) -> Shard:
        """A shard of some of the rows, numbered anew."""
        return replace(
            self,
            cosines=self.cosines[rows],
            norms=self.norms[rows],
            failed=self.failed[rows],
            numbers=rows if self.numbers is None else self.numbers[rows],
        )

    def negated(self) -> Shard:
        """Estimates of the opposite values."""
        return replace(self, sign=-self.sign)


def estimate_rows(
    index: OpenIndex, directions: Mapping[str, Tensor], ranking: Ranking, tail: Tail = "gaussian"
) -> Shard:
    """Estimates of every row's ranking value for a direction, with their error scales.

    Whatever the direction: the index' coordinates decide only how large the errors are.

    Args:
        index: opened.
        directions: of one question, [in, out] a layer.
        ranking: what is estimated.
        tail: assumed law of the errors.
    """
    sketched = index.sketches.query({name: d[None] for name, d in directions.items()})
    y = np.stack([sketch[0].cpu().numpy() for sketch, _ in sketched])
    lengths = [float(np.linalg.norm(one)) for one in y]
    record = index.manifest.sketch
    return CodedShard(
        cosines=index.inner_products(y[0]) / lengths[0] if lengths[0] else 0 * index.norms,
        norms=index.norms,
        failed=index.failed,
        psi=float(sketched[0][1][0]),
        scale=_scale(record.noise, record.dimensions, tail),
        relative=record.noise.relative,
        ranking=ranking,
        lawful=index.manifest.codes in LAWFUL,
        looks=1 + len(record.later),
        slices=None if index.slices is None else _sliced(index, index.slices, y, tail),
    )


def _sliced(
    index: OpenIndex, store: SliceStore, y: Float[np.ndarray, "slice dimension"], tail: Tail
) -> SlicedCosines:
    lengths = np.linalg.norm(y, axis=1, keepdims=True)
    record = index.manifest.sketch
    return SlicedCosines(
        store=store,
        asked=np.divide(y, lengths, out=np.zeros_like(y), where=lengths > 0)[1:],
        looks=tuple(
            LaterLook(
                slices=look.slices,
                scale=_scale(look.noise, look.slices * record.dimensions, tail),
                relative=look.noise.relative,
            )
            for look in record.later
        ),
        kept=index.kept,
    )


def _scale(noise: NoiseRecord, dimensions: int, tail: Tail) -> float:
    """Error scale of a cosine that the assumed law of the errors allows for."""
    scale = max(noise.predicted, noise.measured)
    return scale if tail == "gaussian" else max(scale, math.sqrt(math.pi / (2 * dimensions)))


def order_rows(
    index: OpenIndex, values: Float[np.ndarray, "row"], ranking: Ranking, *, by_gradients: bool
) -> Shard:
    """Any values by which rows are looked at, the highest first; they estimate nothing.

    Args:
        index: opened.
        values: of every row, in any unit.
        ranking: of the exact scores.
        by_gradients: whether the exact scores need gradients, which some rows have not.
    """
    failed = index.failed if by_gradients else np.zeros_like(index.failed)
    ordered = values.astype(np.float64)
    ordered[failed] = -np.inf
    norms = index.norms.astype(np.float64)
    by_score = ranking == "score"
    ranked = RankedProxies(
        values=ordered,
        sigmas=np.zeros(len(ordered)),
        relative=0.0,
        divisors=np.ones_like(norms) if by_score else np.where(norms > 0, norms, np.inf),
        failed=failed,
        lawful=False,
    )
    return DenseShard(ranked)
