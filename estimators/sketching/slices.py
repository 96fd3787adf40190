"""All slices of a row's sketch: one of its own that is scanned, and further ones many at a time."""

import copy
import math
from collections.abc import Mapping, Sequence

from jaxtyping import Float
from torch import Tensor, nn

from estimators.model.gradients import Gradients
from estimators.model.layers import LinearLayer
from estimators.model.tokens import TokenBatch
from estimators.sketching.sketch import Sketch, SketchPlan, query_sketches, training_sketches
from estimators.sketching.whitening import LayerWhitening

TOGETHER = 16
"""Further slices that are cut from one sketch."""
WIDER = 4
"""Rank of its first stage over that of the slice that is scanned: the root of ``TOGETHER``."""
A_BUCKET = 16
"""Entries of the first stage for each coordinate, at most: more layers get a smaller rank. Their
errors average out, and a row's entries stay below 17 MB at 16,384 dimensions."""

Sliced = list[tuple[Float[Tensor, "row dimension"], Float[Tensor, "row"]]]
"""Of each slice the rows' sketches, in a unit of its own, and their norms, see ``Sketch``."""


class SketchSlices:
    """Slices of equal size, whose estimates get sharper by the root of how many are averaged.

    The first is a sketch by itself. The others are cut, sixteen at a time, from wider sketches:
    these need one first stage and one fold instead of sixteen, and their first stage errs as little
    as the mean of sixteen would. What a slice holds does not depend on how many there are.

    Args:
        layers: attributed layers.
        whitening: of each layer, by name.
        plan: of the first slice.
        count: of slices.
        rank: of the wide sketches' first stage; None takes ``further_rank``.
    """

    def __init__(
        self,
        layers: Sequence[LinearLayer],
        whitening: Mapping[str, LayerWhitening],
        plan: SketchPlan,
        count: int,
        rank: int | None = None,
    ) -> None:
        self._count = count
        self.first = Sketch(layers, whitening, plan)
        self.rank = further_rank(plan, len(layers)) if rank is None else rank
        self._wide = [
            Sketch(layers, whitening, plan.further(number, TOGETHER, self.rank))
            for number in range(math.ceil((count - 1) / TOGETHER))
        ]

    def up_to(self, count: int) -> "SketchSlices":
        """The first ``count`` of them."""
        fewer = copy.copy(self)
        fewer._count = count
        fewer._wide = self._wide[: math.ceil((count - 1) / TOGETHER)]
        return fewer

    def __len__(self) -> int:
        return self._count

    def training(self, model: nn.Module, batch: TokenBatch, start: int = 0) -> Sliced:
        """``Sketch.training`` of the slices from number ``start`` on, by one pass."""
        own = [self.first] if start == 0 else []
        skipped = max(0, start - 1) // TOGETHER
        found = training_sketches([*own, *self._wide[skipped:]], model, batch)
        wide = _cut(found[len(own) :])
        past = 0 if start == 0 else start - 1 - skipped * TOGETHER
        return [*found[: len(own)], *wide[past:]][: self._count - start]

    def query(self, directions: Gradients) -> Sliced:
        """``Sketch.query`` of all slices; the norms are those of the directions themselves."""
        first, *wide = query_sketches([self.first, *self._wide], directions)
        return [first, *_cut(wide)][: self._count]

    def predicted_noise(self, count: int, distortion: float = math.pi / 2 - 1) -> float:
        """``Sketch.predicted_noise`` of the mean of the first ``count`` slices' estimates."""
        variance = self.first.predicted_noise(distortion) ** 2
        for number, sketch in enumerate(self._wide):
            used = min(TOGETHER, count - 1 - number * TOGETHER)
            if used > 0:
                variance += (used * sketch.predicted_noise(distortion, used)) ** 2
        return math.sqrt(variance) / count


def further_rank(plan: SketchPlan, layers: int) -> int:
    """Rank of the first stage of further slices, for so many layers."""
    most = math.isqrt(A_BUCKET * TOGETHER * plan.dimensions // max(1, layers))
    return min(WIDER * plan.rank, max(plan.rank, most))


def _cut(found: Sequence[tuple[Tensor, Tensor]]) -> Sliced:
    """The slices of wide sketches."""
    return [(part, norms) for x, norms in found for part in x.view(len(x), TOGETHER, -1).unbind(1)]
