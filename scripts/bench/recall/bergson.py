"""Bergson's own projected gradients of the same examples and queries, where it is installed."""

import importlib
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from jaxtyping import Float
from torch import Tensor
from transformers import AutoModelForCausalLM

from estimators.model.tokens import Sequence1D, plan_batches

PROJECTION = 16
"""Bergson's default where it projects at all: 16 by 16 random numbers a layer."""
IGNORED = -100


def bergson_installed() -> bool:
    """Whether the package can be imported."""
    return importlib.util.find_spec("bergson") is not None


def bergson_proxies(
    model: Path,
    examples: Sequence[Sequence1D],
    queries: Sequence[Sequence1D],
    damping: float,
    token_budget: int,
) -> dict[str, tuple[int, Float[np.ndarray, "query row"]]]:
    """Bytes an example and proxies of Bergson's stores, higher = more of a proponent.

    Gradients are collected by Bergson itself with its default random projection (Rademacher, both
    sides, 16 x 16 a layer, float32). "dot product" compares them as they are; "inverse
    autocorrelation" multiplies the query's by the inverse of each layer's second moment over the
    examples, collected and decomposed by Bergson, damped by ``damping`` times its mean eigenvalue.

    Args:
        model: folder of the model; loaded anew, since Bergson wants weights with gradients.
        examples: training examples.
        queries: prompt and completion; only completion tokens count.
        damping: relative.
        token_budget: padded tokens in a batch.
    """
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    store, moments = _collect(network, examples, token_budget)
    asked, _ = _collect(network, queries, token_budget)
    size = sum(4 * values.shape[1] for values in store.values())
    inverses = {name: _damped_inverse(*moments[name], damping) for name in store}
    plain = sum((asked[n].float() @ store[n].float().T for n in store), torch.zeros(()))
    solved = sum(
        (asked[n].float() @ inverses[n] @ store[n].float().T for n in store), torch.zeros(())
    )
    # Both sides are gradients of the negative log-likelihood: like signs are a proponent already.
    return {
        "bergson 16x16, float32, dot product": (size, plain.numpy()),
        "bergson 16x16, float32, inverse autocorrelation": (size, solved.numpy()),
    }


def _damped_inverse(values: Tensor, vectors: Tensor, damping: float) -> Float[Tensor, "size size"]:
    return (vectors / (values + damping * values.mean())) @ vectors.T


def _collect(
    network: Any, sequences: Sequence[Sequence1D], token_budget: int
) -> tuple[dict[str, Tensor], dict[str, tuple[Tensor, Tensor]]]:
    """Projected gradients by layer, and eigenvalues and eigenvectors of their second moments."""
    bergson = importlib.import_module("bergson")
    tokens = [list(s.tokens) for s in sequences]
    labels = [[IGNORED] * s.first_target + list(s.tokens[s.first_target :]) for s in sequences]
    data = Dataset.from_dict({"input_ids": tokens, "labels": labels})
    with TemporaryDirectory() as folder:
        settings = bergson.IndexConfig(
            run_path=f"{folder}/run", projection_dim=PROJECTION, include_bias=True
        )
        settings.partial_run_path.mkdir(parents=True)
        processor = bergson.GradientProcessor(projection_dim=PROJECTION, include_bias=True)
        collector = bergson.InMemoryCollector(
            model=network.base_model,
            data=data,
            cfg=settings,
            processor=processor,
            skip_hessians=False,
        )
        batches = list(plan_batches([len(row) for row in tokens], token_budget))
        bergson.CollectorComputer(
            model=network, data=data, collector=collector, batches=batches, cfg=settings
        ).run_with_collector_hooks(desc="gradients")
    return collector.gradients, dict(processor.hessians_eigen)
