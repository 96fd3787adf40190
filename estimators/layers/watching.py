"""Products with weights inside a block, with the tokens that their rows belong to.

A *region* is a module whose first tensor is [batch, token, feature]. While it runs, every call of a
tensor function in it is seen: rows are followed from the region's tokens (``places``), and products
with the weights that are asked for are handed over.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from estimators.layers.operands import Operands, Parameter, Product, find_product
from estimators.layers.places import follow, places_of, put_places

RECOMPUTED = "_etymon_plain_forward"
"""Where a module keeps its own forward pass, if another is in its place that may run it twice."""


@dataclass(frozen=True, kw_only=True)
class Seen:
    """A product that took place.

    Attributes:
        product: with one of a parameter's matrices; its ``inputs`` only, where it was a module's.
        module: the dotted name of a linear module that it was of; None if it was a parameter's.
        output: of the product.
        places: tokens of the inputs' rows, numbered through the flattened batch; None if unknown.
        batch: sequences and tokens of the region.
    """

    product: Product | None
    module: str | None
    inputs: Tensor
    output: Tensor
    places: Int[Tensor, "..."] | None
    batch: tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class Watched:
    """What is watched in one region.

    Attributes:
        region: its module.
        parameters: those whose products are wanted, and those that may be added to them.
        modules: linear modules whose rows are wanted, by name.
    """

    region: nn.Module
    parameters: dict[Parameter, nn.Parameter]
    modules: dict[str, nn.Module]


@contextmanager
def watching(watched: Sequence[Watched], receive: Callable[[Seen], None]) -> Iterator[None]:
    """Hand over the products of each region that runs with gradients meanwhile."""
    with ExitStack() as stack:
        for one in watched:
            stack.enter_context(_watching_one(one, receive))
        yield


@contextmanager
def _watching_one(watched: Watched, receive: Callable[[Seen], None]) -> Iterator[None]:
    operands = Operands(watched.parameters)
    own = vars(watched.region)
    name = RECOMPUTED if RECOMPUTED in own else "forward"
    before = own.get(name)
    forward = getattr(watched.region, name)

    def run(*args: Any, **named: Any) -> Any:
        first = first_rows(args, named)
        if first is None or not torch.is_grad_enabled():
            return forward(*args, **named)
        batch = (first.shape[0], first.shape[1])
        _begin(batch, args, named)
        hooks = [
            module.register_forward_hook(partial(_after_module, name, batch, receive))
            for name, module in watched.modules.items()
        ]
        try:
            with _Following(operands, batch, receive):
                return forward(*args, **named)
        finally:
            for hook in hooks:
                hook.remove()

    own[name] = run
    try:
        yield
    finally:
        if before is None:
            del own[name]
        else:
            own[name] = before


def first_rows(args: Sequence[Any], named: Mapping[str, Any]) -> Tensor | None:
    """The first tensor of numbers that a module is given, if it is [batch, token, feature]."""
    for value in (*args, *named.values()):
        if isinstance(value, Tensor) and value.is_floating_point():
            return value if value.ndim == 3 else None
    return None


def _begin(batch: tuple[int, int], args: Sequence[Any], named: Mapping[str, Any]) -> None:
    for value in (*args, *named.values()):
        if isinstance(value, Tensor) and value.ndim == 3 and value.shape[:2] == batch:
            every = torch.arange(batch[0] * batch[1], device=value.device)
            put_places(value, every.view(batch))


class _Following(TorchFunctionMode):
    """Sees every tensor function that is called."""

    def __init__(
        self, operands: Operands, batch: tuple[int, int], receive: Callable[[Seen], None]
    ) -> None:
        super().__init__()
        self._operands, self._batch, self._receive = operands, batch, receive

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        named = kwargs or {}
        output = func(*args, **named)
        if not isinstance(output, (Tensor, tuple, list)):
            return output
        follow(func, args, named, output)
        self._operands.remember(func, args, output)
        product = find_product(self._operands, func, args, named, output)
        if product is not None and output.requires_grad:  # type: ignore[union-attr]
            places = _tokens_of(product.inputs, self._batch)
            seen = Seen(
                product=product,
                module=None,
                inputs=product.inputs,
                output=output,  # type: ignore[arg-type]
                places=places,
                batch=self._batch,
            )
            self._receive(seen)
        return output


def _after_module(
    name: str,
    batch: tuple[int, int],
    receive: Callable[[Seen], None],
    module: nn.Module,
    inputs: tuple[Any, ...],
    output: Any,
) -> None:
    if isinstance(output, Tensor) and output.requires_grad and inputs:
        receive(
            Seen(
                product=None,
                module=name,
                inputs=inputs[0],
                output=output,
                places=_tokens_of(inputs[0], batch),
                batch=batch,
            )
        )


def _tokens_of(values: Tensor, batch: tuple[int, int]) -> Tensor | None:
    """Places of rows: as they were followed, or one a token if there are as many."""
    places = places_of(values)
    if places is not None:
        return places
    leading = tuple(values.shape[:-1])
    if leading in (batch, (batch[0] * batch[1],)):
        return torch.arange(batch[0] * batch[1], device=values.device).view(leading)
    return None
