"""What certificates are tried on: exact scores of all rows, proxies by many sketches."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from estimators.contracts import Estimator
from estimators.sketch import Sketch, SketchPlan, training_sketches
from estimators.tokens import Sequence1D, collate, plan_batches
from index.manifest import NoiseRecord
from index.onebit import OneBitIndex
from scripts.console import show_progress
from service.models import LoadedModel
from service.noise import noise_record

SKETCHES_AT_ONCE = 20
NOISE_QUERIES = 16
"""Further queries, on which each draw's noise is measured as a build does."""
NOISE_ROWS = 512


@dataclass(frozen=True, kw_only=True)
class Redraws:
    """One-bit proxies by several draws of the sketch.

    Attributes:
        cosines: estimated cosines; 0 for rows without a gradient.
        noise: as measured with each draw.
    """

    cosines: Float[np.ndarray, "draw query row"]
    noise: list[NoiseRecord]


def redraw(
    loaded: LoadedModel,
    estimator: Estimator,
    damping: float,
    sequences: Sequence[Sequence1D],
    directions: dict[str, np.ndarray],
    exact_cosines: Float[np.ndarray, "query row"],
    plans: Sequence[SketchPlan],
    token_budget: int,
) -> Redraws:
    """Proxies of all queries and rows by each plan's sketch, through the code of a build.

    The first ``NOISE_QUERIES`` queries only serve to measure the noise.
    """
    layers = loaded.coverage.layers
    whitening = estimator.whitening(layers, damping)
    lengths = [len(s.tokens) for s in sequences]
    batches = list(plan_batches(lengths, token_budget))
    sampled = np.random.default_rng(0).permutation(len(sequences))[:NOISE_ROWS]
    found, records = [], []
    for start in range(0, len(plans), SKETCHES_AT_ONCE):
        part = plans[start : start + SKETCHES_AT_ONCE]
        sketches = [Sketch(layers, whitening, plan) for plan in part]
        indexes = [OneBitIndex(plan.dimensions) for plan in part]
        codes = [np.zeros((len(sequences), i.code_size), dtype=np.uint8) for i in indexes]
        live = np.zeros(len(sequences), dtype=bool)
        for positions in show_progress(f"sketches {start + 1} to {start + len(part)}", batches):
            batch = collate([sequences[p] for p in positions]).to(loaded.device)
            sketched = training_sketches(sketches, loaded.model, batch)
            for (units, norm), index, kept in zip(sketched, indexes, codes, strict=True):
                kept[positions] = index.encode(units.cpu().numpy())
                live[positions] = norm.cpu().numpy() > 0
        for sketch, index, kept in zip(sketches, indexes, codes, strict=True):
            index.add(index.pack(kept), len(kept))
            y = sketch.query(directions)[0].cpu().numpy()  # type: ignore[arg-type]
            cosines = index.scan(y) / np.linalg.norm(y, axis=1, keepdims=True) * live
            head = np.s_[:NOISE_QUERIES, sampled]
            records.append(
                noise_record(
                    sketch.predicted_noise(),
                    (cosines[:NOISE_QUERIES] - exact_cosines[:NOISE_QUERIES])[:, sampled],
                    exact_cosines[head[0]][:, sampled],
                    live[sampled],
                )
            )
            found.append(cosines[NOISE_QUERIES:].astype(np.float32))
    return Redraws(cosines=np.stack(found), noise=records)
