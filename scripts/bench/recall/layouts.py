"""How other systems lay out stored gradients: two-sided projections and low-rank factors.

Written for the comparison only. Every layout gets what helps it: the exact EK-FAC direction on the
query's side, its own usual preconditioner, and our whitening, each as a row of its own.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from estimators.model.capture import visit_gradients
from estimators.model.gradients import Gradients, negated, sum_over_tokens, widen
from estimators.model.layers import LinearLayer
from estimators.model.progress import Progress, no_progress
from estimators.model.tokens import Sequence1D, collate, plan_batches
from estimators.operators.ekfac import EKFac
from estimators.rescoring import query_gradients
from service.models import LoadedModel

SIDE = 16
"""Of a projected layer: LoGra's and Bergson's default."""
RANKS = (1, 2)
SEED = 7
OVERSAMPLING = 6

Proxies = dict[str, tuple[int, Float[np.ndarray, "query row"]]]
"""Layout -> bytes an example and proxies, higher = more of a proponent."""


def other_layouts(
    loaded: LoadedModel,
    estimator: EKFac,
    damping: float,
    examples: Sequence[Sequence1D],
    queries: Sequence[Sequence1D],
    token_budget: int = 1024,
    progress: Progress = no_progress,
) -> Proxies:
    """Proxies of every layout for every example, in one pass over the examples."""
    layers = loaded.coverage.layers
    gradients, _ = query_gradients(loaded.model, layers, queries)
    directions = negated(estimator.precondition(gradients, damping))
    white = estimator.whitening(layers, damping)
    maps = {
        name: tuple((w.left_map(dual=dual), w.right_map(dual=dual).T) for dual in (False, True))
        for name, w in white.items()
    }
    plain = TwoSided(layers, len(examples))
    whitened = TwoSided(layers, len(examples))
    factors = [LowRank(rank, layers, directions, len(examples)) for rank in RANKS]
    batches = list(plan_batches([len(s.tokens) for s in examples], token_budget))
    for positions in progress("other layouts", batches):
        rows = torch.tensor(positions)

        def visit(layer: LinearLayer, a: Tensor, d: Tensor, rows: Tensor = rows) -> None:
            gradient = sum_over_tokens(widen(a), widen(d))
            left, right = maps[layer.name][0]
            plain.add(layer, rows, gradient)
            whitened.add(layer, rows, left.to(gradient) @ gradient @ right.to(gradient))
            u, v = top_factors(gradient, max(RANKS))
            for each in factors:
                each.add(layer, rows, u, v)

        batch = collate([examples[p] for p in positions]).to(loaded.device)
        visit_gradients(loaded.model, layers, batch, visit)
    duals = {n: maps[n][1][0].to(v) @ v @ maps[n][1][1].to(v) for n, v in directions.items()}
    # The score is -<(H + lambda)^-1 grad f, grad L>: directions carry that sign, gradients do not.
    negative = {name: -value for name, value in gradients.items()}
    result: Proxies = {}
    for dtype, name, size in ((torch.float16, "float16", 2), (torch.float32, "float32", 4)):
        title, bytes_ = f"two-sided 16x16, {name}", size * SIDE * SIDE * len(layers)
        result[f"{title}, dot product"] = bytes_, plain.scores(negative, dtype)
        result[f"{title}, inverse autocorrelation"] = (
            bytes_,
            plain.scores(negative, dtype, damping),
        )
        result[f"{title}, EK-FAC query"] = bytes_, plain.scores(directions, dtype)
        result[f"{title}, our whitening"] = bytes_, whitened.scores(duals, dtype)
    for each in factors:
        result[f"rank-{each.rank} factors, float16, EK-FAC query"] = each.bytes, each.scores()
    return result


class TwoSided:
    """One random projection a side and layer (LoGra, Choe et al. 2024; Bergson's default).

    Args:
        layers: attributed layers.
        rows: examples to store.
    """

    def __init__(self, layers: Sequence[LinearLayer], rows: int) -> None:
        generator = torch.Generator().manual_seed(SEED)
        self._sides = {
            layer.name: tuple(
                (torch.randint(0, 2, (SIDE, width), generator=generator) * 2.0 - 1)
                / math.sqrt(SIDE)
                for width in (layer.in_features, layer.out_features)
            )
            for layer in layers
        }
        self._stored = {layer.name: torch.zeros(rows, SIDE * SIDE) for layer in layers}

    def project(self, name: str, gradient: Tensor) -> Float[Tensor, "row entry"]:
        """``P_left G P_right^T``, flattened."""
        left, right = (side.to(gradient) for side in self._sides[name])
        return (left @ gradient @ right.T).flatten(1)

    def add(self, layer: LinearLayer, rows: Tensor, gradient: Tensor) -> None:
        """Store the projections of some rows' gradients."""
        self._stored[layer.name][rows] = self.project(layer.name, gradient).cpu().float()

    def scores(
        self, queries: Gradients, dtype: torch.dtype, damping: float | None = None
    ) -> Float[np.ndarray, "query row"]:
        """Inner products with the stored rows rounded to ``dtype``.

        With ``damping`` a layer's query is first multiplied by the inverse of the stored rows'
        second moment, damped by so many times its mean eigenvalue.
        """
        total = torch.zeros(())
        for name, gradient in queries.items():
            stored = self._stored[name].to(dtype).double()
            asked = self.project(name, gradient).cpu().double()
            if damping is not None:
                moment = stored.T @ stored / len(stored)
                ridge = damping * moment.diagonal().mean()
                asked = torch.linalg.solve(moment + ridge * torch.eye(len(moment)), asked.T).T
            total = total + asked @ stored.T
        result: np.ndarray = total.numpy()
        return result


class LowRank:
    """The best rank-r factors of each layer's gradient, in half precision (LoRIF's layout).

    Args:
        rank: factors a layer.
        layers: attributed layers.
        directions: of the queries, exact; [query, in, out] a layer.
        rows: examples.
    """

    def __init__(
        self, rank: int, layers: Sequence[LinearLayer], directions: Gradients, rows: int
    ) -> None:
        self.rank = rank
        self.bytes = sum(2 * rank * (la.in_features + la.out_features) for la in layers)
        self._directions = directions
        self._scores = torch.zeros(len(next(iter(directions.values()))), rows)

    def add(self, layer: LinearLayer, rows: Tensor, left: Tensor, right: Tensor) -> None:
        """Score some rows by the first of their factors."""
        left, right = left[..., : self.rank], right[:, : self.rank]
        approximate = left.half().to(left) @ right.half().to(right)
        part = self._directions[layer.name].flatten(1) @ approximate.flatten(1).T
        self._scores[:, rows] += part.cpu()

    def scores(self) -> Float[np.ndarray, "query row"]:
        """Of all rows."""
        result: np.ndarray = self._scores.numpy()
        return result


def top_factors(
    gradient: Float[Tensor, "row in out"], rank: int
) -> tuple[Float[Tensor, "row in rank"], Float[Tensor, "row rank out"]]:
    """``left @ right`` is the best approximation of rank ``rank``, by subspace iteration."""
    width = min(rank + OVERSAMPLING, *gradient.shape[1:])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        u, s, v = torch.svd_lowrank(gradient, q=width, niter=4)
    root = s[:, None, :rank].sqrt()
    return u[..., :rank] * root, (v[..., :rank] * root).transpose(1, 2)
