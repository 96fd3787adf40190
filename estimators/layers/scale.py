"""Norms' own parameters: vectors that a module's output depends on linearly, feature by feature.

With ``y_t = w * u(x_t) + rest``, ``u`` being what the module gives for ``w = 1`` less what it gives
for ``w = 0``, the gradient of w is ``sum_t d_t * u(x_t)``: that of a matrix [1, feature] which maps
a 1 for each token and has the output gradients ``d_t * u(x_t)``. So it is a layer like others.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from estimators.layers.following import Visitor
from estimators.layers.judging import AGREEMENT, COARSE_AGREEMENT
from estimators.layers.linear import LinearLayer, plain_name


@dataclass(frozen=True, kw_only=True)
class ScaleLayer(LinearLayer):
    """A vector of a module, as a matrix [1, feature], or a block of its features.

    Its name is the parameter's in the model: ``model.norm.weight``.

    Attributes:
        parameter: its name in the module.
    """

    parameter: str

    @property
    def module_name(self) -> str:
        """The module's dotted name."""
        return self.name.partition("[")[0].rpartition(".")[0]

    @property
    def is_block(self) -> bool:
        """Whether it has some of the features only."""
        return self.out_features != self.weight.numel()

    @property
    def weight(self) -> Tensor:
        """The parameter."""
        return self.module.get_parameter(self.parameter)

    @property
    def has_bias(self) -> bool:
        """Never."""
        return False

    @property
    def inputs(self) -> slice:
        """The constant 1."""
        return slice(0, 1)

    @property
    def parameter_names(self) -> frozenset[str]:
        """The plain name in the model of the parameter."""
        return frozenset([f"{plain_name(self.module_name)}.{self.parameter}"])

    def part_of(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """What tensors by plain names of parameters have here: [1, out], where it computes."""
        (name,) = self.parameter_names
        own = self.weight
        found = parameters.get(name)
        if found is None:
            return torch.zeros(1, self.out_features, device=own.device)
        return found[self.outputs][None].to(own.device)

    def add_to_weights(self, step: Tensor) -> None:
        """Add ``step`` ([1, out]) to the parameter."""
        self.weight.data[self.outputs] += step[0].to(self.weight.dtype)


@torch.no_grad()
def slope(
    module: nn.Module, parameter: str, args: Sequence[Any], named: Mapping[str, Any]
) -> Float[Tensor, "*row feature"]:
    """``u``: what a module's output changes by if one of its vectors goes from 0 to 1."""
    own, before = module._parameters, module._parameters[parameter]
    assert before is not None
    found = []
    try:
        for value in (torch.ones_like(before), torch.zeros_like(before)):
            own[parameter] = nn.Parameter(value, requires_grad=False)
            found.append(module.forward(*args, **named))
    finally:
        own[parameter] = before
    one, zero = found
    difference: Tensor = one - zero
    return difference


@contextmanager
def scaled(layers: Sequence[ScaleLayer], visit: Visitor) -> Iterator[None]:
    """Call ``visit`` for each vector as soon as a backward pass reaches its module."""
    by_module: dict[nn.Module, list[ScaleLayer]] = {}
    for layer in layers:
        by_module.setdefault(layer.module, []).append(layer)

    def after_forward(
        module: nn.Module, args: tuple[Any, ...], named: dict[str, Any], output: Tensor
    ) -> None:
        if not output.requires_grad:
            return

        def on_gradient(gradient: Tensor) -> None:
            slopes: dict[str, Tensor] = {}
            for layer in by_module[module]:
                if layer.parameter not in slopes:
                    slopes[layer.parameter] = slope(module, layer.parameter, args, named)
                d = gradient.detach() * slopes[layer.parameter]
                visit(layer, d.new_ones(*d.shape[:-1], 1), d[..., layer.outputs])

        output.register_hook(on_gradient)  # type: ignore[no-untyped-call]

    handles = [
        module.register_forward_hook(after_forward, with_kwargs=True) for module in by_module
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@dataclass(kw_only=True)
class _Run:
    """What a module did in a trial."""

    runs: int = 0
    reached: bool = False
    edge: Any = None
    fault: str | None = None
    slopes: dict[str, Tensor] | None = None


class ScaleTrial:
    """Finds out in a pass which vectors of modules are scales.

    Args:
        modules: by name, whose own vectors are tried.
        shape: sequences and tokens of the pass.
    """

    def __init__(self, modules: Mapping[str, nn.Module], shape: tuple[int, int]) -> None:
        self._modules, self._shape = modules, shape
        self._seen = {name: _Run() for name in modules}

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """See which modules depend on the embeddings, in a pass in which no vector is trained."""

        def hook(name: str) -> Any:
            def after_forward(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
                if isinstance(output, Tensor) and output.requires_grad:
                    self._seen[name].reached = True

            return after_forward

        handles = [m.register_forward_hook(hook(name)) for name, m in self._modules.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """See what the modules do while a pass runs forward."""
        handles = [
            module.register_forward_hook(self._hook(name), with_kwargs=True)
            for name, module in self._modules.items()
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def parameters(self) -> dict[tuple[str, str], nn.Parameter]:
        """The vectors, by names of module and parameter."""
        return {
            (name, own): parameter
            for name, module in self._modules.items()
            for own, parameter in module.named_parameters(recurse=False)
            if parameter.ndim == 1 and parameter.is_floating_point()
        }

    def judge(self, value: Tensor) -> tuple[dict[str, list[str]], dict[str, str]]:
        """Scales of each module by name; of others, why they are none.

        Args:
            value: what the pass ended in, of which the vectors have gradients.
        """
        parameters = self.parameters()
        edges = [run.edge for run in self._seen.values() if run.edge is not None]
        found = torch.autograd.grad(value, [*edges, *parameters.values()], allow_unused=True)
        reached = [name for name, run in self._seen.items() if run.edge is not None]
        outputs = dict(zip(reached, found[: len(edges)], strict=True))
        expected = dict(zip(parameters, found[len(edges) :], strict=True))
        scales: dict[str, list[str]] = {}
        reasons: dict[str, str] = {}
        for (name, own), gradient in expected.items():
            fault = self._fault(name, own, outputs.get(name), gradient)
            if fault is None:
                scales.setdefault(name, []).append(own)
            else:
                reasons[f"{name}.{own}"] = fault
        return scales, reasons

    def _hook(self, name: str) -> Any:
        run = self._seen[name]

        def after_forward(
            module: nn.Module, args: tuple[Any, ...], named: dict[str, Any], output: Any
        ) -> None:
            if not torch.is_grad_enabled():
                return
            run.runs += 1
            if not isinstance(output, Tensor) or tuple(output.shape[:-1]) != self._shape:
                run.fault = "it gives other than [batch, token, feature]"
                return
            sizes = {n: p for n, p in module.named_parameters(recurse=False) if p.ndim == 1}
            if not output.requires_grad or any(
                p.numel() != output.shape[-1] for p in sizes.values()
            ):
                run.fault = "it has not one parameter a feature"
                return
            run.edge = get_gradient_edge(output)
            run.slopes = {own: slope(module, own, args, named) for own in sizes}

        return after_forward

    def _fault(self, name: str, own: str, d: Tensor | None, expected: Tensor | None) -> str | None:
        run = self._seen[name]
        if run.runs != 1:
            return "runs more than once in a forward pass" if run.runs else "did not run"
        if run.fault is not None or run.slopes is None:
            return run.fault
        if d is None or expected is None or not run.reached or not expected.any():
            return "no gradient reaches it"
        wide = expected.dtype in (torch.float32, torch.float64)
        found = (d.double() * run.slopes[own].double()).sum((0, 1))
        error = (found - expected.double()).norm() / expected.double().norm()
        if error > (AGREEMENT if wide else COARSE_AGREEMENT):
            return "its output does not depend on it linearly, feature by feature"
        return None
