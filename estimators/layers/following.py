"""Inputs and output gradients of layers whose rows are followed, sequence by sequence."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from jaxtyping import Int
from torch import Tensor, nn

from estimators.layers.linear import LinearLayer
from estimators.layers.matrix import MatrixLayer
from estimators.layers.operands import Parameter
from estimators.layers.rows import by_sequence
from estimators.layers.watching import Seen, Watched, watching

Visitor = Callable[[LinearLayer, Tensor, Tensor], None]
"""Receives a layer, its inputs ``a`` [batch, token, in] (1 appended for the bias, unless asked not
to) and the gradients ``d`` [batch, token, out] of the summed loss with respect to its outputs.
Masked and padded tokens have d = 0. Layers that see other rows than one a token have ``Places``."""

Places = dict[str, Int[Tensor, "batch row"]]
"""Of layers, by name, that see several rows a token, or one of some tokens only: the token of each
row within its sequence; ``estimators.layers.rows.NOWHERE`` of rows that fill up, whose a and d are
0. Known as soon as a layer is visited."""

Key = tuple[str, int]
"""A module's dotted name (and its parameter's), and which of the parameter's matrices."""


@dataclass(kw_only=True)
class _Arrived:
    """What is known of the products with one matrix."""

    expected: int = 0
    rows: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)


@contextmanager
def followed(
    layers: Sequence[LinearLayer],
    visit: Visitor,
    append_one: bool = True,
    places: Places | None = None,
) -> Iterator[None]:
    """Call ``visit`` for each layer with a region as soon as a backward pass reaches it.

    A layer of a mixture's expert that no token reached is visited at the end, without rows.

    Args:
        layers: of one model, with a region.
        visit: see ``Visitor``.
        append_one: whether inputs of layers with a bias get a 1 appended.
        places: is filled.

    Raises:
        ValueError: a layer was used again after its gradient had come, or its rows could not be
            followed.
    """
    handing = _Handing(layers, visit, append_one, {} if places is None else places)
    with watching(_watched(layers), handing.receive):
        yield
    handing.finish()


class _Handing:
    """Collects products and hands over whole layers."""

    def __init__(
        self, layers: Sequence[LinearLayer], visit: Visitor, append_one: bool, places: Places
    ) -> None:
        self._visit, self._append_one, self._places = visit, append_one, places
        self._layers: dict[Key, list[LinearLayer]] = defaultdict(list)
        for layer in layers:
            self._layers[_key(layer)].append(layer)
        self._arrived: dict[Key, _Arrived] = defaultdict(_Arrived)
        self._done: set[Key] = set()
        self._batch: tuple[int, int] | None = None

    def receive(self, seen: Seen) -> None:
        """A product took place in the forward pass."""
        keys = self._keys(seen)
        if not keys:
            return
        if seen.places is None:
            raise ValueError(
                f"The tokens that layer {self._layers[keys[0]][0].name} saw cannot be followed; "
                f"leave it out with a layer pattern."
            )
        self._batch = seen.batch
        for key in keys:
            self._arrived[key].expected += 1
        inputs, places = seen.inputs.detach(), seen.places

        def on_gradient(gradient: Tensor) -> None:
            d = gradient.detach()
            if len(keys) == 1:
                rows = inputs.flatten(0, -2), d.flatten(0, -2), places.flatten()
                self._arrive(keys[0], rows)
                return
            for number, key in enumerate(keys):
                self._arrive(key, (inputs[number], d[number], places[number]))

        seen.output.register_hook(on_gradient)  # type: ignore[no-untyped-call]

    def finish(self) -> None:
        """The backward pass is over: what did not come is zero."""
        for key, layers in self._layers.items():
            if key in self._done or (layers[0].family is None and not self._arrived[key].rows):
                continue
            self._hand_over(key)

    def _keys(self, seen: Seen) -> list[Key]:
        if seen.product is None:
            keys = [(seen.module or "", 0)]
        else:
            operand = seen.product.operand
            name = f"{operand.parameter.holder}.{operand.parameter.name}"
            numbers = range(operand.count) if operand.number is None else [operand.number]
            keys = [(name, number) for number in numbers]
        return keys if any(key in self._layers for key in keys) else []

    def _arrive(self, key: Key, rows: tuple[Tensor, Tensor, Tensor]) -> None:
        if key not in self._layers:
            return
        if key in self._done:
            raise ValueError(
                f"Layer {self._layers[key][0].name} ran twice in one forward pass; leave it out "
                f"with a layer pattern."
            )
        arrived = self._arrived[key]
        arrived.rows.append(rows)
        if len(arrived.rows) == arrived.expected:
            self._hand_over(key)

    def _hand_over(self, key: Key) -> None:
        self._done.add(key)
        rows = self._arrived.pop(key, _Arrived()).rows
        places: Tensor | None
        if rows:
            assert self._batch is not None
            parts = (torch.cat(x) if len(x) > 1 else x[0] for x in zip(*rows, strict=True))
            inputs, gradients, tokens = parts
            a, d, places = by_sequence(inputs, gradients, tokens, self._batch)
        else:
            a, d, places = self._nothing(self._layers[key])
        for layer in self._layers[key]:
            own = a[..., layer.inputs]
            if self._append_one and layer.has_bias:
                own = with_one(own)
            if places is not None:
                self._places[layer.name] = places
            else:
                self._places.pop(layer.name, None)
            self._visit(layer, own, d[..., layer.outputs])

    def _nothing(self, blocks: Sequence[LinearLayer]) -> tuple[Tensor, Tensor, Tensor]:
        """No rows of as many sequences as the batch has."""
        like = next(blocks[0].module.parameters())
        count = 0 if self._batch is None else self._batch[0]
        dtype = like.dtype if like.is_floating_point() else torch.float32
        inputs = max(block.inputs.stop for block in blocks)
        outputs = max(block.outputs.stop for block in blocks)
        empty = torch.empty(count, 0, inputs, device=like.device, dtype=dtype)
        places = torch.empty(count, 0, device=like.device, dtype=torch.int64)
        return empty, empty.new_empty(count, 0, outputs), places


def with_one(inputs: Tensor) -> Tensor:
    """A 1 appended to each row, for the bias."""
    return torch.cat([inputs, inputs.new_ones(*inputs.shape[:-1], 1)], dim=-1)


def _key(layer: LinearLayer) -> Key:
    if isinstance(layer, MatrixLayer):
        return f"{_module_name(layer)}.{layer.stored.parameter}", layer.stored.number
    return _module_name(layer), 0


def _module_name(layer: LinearLayer) -> str:
    """Without the label of a checkpoint."""
    return layer.module_name.rpartition(":")[2]


def _watched(layers: Sequence[LinearLayer]) -> list[Watched]:
    found: dict[nn.Module, Watched] = {}
    for layer in layers:
        assert layer.region is not None
        one = found.setdefault(
            layer.region, Watched(region=layer.region, parameters={}, modules={})
        )
        name = _module_name(layer)
        if isinstance(layer, MatrixLayer):
            for own in (layer.stored.parameter, layer.stored.bias):
                if own is not None:
                    one.parameters[Parameter(name, own)] = layer.module.get_parameter(own)
        else:
            one.modules[name] = layer.module
    return list(found.values())
