"""Passes of a run's batches through the model, with a weight on each row's loss."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from estimators.model.measurement import next_token_logits, token_losses
from estimators.model.tokens import TokenBatch
from estimators.run.recorded import UNCOUNTED, Batch, Recipe, Row, State, Step
from estimators.run.updates import update


def trained_names(recipe: Recipe) -> list[str]:
    """Names of all trained parameters, in the optimizer's order."""
    return [name for group in recipe.groups for name in group.parameters]


@contextmanager
def trainable(
    model: nn.Module, recipe: Recipe, named: Mapping[str, nn.Parameter] | None = None
) -> Iterator[dict[str, nn.Parameter]]:
    """The run's parameters, which require gradients within; the model is left as it was.

    Attention takes the plain kernel, which has a second derivative.

    Args:
        model: of the run.
        recipe: says which parameters were trained.
        named: the model's parameters as the recipe names them; None takes the model's own names.

    Raises:
        ValueError: the model lacks one of them.
    """
    found = dict(model.named_parameters() if named is None else named)
    names = trained_names(recipe)
    missing = [name for name in names if name not in found]
    if missing:
        raise ValueError(
            f"The run trained {len(missing)} parameters that this model lacks, the first is "
            f"'{missing[0]}'; give the model that was trained."
        )
    before = {name: found[name].detach().clone() for name in names}
    required = {name: parameter.requires_grad for name, parameter in found.items()}
    training = model.training
    chosen = set(names)
    try:
        model.eval()
        for name, parameter in found.items():
            parameter.requires_grad_(name in chosen)
        with sdpa_kernel(SDPBackend.MATH):
            yield {name: found[name] for name in names}
    finally:
        model.train(training)
        for name, parameter in found.items():
            parameter.requires_grad_(required[name])
        with torch.no_grad():
            for name, value in before.items():
                found[name].copy_(value)


@torch.no_grad()
def put(parameters: Mapping[str, nn.Parameter], state: State) -> None:
    """Give the model the weights of a state."""
    for name, parameter in parameters.items():
        parameter.copy_(state.parameters[name])


def collated(rows: Sequence[Row], batch: Batch, device: torch.device) -> TokenBatch:
    """The batch's rows, padded on the right to its width."""
    ids = torch.zeros(len(batch.rows), batch.width, dtype=torch.long)
    counted = torch.zeros(len(batch.rows), batch.width, dtype=torch.bool)
    for place, number in enumerate(batch.rows):
        row = rows[number]
        ids[place, : len(row.tokens)] = torch.tensor(row.tokens, dtype=torch.long)
        counted[place, : len(row.labels)] = torch.tensor(row.labels) != UNCOUNTED
    counted[:, 0] = False
    tokens = TokenBatch(input_ids=ids, target_mask=counted, rows=batch.rows)
    return tokens.to(device)


def batch_losses(
    model: nn.Module, rows: Sequence[Row], batch: Batch, device: torch.device
) -> Float[Tensor, "row token"]:
    """Negative log-likelihood of each row's counted tokens, at the position that predicts them."""
    tokens = collated(rows, batch, device)
    return token_losses(next_token_logits(model, tokens), tokens)


def step_gradients(
    model: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    rows: Sequence[Row],
    step: Step,
    weights: Float[Tensor, "row"],
) -> dict[str, Tensor]:
    """The gradient that the step's optimizer saw before clipping, without a graph."""
    total = {name: torch.zeros_like(value) for name, value in parameters.items()}
    for batch in step.batches:
        losses = batch_losses(model, rows, batch, weights.device).sum(1)
        loss = (weights[list(batch.rows)] * losses).sum() / batch.divisor
        found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        for name, gradient in zip(parameters, found, strict=True):
            if gradient is not None:
                total[name] += gradient
    return total


def advance(
    model: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    recipe: Recipe,
    rows: Sequence[Row],
    step: Step,
    state: State,
    weights: Float[Tensor, "row"],
) -> State:
    """The state after one more step; ``weights`` of all rows of the run."""
    put(parameters, state)
    gradients = step_gradients(model, parameters, rows, step, weights)
    with torch.no_grad():
        after, moments = update(
            recipe, state.step, step.rates, state.parameters, state.moments, gradients
        )
    return State(step=state.step + 1, parameters=after, moments=moments)
