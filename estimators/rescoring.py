"""Exact scores without stored gradients: one directional derivative of the training loss.

``score(q, z) = <direction, grad L(z)>`` with ``direction = -(H + lambda I)^-1 grad f(q)``. For one
query, ``sum_t d_t^T V a_t`` a layer needs no gradient of the layer's size and splits by layer and
by position. For many queries the gradient of each example is formed once and multiplied by all.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from estimators.model.capture import Places, visit_gradients
from estimators.model.gradients import (
    Gradients,
    apply_layer,
    cached_parts,
    find_non_finite,
    sum_over_tokens,
    widen,
)
from estimators.model.layers import LinearLayer, VocabularyLayer
from estimators.model.terms import VocabularyTerms
from estimators.model.tokens import Sequence1D, TokenBatch, collate, plan_batches


class NonFiniteGradientError(ValueError):
    """A query's gradient is NaN or infinite, so nothing can be attributed to it."""


@dataclass(frozen=True, kw_only=True)
class ScoreParts:
    """Exact scores of one batch for one query, positive = proponent.

    Attributes:
        by_layer: the score's split over layers; a row sums to the example's score.
        by_position: the split over the positions that read a token; sums to the same score.
    """

    by_layer: Float[Tensor, "batch layer"]
    by_position: Float[Tensor, "batch token"]

    @property
    def total(self) -> Float[Tensor, "batch"]:
        """The scores."""
        return self.by_layer.sum(1)


def query_gradients(
    model: nn.Module, layers: Sequence[LinearLayer], queries: Sequence[Sequence1D]
) -> tuple[dict[str, Tensor], Float[Tensor, "query"]]:
    """Gradients of ``f = log p(completion | prompt)`` (nats) and the values of f.

    Args:
        model: frozen, in evaluation mode.
        layers: attributed layers.
        queries: prompt and completion; ``first_target`` is the length of the prompt.

    Returns:
        [query, in, out] a layer, and f for each query.

    Raises:
        ValueError: a query has no completion token, or a layer never runs.
        NonFiniteGradientError: the model gives NaN or infinite gradients for a query.
    """
    for query in queries:
        if query.targets == 0:
            raise ValueError("The completion has no token; give at least one.")
    batch = collate(queries).to(next(model.parameters()).device)
    gradients: dict[str, Tensor] = {}

    def visit(layer: LinearLayer, a: Tensor, d: Tensor) -> None:
        gradients[layer.name] = -sum_over_tokens(widen(a), widen(d))

    def visit_terms(layer: VocabularyLayer, terms: VocabularyTerms) -> None:
        gradients[layer.name] = terms.empty(len(queries))
        terms.add_to(list(gradients[layer.name]), [-1.0] * len(queries))

    losses = visit_gradients(model, layers, batch, visit, visit_terms=visit_terms)
    idle = [layer.name for layer in layers if layer.name not in gradients]
    if idle:
        raise ValueError(_IDLE.format(idle[0]))
    name = find_non_finite(gradients)
    if name is not None:
        raise NonFiniteGradientError(_NOT_FINITE.format(name))
    return {layer.name: gradients[layer.name] for layer in layers}, -losses


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Measurements of queries, each a weighted sum of log-probabilities, and their gradients.

    Attributes:
        gradients: [query, in, out] a layer.
        values: of every sequence of every query, in nats.
        faults: of each query, what makes its gradient useless; None for most.
    """

    gradients: dict[str, Tensor]
    values: list[list[float]]
    faults: list[str | None]


def measure_queries(
    model: nn.Module,
    layers: Sequence[LinearLayer],
    queries: Sequence[Sequence[tuple[Sequence1D, float]]],
    token_budget: int,
) -> Measured:
    """Gradients of ``f = sum_i w_i log p(completion_i | prompt_i)`` (nats), for many queries.

    Their sequences share the passes through the model; only one gradient a query is kept.

    Args:
        model: frozen, in evaluation mode.
        layers: attributed layers.
        queries: sequences with their weights; ``first_target`` is the length of the prompt.
        token_budget: padded tokens in a pass.
    """
    parts = [(q, sequence, w) for q, query in enumerate(queries) for sequence, w in query]
    values: list[list[float]] = [[] for _ in queries]
    found = [0.0] * len(parts)
    gradients: dict[str, Tensor] = {}
    device = next(model.parameters()).device
    for places in plan_batches([len(sequence.tokens) for _, sequence, _ in parts], token_budget):
        batch = collate([parts[place][1] for place in places]).to(device)
        owners = [parts[place][0] for place in places]
        weights = torch.tensor([parts[place][2] for place in places], device=device)

        def visit(
            layer: LinearLayer,
            a: Tensor,
            d: Tensor,
            owners: list[int] = owners,
            weights: Tensor = weights,
        ) -> None:
            a, d = widen(a), widen(d)
            if layer.name not in gradients:
                shape = (len(queries), a.shape[-1], d.shape[-1])
                gradients[layer.name] = torch.zeros(shape, dtype=d.dtype, device=device)
            weighted = d * weights.to(d)[:, None, None]
            for owner in set(owners):
                rows = [i for i, o in enumerate(owners) if o == owner]
                product = a[rows].flatten(0, 1).T @ weighted[rows].flatten(0, 1)
                gradients[layer.name][owner] -= product

        def visit_terms(
            layer: VocabularyLayer,
            terms: VocabularyTerms,
            owners: list[int] = owners,
            weights: Tensor = weights,
        ) -> None:
            if layer.name not in gradients:
                gradients[layer.name] = terms.empty(len(queries))
            terms.add_to([gradients[layer.name][owner] for owner in owners], (-weights).tolist())

        losses = visit_gradients(model, layers, batch, visit, visit_terms=visit_terms)
        for place, loss in zip(places, losses.tolist(), strict=True):
            found[place] = -loss
    for (q, _, _), value in zip(parts, found, strict=True):
        values[q].append(value)
    return Measured(
        gradients={
            layer.name: gradients[layer.name] for layer in layers if layer.name in gradients
        },
        values=values,
        faults=_faults(layers, gradients, len(queries)),
    )


def _faults(layers: Sequence[LinearLayer], gradients: Gradients, queries: int) -> list[str | None]:
    idle = next((layer.name for layer in layers if layer.name not in gradients), None)
    if idle is not None:
        return [_IDLE.format(idle)] * queries
    faults: list[str | None] = []
    for query in range(queries):
        name = find_non_finite({name: value[query] for name, value in gradients.items()})
        faults.append(None if name is None else _NOT_FINITE.format(name))
    return faults


_IDLE = (
    "Layer {} did not run for this query, so it has no gradient; leave it out with a layer pattern."
)
_NOT_FINITE = (
    "The query's gradient is not finite in layer {}; the model gives NaN or infinite values for "
    "this text, so no influence can be computed. Check the model's weights."
)


def score_batch(
    model: nn.Module, layers: Sequence[LinearLayer], directions: Gradients, batch: TokenBatch
) -> ScoreParts:
    """Exact scores of a batch's sequences for one query.

    Args:
        model: frozen, in evaluation mode.
        layers: attributed layers.
        directions: [in, out] a layer, from an estimator.
        batch: training sequences on the model's device.
    """
    numbers = {layer.name: i for i, layer in enumerate(layers)}
    shape = batch.shape
    dtype = next(iter(directions.values())).dtype
    by_layer = torch.zeros(shape[0], len(layers), dtype=dtype, device=batch.input_ids.device)
    by_position = torch.zeros(shape, dtype=dtype, device=batch.input_ids.device)
    places: Places = {}

    def visit(layer: LinearLayer, a: Tensor, d: Tensor) -> None:
        moved = apply_layer(directions[layer.name], widen(a), layer.has_bias)
        add(layer, moved.mul_(widen(d)).sum(-1))

    def visit_terms(layer: VocabularyLayer, terms: VocabularyTerms) -> None:
        add(layer, terms.products(directions[layer.name]))

    def add(layer: LinearLayer, products: Tensor) -> None:
        by_layer[:, numbers[layer.name]] = products.sum(1)
        own = places.get(layer.name)
        if own is None:
            by_position.add_(products)
        else:  # rows that only fill up have products of 0
            by_position.scatter_add_(1, own.clamp_min(0), products.to(by_position))

    visit_gradients(
        model, layers, batch, visit, append_one=False, visit_terms=visit_terms, places=places
    )
    return ScoreParts(by_layer=by_layer, by_position=by_position)


def score_batch_for_queries(
    model: nn.Module, layers: Sequence[LinearLayer], directions: Gradients, batch: TokenBatch
) -> Float[Tensor, "query batch"]:
    """Exact scores of a batch's sequences for many queries at once.

    Args:
        model: frozen, in evaluation mode.
        layers: attributed layers.
        directions: [query, in, out] a layer.
        batch: training sequences on the model's device.
    """
    first = next(iter(directions.values()))
    scores = torch.zeros(len(first), len(batch.rows), dtype=first.dtype, device=first.device)

    def visit(layer: LinearLayer, a: Tensor, d: Tensor) -> None:
        a, d = widen(a), widen(d)
        direction = directions[layer.name].flatten(1)
        for part in cached_parts(a, d):
            gradients = sum_over_tokens(a[part], d[part]).flatten(1)
            scores[:, part].addmm_(direction, gradients.T)

    def visit_terms(layer: VocabularyLayer, terms: VocabularyTerms) -> None:
        scores.add_(terms.scores(directions[layer.name]))

    visit_gradients(model, layers, batch, visit, visit_terms=visit_terms)
    return scores
