"""A matrix that a module multiplies by without being a linear layer: an expert's, a router's."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from estimators.layers.judging import Matrices
from estimators.layers.linear import LinearLayer, plain_name


@dataclass(frozen=True, kw_only=True)
class Stored:
    """Where in a module a matrix lies.

    Attributes:
        parameter: its name in the module.
        bias: name of the parameter that is added, if there is one.
        count: matrices of the same shape that the parameter holds, one behind another.
        number: which of them.
        shape: of the matrix as it is stored.
        inputs_first: whether that is [in, out]; otherwise [out, in].
    """

    parameter: str
    bias: str | None
    count: int
    number: int
    shape: tuple[int, int]
    inputs_first: bool

    @property
    def widths(self) -> tuple[int, int]:
        """Inputs, without the bias, and outputs."""
        rows, columns = self.shape
        return (rows, columns) if self.inputs_first else (columns, rows)

    def matrix(self, whole: Tensor) -> Tensor:
        """The matrix as [in, out] in the parameter's own memory."""
        stored = whole.view(self.count, *self.shape)[self.number]
        return stored if self.inputs_first else stored.T

    def vector(self, whole: Tensor) -> Tensor:
        """The bias, [out], in its parameter's own memory."""
        return whole.view(self.count, -1)[self.number]


@dataclass(frozen=True, kw_only=True)
class MatrixLayer(LinearLayer):
    """A matrix among a module's parameters, [in, out], or a block of one.

    Its name is that of the parameter in the model (of the module, if it is called ``weight``), and
    in brackets which of the parameter's matrices it is, where there are several:
    ``model.layers.0.mlp.experts.gate_up_proj[3]``.

    Attributes:
        stored: where it lies in the module.
    """

    stored: Stored

    @property
    def module_name(self) -> str:
        """The module's dotted name."""
        whole = self.name.partition("[")[0]
        return whole if self.stored.parameter == "weight" else whole.rpartition(".")[0]

    @property
    def is_block(self) -> bool:
        """Whether it is a block of a wider matrix."""
        whole = slice(0, self.stored.widths[0]), slice(0, self.stored.widths[1])
        return (self.inputs, self.outputs) != whole

    @property
    def weight(self) -> Tensor:
        """The parameter that its matrix is part of."""
        return self.module.get_parameter(self.stored.parameter)

    @property
    def has_bias(self) -> bool:
        """Whether the last input coordinate is the constant 1 of the bias."""
        end = self.first_input + self.in_features
        return self.stored.bias is not None and end > self.stored.widths[0]

    @property
    def parameter_names(self) -> frozenset[str]:
        """Plain names in the model of the parameter and, if the block reads its 1, the bias'."""
        names = [self.stored.parameter, *([self.stored.bias] if self.has_bias else [])]
        return frozenset(f"{plain_name(self.module_name)}.{name}" for name in names)

    def part_of(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """What tensors by plain names of parameters have here: [in, out], where it computes."""
        module, stored = plain_name(self.module_name), self.stored
        weight = parameters.get(f"{module}.{stored.parameter}")
        dtype = torch.float64 if weight is not None and weight.dtype == torch.float64 else None
        shape = self.in_features, self.out_features
        found = torch.zeros(shape, device=self.weight.device, dtype=dtype)
        rows = self.in_features - int(self.has_bias)
        if weight is not None:
            found[:rows] = stored.matrix(weight.contiguous())[self.inputs, self.outputs].to(found)
        bias = parameters.get(f"{module}.{stored.bias}") if self.has_bias else None
        if bias is not None:
            found[-1] = stored.vector(bias.contiguous())[self.outputs].to(found)
        return found

    def add_to_weights(self, step: Tensor) -> None:
        """Add ``step`` (``[in, out]``, the shape of the layer's gradient) to weight and bias."""
        weight = self.weight.data
        rows = (step[:-1] if self.has_bias else step).to(weight.dtype)
        self.stored.matrix(weight)[self.inputs, self.outputs] += rows
        if self.has_bias and self.stored.bias is not None:
            bias = self.module.get_parameter(self.stored.bias).data
            self.stored.vector(bias)[self.outputs] += step[-1].to(bias.dtype)


def matrix_layers(
    name: str, module: nn.Module, parameter: str, found: Matrices, region: nn.Module
) -> list[MatrixLayer]:
    """The layers that a parameter is, whole: one for each of its matrices.

    Args:
        name: the module's dotted name.
        module: holds the parameter.
        parameter: its name in the module.
        found: of the trial.
        region: in whose run its rows are followed.
    """
    whole = name if parameter == "weight" else f"{name}.{parameter}"
    rows, columns = found.shape
    inputs, outputs = (rows, columns) if found.inputs_first else (columns, rows)
    return [
        MatrixLayer(
            name=f"{whole}[{number}]" if found.count > 1 else whole,
            module=module,
            in_features=inputs + (found.bias is not None),
            out_features=outputs,
            region=region,
            family=f"{whole}[*]" if found.routed else None,
            stored=Stored(
                parameter=parameter,
                bias=found.bias,
                count=found.count,
                number=number,
                shape=found.shape,
                inputs_first=found.inputs_first,
            ),
        )
        for number in range(found.count)
    ]
