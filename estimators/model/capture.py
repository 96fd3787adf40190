"""Layer inputs and output gradients, handed over one layer at a time during a backward pass."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from estimators.layers.eager import make_eager
from estimators.layers.following import Places, Visitor, followed, with_one
from estimators.layers.rows import NOWHERE
from estimators.layers.scale import ScaleLayer, scaled
from estimators.model.layers import LinearLayer, VocabularyLayer
from estimators.model.output_head import final_states, losses_and_gradient
from estimators.model.terms import HeadRun, VocabularyTerms
from estimators.model.tokens import TokenBatch
from estimators.model.trial import embeddings_require_grad

__all__ = ["Places", "TermsVisitor", "Visitor", "captured", "freeze", "visit_gradients"]

TermsVisitor = Callable[[VocabularyLayer, VocabularyTerms], None]
"""Receives a vocabulary layer and the terms of its gradients, all its uses together."""


@contextmanager
def captured(
    model: nn.Module,
    layers: Sequence[LinearLayer],
    visit: Visitor,
    append_one: bool = True,
    places: Places | None = None,
) -> Iterator[None]:
    """Call ``visit`` for each layer as soon as a backward pass reaches it.

    Blocks of one module are handed over one after another from one hook. Layers with a region are
    seen in another way, see ``estimators.layers.following``.

    No weight needs ``requires_grad``: the token embeddings' output is made to require it, so frozen
    and quantised models work, and no weight gradient is computed that nobody asked for.

    Raises:
        ValueError: a layer saw inputs that are not [batch, token, feature], or ran twice in one
            forward pass (its gradient would be the sum of both uses).
    """
    handles: list[RemovableHandle] = []
    seen: set[nn.Module] = set()

    def after_forward(blocks: list[LinearLayer], inputs: tuple[Any, ...], output: Tensor) -> None:
        if not output.requires_grad:
            return
        module, name = blocks[0].module, blocks[0].module_name
        if module in seen:
            raise ValueError(
                f"Layer {name} ran twice in one forward pass; shared layers are not "
                f"supported, leave it out with a layer pattern."
            )
        seen.add(module)
        _check_shape(name, inputs[0])
        activations = inputs[0].detach()

        def on_gradient(gradient: Tensor) -> None:
            for block in blocks:
                a = activations[..., block.inputs]
                a = with_one(a) if append_one and block.has_bias else a
                visit(block, a, gradient.detach()[..., block.outputs])

        output.register_hook(on_gradient)  # type: ignore[no-untyped-call]

    scales = [layer for layer in layers if isinstance(layer, ScaleLayer)]
    usual = [x for x in layers if x.region is None and not isinstance(x, ScaleLayer)]
    others = [layer for layer in layers if layer.region is not None]
    for blocks in _by_module(usual):
        handles.append(
            blocks[0].module.register_forward_hook(
                lambda _, inputs, output, blocks=blocks: after_forward(blocks, inputs, output)
            )
        )
    try:
        with (
            embeddings_require_grad(model),
            followed(others, visit, append_one, places),
            scaled(scales, visit),
        ):
            yield
    finally:
        for handle in handles:
            handle.remove()


def visit_gradients(
    model: nn.Module,
    layers: Sequence[LinearLayer],
    batch: TokenBatch,
    visit: Visitor,
    label_seed: int | None = None,
    append_one: bool = True,
    visit_terms: TermsVisitor | None = None,
    places: Places | None = None,
) -> Float[Tensor, "sequence"]:
    """One forward and one backward pass of the batch's losses, handing each layer to ``visit``.

    The losses are summed over the batch, not averaged, so that each sequence's part of ``d`` is its
    own gradient.

    Layers of other checkpoints are visited by a pass through their own model.

    Args:
        model: in evaluation mode.
        layers: layers to hand over.
        batch: sequences on the model's device.
        visit: called once a layer, last layer first.
        label_seed: draw the labels from the model's own distribution (true Fisher) with this seed;
            None takes the batch's own tokens.
        append_one: whether ``visit`` gets the inputs of layers with a bias with a 1 appended.
        visit_terms: called once a vocabulary layer, after ``visit`` had the other layers.
        places: is filled for layers that see other rows than one a token, see ``Places``.

    Returns:
        The loss of each sequence in nats, by ``model``.

    Raises:
        ValueError: there are vocabulary layers, and nobody receives them.
    """
    if batch.group > 1:
        places = {} if places is None else places
        visit = _together(visit, batch, places)
    groups: dict[nn.Module, list[LinearLayer]] = {model: []}
    for layer in layers:
        groups.setdefault(layer.checkpoint or model, []).append(layer)
    losses: dict[nn.Module, Tensor] = {}
    for checkpoint, own in groups.items():
        linear = [layer for layer in own if not isinstance(layer, VocabularyLayer)]
        wide = [layer for layer in own if isinstance(layer, VocabularyLayer)]
        labels = batch.input_ids.roll(-1, 1)
        with (
            torch.enable_grad(),
            captured(checkpoint, linear, visit, append_one, places),
            _embedded(wide) as read,
        ):
            head, states = final_states(checkpoint, batch)
            losses[checkpoint], gradient = losses_and_gradient(
                head, states, batch, label_seed, labels if wide else None
            )
            if gradient is not None and own:
                states.backward(gradient)  # type: ignore[no-untyped-call]
        run = HeadRun(head=head, states=states.detach(), labels=labels)
        for layer in wide:
            if visit_terms is None:
                raise ValueError(f"Nothing here can use {layer.name}; fit without --embeddings.")
            visit_terms(layer, _terms(layer, batch, read, run))
    return losses[model]


def _together(visit: Visitor, batch: TokenBatch, places: Places) -> Visitor:
    """Hands over an example's sequences as one, their positions one after another."""
    count, (examples, _) = batch.group, batch.shape
    first = torch.arange(count * examples, device=batch.input_ids.device) % count
    first = (first * batch.input_ids.shape[1])[:, None]

    def joined(layer: LinearLayer, a: Tensor, d: Tensor) -> None:
        own = places.get(layer.name)
        if own is not None:
            moved = torch.where(own == NOWHERE, own, own + first)
            places[layer.name] = moved.reshape(examples, -1)
        rows = count * a.shape[1]
        visit(layer, *(x.reshape(examples, rows, x.shape[-1]) for x in (a, d)))

    return joined


@contextmanager
def _embedded(layers: Sequence[VocabularyLayer]) -> Iterator[dict[nn.Module, Tensor]]:
    """Collects the gradients of the outputs of the layers' embeddings."""
    found: dict[nn.Module, Tensor] = {}

    def after_forward(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        output.register_hook(  # type: ignore[no-untyped-call]
            lambda gradient: found.update({module: gradient.detach()})
        )

    embeddings = [x.uses.embedding for x in layers if x.uses.embedding is not None]
    handles = [module.register_forward_hook(after_forward) for module in embeddings]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _terms(
    layer: VocabularyLayer, batch: TokenBatch, read: dict[nn.Module, Tensor], run: HeadRun
) -> VocabularyTerms:
    embedding, gradient = layer.uses.embedding, None
    padding: int | None = getattr(embedding, "padding_idx", None)
    if embedding is not None:
        gradient = read[embedding]
        if layer.uses.scale != 1:
            gradient = gradient * layer.uses.scale
        if padding is not None:  # PyTorch gives its row no gradient
            gradient = gradient.masked_fill((batch.input_ids == padding)[..., None], 0)
    return VocabularyTerms(
        batch=batch,
        vocabulary=layer.in_features,
        read=gradient,
        predicted=None if layer.uses.head is None else run,
        padding=padding,
    )


def freeze(model: nn.Module) -> nn.Module:
    """Put the model in evaluation mode and stop weight gradients, which nothing here needs.

    Experts of mixtures are computed one after another from now on.
    """
    make_eager(model)
    return model.eval().requires_grad_(False)


def _by_module(layers: Sequence[LinearLayer]) -> list[list[LinearLayer]]:
    groups: dict[nn.Module, list[LinearLayer]] = {}
    for layer in layers:
        groups.setdefault(layer.module, []).append(layer)
    return list(groups.values())


def _check_shape(name: str, inputs: Tensor) -> None:
    if inputs.ndim != 3:
        raise ValueError(
            f"Layer {name} saw inputs of shape {tuple(inputs.shape)}, expected "
            f"[batch, token, feature]; leave it out with a layer pattern."
        )
