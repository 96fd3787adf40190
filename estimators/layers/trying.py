"""A trial of what is not simply [batch, token, feature]: which weights are whose, which rows are.

Products inside a region are seen as they take place (``watching``). Whether their rows belong to
the tokens that they were followed from is tried by differentiating each position's prediction
alone: a causal model's prediction at position t depends on a row of a token at t or before, in the
same sequence, so that the first prediction that depends on a row is that of its own token. Whether
the products are all that a parameter does is tried by comparing their sum with autograd's gradient
of the parameter, for one module of each class.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from estimators.layers.judging import (
    FOLLOWED_SHAPE,
    Findings,
    Record,
    judge_modules,
    judge_parameters,
)
from estimators.layers.operands import Parameter
from estimators.layers.watching import Seen, Watched, first_rows, watching


def try_following(
    model: nn.Module,
    run: Callable[[], Tensor],
    modules: Mapping[str, nn.Module],
    holders: Mapping[str, nn.Module],
) -> Findings:
    """Run the model forward once, and backward once for each of the trial's positions.

    Args:
        model: frozen.
        run: gives logits [batch, token, vocabulary] of a trial of ``FOLLOWED_SHAPE``.
        modules: linear modules that did not see [batch, token, feature], by name.
        holders: modules whose own parameters may be matrices, by name.
    """
    findings = Findings()
    wanted = {*modules, *holders}
    regions = _find_regions(model, run, wanted)
    for name in sorted(wanted - regions.keys()):
        findings.reasons[name] = "it is in no module that is called with [batch, token, feature]"
    modules = {n: m for n, m in modules.items() if n in regions}
    holders = {n: m for n, m in holders.items() if n in regions}
    tried = _first_of_each_kind(holders)
    records: list[Record] = []

    watched = watch(model, regions, modules, holders)
    reached = _reached(run, watched)

    def receive(seen: Seen) -> None:
        if _source(seen) in reached:
            records.append(Record(seen=seen, edge=get_gradient_edge(seen.output)))

    for parameter in tried.values():
        parameter.requires_grad_(True)
    try:
        with torch.enable_grad(), watching(watched, receive):
            logits = run()
        whole = _differentiate(logits, records, list(tried.values()))
    finally:
        for parameter in tried.values():
            parameter.requires_grad_(False)
    judge_modules(findings, records, modules, regions)
    judge_parameters(findings, records, holders, regions, dict(zip(tried, whole, strict=True)))
    return findings


def _source(seen: Seen) -> object:
    return seen.module if seen.product is None else seen.product.operand


def _reached(run: Callable[[], Tensor], watched: Sequence[Watched]) -> set[object]:
    """Modules and matrices whose products depend on the embeddings, while no weight is trained.

    Others, e.g. within the embeddings, get no gradient when layers are attributed.
    """
    found: set[object] = set()
    with torch.enable_grad(), watching(watched, lambda seen: found.add(_source(seen))):
        run()
    return found


def watch(
    model: nn.Module,
    regions: Mapping[str, str],
    modules: Mapping[str, nn.Module],
    holders: Mapping[str, nn.Module],
) -> list[Watched]:
    """What to watch for the products of modules and of holders' parameters, by their regions."""
    found = []
    for region in dict.fromkeys(regions[name] for name in (*modules, *holders)):
        parameters = {
            Parameter(holder, name): parameter
            for holder, module in holders.items()
            if regions[holder] == region
            for name, parameter in module.named_parameters(recurse=False)
        }
        own = {name: m for name, m in modules.items() if regions[name] == region}
        found.append(
            Watched(region=model.get_submodule(region), parameters=parameters, modules=own)
        )
    return found


def _find_regions(model: nn.Module, run: Callable[[], Tensor], names: set[str]) -> dict[str, str]:
    """The innermost module around each name that is called with [batch, token, feature]."""
    fit: set[str] = set()
    above = {prefix for name in names for prefix in _prefixes(name)}
    handles = []
    for name in above:

        def before(
            module: nn.Module, args: tuple[Any, ...], named: dict[str, Any], name: str = name
        ) -> None:
            first = first_rows(args, named)
            if first is not None and tuple(first.shape[:2]) == FOLLOWED_SHAPE:
                fit.add(name)

        module = model.get_submodule(name)
        handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
    try:
        with torch.no_grad():
            run()
    finally:
        for handle in handles:
            handle.remove()
    found = {}
    for name in names:
        inside = [prefix for prefix in _prefixes(name) if prefix in fit]
        if inside:
            found[name] = inside[-1]
    return found


def _prefixes(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[: i + 1]) for i in range(len(parts))]


def _first_of_each_kind(holders: Mapping[str, nn.Module]) -> dict[Parameter, nn.Parameter]:
    found: dict[tuple[type, str], tuple[Parameter, nn.Parameter]] = {}
    for holder, module in holders.items():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.is_floating_point():
                found.setdefault((type(module), name), (Parameter(holder, name), parameter))
    return dict(found.values())


def _differentiate(
    logits: Tensor, records: Sequence[Record], parameters: Sequence[nn.Parameter]
) -> list[Tensor | None]:
    """Fill the records' gradients, one a position; give those of the sum over positions."""
    if not logits.requires_grad:
        return [None] * len(parameters)
    positions = logits.float().logsumexp(-1)
    if records:
        edges = [record.edge for record in records]
        for value in positions.flatten():
            found = torch.autograd.grad(value, edges, retain_graph=True, allow_unused=True)
            for record, gradient in zip(records, found, strict=True):
                like = record.seen.output
                gradient = torch.zeros_like(like) if gradient is None else gradient
                record.gradients.append(gradient.detach().flatten(0, -2))
    if not parameters:
        return []
    return list(torch.autograd.grad(positions.sum(), parameters, allow_unused=True))
