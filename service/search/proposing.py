"""Which rows are looked at first: estimates by the index' codes, or any other order."""

import math
from collections.abc import Mapping

import numpy as np
from jaxtyping import Float
from torch import Tensor

from index.certificates.sketch import Tail
from index.codes.vectors import LAWFUL
from service.search.opening import OpenIndex
from service.search.proxies import RankedProxies
from service.search.query import Ranking
from service.search.shards import CodedShard, DenseShard, Shard


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
    sketch, norm = index.sketch.query({n: d[None] for n, d in directions.items()})
    y = sketch[0].cpu().numpy()
    length = float(np.linalg.norm(y))
    noise = index.manifest.sketch.noise
    scale = max(noise.predicted, noise.measured)
    if tail == "hoeffding":
        scale = max(scale, math.sqrt(math.pi / (2 * index.manifest.sketch.dimensions)))
    return CodedShard(
        cosines=index.inner_products(y) / length if length else 0 * index.norms,
        norms=index.norms,
        failed=index.failed,
        psi=float(norm[0]),
        scale=scale,
        relative=noise.relative,
        ranking=ranking,
        lawful=index.manifest.codes in LAWFUL,
    )


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
