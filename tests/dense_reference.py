"""Slow, obvious float64 references: loops over examples, real weights, dense matrices.

Nothing here uses the hooks, batches or factorisations that it is compared with. A layer's gradient
has the shape [in, out], its bias as the last row; ``vec`` is row-major, so that
``vec(L M R^T) = (L kron R) vec(M)``.
"""

import copy
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from estimators.model.layers import LinearLayer
from estimators.model.measurement import draw_labels, label_numbers
from estimators.model.tokens import Sequence1D, collate

Gradient = dict[str, Tensor]
Tokens = list[dict[str, tuple[Tensor, Tensor]]]


def relative_error(value: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of ``expected``; the norm itself where that is 0."""
    difference = float(torch.linalg.vector_norm(value.double() - expected.double()))
    return difference / (float(torch.linalg.vector_norm(expected.double())) or 1)


FLOOR = 0.01
"""Of the largest layer's norm: what a layer's error is at least relative to."""


def worst_error(values: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """The largest error of any layer, relative to its norm; the layers must be the same.

    A gradient may be zero in theory (the queries' and keys' where the only counted token attends to
    one position) and anything of the size of rounding in practice, by the processor. So layers
    smaller than ``FLOOR`` times the largest count as if they were of that size.
    """
    assert set(values) == set(expected)
    norms = {n: float(torch.linalg.vector_norm(x.double())) for n, x in expected.items()}
    least = FLOOR * max(norms.values()) or 1
    differences = (
        float(torch.linalg.vector_norm(values[n].double() - x.double())) / max(norms[n], least)
        for n, x in expected.items()
    )
    return max(differences)


def trainable(model: nn.Module) -> nn.Module:
    """A float64 copy whose weights require gradients."""
    return copy.deepcopy(model).double().requires_grad_(True)


def log_probabilities(model: nn.Module, sequence: Sequence1D) -> Tensor:
    """``log p(token t + 1 = y | tokens 0 .. t)``, [token - 1, vocabulary]; nothing is padded."""
    logits = model(input_ids=torch.tensor([sequence.tokens]), use_cache=False).logits[0, :-1]
    return torch.log_softmax(logits.double(), dim=-1)


def loss(model: nn.Module, sequence: Sequence1D, labels: Sequence[int] | None = None) -> Tensor:
    """Negative log-likelihood in nats of the counted tokens, or of ``labels`` in their place.

    ``labels[t]`` stands in for token t + 1.
    """
    labels = sequence.tokens[1:] if labels is None else labels
    logs = log_probabilities(model, sequence)
    total = torch.zeros((), dtype=torch.float64)
    for target in range(sequence.first_target, len(sequence.tokens)):
        spans = sequence.counted
        if spans is not None and not any(start <= target < stop for start, stop in spans):
            continue
        total = total - logs[target - 1, int(labels[target - 1])]
    return total


def drawn_labels(model: nn.Module, sequences: Sequence[Sequence1D], seed: int) -> list[list[int]]:
    """Labels from the model's own distribution, each sequence by itself."""
    return [
        draw_labels(
            log_probabilities(model, s).exp(), label_numbers(collate([s]), seed)[0]
        ).tolist()
        for s in sequences
    ]


def weight_gradients(model: nn.Module, layers: Sequence[LinearLayer], value: Tensor) -> Gradient:
    """Autograd's gradients of ``value`` with respect to the layers' weights and biases.

    Of a block of a layer: its rows and columns of the whole layer's gradient.
    """
    modules = {layer.module_name: model.get_submodule(layer.module_name) for layer in layers}
    parameters = [p for m in modules.values() for p in (m.weight, m.bias) if p is not None]
    found = iter(torch.autograd.grad(value, parameters, retain_graph=True))
    whole = {}
    for name, module in modules.items():
        weight = next(found)
        gradient = weight if isinstance(module, Conv1D) else weight.T
        if module.bias is not None:
            gradient = torch.cat([gradient, next(found)[None]])
        whole[name] = gradient
    return {layer.name: whole[layer.module_name][rows_of(layer), layer.outputs] for layer in layers}


def rows_of(layer: LinearLayer) -> slice:
    """A layer's rows in the gradient of its module, the bias' last."""
    return slice(layer.first_input, layer.first_input + layer.in_features)


def example_gradients(
    model: nn.Module,
    layers: Sequence[LinearLayer],
    sequences: Sequence[Sequence1D],
    labels: Sequence[Sequence[int]] | None = None,
) -> list[Gradient]:
    """The gradient of each example's loss, one example after another."""
    copied = trainable(model)
    return [
        weight_gradients(copied, layers, loss(copied, s, None if labels is None else labels[i]))
        for i, s in enumerate(sequences)
    ]


def example_tokens(
    model: nn.Module,
    layers: Sequence[LinearLayer],
    sequences: Sequence[Sequence1D],
    labels: Sequence[Sequence[int]] | None = None,
) -> Tokens:
    """Inputs a [token, in] and output gradients d [token, out] of each layer, for each example.

    All tokens but the last, which predicts nothing.
    """
    copied = trainable(model)
    recorded: dict[str, tuple[Tensor, Tensor]] = {}

    def record(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            a = inputs[0][0]
            if module.bias is not None:
                a = torch.cat([a, torch.ones(len(a), 1, dtype=a.dtype)], dim=1)
            recorded[name] = (a, output)

        return hook

    for name in {layer.module_name: None for layer in layers}:
        copied.get_submodule(name).register_forward_hook(record(name))
    result = []
    for i, sequence in enumerate(sequences):
        value = loss(copied, sequence, None if labels is None else labels[i])
        gradients = torch.autograd.grad(value, [output for _, output in recorded.values()])
        whole = {
            name: (a[:-1].detach(), d[0, :-1])
            for (name, (a, _)), d in zip(recorded.items(), gradients, strict=True)
        }
        result.append(
            {
                layer.name: (
                    whole[layer.module_name][0][:, rows_of(layer)],
                    whole[layer.module_name][1][:, layer.outputs],
                )
                for layer in layers
            }
        )
    return result


def covariances(tokens: Tokens, name: str) -> tuple[Tensor, Tensor, float]:
    """``E[a a^T]`` and ``E[d d^T]`` over token positions; the mean positions an example."""
    pairs = [(a, d) for example in tokens for a, d in zip(*(x for x in example[name]), strict=True)]
    a_mean = sum(torch.outer(a, a) for a, _ in pairs) / len(pairs)
    d_mean = sum(torch.outer(d, d) for _, d in pairs) / len(pairs)
    return a_mean, d_mean, len(pairs) / len(tokens)


def corrected_eigenvalues(gradients: Sequence[Tensor], left: Tensor, right: Tensor) -> Tensor:
    """``E_example[(Q_A^T G Q_S)_ij^2]``."""
    return sum((left.T @ g @ right) ** 2 for g in gradients) / len(gradients)


def kronecker_operator(left: Tensor, right: Tensor, eigenvalues: Tensor) -> Tensor:
    """``(Q_A kron Q_S) diag(vec L) (Q_A kron Q_S)^T``."""
    basis = torch.kron(left.contiguous(), right.contiguous())
    return basis @ torch.diag(eigenvalues.flatten()) @ basis.T


def kfac_operator(tokens: Tokens, gradients: Sequence[Gradient], name: str) -> Tensor:
    """``T * A kron S``: no eigenbasis needed."""
    a, s, positions = covariances(tokens, name)
    return positions * torch.kron(a, s)


def ekfac_operator(tokens: Tokens, gradients: Sequence[Gradient], name: str) -> Tensor:
    """K-FAC's eigenbasis with second moments measured in it."""
    a, s, _ = covariances(tokens, name)
    left, right = torch.linalg.eigh(a)[1], torch.linalg.eigh(s)[1]
    eigenvalues = corrected_eigenvalues([g[name] for g in gradients], left, right)
    return kronecker_operator(left, right, eigenvalues)


def empirical_fisher(gradients: Sequence[Tensor]) -> Tensor:
    """``E_example[vec(G) vec(G)^T]``."""
    return sum(torch.outer(g.flatten(), g.flatten()) for g in gradients) / len(gradients)


def fisher_blocks(
    model: nn.Module, layers: Sequence[LinearLayer], sequences: Sequence[Sequence1D]
) -> dict[str, Tensor]:
    """True Fisher of the mean loss, a dense block a layer: sums over every possible label.

    Labels of different positions are independent given the text, so only ``sum_t`` remains:
    ``E_example sum_t sum_y p(y) g_ty g_ty^T`` with ``g_ty = grad -log p(y)``.
    """
    copied = trainable(model)
    blocks = {layer.name: torch.zeros((), dtype=torch.float64) for layer in layers}
    for sequence in sequences:
        logs = log_probabilities(copied, sequence)
        for target in range(sequence.first_target, len(sequence.tokens)):
            for log in logs[target - 1]:
                for name, g in weight_gradients(copied, layers, -log).items():
                    outer = torch.outer(g.flatten(), g.flatten())
                    blocks[name] = blocks[name] + log.exp().detach() * outer / len(sequences)
    return blocks


def gauss_newton_blocks(
    model: nn.Module, layers: Sequence[LinearLayer], sequences: Sequence[Sequence1D]
) -> dict[str, Tensor]:
    """Gauss-Newton Hessian of the mean loss: ``E_example sum_t J^T (diag p - p p^T) J``.

    J is the explicit Jacobian of the logits at one position. Equal to the true Fisher.
    """
    copied = trainable(model)
    blocks = {layer.name: torch.zeros((), dtype=torch.float64) for layer in layers}
    for sequence in sequences:
        logits = copied(input_ids=torch.tensor([sequence.tokens]), use_cache=False).logits[0]
        for target in range(sequence.first_target, len(sequence.tokens)):
            p = torch.softmax(logits[target - 1].detach(), dim=-1)
            rows = [weight_gradients(copied, layers, logit) for logit in logits[target - 1]]
            for layer in layers:
                jacobian = torch.stack([row[layer.name].flatten() for row in rows])
                middle = torch.diag(p) - torch.outer(p, p)
                product = jacobian.T @ middle @ jacobian / len(sequences)
                blocks[layer.name] = blocks[layer.name] + product
    return blocks


def damped_solve(curvature: Tensor, gradient: Tensor, damping: float) -> Tensor:
    """``(H + lambda I)^-1 G`` by a dense solve; lambda is damping times the mean eigenvalue."""
    damped = curvature + damping * curvature.diagonal().mean() * torch.eye(len(curvature)).double()
    return torch.linalg.solve(damped, gradient.flatten()).view_as(gradient)


def inner_product(left: Gradient, right: Gradient) -> float:
    """Sum over layers of the entrywise products."""
    return sum(float((left[name] * right[name]).sum()) for name in left)


def batched_inner_product(left, right):
    """Sum over layers and entries of ``left * right``; leading dimensions broadcast."""
    return torch.stack([(left[name] * right[name]).sum((-2, -1)) for name in left]).sum(0)
