"""Passes that benchmarks measure against: what anybody writes, without a look at any layer."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from estimators.model.layers import find_layers
from estimators.model.measurement import negative_log_likelihood, next_token_logits
from estimators.model.tokens import Sequence1D, TokenBatch, collate, plan_batches
from estimators.model.trial import embeddings_require_grad
from estimators.rescoring import query_gradients, score_batch


@dataclass(frozen=True, kw_only=True)
class Problem:
    """What every system gets.

    Attributes:
        name: of the shape.
        model: frozen, with random weights.
        sequences: all of the same length.
        batches: positions in them.
        budget: padded tokens in a batch.
    """

    name: str
    model: nn.Module
    sequences: Sequence[Sequence1D]
    batches: Sequence[Sequence[int]]
    budget: int

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.model.parameters()).device

    def batch(self, positions: Sequence[int]) -> TokenBatch:
        """Sequences at these positions, on the device."""
        return collate([self.sequences[p] for p in positions]).to(self.device)


def random_problem(
    name: str, model: nn.Module, vocabulary: int, count: int, length: int, budget: int
) -> Problem:
    """``count`` sequences of ``length`` random tokens for a frozen model."""
    tokens = torch.randint(vocabulary, (count, length)).tolist()
    return Problem(
        name=name,
        model=model,
        sequences=[Sequence1D(tokens=tuple(row), row=i) for i, row in enumerate(tokens)],
        batches=list(plan_batches([length] * count, budget)),
        budget=budget,
    )


def plain(problem: Problem) -> None:
    """The floor of a fit and a build: forward and backward."""
    with torch.enable_grad(), embeddings_require_grad(problem.model):
        for positions in problem.batches:
            batch = problem.batch(positions)
            logits = next_token_logits(problem.model, batch)
            negative_log_likelihood(logits, batch).sum().backward()  # type: ignore[no-untyped-call]


@torch.no_grad()
def forward(problem: Problem) -> None:
    """The losses alone."""
    for positions in problem.batches:
        batch = problem.batch(positions)
        negative_log_likelihood(next_token_logits(problem.model, batch), batch)


def rescore(problem: Problem) -> Callable[[], None]:
    """Exact scores of all sequences for one query, whose gradient is taken before."""
    layers = find_layers(problem.model).layers
    gradients, _ = query_gradients(problem.model, layers, problem.sequences[:1])
    directions = {name: gradient[0] for name, gradient in gradients.items()}

    def run() -> None:
        for positions in problem.batches:
            score_batch(problem.model, layers, directions, problem.batch(positions))

    return run


def synchronise(device: torch.device) -> None:
    """Wait for the GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
