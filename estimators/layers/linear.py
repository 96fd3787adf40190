"""A linear layer: which weights of a model it is, and what of them a block of it is."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

ADAPTER = "base_model.model."
"""What PEFT puts before the name of everything in the model that it wraps."""


def plain_name(name: str) -> str:
    """A parameter's name without PEFT's wrapping: as in the model with the adapter in place."""
    return name.removeprefix(ADAPTER)


@dataclass(frozen=True, kw_only=True)
class LinearLayer:
    """An affine map inside a model: ``output = [a, 1] @ W`` with ``W`` of shape ``[in, out]``.

    Or a block of one: the rows and columns of W that belong to contiguous inputs and outputs. The
    bias belongs to the blocks of the last inputs.

    Attributes:
        name: the module's dotted name in the model; of a block, with its inputs and outputs:
            ``h.0.mlp.c_proj[0:1024,:]``.
        module: ``nn.Linear`` (weight stored ``[out, in]``), HF ``Conv1D`` (``[in, out]``) or a
            quantised layer (stored in a way of its own).
        in_features: inputs, the homogeneous coordinate of the bias included.
        out_features: outputs.
        first_input: the first of the module's inputs that the block reads.
        first_output: the first of the module's outputs that the block adds to.
        checkpoint: the model that the module is part of, where several are attributed together;
            None where there is only one.
        region: the module in whose run the rows that the layer sees are followed from tokens to it;
            None where they are [batch, token] as they come.
        family: what it has in common with the same matrix of other experts, each of which sees the
            tokens that a router sends to it; None where every token passes.
    """

    name: str
    module: nn.Module
    in_features: int
    out_features: int
    first_input: int = 0
    first_output: int = 0
    checkpoint: nn.Module | None = None
    region: nn.Module | None = None
    family: str | None = None

    @property
    def module_name(self) -> str:
        """The module's dotted name, of a block too."""
        return self.name.partition("[")[0]

    @property
    def is_block(self) -> bool:
        """Whether it is a block of a wider matrix."""
        return self.name != self.module_name

    @property
    def weight(self) -> Tensor | None:
        """The tensor that its weights are stored in; None where it has another name."""
        found: Tensor | None = getattr(self.module, "weight", None)
        return found

    @property
    def has_bias(self) -> bool:
        """Whether the last input coordinate is the constant 1 of the bias."""
        end = self.first_input + self.in_features
        return has_bias(self.module) and end > widths(self.module)[0]

    @property
    def inputs(self) -> slice:
        """Which of the module's inputs the block reads, the constant 1 left out."""
        return slice(self.first_input, self.first_input + self.in_features - int(self.has_bias))

    @property
    def outputs(self) -> slice:
        """Which of the module's outputs the block adds to."""
        return slice(self.first_output, self.first_output + self.out_features)

    @property
    def parameters(self) -> int:
        """Number of attributed parameters (weights and bias)."""
        return self.in_features * self.out_features

    @property
    def parameter_names(self) -> frozenset[str]:
        """Plain names in the model of the weight and, if the block reads its 1, the bias."""
        module = plain_name(self.name.partition("[")[0])
        return frozenset([f"{module}.weight", *([f"{module}.bias"] * self.has_bias)])

    def part_of(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """What tensors by plain names of parameters have here: [in, out], where it computes.

        Zeros for a parameter that is not among them.
        """
        module = plain_name(self.name.partition("[")[0])
        own: Tensor = self.module.weight  # type: ignore[assignment]
        found = torch.zeros(self.in_features, self.out_features, device=own.device)
        rows = self.in_features - int(self.has_bias)
        weight, bias = parameters.get(f"{module}.weight"), parameters.get(f"{module}.bias")
        if weight is not None:
            flat = isinstance(self.module, Conv1D)
            block = (
                weight[self.inputs, self.outputs] if flat else weight[self.outputs, self.inputs].T
            )
            found[:rows] = block.to(found)
        if self.has_bias and bias is not None:
            found[-1] = bias[self.outputs].to(found)
        return found

    @property
    def curvature_entries(self) -> int:
        """Numbers that the covariances of both sides consist of."""
        return self.in_features**2 + self.out_features**2

    def add_to_weights(self, step: Tensor) -> None:
        """Add ``step`` (``[in, out]``, the shape of the layer's gradient) to weight and bias."""
        weight: Tensor = self.module.weight.data  # type: ignore[assignment]
        rows = (step[:-1] if self.has_bias else step).to(weight.dtype)
        if isinstance(self.module, Conv1D):
            weight[self.inputs, self.outputs] += rows
        else:
            weight[self.outputs, self.inputs] += rows.T
        if self.has_bias:
            self.module.bias.data[self.outputs] += step[-1].to(weight.dtype)  # type: ignore[operator,index]


def is_linear(module: nn.Module) -> bool:
    """Whether the module is one affine map, by class or by the attributes of quantised layers."""
    if isinstance(module, (nn.Linear, Conv1D)):
        return True
    width, out = (getattr(module, side, None) for side in ("in_features", "out_features"))
    if not isinstance(width, int) or not isinstance(out, int):
        return False
    if any(True for child in module.children() for _ in child.parameters()):
        return False  # a wrapper, e.g. PEFT's around a layer and its adapters
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        return True
    return tuple(weight.shape) in ((width, out), (out, width))


def widths(module: nn.Module) -> tuple[int, int]:
    """Inputs and outputs of a linear module."""
    if isinstance(module, Conv1D):
        return int(module.nx), int(module.nf)
    return int(module.in_features), int(module.out_features)  # type: ignore[arg-type]


def has_bias(module: nn.Module) -> bool:
    """Whether a linear module adds a bias."""
    return isinstance(getattr(module, "bias", None), Tensor)


Layer = TypeVar("Layer", bound=LinearLayer)


def blocks(layer: Layer, widest: int | None) -> list[Layer]:
    """The layer, or its blocks in row-major order, one for each pair of inputs and outputs.

    Args:
        layer: whole.
        widest: most features of a side of a block, the bias aside; None never splits.
    """
    bias = int(layer.has_bias)
    rows = _cuts(layer.in_features - bias, widest)
    columns = _cuts(layer.out_features, widest)
    return [
        replace(
            layer,
            name=layer.name + _block_label(rows, i, columns, j),
            in_features=rows[i + 1] - rows[i] + (bias if i == len(rows) - 2 else 0),
            out_features=columns[j + 1] - columns[j],
            first_input=rows[i],
            first_output=columns[j],
        )
        for i in range(len(rows) - 1)
        for j in range(len(columns) - 1)
    ]


def _cuts(width: int, widest: int | None) -> list[int]:
    """Where the fewest blocks of equal size (to within one feature) begin and end."""
    count = 1 if widest is None else math.ceil(width / widest)
    return [width * i // count for i in range(count + 1)]


def _block_label(rows: list[int], i: int, columns: list[int], j: int) -> str:
    if len(rows) == len(columns) == 2:
        return ""
    inputs = f"{rows[i]}:{rows[i + 1]}" if len(rows) > 2 else ":"
    outputs = f"{columns[j]}:{columns[j + 1]}" if len(columns) > 2 else ":"
    return f"[{inputs},{outputs}]"
