"""Which layers of a model are attributed, and what share of its parameters that is."""

import fnmatch
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NoReturn

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from estimators.model.selection import EVERY_LAYER, LayerSelection
from estimators.model.trial import find_obstacles
from estimators.model.vocabulary import Uses, Vocabulary, find_vocabulary

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
    """

    name: str
    module: nn.Module
    in_features: int
    out_features: int
    first_input: int = 0
    first_output: int = 0
    checkpoint: nn.Module | None = None

    @property
    def module_name(self) -> str:
        """The module's dotted name, of a block too."""
        return self.name.partition("[")[0]

    @property
    def has_bias(self) -> bool:
        """Whether the last input coordinate is the constant 1 of the bias."""
        end = self.first_input + self.in_features
        return _has_bias(self.module) and end > _widths(self.module)[0]

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


@dataclass(frozen=True, kw_only=True)
class VocabularyLayer(LinearLayer):
    """A weight with a row for each entry of the vocabulary, [in = vocabulary, out = feature].

    As embeddings it is an affine map of one-hot vectors. As a head it maps features to logits; its
    gradient is ``sum_t (p_t - y_t) h_t^T`` in the same shape. Of a tied weight it is the sum of
    both: see ``estimators.model.terms``. A bias of the head is no part of it.

    Attributes:
        uses: the modules whose weight it is; ``module`` is the first of them in the model.
    """

    uses: Uses

    @property
    def has_bias(self) -> bool:
        """Never."""
        return False

    @property
    def curvature_entries(self) -> int:
        """The vocabulary's side has a diagonal only; each use has its own."""
        return len(self.uses) * (self.in_features + self.out_features**2)

    def part_of(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """What tensors by plain names of parameters have here, a tied one under its first name."""
        own: Tensor = self.module.weight  # type: ignore[assignment]
        weight = parameters.get(f"{plain_name(self.name)}.weight")
        found = torch.zeros(self.in_features, self.out_features, device=own.device)
        return found if weight is None else weight.to(found)

    def add_to_weights(self, step: Tensor) -> None:
        """Add ``step`` (``[in, out]``, the shape of the layer's gradient) to the weight."""
        weight: Tensor = self.module.weight.data  # type: ignore[assignment]
        weight += step.to(weight.dtype)


@dataclass(frozen=True, kw_only=True)
class SkippedModule:
    """A module whose parameters are not attributed.

    Attributes:
        name: dotted name.
        kind: class name.
        parameters: parameters it holds itself (not those of its children, nor tied ones that an
            earlier module already holds).
        share: those parameters as a share of all the model's parameters, in [0, 1].
        reason: one clause for people.
    """

    name: str
    kind: str
    parameters: int
    share: float
    reason: str


@dataclass(frozen=True, kw_only=True)
class Coverage:
    """The attributed layers of a model and everything that is left out.

    Attributes:
        layers: attributed layers, in the order of ``model.named_modules()``.
        skipped: every other module that holds parameters of its own.
        attributed_share: attributed parameters over all parameters, in [0, 1].
    """

    layers: tuple[LinearLayer, ...]
    skipped: tuple[SkippedModule, ...]
    attributed_share: float


def at_checkpoint(
    layers: Sequence[LinearLayer], label: str, checkpoint: nn.Module
) -> tuple[LinearLayer, ...]:
    """Layers of one of several checkpoints, to be attributed together with those of others.

    Scores are then sums over checkpoints (Pruthi et al. 2020, eq. 1): a sketch of all their
    gradients is one sketch, and a direction has a part for each layer of each checkpoint.

    Args:
        layers: of the checkpoint.
        label: that sets their names apart from those of the other checkpoints.
        checkpoint: frozen, in evaluation mode.
    """
    return tuple(
        replace(layer, name=f"{label}:{layer.name}", checkpoint=checkpoint) for layer in layers
    )


def find_layers(model: nn.Module, selection: LayerSelection = EVERY_LAYER) -> Coverage:
    """List the layers to attribute: every linear layer but, unless wanted, the output head.

    Linear layers are ``nn.Linear``, HF ``Conv1D`` and quantised layers of any library, which are
    known by their ``in_features`` and ``out_features`` and count with in x out parameters, however
    they are packed. A trial pass on eight tokens finds those that cannot be attributed: see
    ``estimators.model.trial``.

    The output head (``model.get_output_embeddings()``) and the token embeddings are attributed if
    ``selection.embeddings``, as one layer if they are tied. Otherwise they are named in ``skipped``
    with their share, like norms and every other module that holds parameters. So are other
    layers that share their weights: the gradient of such a weight is the sum of all its uses.

    Args:
        model: a causal language model, or any module tree in tests.
        selection: which layers are wanted.

    Raises:
        ValueError: no layer is left to attribute, the model does not run, or gradients cannot pass
            through one of its layers.
    """
    get_head = getattr(model, "get_output_embeddings", None)
    head = get_head() if callable(get_head) else None
    linear = {name: m for name, m in model.named_modules() if _is_linear(m)}
    obstacles = find_obstacles(model, linear)
    vocabulary = find_vocabulary(model, obstacles) if selection.embeddings else Vocabulary()
    sizes = _own_sizes(model)
    total = sum(sizes.values())
    layers: list[LinearLayer] = []
    skipped: list[SkippedModule] = []
    holders = Counter(id(p) for m in model.modules() for p in m.parameters(recurse=False))
    for name, size in sizes.items():
        module = model.get_submodule(name)
        if (uses := vocabulary.uses.get(name)) is not None:
            if size >= (held := uses.weight.numel()):  # else it came with what it is tied to
                layers.append(_vocabulary_layer(name, module, uses))
                size -= held
            if size:
                why = "bias of the output head"
                skipped.append(_skip(f"{name}.bias", module, size, total, why))
            continue
        tied = any(holders[id(p)] > 1 for p in module.parameters(recurse=False))
        reason = (
            vocabulary.obstacles.get(name)
            or _reason_to_skip(name, module, head, selection, tied)
            or obstacles.get(name)
        )
        if reason is None:
            layers.extend(_blocks(name, module, selection.widest))
            continue
        skipped.append(_skip(name, module, size, total, reason))
    if not layers:
        _refuse_empty(selection, skipped)
    attributed = sum(layer.parameters for layer in layers)
    return Coverage(
        layers=tuple(layers), skipped=tuple(skipped), attributed_share=attributed / total
    )


def _skip(name: str, module: nn.Module, size: int, total: int, reason: str) -> SkippedModule:
    kind = type(module).__name__
    return SkippedModule(name=name, kind=kind, parameters=size, share=size / total, reason=reason)


def _vocabulary_layer(name: str, module: nn.Module, uses: Uses) -> VocabularyLayer:
    rows, features = uses.weight.shape
    return VocabularyLayer(
        name=name, module=module, in_features=rows, out_features=features, uses=uses
    )


def _own_sizes(model: nn.Module) -> dict[str, int]:
    """Parameters that each module holds itself, by name; tied ones count where they come first.

    Linear modules are listed even if they hold none.
    """
    sizes: dict[str, int] = {}
    counted: set[int] = set()
    for name, module in model.named_modules():
        held = list(module.parameters(recurse=False))
        own = [p for p in held if id(p) not in counted]
        counted.update(id(p) for p in own)
        if _is_linear(module) and len(own) == len(held):
            width, out = _widths(module)
            sizes[name] = width * out + (out if _has_bias(module) else 0)
        elif own or _is_linear(module):
            sizes[name] = sum(p.numel() for p in own)
    return sizes


def _refuse_empty(selection: LayerSelection, skipped: list[SkippedModule]) -> NoReturn:
    names = [m.name for m in skipped if m.reason.startswith("no layer pattern")]
    if names:
        raise ValueError(
            f"No layer to attribute: none of the model's linear layers matches "
            f"{list(selection.patterns)}; name at least one, e.g. {names[:3]}."
        )
    reasons = "; ".join(f"{m.name} ({m.kind}): {m.reason}" for m in skipped[:5])
    raise ValueError(f"No layer of this model can be attributed: {reasons}.")


def _is_linear(module: nn.Module) -> bool:
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


def _reason_to_skip(
    name: str, module: nn.Module, head: nn.Module | None, selection: LayerSelection, tied: bool
) -> str | None:
    if not _is_linear(module):
        return "not a linear layer"
    if module is head:
        return "output head"
    if tied:
        return "its weights are shared with another module"
    if not any(fnmatch.fnmatchcase(name, pattern) for pattern in selection.patterns):
        return f"no layer pattern matches it ({', '.join(selection.patterns)})"
    return None


def _blocks(name: str, module: nn.Module, widest: int | None) -> list[LinearLayer]:
    """The layer, or its blocks in row-major order, one for each pair of inputs and outputs."""
    width, out = _widths(module)
    bias = int(_has_bias(module))
    rows, columns = _cuts(width, widest), _cuts(out, widest)
    return [
        LinearLayer(
            name=name + _block_label(rows, i, columns, j),
            module=module,
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


def _widths(module: nn.Module) -> tuple[int, int]:
    if isinstance(module, Conv1D):
        return int(module.nx), int(module.nf)
    return int(module.in_features), int(module.out_features)  # type: ignore[arg-type]


def _has_bias(module: nn.Module) -> bool:
    return isinstance(getattr(module, "bias", None), Tensor)
