"""Which layers of a model are attributed, and what share of its parameters that is."""

import fnmatch
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NoReturn

from torch import nn

from estimators.layers.judging import Findings, Matrices, family_of
from estimators.layers.linear import (
    ADAPTER,
    LinearLayer,
    blocks,
    has_bias,
    is_linear,
    plain_name,
    widths,
)
from estimators.layers.matrix import MatrixLayer, matrix_layers
from estimators.layers.scale import ScaleLayer
from estimators.model.selection import EVERY_LAYER, LayerSelection
from estimators.model.trial import Trial, find_scales, follow_rows, run_trial
from estimators.model.vocabulary import Uses, Vocabulary, VocabularyLayer, find_vocabulary

__all__ = [
    "ADAPTER",
    "Coverage",
    "LinearLayer",
    "MatrixLayer",
    "SkippedModule",
    "VocabularyLayer",
    "at_checkpoint",
    "find_layers",
    "plain_name",
]


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
        replace(
            layer,
            name=f"{label}:{layer.name}",
            checkpoint=checkpoint,
            family=None if layer.family is None else f"{label}:{layer.family}",
        )
        for layer in layers
    )


def find_layers(model: nn.Module, selection: LayerSelection = EVERY_LAYER) -> Coverage:
    """List the layers to attribute: every matrix but, unless wanted, the output head.

    Linear layers are ``nn.Linear``, HF ``Conv1D`` and quantised layers of any library, which are
    known by their ``in_features`` and ``out_features`` and count with in x out parameters, however
    they are packed. A trial pass on eight tokens finds those that cannot be attributed: see
    ``estimators.model.trial``. A second one looks for those that see flattened or routed tokens,
    and for matrices that other modules multiply by, such as the experts of mixtures and their
    routers: see ``estimators.layers.trying``. Each expert's matrix is a layer of its own.

    The output head (``model.get_output_embeddings()``) and the token embeddings are attributed if
    ``selection.embeddings``, as one layer if they are tied. Otherwise they are named in ``skipped``
    with their share, like every other module that holds parameters. So are layers that share their
    weights otherwise: the gradient of such a weight is the sum of all its uses. Vectors of norms
    are attributed if ``selection.norms``, see ``estimators.layers.scale``.

    Args:
        model: a causal language model, or any module tree in tests.
        selection: which layers are wanted.

    Raises:
        ValueError: no layer is left to attribute, the model does not run, or gradients cannot pass
            through one of its layers.
    """
    survey = _Survey(model, selection)
    sizes = _own_sizes(model)
    total = sum(sizes.values())
    for name, size in sizes.items():
        survey.look_at(name, size)
    skipped = [
        SkippedModule(
            name=left.name,
            kind=type(left.module).__name__,
            parameters=left.parameters,
            share=left.parameters / total,
            reason=left.reason,
        )
        for left in survey.left
    ]
    if not survey.layers:
        _refuse_empty(selection, skipped)
    attributed = sum(layer.parameters for layer in survey.layers)
    return Coverage(
        layers=tuple(survey.layers), skipped=tuple(skipped), attributed_share=attributed / total
    )


@dataclass(frozen=True)
class _Left:
    """What is not attributed of a module."""

    name: str
    module: nn.Module
    parameters: int
    reason: str


class _Survey:
    """The layers of a model and what is left out, module by module."""

    def __init__(self, model: nn.Module, selection: LayerSelection) -> None:
        self._model, self._selection = model, selection
        get_head = getattr(model, "get_output_embeddings", None)
        self._head = get_head() if callable(get_head) else None
        linear = {name: m for name, m in model.named_modules() if is_linear(m)}
        self._trial = run_trial(model, linear)
        self._vocabulary = Vocabulary()
        if selection.embeddings:
            self._vocabulary = find_vocabulary(model, self._trial.obstacles)
        self._findings = _follow(model, linear, self._trial)
        self._scales, why = _find_scales(model) if selection.norms else ({}, {})
        self._findings.reasons.update(why)
        held = (id(p) for m in model.modules() for p in m.parameters(recurse=False))
        self._holders = Counter(held)
        self.layers: list[LinearLayer] = []
        self.left: list[_Left] = []

    def look_at(self, name: str, size: int) -> None:
        """Take in a module that holds so many parameters which no earlier one holds."""
        module = self._model.get_submodule(name)
        if (uses := self._vocabulary.uses.get(name)) is not None:
            self._take_vocabulary(name, module, size, uses)
            return
        tied = any(self._holders[id(p)] > 1 for p in module.parameters(recurse=False))
        matrices = {} if tied or module is self._head else _matrices_of(name, self._findings)
        if matrices:
            self._take_matrices(name, module, matrices)
            return
        if name in self._scales and not tied:
            self._take_scales(name, module)
            return
        reason = self._reason(name, module, tied)
        if reason is None:
            widest = self._selection.widest
            self.layers += _linear_layers(self._model, name, module, self._findings, widest)
        else:
            self.left.append(_Left(name, module, size, reason))

    def _take_vocabulary(self, name: str, module: nn.Module, size: int, uses: Uses) -> None:
        if size >= (held := uses.weight.numel()):  # else it came with what it is tied to
            self.layers.append(_vocabulary_layer(name, module, uses))
            size -= held
        if size:
            self.left.append(_Left(f"{name}.bias", module, size, "bias of the output head"))

    def _take_matrices(
        self, name: str, module: nn.Module, matrices: Mapping[str, Matrices]
    ) -> None:
        own, left = _matrix_layers(self._model, name, matrices, self._selection)
        self.layers += own
        left |= _other_reasons(name, module, matrices, self._findings)
        self.left += [_Left(part, module, size, why) for part, (size, why) in left.items()]

    def _take_scales(self, name: str, module: nn.Module) -> None:
        for own, parameter in module.named_parameters(recurse=False):
            whole = f"{name}.{own}"
            reason = _unmatched(whole, self._selection)
            if own not in self._scales[name]:
                reason = self._findings.reasons.get(whole, "not a linear layer")
            if reason is not None:
                self.left.append(_Left(whole, module, parameter.numel(), reason))
                continue
            layer = ScaleLayer(
                name=whole,
                module=module,
                in_features=1,
                out_features=parameter.numel(),
                parameter=own,
            )
            self.layers += blocks(layer, self._selection.widest)

    def _reason(self, name: str, module: nn.Module, tied: bool) -> str | None:
        """Why a module that holds no matrices is not attributed; None if it is."""
        followed = name in self._findings.modules
        why = _why_not_followed(name, module, self._findings)
        return (
            self._vocabulary.obstacles.get(name)
            or (None if is_linear(module) else why or "not a linear layer")
            or _reason_to_skip(name, module, self._head, self._selection, tied)
            or (None if followed else why or self._trial.obstacles.get(name))
        )


def _follow(model: nn.Module, linear: Mapping[str, nn.Module], trial: Trial) -> Findings:
    """A second trial, of linear layers that see other rows than one a token, and of matrices."""
    get = (getattr(model, f"get_{what}_embeddings", None) for what in ("input", "output"))
    apart = [getter() for getter in get if callable(getter)]
    others = {
        name: module
        for name, module in model.named_modules()
        if (not is_linear(module) or name in trial.opaque or name in trial.idle)
        and not isinstance(module, nn.Embedding)
        and any(p.ndim > 1 and p.is_floating_point() for p in module.parameters(recurse=False))
    }
    unusual = {name: linear[name] for name in linear if name in trial.unusual}
    keep = [{n: m for n, m in some.items() if m not in apart} for some in (unusual, others)]
    return follow_rows(model, *keep)


def _why_not_followed(name: str, module: nn.Module, findings: Findings) -> str | None:
    names = [name, *(f"{name}.{own}" for own, _ in module.named_parameters(recurse=False))]
    return next((findings.reasons[n] for n in names if n in findings.reasons), None)


def _find_scales(model: nn.Module) -> tuple[dict[str, list[str]], dict[str, str]]:
    """Scales of the modules that hold vectors and are neither linear layers nor embeddings."""
    tried = {
        name: module
        for name, module in model.named_modules()
        if not is_linear(module)
        and not isinstance(module, nn.Embedding)
        and any(p.ndim == 1 for p in module.parameters(recurse=False))
        and not any(p.ndim > 1 for p in module.parameters(recurse=False))
    }
    return find_scales(model, tried)


def _matrices_of(name: str, findings: Findings) -> dict[str, Matrices]:
    """Of a module: what its parameters are, by their names in it."""
    return {p.name: found for p, found in findings.parameters.items() if p.holder == name}


def _matrix_layers(
    model: nn.Module, name: str, matrices: Mapping[str, Matrices], selection: LayerSelection
) -> tuple[list[MatrixLayer], dict[str, tuple[int, str]]]:
    """Layers of a module's matrices that are wanted; sizes and reasons of those that are not."""
    module = model.get_submodule(name)
    layers: list[MatrixLayer] = []
    skipped: dict[str, tuple[int, str]] = {}
    for parameter, found in matrices.items():
        whole = name if parameter == "weight" else f"{name}.{parameter}"
        region = model.get_submodule(found.region)
        own = matrix_layers(name, module, parameter, found, region)
        reason = _unmatched(whole, selection)
        if reason is None:
            layers.extend(block for layer in own for block in blocks(layer, selection.widest))
        else:
            skipped[whole] = sum(layer.parameters for layer in own), reason
    return layers, skipped


def _other_reasons(
    name: str, module: nn.Module, matrices: Mapping[str, Matrices], findings: Findings
) -> dict[str, tuple[int, str]]:
    """Sizes of a module's parameters that are no matrices nor added to one, and the reasons."""
    used = set(matrices) | {found.bias for found in matrices.values()}
    return {
        f"{name}.{own}": (
            parameter.numel(),
            findings.reasons.get(f"{name}.{own}", "not a linear layer"),
        )
        for own, parameter in module.named_parameters(recurse=False)
        if own not in used
    }


def _linear_layers(
    model: nn.Module,
    name: str,
    module: nn.Module,
    findings: Findings,
    widest: int | None,
) -> list[LinearLayer]:
    """A linear module's layer, or its blocks."""
    width, out = widths(module)
    region = findings.modules.get(name)
    layer = LinearLayer(
        name=name,
        module=module,
        in_features=width + has_bias(module),
        out_features=out,
        region=None if region is None else model.get_submodule(region),
        family=family_of(name, region or "") if name in findings.routed else None,
    )
    return blocks(layer, widest)


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
        if is_linear(module) and len(own) == len(held):
            width, out = widths(module)
            sizes[name] = width * out + (out if has_bias(module) else 0)
        elif own or is_linear(module):
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


def _reason_to_skip(
    name: str, module: nn.Module, head: nn.Module | None, selection: LayerSelection, tied: bool
) -> str | None:
    if module is head:
        return "output head"
    if tied:
        return "its weights are shared with another module"
    return _unmatched(name, selection)


def _unmatched(name: str, selection: LayerSelection) -> str | None:
    if any(fnmatch.fnmatchcase(name, pattern) for pattern in selection.patterns):
        return None
    return f"no layer pattern matches it ({', '.join(selection.patterns)})"
