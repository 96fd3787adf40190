"""What a trial's records say: whose rows are known, and which parameters are matrices."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

from estimators.layers.operands import Parameter
from estimators.layers.watching import Seen

FOLLOWED_SHAPE = (2, 5)
"""Sequences and tokens of the trial."""

RESPONSE = 1e-4
"""Share of a row's largest influence on any prediction that is more than rounding."""

AGREEMENT = 1e-3
"""Largest relative error of a gradient put together from products, in float32 and wider."""

COARSE_AGREEMENT = 0.1
"""In narrower precision."""


@dataclass(frozen=True, kw_only=True)
class Matrices:
    """What a parameter is: one matrix or several, see ``estimators.layers.matrix.Stored``.

    Attributes:
        count: how many.
        shape: of each.
        inputs_first: whether each is stored [in, out].
        bias: name in the module of what is added.
        region: the dotted name of the module in whose run rows are followed.
        routed: whether some matrix sees some tokens only.
    """

    count: int
    shape: tuple[int, int]
    inputs_first: bool
    bias: str | None
    region: str
    routed: bool


@dataclass(kw_only=True)
class Findings:
    """What a trial found.

    Attributes:
        parameters: those that are matrices and can be attributed.
        modules: linear modules whose rows can be followed: the region of each.
        routed: those of them that see some tokens only.
        reasons: why others cannot be attributed, by name of module, or of module and parameter.
    """

    parameters: dict[Parameter, Matrices] = field(default_factory=dict)
    modules: dict[str, str] = field(default_factory=dict)
    routed: set[str] = field(default_factory=set)
    reasons: dict[str, str] = field(default_factory=dict)


@dataclass(kw_only=True)
class Record:
    """A product of the trial, and its gradients once they are known."""

    seen: Seen
    edge: GradientEdge
    gradients: list[Tensor] = field(default_factory=list)


def family_of(name: str, region: str) -> str:
    """A module's name with * for numbers within its region: the same for all experts of a block."""
    inside = name[len(region) :]
    return name[: len(region)] + re.sub(r"(?<=\.)\d+(?=\.|$)", "*", inside)


def _row_fault(record: Record) -> str | None:
    """Why the rows are not those of the tokens that they were followed from; None if they are."""
    places = record.seen.places
    if places is None:
        return "which tokens it sees cannot be followed"
    norms = torch.stack([g.float().norm(dim=-1) for g in record.gradients])  # [position, row]
    if norms.shape[1] != places.numel():
        return "its outputs are not one a row of its inputs"
    norms = norms.view(*FOLLOWED_SHAPE, -1)
    largest = norms.amax((0, 1))
    reached = norms > RESPONSE * largest
    place = places.flatten()
    owners, tokens = place // FOLLOWED_SHAPE[1], place % FOLLOWED_SHAPE[1]
    rows = torch.arange(len(place), device=place.device)
    own = reached[owners, :, rows]
    alone = reached.sum((0, 1)) == own.sum(1)
    first = own.int().argmax(1)  # the first True; 0 if there is none
    right = alone & (first == tokens) & own.any(1)
    if not bool((right | (largest == 0)).all()):
        return "its rows do not belong to the tokens that they were followed from"
    return None


def judge_modules(
    findings: Findings,
    records: Sequence[Record],
    modules: Mapping[str, nn.Module],
    regions: Mapping[str, str],
) -> None:
    """Modules that ran once with rows of known tokens; experts that did not run go with others."""
    every = FOLLOWED_SHAPE[0] * FOLLOWED_SHAPE[1]
    for name in modules:
        own = [record for record in records if record.seen.module == name]
        if not own:
            findings.reasons[name] = "did not run in a trial pass"
            continue
        fault = _row_fault(own[0])
        if len(own) > 1:
            fault = "runs more than once in a forward pass"
        elif not any(bool(g.any()) for g in own[0].gradients):
            fault = fault or "no gradient reaches it"
        if fault is not None:
            findings.reasons[name] = fault
            continue
        findings.modules[name] = regions[name]
        places = own[0].seen.places
        if places is not None and int(torch.bincount(places.flatten()).count_nonzero()) < every:
            findings.routed.add(name)
    _take_in_siblings(findings, modules, regions)


def _take_in_siblings(
    findings: Findings, modules: Mapping[str, nn.Module], regions: Mapping[str, str]
) -> None:
    """Experts of one block are alike: what one is, all are, whatever the trial sent them."""
    families: dict[tuple[str, str], list[str]] = {}
    for name, module in modules.items():
        key = (family_of(name, regions[name]), repr(module))
        families.setdefault(key, []).append(name)
    for names in families.values():
        good = [name for name in names if name in findings.modules]
        idle = {"did not run in a trial pass", "no gradient reaches it"}
        missing = [n for n in names if findings.reasons.get(n) in idle]
        faulty = [n for n in names if n in findings.reasons and n not in missing]
        if len(names) < 2 or not good or faulty:
            continue
        if missing or any(name in findings.routed for name in good):
            for name in names:
                findings.reasons.pop(name, None)
                findings.modules[name] = regions[name]
                findings.routed.add(name)


def judge_parameters(
    findings: Findings,
    records: Sequence[Record],
    holders: Mapping[str, nn.Module],
    regions: Mapping[str, str],
    whole: Mapping[Parameter, Tensor | None],
) -> None:
    """Parameters that are multiplied by, and by nothing but the products that were seen.

    Args:
        findings: are added to.
        records: of the trial.
        holders: of the parameters, by name.
        regions: of the holders.
        whole: autograd's gradients of those of one holder of each class.
    """
    kinds: dict[tuple[type, str], str | None] = {}
    by_parameter: dict[Parameter, list[Record]] = {}
    for record in records:
        if record.seen.product is not None:
            by_parameter.setdefault(record.seen.product.operand.parameter, []).append(record)
    for holder, module in holders.items():
        for name, _ in module.named_parameters(recurse=False):
            parameter = Parameter(holder, name)
            own = by_parameter.get(parameter, [])
            if not own:
                continue
            kind = (type(module), name)
            fault = _parameter_fault(own)
            if kind not in kinds:
                kinds[kind] = fault or _gradient_fault(own, module, whole.get(parameter))
                fault = kinds[kind] or _bias_fault(own, whole)
            fault = kinds[kind] or fault
            if fault is not None:
                findings.reasons[f"{holder}.{name}"] = fault
                continue
            findings.parameters[parameter] = _matrices(own, regions[holder])


def _matrices(records: Sequence[Record], region: str) -> Matrices:
    product = records[0].seen.product
    assert product is not None
    operand = product.operand
    every = FOLLOWED_SHAPE[0] * FOLLOWED_SHAPE[1]
    places = (r.seen.places.flatten() for r in records if r.seen.places is not None)
    seen = sum(int(torch.bincount(own).count_nonzero()) for own in places)
    rows, columns = operand.shape
    return Matrices(
        count=operand.count,
        shape=(rows, columns),
        inputs_first=product.inputs_first,
        bias=None if product.bias is None else product.bias.name,
        region=region,
        routed=operand.count > 1 and seen < every * operand.count,
    )


def _parameter_fault(records: Sequence[Record]) -> str | None:
    products = [r.seen.product for r in records if r.seen.product is not None]
    ways = {(p.operand.count, p.operand.shape, p.inputs_first, p.bias) for p in products}
    if len(ways) > 1:
        return "it is multiplied by in several ways"
    numbers = [p.operand.number for p in products]
    if len(set(numbers)) < len(numbers):
        return "it is multiplied by more than once in a forward pass"
    if not any(bool(g.any()) for record in records for g in record.gradients):
        return "no gradient reaches it"
    return next((fault for r in records if (fault := _row_fault(r)) is not None), None)


def _gradient_fault(
    records: Sequence[Record], module: nn.Module, expected: Tensor | None
) -> str | None:
    """Whether the products' gradients add up to autograd's."""
    if expected is None:
        return "no gradient reaches it"
    found = torch.zeros_like(expected)
    for record in records:
        product = record.seen.product
        assert product is not None
        operand = product.operand
        blocks = found.view(operand.count, *operand.shape)
        a = record.seen.inputs.detach()
        d = torch.stack(record.gradients).sum(0).view(*a.shape[:-1], -1)
        if operand.number is not None:
            a, d = a.flatten(0, -2)[None], d.flatten(0, -2)[None]
        gradient = a.transpose(1, 2).to(d.dtype) @ d
        gradient = gradient if product.inputs_first else gradient.transpose(1, 2)
        if operand.number is None:
            blocks += gradient.to(blocks)
        else:
            blocks[operand.number] += gradient[0].to(blocks)
    if _differ(found, expected):
        return "its gradient is not that of the products that were seen"
    return None


def _bias_fault(records: Sequence[Record], whole: Mapping[Parameter, Tensor | None]) -> str | None:
    product = records[0].seen.product
    if product is None or product.bias is None:
        return None
    expected = whole.get(product.bias)
    if expected is None:
        return "no gradient reaches its bias"
    found = torch.zeros_like(expected)
    rows = found.view(product.operand.count, -1)
    for record in records:
        assert record.seen.product is not None
        operand = record.seen.product.operand
        d = torch.stack(record.gradients).sum(0)
        if operand.number is None:
            rows += d.view(operand.count, -1, d.shape[-1]).sum(1).to(rows)
        else:
            rows[operand.number] += d.sum(0).to(rows)
    if _differ(found, expected):
        return "the gradient of its bias is not that of the products that were seen"
    return None


def _differ(found: Tensor, expected: Tensor) -> bool:
    wide = expected.dtype in (torch.float32, torch.float64)
    error = (found.double() - expected.double()).norm()
    return bool(error > (AGREEMENT if wide else COARSE_AGREEMENT) * expected.double().norm())
