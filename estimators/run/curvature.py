"""Products of a step's curvature with several vectors at once."""

from collections.abc import Callable, Mapping, Sequence
from typing import Literal, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from estimators.model.tokens import TokenBatch
from estimators.run.adjoint import BatchPass
from estimators.run.passes import collated
from estimators.run.recorded import Batch, Row

Curvature = Literal["gauss-newton", "hessian"]
"""Of half of a batch's rows, or of the whole batch."""

Vectors = Sequence[Mapping[str, Tensor]]

LARGEST = 2**27
"""Entries of logits' tangents that are held at once: 512 MiB in float32."""


def curvature_products(
    model: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    rows: Sequence[Row],
    batch: Batch,
    vectors: Vectors,
    kind: Curvature,
    generator: torch.Generator,
) -> list[dict[str, Tensor]]:
    """The curvature of a batch's loss, in the weights that the model has, times each vector.

    "hessian" is that of the loss. "gauss-newton" leaves the second derivatives of the model out
    (Martens 2020, New insights and perspectives on the natural gradient method, section 8) and
    takes a random half of the rows, weighted as the whole: positive semi-definite, and cheaper.

    Args:
        model: its trained parameters require gradients.
        parameters: these, by name.
        rows: of the run.
        batch: that is passed.
        vectors: each by name of parameter.
        kind: of curvature.
        generator: draws the half.
    """
    if kind == "hessian":
        passed = BatchPass(model, parameters, rows, batch)
        return [product for product, _ in passed.derivatives(vectors)]
    part = half(rows, batch, generator)
    if part is None:
        return [{name: torch.zeros_like(v) for name, v in vector.items()} for vector in vectors]
    return _gauss_newton(model, parameters, rows, part, vectors)


def half(rows: Sequence[Row], batch: Batch, generator: torch.Generator) -> Batch | None:
    """A random half of a batch's rows, weighted so that their tokens count as all of them did.

    None if no token of the batch counts.
    """
    useful = [row for row in batch.rows if rows[row].targets]
    if not useful:
        return None
    order = torch.randperm(len(useful), generator=generator).tolist()
    kept = tuple(useful[place] for place in sorted(order[: (len(useful) + 1) // 2]))
    share = sum(rows[row].targets for row in kept) / sum(rows[row].targets for row in useful)
    width = max(len(rows[row].tokens) for row in kept)
    return Batch(rows=kept, divisor=batch.divisor * share, width=width)


def _gauss_newton(
    model: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    rows: Sequence[Row],
    batch: Batch,
    vectors: Vectors,
) -> list[dict[str, Tensor]]:
    """``J^T S J v``, S the Hessian of the summed loss with respect to the logits."""
    values = list(parameters.values())
    tokens = collated(rows, batch, values[0].device)
    passed = logits_of(model, parameters, tokens)
    logits = passed(parameters)
    with torch.no_grad():
        wide = logits if logits.dtype == torch.float64 else logits.float()
        counted = nn.functional.pad(tokens.target_mask[:, 1:], (0, 1))[..., None]
        likely = torch.softmax(wide, dim=-1) * counted / batch.divisor
    found: list[dict[str, Tensor]] = []
    at_once = max(1, LARGEST // logits.numel())
    for start in range(0, len(vectors), at_once):
        some = vectors[start : start + at_once]
        tangents = _tangents(passed, parameters, some)
        for tangent in tangents:
            pushed = _times(likely, tangent.to(likely), batch.divisor).to(logits.dtype)
            products = torch.autograd.grad(
                logits,
                values,
                pushed,
                retain_graph=len(found) + 1 < len(vectors),
                materialize_grads=True,
            )
            found.append(dict(zip(parameters, products, strict=True)))
    return found


def _times(
    likely: Float[Tensor, "batch token vocabulary"],
    tangent: Float[Tensor, "batch token vocabulary"],
    divisor: float,
) -> Float[Tensor, "batch token vocabulary"]:
    """``(diag(p) - p p^T) tangent / divisor`` at counted positions; ``likely = p / divisor``."""
    pushed = likely * tangent
    return pushed.sub_(likely * (divisor * pushed.sum(-1, keepdim=True)))


def _tangents(
    passed: Callable[[Mapping[str, Tensor]], Tensor],
    parameters: Mapping[str, nn.Parameter],
    vectors: Vectors,
) -> Float[Tensor, "vector batch token vocabulary"]:
    """The logits' derivatives along each vector, by forward-mode differentiation."""
    at = {name: value.detach() for name, value in parameters.items()}
    along = {name: torch.stack([vector[name] for vector in vectors]) for name in at}
    with torch.no_grad():
        tangent = torch.func.vmap(lambda one: torch.func.jvp(passed, (at,), (one,))[1])
        return cast(Tensor, tangent(along))


def logits_of(
    model: nn.Module, parameters: Mapping[str, nn.Parameter], tokens: TokenBatch
) -> Callable[[Mapping[str, Tensor]], Tensor]:
    """The logits as a function of the trained parameters, by the names that they have here."""
    own = {id(value): name for name, value in model.named_parameters()}
    names = {name: own[id(value)] for name, value in parameters.items()}
    everything = torch.ones_like(tokens.input_ids)
    given = {"input_ids": tokens.input_ids, "attention_mask": everything, "use_cache": False}

    def passed(values: Mapping[str, Tensor]) -> Tensor:
        named = {names[name]: value for name, value in values.items()}
        found: Tensor = torch.func.functional_call(model, named, (), given).logits
        return found

    return passed
