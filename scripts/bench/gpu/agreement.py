"""Scores of one small model on the device and on the CPU, both in float32."""

import copy
from collections.abc import Mapping

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from estimators.curvature.fitting import fit_estimator
from estimators.model.layers import find_layers
from estimators.operators.ekfac import EKFac
from estimators.rescoring import query_gradients, score_batch_for_queries
from scripts.bench.gpu.gradients import DAMPING
from scripts.bench.gpu.measuring import Report, forget_peak, peak
from scripts.bench.gpu.sizes import Sizes, llama
from scripts.bench.passes import Problem, random_problem

QUERIES = 8
"""Second halves of the first training sequences, given their first halves."""

Scores = Float[np.ndarray, "query sequence"]


def agreement(sizes: Sizes, device: torch.device, report: Report) -> None:
    """EK-FAC scores with the CPU's own factors, and with factors that were fitted on the device."""
    cpu = torch.device("cpu")
    model = llama(sizes.compared, sizes.compared_length, "float32", cpu)
    host = random_problem(
        "compared",
        model,
        sizes.compared["vocab_size"],
        sizes.compared_sequences,
        sizes.compared_length,
        sizes.budget,
    )
    there = Problem(
        name=host.name,
        model=copy.deepcopy(model).to(device),
        sequences=host.sequences,
        batches=host.batches,
        budget=host.budget,
    )
    factors = _fit(host)
    expected = _scores(host, factors)
    forget_peak(device)
    for whose in ("the CPU's", "its own"):
        found = _scores(there, factors if whose == "the CPU's" else _fit(there))
        report(
            {
                "part": "agreement",
                "factors": whose,
                "sequences": len(host.sequences),
                "queries": QUERIES,
                "matrix_product_precision": torch.get_float32_matmul_precision(),
                "peak_device_bytes": peak(device),
                **compare(found, expected),
            }
        )


def compare(found: Scores, expected: Scores) -> dict[str, float]:
    """Largest difference over the largest score; least rank correlation of any query."""
    ranks = [
        np.corrcoef(ours.argsort().argsort(), theirs.argsort().argsort())[0, 1]
        for ours, theirs in zip(found, expected, strict=True)
    ]
    return {
        "largest_relative_difference": float(
            np.abs(found - expected).max() / np.abs(expected).max()
        ),
        "least_rank_correlation": float(min(ranks)),
    }


def _fit(problem: Problem) -> Mapping[str, Tensor]:
    layers = find_layers(problem.model).layers
    fitted = fit_estimator(
        "ekfac", problem.model, layers, problem.sequences, token_budget=problem.budget
    )
    return fitted.tensors()


def _scores(problem: Problem, factors: Mapping[str, Tensor]) -> Scores:
    """Of all sequences, for all queries."""
    layers = find_layers(problem.model).layers
    half = len(problem.sequences[0].tokens) // 2
    asked = [type(one)(tokens=one.tokens, first_target=half) for one in problem.sequences[:QUERIES]]
    gradients, _ = query_gradients(problem.model, layers, asked)
    directions = {
        name: -one for name, one in EKFac(factors).precondition(gradients, DAMPING).items()
    }
    scores = np.empty((len(asked), len(problem.sequences)), dtype=np.float32)
    for positions in problem.batches:
        batch = problem.batch(positions)
        found = score_batch_for_queries(problem.model, layers, directions, batch)
        scores[:, positions] = found.cpu().numpy()
    return scores
