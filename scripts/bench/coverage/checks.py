"""What Etymon says of a model's log-probabilities and scores, beside slow independent sums."""

import copy
import dataclasses
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from estimators.model.capture import visit_gradients
from estimators.model.layers import LinearLayer, find_layers
from estimators.model.selection import EVERY_LAYER, LayerSelection
from estimators.model.tokens import Sequence1D, collate
from estimators.rescoring import score_batch
from scripts.bench.coverage.architectures import full_sizes, in_float64, tiny_model, widened

EVERYTHING = LayerSelection(embeddings=True, norms=True)

SEQUENCES = (
    Sequence1D(tokens=(3, 5, 2, 7, 11, 4), row=0),
    Sequence1D(tokens=(9, 2, 6), row=1),
    Sequence1D(tokens=(2, 2, 8, 1, 3, 13, 21), row=2),
)

CLOSE = 1e-6
"""Largest relative error of a log-probability or of a score, in float64."""

CLOSE_IN_FLOAT32 = 1e-4
"""The same of models that cannot compute in float64."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """What was found of an architecture.

    Attributes:
        architecture: its model type.
        status: "works", "refused: ..." or "not built: ...".
        attributed_share: of the parameters, by default.
        attributed_share_all: with embeddings, output head and norms.
        log_p_error: largest relative error of a sequence's log-probability.
        score_error: error of the scores, relative to their norm.
        full_share: of a model of transformers' default sizes, by the names of its parameters.
        full_share_all: of such a model with embeddings, output head and norms.
    """

    architecture: str
    status: str
    attributed_share: float | None = None
    attributed_share_all: float | None = None
    log_p_error: float | None = None
    score_error: float | None = None
    full_share: float | None = None
    full_share_all: float | None = None


def check(kind: str) -> Row:
    """Build an architecture tiny and compare what is computed of it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            model = tiny_model(kind)
        except Exception as error:  # noqa: BLE001 - whatever transformers raises is what is told
            return Row(architecture=kind, status=f"not built: {_sentence(error)}")
        with in_float64():
            row = _attempt(kind, widened(model), CLOSE)
        if row.status.startswith("refused: The model cannot be differentiated"):
            return _attempt(kind, model, CLOSE_IN_FLOAT32)  # some compute as they are written only
        return row


def _attempt(kind: str, model: nn.Module, close: float) -> Row:
    try:
        return _checked(kind, model, close)
    except ValueError as error:
        return Row(architecture=kind, status=f"refused: {_sentence(error)}")


def _checked(kind: str, model: nn.Module, close: float) -> Row:
    plain = find_layers(model, EVERY_LAYER)
    coverage = find_layers(model, EVERYTHING)
    log_p, score = errors(model, coverage.layers)
    good = max(log_p, score) < close
    return Row(
        architecture=kind,
        status="works" if good else "wrong",
        attributed_share=plain.attributed_share,
        attributed_share_all=coverage.attributed_share,
        log_p_error=log_p,
        score_error=score,
        full_share=_share_of_full_size(kind, plain.layers),
        full_share_all=_share_of_full_size(kind, coverage.layers),
    )


def _share_of_full_size(kind: str, layers: Sequence[LinearLayer]) -> float | None:
    """What share of a model of default sizes the parameters of these names are; None if unknown."""
    sizes = full_sizes(kind)
    if not sizes:
        return None
    names = {_kind_of(name) for layer in layers for name in layer.parameter_names}
    held = sum(size for name, size in sizes.items() if _kind_of(name) in names)
    return held / sum(sizes.values())


def _kind_of(name: str) -> str:
    """The name of a parameter without the numbers of blocks and experts."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name)


def errors(
    model: nn.Module,
    layers: Sequence[LinearLayer],
    sequences: Sequence[Sequence1D] = SEQUENCES,
) -> tuple[float, float]:
    """Relative errors of log-probabilities and of scores for a random direction.

    In place of hooks the reference differentiates each sequence's loss, alone and unpadded, with
    respect to the weights.

    Args:
        model: frozen.
        layers: attributed layers.
        sequences: tried together, padded, and one by one.
    """
    generator = torch.Generator().manual_seed(1)
    dtype = next(model.parameters()).dtype
    directions = {
        layer.name: torch.randn(
            layer.in_features, layer.out_features, generator=generator, dtype=dtype
        )
        for layer in layers
    }
    batch = collate(sequences)
    parts = score_batch(model, layers, directions, batch)
    losses = visit_gradients(model, [], batch, lambda *_: None)
    expected, alone = _slowly(model, layers, directions, sequences)
    total = parts.total
    both = torch.stack([total, parts.by_position.sum(1)])
    return _relative(losses, alone), _relative(both, expected.expand_as(both))


def _slowly(
    model: nn.Module,
    layers: Sequence[LinearLayer],
    directions: Mapping[str, Tensor],
    sequences: Sequence[Sequence1D],
) -> tuple[Tensor, Tensor]:
    """Scores and losses of each sequence by itself, by autograd through the weights."""
    warm, steps = (_copied(model) for _ in range(2))
    warm.requires_grad_(True)
    for parameter in steps.parameters():
        parameter.data.zero_()
    for layer in layers:
        module = steps.get_submodule(layer.module_name)
        dataclasses.replace(layer, module=module).add_to_weights(directions[layer.name])
    wanted = list(warm.parameters())
    scores, losses = [], []
    for sequence in sequences:
        ids = torch.tensor([sequence.tokens])
        logits = warm(input_ids=ids, use_cache=False).logits[0, :-1]
        logs = torch.log_softmax(logits.double(), dim=-1)
        loss = -logs.gather(1, ids[0, 1:, None]).sum()
        found = torch.autograd.grad(loss, wanted, allow_unused=True)
        pairs = zip(found, steps.parameters(), strict=True)
        scores.append(sum((g * s).sum() for g, s in pairs if g is not None))
        losses.append(loss.detach())
    return torch.stack([torch.as_tensor(s) for s in scores]), torch.stack(losses)


def _copied(model: nn.Module) -> nn.Module:
    """A copy, without what the model keeps of its last pass."""
    for module in model.modules():
        for name, value in list(vars(module).items()):
            if isinstance(value, Tensor) and value.grad_fn is not None:
                vars(module)[name] = None
    return copy.deepcopy(model)


def _relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def _sentence(error: Exception) -> str:
    text = re.sub(r"\s+", " ", str(error)).strip()
    first = text if len(text) <= 240 else f"{text[:240]} ..."
    kind = type(error).__name__
    return first if isinstance(error, ValueError) and kind == "ValueError" else f"{kind}: {first}"
