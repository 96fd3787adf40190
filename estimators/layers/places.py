"""Which token each row of a tensor comes from, followed through whatever a block does to it.

A *place* is a token's number in the flattened batch. A tensor of rows, [..., feature], carries the
places of its rows, [...], as an attribute. Indexing and moving of axes are done to the places as
they are done to the rows; everything else gives rows in the order that it was given them. Whether
that holds for a model is tried: see ``estimators.layers.trying``.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

_PLACES = "_etymon_places"


def places_of(values: Tensor) -> Tensor | None:
    """Places of the rows of ``values`` [..., feature], of the shape [...]; None if unknown."""
    found: Tensor | None = getattr(values, _PLACES, None)
    return found


def put_places(values: Tensor, places: Tensor) -> None:
    """Let ``values`` [..., feature] carry the places [...] of its rows."""
    setattr(values, _PLACES, places)


def _named(*names: str) -> frozenset[Any]:
    """Functions of these names, of ``torch`` and of its tensors."""
    return frozenset(
        getattr(holder, name)
        for holder in (torch, Tensor)
        for name in names
        if hasattr(holder, name)
    )


_RESHAPING = _named("reshape", "view", "view_as", "reshape_as", "flatten", "unflatten")
_JOINING = _named("cat", "concat", "stack")
_MOVING = (
    _RESHAPING
    | _JOINING
    | _named("squeeze", "unsqueeze", "transpose", "permute", "swapaxes", "swapdims", "movedim", "t")
    | _named("split", "chunk", "unbind", "tensor_split", "split_with_sizes", "narrow", "select")
    | _named("expand", "expand_as", "repeat", "repeat_interleave", "tile", "index_select", "gather")
    | _named("roll", "flip", "__getitem__", "take_along_dim")
    | {Tensor.T.__get__, Tensor.mT.__get__}  # type: ignore[attr-defined]
)
_SCATTERING = _named(
    "__setitem__", "index_add_", "index_add", "index_copy_", "index_put_", "index_put", "copy_"
) | _named("scatter", "scatter_", "scatter_add", "scatter_add_", "scatter_reduce", "masked_scatter")


def follow(
    func: Callable[..., Any], args: Sequence[Any], named: Mapping[str, Any], output: Any
) -> None:
    """Let what ``func(*args, **named)`` gave carry the places of the rows that it was given."""
    outputs = list(_tensors([output]))
    given = [x for x in _tensors([*args, *named.values()]) if places_of(x) is not None]
    if not outputs or not given:
        return
    if func in _MOVING:
        for value, places in zip(outputs, _moved(func, args, named, outputs), strict=False):
            if places is not None:
                put_places(value, places)
        return
    if func in _SCATTERING:
        given = [x for x in given if x is args[0]]
    for value in outputs:
        for source in given:
            places = places_of(source)
            if places is not None and places.shape == value.shape[:-1]:
                put_places(value, places)
                break


def _tensors(values: Sequence[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (tuple, list)):
            yield from (x for x in value if isinstance(x, Tensor))


def _moved(
    func: Any, args: Sequence[Any], named: Mapping[str, Any], outputs: Sequence[Tensor]
) -> list[Tensor | None]:
    """Places of each output; None where its rows do not belong to one token each."""
    if func in _JOINING:
        parts = list(args[0]) if args else []
        if not parts or any(places_of(part) is None for part in parts):
            return []
        moved = func([_spread(part) for part in parts], *args[1:], **named)
        return [_rows(moved)]
    first = args[0] if args else None
    if not isinstance(first, Tensor) or (places := places_of(first)) is None:
        return []
    if any(isinstance(x, torch.dtype) for x in (*args[1:], *named.values())):
        return []
    if func in _RESHAPING and outputs[0].shape[-1:] == first.shape[-1:]:
        return [places.reshape(outputs[0].shape[:-1])]
    if func is Tensor.__getitem__ and _indexes_rows(args[1], places, outputs[0]):
        return [places[args[1]]]
    spread = _spread(first)
    if func in _RESHAPING:
        return [_rows(spread.reshape(outputs[0].shape))]
    try:
        moved = func(spread, *args[1:], **named)
    except (IndexError, RuntimeError, TypeError):
        return []
    return [_rows(part) for part in _tensors([moved])]


def _spread(values: Tensor) -> Tensor:
    """The place of each entry, in memory of one a row."""
    places = places_of(values)
    assert places is not None
    return places[..., None].expand(values.shape)


def _rows(spread: Tensor) -> Tensor | None:
    """Back from places of entries to places of rows."""
    if spread.ndim == 0 or spread.shape[-1] == 0:
        return None
    if spread.stride(-1) == 0 or bool((spread == spread[..., :1]).all()):
        return spread[..., 0]
    return None


def _indexes_rows(index: Any, places: Tensor, output: Tensor) -> bool:
    """Whether an index leaves features alone."""
    parts = index if isinstance(index, tuple) else (index,)
    if any(part is Ellipsis for part in parts):
        return False
    try:
        return places[index].shape == output.shape[:-1]
    except (IndexError, RuntimeError, TypeError):
        return False
