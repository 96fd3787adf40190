"""Products with a model's weights, recognised by the memory that their operands lie in.

A parameter may hold one matrix or many of the same shape, one behind another: those of the experts
of a mixture. A view of one of them, transposed or not, lies in the parameter's own memory, and its
address says which it is. Copies in another precision are remembered.
"""

from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

_OPERAND = "_etymon_operand"
_PRODUCT = "_etymon_product"


@dataclass(frozen=True)
class Parameter:
    """A parameter of a module.

    Attributes:
        holder: the module's dotted name.
        name: within the module.
    """

    holder: str
    name: str


@dataclass(frozen=True, kw_only=True)
class Operand:
    """A tensor that is one of a parameter's matrices, or all of them.

    Attributes:
        parameter: whose.
        count: how many matrices of this shape the parameter holds.
        number: which of them; None for all.
        shape: of one matrix as it is stored.
        turned: whether the tensor is the transpose of what is stored.
    """

    parameter: Parameter
    count: int
    number: int | None
    shape: tuple[int, ...]
    turned: bool


@dataclass(kw_only=True)
class Product:
    """Rows times one of a parameter's matrices, or a batch of rows for each of them.

    Attributes:
        operand: the matrix.
        inputs_first: whether the matrix is stored [in, out].
        inputs: ``a``, [..., in]; [matrix, row, in] if the operand is all of a parameter.
        bias: the parameter that was added, if one was.
    """

    operand: Operand
    inputs_first: bool
    inputs: Tensor
    bias: Parameter | None = None


class Operands:
    """Finds tensors again that lie in the memory of parameters.

    Args:
        parameters: dense and contiguous; others are never found.
    """

    def __init__(self, parameters: Mapping[Parameter, Tensor]) -> None:
        held = {k: p.detach() for k, p in parameters.items() if p.is_contiguous() and p.numel()}
        ordered = sorted(held.items(), key=lambda item: item[1].data_ptr())
        self._held = ordered
        self._names = frozenset(held)
        self._starts = [tensor.data_ptr() for _, tensor in ordered]

    def find(self, values: Any) -> Operand | None:
        """Which of a parameter's matrices (or vectors) a tensor is; None if none."""
        if not isinstance(values, Tensor):
            return None
        remembered: Operand | None = getattr(values, _OPERAND, None)
        if remembered is not None and remembered.parameter not in self._names:
            remembered = None  # of a region around this one
        if remembered is not None or not 1 <= values.ndim <= 3 or values.numel() == 0:
            return remembered
        place = bisect_right(self._starts, values.data_ptr()) - 1
        if place < 0:
            return None
        parameter, whole = self._held[place]
        size = whole.element_size()
        offset, rest = divmod(values.data_ptr() - self._starts[place], size)
        if rest or offset >= whole.numel() or values.dtype != whole.dtype:
            return None
        return _operand(parameter, whole, values, offset)

    def remember(self, func: Callable[..., Any], args: Sequence[Any], output: Any) -> None:
        """Let a copy in another precision, or a transpose of one, be found, too."""
        if not args or not isinstance(output, Tensor):
            return
        if func in _COPYING and (found := self.find(args[0])) is not None:
            if output.shape == args[0].shape:
                setattr(output, _OPERAND, found)
        elif func in _TURNING and (known := getattr(args[0], _OPERAND, None)) is not None:
            setattr(output, _OPERAND, replace(known, turned=not known.turned))


def _operand(parameter: Parameter, whole: Tensor, values: Tensor, offset: int) -> Operand | None:
    sides = values.shape[-2:] if values.ndim > 1 else values.shape
    strides = values.stride()[-2:] if values.ndim > 1 else values.stride()
    one = sides.numel()
    straight = strides == (sides[-1], 1) if values.ndim > 1 else strides == (1,)
    turned = values.ndim > 1 and not straight and strides == (1, sides[0])
    if not (straight or turned) or offset % one or whole.numel() % one:
        return None
    every = values.ndim == 3 and values.numel() == whole.numel()
    if values.ndim == 3 and not every:
        return None
    if every and len(values) > 1 and values.stride(0) != one:
        return None
    return Operand(
        parameter=parameter,
        count=whole.numel() // one,
        number=None if every else offset // one,
        shape=tuple(reversed(sides)) if turned else tuple(sides),
        turned=turned,
    )


def _functions(*names: str) -> frozenset[Any]:
    return frozenset(
        getattr(holder, name)
        for holder in (torch, Tensor)
        for name in names
        if hasattr(holder, name)
    )


_COPYING = _functions("to", "type", "type_as", "float", "double", "half", "bfloat16", "contiguous")
_TURNING = _functions("t", "transpose", "swapaxes", "adjoint") | {
    Tensor.T.__get__,  # type: ignore[attr-defined]
    Tensor.mT.__get__,  # type: ignore[attr-defined]
}
_MULTIPLYING = _functions("matmul", "__matmul__", "mm", "bmm")
_ADDING_TO = _functions("addmm", "baddbmm")
_ADDING = _functions("add", "__add__", "__radd__", "add_", "__iadd__")


def find_product(
    operands: Operands,
    func: Callable[..., Any],
    args: Sequence[Any],
    named: Mapping[str, Any],
    output: Any,
) -> Product | None:
    """The product with a matrix of a parameter that ``func(*args, **named) -> output`` was.

    A bias that is added to a product at once, by a later call, becomes part of that product.
    """
    if func is nn.functional.linear:
        values, matrix, bias, turned = *_taken(args, named, "input", "weight", "bias"), True
    elif func in _MULTIPLYING:
        values, matrix, bias, turned = *_taken(args, named, "input", "other"), None, False
    elif func in _ADDING_TO and named.keys() <= {"input"}:
        bias, values, matrix = _taken(args, named, "input", "mat1", "mat2")
        turned = False
    else:
        if func in _ADDING and len(args) > 1:
            _add_bias(operands, args)
        return None
    operand = operands.find(matrix)
    if operand is None or len(operand.shape) != 2 or not isinstance(output, Tensor):
        return None
    added = operands.find(bias)
    product = Product(
        operand=operand,
        inputs_first=turned == operand.turned,
        inputs=values,
        bias=None if added is None else added.parameter,
    )
    setattr(output, _PRODUCT, product)
    return product


def _taken(args: Sequence[Any], named: Mapping[str, Any], *names: str) -> list[Any]:
    values = dict(zip(names, args, strict=False)) | dict(named)
    return [values.get(name) for name in names]


def _add_bias(operands: Operands, args: Sequence[Any]) -> None:
    for values, other in (args[:2], args[1::-1]):
        product: Product | None = getattr(values, _PRODUCT, None)
        added = None if product is None else operands.find(other)
        if product is None or added is None or product.bias is not None:
            continue
        same = (added.count, added.number) == (product.operand.count, product.operand.number)
        if same and added.parameter.holder == product.operand.parameter.holder:
            product.bias = added.parameter
