"""Weights with a row for each entry of the vocabulary: token embeddings, output head, or both."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor, nn

from estimators.layers.linear import LinearLayer, plain_name
from estimators.model.output_head import plain_head
from estimators.model.trial import trial_tokens


@dataclass(frozen=True, kw_only=True)
class Uses:
    """The modules that use one such weight, [vocabulary, feature]; at least one is not None.

    Attributes:
        embedding: looks up the rows of the tokens that are read.
        head: ``nn.Linear`` from features to logits.
        scale: what the rows that are looked up are multiplied by.
    """

    embedding: nn.Module | None
    head: nn.Module | None
    scale: float = 1.0

    def __len__(self) -> int:
        return (self.embedding is not None) + (self.head is not None)

    @property
    def weight(self) -> Float[Tensor, "vocabulary feature"]:
        """The weight that they share."""
        module = self.head if self.embedding is None else self.embedding
        assert module is not None
        weight: Tensor = module.weight  # type: ignore[assignment]
        return weight


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
class Vocabulary:
    """What of a model's embeddings and head can be attributed.

    Attributes:
        uses: by the dotted name of each module; a tied pair's two names have the same value.
        obstacles: one clause for each module that cannot be attributed, by name.
    """

    uses: Mapping[str, Uses] = field(default_factory=dict)
    obstacles: Mapping[str, str] = field(default_factory=dict)


def find_vocabulary(model: nn.Module, obstacles: Mapping[str, str]) -> Vocabulary:
    """Find the token embeddings and the output head, and try whether their gradients are known.

    The gradient of an embedding is that of its outputs, added up by token; of a head it is
    ``sum_t h_t (p_t - y_t)^T``. So the embeddings must give rows of their weight, all of them times
    one number if they are scaled, the head's outputs must be the logits as they are, and of a tied
    weight both uses must be known.

    Args:
        model: with ``get_input_embeddings`` and ``get_output_embeddings``; others have nothing.
        obstacles: what keeps linear modules from being attributed, of ``run_trial``.
    """
    names = {module: name for name, module in model.named_modules()}
    found: dict[str, nn.Module] = {}
    reasons: dict[str, str | None] = {}
    for what, check in (("input", _embedding_obstacle), ("output", _head_obstacle)):
        get = getattr(model, f"get_{what}_embeddings", None)
        module = get() if callable(get) else None
        if isinstance(module, nn.Module) and module in names:
            name = names[module]
            found[what] = module
            reasons[name] = obstacles.get(name) or check(model, module)
    scale = 1.0
    if "input" in found and reasons[names[found["input"]]] is None:
        scale = _looked_up(model, found["input"])[2]
    weights = {id(module.weight) for module in found.values()}
    if len(found) == 2 and len(weights) == 1:  # tied
        reason = next((f"tied to {n}: {r}" for n, r in reasons.items() if r is not None), None)
        pair = Uses(embedding=found["input"], head=found["output"], scale=scale)
        uses = dict.fromkeys(reasons, pair)
        reasons = {name: reasons[name] or reason for name in reasons}
    else:
        uses = {
            names[module]: Uses(
                embedding=module if what == "input" else None,
                head=module if what == "output" else None,
                scale=scale if what == "input" else 1.0,
            )
            for what, module in found.items()
        }
    for name in uses:
        reasons[name] = reasons[name] or _sharing(model, uses[name])
    return Vocabulary(
        uses={name: uses[name] for name, reason in reasons.items() if reason is None},
        obstacles={name: reason for name, reason in reasons.items() if reason is not None},
    )


def _sharing(model: nn.Module, uses: Uses) -> str | None:
    held = (p for m in model.modules() for p in m.parameters(recurse=False))
    if sum(p is uses.weight for p in held) != len(uses):
        return "its weights are shared with another module"
    return None


def _has_rows(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.ndim == 2 and weight.is_floating_point()


@torch.no_grad()
def _embedding_obstacle(model: nn.Module, embedding: nn.Module) -> str | None:
    if not _has_rows(embedding):
        return "its weights are not one row a token"
    if getattr(embedding, "max_norm", None) or getattr(embedding, "scale_grad_by_freq", False):
        return "its rows or gradients are rescaled"
    count, read, scale = _looked_up(model, embedding)
    if count != 1 or read is None:
        return "it does not read the tokens once"
    if scale == 0:
        return "its outputs are not rows of its weight"
    return None


@torch.no_grad()
def _looked_up(model: nn.Module, embedding: nn.Module) -> tuple[int, Tensor | None, float]:
    """How often a trial's tokens are looked up, what is read if it is they, and the rows' scale.

    The scale is 0 if what is read is no multiple of the rows.
    """
    seen: list[tuple[Tensor, Tensor]] = []
    handle = embedding.register_forward_hook(
        lambda _, inputs, output: seen.append((inputs[0], output.clone())) if inputs else None
    )
    try:
        tokens = trial_tokens(embedding)
        model(**tokens, use_cache=False)
    finally:
        handle.remove()
    ids = tokens["input_ids"]
    if len(seen) != 1 or not torch.equal(seen[0][0], ids):
        return len(seen), None, 0.0
    read, rows = seen[0][1], embedding.weight[ids]  # type: ignore[index]
    if torch.equal(read, rows):
        return 1, read, 1.0
    largest = int(rows.abs().argmax())
    scale = float(read.flatten()[largest].double() / rows.flatten()[largest].double())
    close = 4 * torch.finfo(read.dtype).eps
    near = torch.allclose(read.double(), rows.double() * scale, rtol=close, atol=0)
    return 1, read, scale if near else 0.0


def _head_obstacle(model: nn.Module, head: nn.Module) -> str | None:
    if not isinstance(head, nn.Linear) or not _has_rows(head):
        return "output head that is no plain linear layer"
    if plain_head(model) is not head:
        return "output head whose outputs are not the logits as they are"
    return None
