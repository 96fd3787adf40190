"""Influence through the run itself: reverse-mode differentiation of all its steps (metagradients).

Maclaurin, Duvenaud and Adams 2015, Gradient-based hyperparameter optimization through reversible
learning; Engstrom et al. 2025, Optimizing ML training with metagradient descent. With a state
``s = (parameters, moments)`` and a step ``s_(t+1) = h_t(s_t, w)`` in which a weight ``w_i`` (= 1)
stands before each row's loss, the adjoint goes backward from ``a_T = df/ds_T``:

    a_t = (dh_t/ds_t)^T a_(t+1)
    influence of row i = sum over the steps that read it of (dh_t/dw_i)^T a_(t+1)

which is ``df/dw_i``, in nats of f for a change of weight 1, exact to first order. Positive: the row
raised f. Leaving it out (weight 0) changes f by minus that, to first order.

Adam's step is hardly smooth in the weights where a second moment is next to nothing, so that what a
tiny change of weights does says little of what happens without a row. A floor under the moments in
the derivative (``smallest``) repairs that: docs/decisions/2026-11-30-smallest-moment.md.

The optimizer's part of a step is elementwise and cheap: its derivative with respect to the gradient
gives one tensor u for each parameter. The model's part is then one derivative of ``<gradient, u>``
with respect to parameters (a Hessian-vector product) and weights.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from estimators.model.measurement import negative_log_likelihood, next_token_logits
from estimators.model.tokens import Sequence1D, collate
from estimators.run.passes import batch_losses, put, step_gradients
from estimators.run.recorded import Batch, Recipe, Row, State, Step
from estimators.run.updates import update


@dataclass(frozen=True, kw_only=True)
class Adjoint:
    """The derivative of one question's measured value with respect to a state.

    Attributes:
        parameters: by name.
        moments: by kind and name; empty at the end of the run and before the first step.
    """

    parameters: Mapping[str, Tensor]
    moments: Mapping[str, Mapping[str, Tensor]]

    @property
    def norm(self) -> float:
        """Of the part for the parameters; growing backward, the run is not smooth."""
        return float(
            torch.stack([value.square().sum() for value in self.parameters.values()]).sum() ** 0.5
        )


def final_adjoint(
    model: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    state: State,
    question: Sequence[tuple[Sequence1D, float]],
) -> tuple[Adjoint, float]:
    """``df/ds`` at the end of the run, and f, the weighted sum of log-probabilities.

    Args:
        model: its trained parameters require gradients.
        parameters: these, by name.
        state: of the end.
        question: sequences with their weights.
    """
    put(parameters, state)
    total = {name: torch.zeros_like(value) for name, value in parameters.items()}
    value = 0.0
    for sequence, weight in question:
        batch = collate([sequence]).to(next(iter(parameters.values())).device)
        said = -weight * negative_log_likelihood(next_token_logits(model, batch), batch).sum()
        found = torch.autograd.grad(said, list(parameters.values()), allow_unused=True)
        value += float(said.detach())
        for name, gradient in zip(parameters, found, strict=True):
            if gradient is not None:
                total[name] += gradient
    return Adjoint(parameters=total, moments={}), value


@torch.no_grad()
def measured_value(
    model: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    state: State,
    question: Sequence[tuple[Sequence1D, float]],
) -> float:
    """F alone, in a state: as ``final_adjoint`` without its backward pass."""
    put(parameters, state)
    device = next(iter(parameters.values())).device
    batches = [(collate([sequence]).to(device), weight) for sequence, weight in question]
    losses = [
        weight * negative_log_likelihood(next_token_logits(model, batch), batch).sum()
        for batch, weight in batches
    ]
    return -sum(float(loss) for loss in losses)


def step_back(
    model: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    recipe: Recipe,
    rows: Sequence[Row],
    step: Step,
    state: State,
    after: Sequence[Adjoint],
    smallest: float = 0.0,
) -> tuple[list[Adjoint], list[Float[Tensor, "question row token"]]]:
    """Each question's adjoint before a step, and the influence of the tokens that the step read.

    The influence of a row is the sum over its tokens.

    Args:
        model: its trained parameters require gradients, in float32 or float64.
        parameters: these, by name.
        recipe: of the run.
        rows: of the run.
        step: to go back over.
        state: before it.
        after: adjoints behind it, one a question; they share the passes through the model.
        smallest: part of a tensor's mean second moment that each of its entries has at least, as
            the optimizer is differentiated; 0 is the derivative of the step as it was.

    Returns:
        The adjoints; influences of each batch of the step, at the position that predicts the token.
    """
    put(parameters, state)
    only = BatchPass(model, parameters, rows, step.batches[0]) if len(step.batches) == 1 else None
    if only is None:
        ones = torch.ones(len(rows)).to(next(iter(parameters.values())))
        gradients = step_gradients(model, parameters, rows, step, ones)
    else:  # one pass serves both
        gradients = only.gradient()
    backs = [
        _optimizer_back(recipe, step, state, gradients, adjoint, smallest) for adjoint in after
    ]
    pushes = [back[1] for back in backs]
    sums = [dict(back[0].parameters) for back in backs]
    influences = []
    for batch in step.batches:
        found = (only or BatchPass(model, parameters, rows, batch)).derivatives(pushes)
        influences.append(torch.stack([one[1] for one in found]))
        for total, (products, _) in zip(sums, found, strict=True):
            for name, product in products.items():
                total[name] = total[name] + product
    moments = [back[0].moments for back in backs]
    adjoints = [Adjoint(parameters=p, moments=m) for p, m in zip(sums, moments, strict=True)]
    return adjoints, influences


def _optimizer_back(
    recipe: Recipe,
    step: Step,
    state: State,
    gradients: Mapping[str, Tensor],
    after: Adjoint,
    smallest: float,
) -> tuple[Adjoint, dict[str, Tensor]]:
    """The adjoint through the optimizer alone, and its derivative with respect to the gradient."""
    old = {name: value.detach().requires_grad_() for name, value in state.parameters.items()}
    moments = {
        kind: {name: value.detach().requires_grad_() for name, value in tensors.items()}
        for kind, tensors in state.moments.items()
    }
    seen = {name: value.detach().requires_grad_() for name, value in gradients.items()}
    new, changed = update(recipe, state.step, step.rates, old, moments, seen, smallest)
    outputs = [(new[name], after.parameters[name]) for name in new]
    for kind, tensors in after.moments.items():
        outputs += [(changed[kind][name], value) for name, value in tensors.items()]
    leaves = [*old.values(), *seen.values(), *(m for t in moments.values() for m in t.values())]
    kept = [(value, grad) for value, grad in outputs if value.requires_grad]
    found = torch.autograd.grad(
        [value for value, _ in kept],
        leaves,
        [grad for _, grad in kept],
        allow_unused=True,
        materialize_grads=True,
    )
    rest = iter(found)
    parameters = {name: next(rest) for name in old}
    pushes = {name: next(rest) for name in seen}
    back = {kind: {name: next(rest) for name in tensors} for kind, tensors in moments.items()}
    return Adjoint(parameters=parameters, moments=back), pushes


class BatchPass:
    """A batch's gradient with the graph behind it, to be differentiated once more.

    Args:
        model: its trained parameters require gradients.
        parameters: these, by name.
        rows: of the run.
        batch: that is passed.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: Mapping[str, nn.Parameter],
        rows: Sequence[Row],
        batch: Batch,
    ) -> None:
        self._parameters = parameters
        like = next(iter(parameters.values()))
        self._weights = torch.ones(len(batch.rows), batch.width).to(like).requires_grad_()
        losses = batch_losses(model, rows, batch, like.device)
        loss = (self._weights * losses).sum() / batch.divisor
        found = torch.autograd.grad(
            loss, list(parameters.values()), create_graph=True, allow_unused=True
        )
        self._found = {n: g for n, g in zip(parameters, found, strict=True) if g is not None}

    def gradient(self) -> dict[str, Tensor]:
        """By parameter, without the graph."""
        return {
            name: self._found[name].detach() if name in self._found else torch.zeros_like(value)
            for name, value in self._parameters.items()
        }

    def derivatives(
        self, pushes: Sequence[Mapping[str, Tensor]]
    ) -> list[tuple[dict[str, Tensor], Float[Tensor, "row token"]]]:
        """For each u: the Hessian of the loss times u, and ``<gradient, u>`` of each token's loss.

        To be asked once: it frees the graph.
        """
        found = []
        for place, push in enumerate(pushes):
            products = torch.autograd.grad(
                list(self._found.values()),
                [*self._parameters.values(), self._weights],
                [push[name] for name in self._found],
                retain_graph=place + 1 < len(pushes),
                allow_unused=True,
                materialize_grads=True,
            )
            found.append((dict(zip(self._parameters, products, strict=False)), products[-1]))
        return found
