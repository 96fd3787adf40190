"""Which layers of a model are attributed, and what share of its parameters that is."""

import fnmatch
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D


@dataclass(frozen=True, kw_only=True)
class LinearLayer:
    """An affine map inside a model: ``output = [a, 1] @ W`` with ``W`` of shape ``[in, out]``.

    Attributes:
        name: the module's dotted name in the model.
        module: ``nn.Linear`` (weight stored ``[out, in]``) or HF ``Conv1D`` (``[in, out]``).
        in_features: inputs, the homogeneous coordinate of the bias included.
        out_features: outputs.
    """

    name: str
    module: nn.Module
    in_features: int
    out_features: int

    @property
    def has_bias(self) -> bool:
        """Whether the last input coordinate is the constant 1 of the bias."""
        return getattr(self.module, "bias", None) is not None

    @property
    def parameters(self) -> int:
        """Number of attributed parameters (weights and bias)."""
        return self.in_features * self.out_features

    def add_to_weights(self, step: Tensor) -> None:
        """Add ``step`` (``[in, out]``, the shape of the layer's gradient) to weight and bias."""
        weight: Tensor = self.module.weight.data  # type: ignore[assignment]
        rows = step[:-1] if self.has_bias else step
        weight += (rows if isinstance(self.module, Conv1D) else rows.T).to(weight.dtype)
        if self.has_bias:
            self.module.bias.data += step[-1].to(weight.dtype)  # type: ignore[operator]


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


def find_layers(model: nn.Module, patterns: Sequence[str] = ("*",)) -> Coverage:
    """List the layers to attribute: every ``nn.Linear`` and ``Conv1D`` but the output head.

    The output head (``model.get_output_embeddings()``) and the token embeddings are left out: their
    gradients concern single tokens, and they are tied in many models. They are named in
    ``skipped`` with their share, like norms and every other module that holds parameters. So are
    layers that share their weights: the gradient of such a weight is the sum of all its uses.

    Args:
        model: a causal language model, or any module tree in tests.
        patterns: shell patterns over dotted module names; a layer is attributed if any matches.

    Raises:
        ValueError: no layer is left to attribute.
    """
    total = sum(parameter.numel() for parameter in model.parameters())
    get_head = getattr(model, "get_output_embeddings", None)
    head = get_head() if callable(get_head) else None
    layers: list[LinearLayer] = []
    skipped: list[SkippedModule] = []
    counted: set[int] = set()
    holders = Counter(id(p) for m in model.modules() for p in m.parameters(recurse=False))
    for name, module in model.named_modules():
        own = [p for p in module.parameters(recurse=False) if id(p) not in counted]
        counted.update(id(p) for p in own)
        if not own and not isinstance(module, (nn.Linear, Conv1D)):
            continue
        tied = any(holders[id(p)] > 1 for p in module.parameters(recurse=False))
        reason = _reason_to_skip(name, module, head, patterns, tied)
        if reason is None:
            layers.append(_linear_layer(name, module))
            continue
        size = sum(p.numel() for p in own)
        skipped.append(
            SkippedModule(
                name=name,
                kind=type(module).__name__,
                parameters=size,
                share=size / total,
                reason=reason,
            )
        )
    if not layers:
        names = [m.name for m in skipped if m.reason.startswith("no layer pattern")]
        raise ValueError(
            f"No layer to attribute: none of the model's linear layers matches {list(patterns)}; "
            f"name at least one, e.g. {names[:3]}."
        )
    attributed = sum(layer.parameters for layer in layers)
    return Coverage(
        layers=tuple(layers), skipped=tuple(skipped), attributed_share=attributed / total
    )


def _reason_to_skip(
    name: str, module: nn.Module, head: nn.Module | None, patterns: Sequence[str], tied: bool
) -> str | None:
    if not isinstance(module, (nn.Linear, Conv1D)):
        return "not a linear layer"
    if module is head:
        return "output head"
    if tied:
        return "its weights are shared with another module"
    if not any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns):
        return f"no layer pattern matches it ({', '.join(patterns)})"
    return None


def _linear_layer(name: str, module: nn.Module) -> LinearLayer:
    if isinstance(module, nn.Linear):
        width, out = module.in_features, module.out_features
    else:
        width, out = int(module.nx), int(module.nf)  # type: ignore[arg-type]
    bias = getattr(module, "bias", None) is not None
    return LinearLayer(name=name, module=module, in_features=width + int(bias), out_features=out)
