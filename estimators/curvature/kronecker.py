"""Kronecker-factored covariances of a layer's inputs and output gradients, and their eigenbases."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Self

import torch
from jaxtyping import Float, Int
from torch import Tensor

from estimators.curvature.accumulation import LongSum, pad_columns
from estimators.curvature.eigenbasis import (
    OUTPUT_GRADIENT,
    Decompositions,
    Eigenbasis,
    add_symmetric,
    check_seen,
    device_of,
)
from estimators.curvature.vocabulary import VocabularyCovariances
from estimators.model.gradients import widen
from estimators.model.layers import LinearLayer, VocabularyLayer
from estimators.model.terms import VocabularyTerms


class Covariances:
    """Sums of ``a a^T`` and ``d d^T`` over tokens, for each layer.

    Products and short sums are in the model's precision (float32 at least), long sums in float64.

    Args:
        tensors: for each layer NAME, ``NAME.inputs`` [in, in] and ``NAME.gradients`` [out, out],
            float64, of which the upper triangles count, and ``NAME.seen``, the numbers of
            sequences and of positions. Of vocabulary layers those of ``VocabularyCovariances``.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._sums: dict[str, tuple[LongSum, LongSum]] = {}
        self._seen: dict[str, Tensor] = {}
        self._vocabulary: dict[str, VocabularyCovariances] = {}
        for name in (key.removesuffix(".seen") for key in tensors if key.endswith(".seen")):
            own = {part: tensors[f"{name}.{part}"] for part in ("inputs", "gradients", "seen")}
            if own["gradients"].ndim == 3:
                self._vocabulary[name] = VocabularyCovariances(own)
                continue
            self._sums[name] = LongSum(own["inputs"]), LongSum(own["gradients"])
            self._seen[name] = own["seen"].clone()

    @classmethod
    def begin(cls, layers: Sequence[LinearLayer]) -> Self:
        """Nothing added yet."""
        tensors: dict[str, Tensor] = {}
        for layer in layers:
            if isinstance(layer, VocabularyLayer):
                empty = VocabularyCovariances.empty(layer)
                tensors |= {f"{layer.name}.{part}": value for part, value in empty.items()}
                continue
            near = torch.empty(0, dtype=torch.float64, device=device_of(layer))
            for part, width in (("inputs", layer.in_features), ("gradients", layer.out_features)):
                tensors[f"{layer.name}.{part}"] = near.new_zeros(width, width)
            tensors[f"{layer.name}.seen"] = torch.zeros(2, dtype=torch.int64)
        return cls(tensors)

    def add(self, layer: LinearLayer, a: Tensor, d: Tensor, positions: Tensor) -> None:
        """Add one batch: ``a`` [batch, token, in], ``d`` [batch, token, out].

        Only ``positions`` count, indices into the flattened tokens. All memory is taken before the
        sums are touched: running out of it leaves them alone.
        """
        rows = [pad_columns(widen(_take(values, positions))) for values in (a, d)]
        sums = self._sums[layer.name]
        recent = [part.recent(x) for part, x in zip(sums, rows, strict=True)]
        for target, x in zip(recent, rows, strict=True):
            add_symmetric(target, x)
        self._seen[layer.name] += torch.tensor([len(a), len(positions)])

    def add_terms(self, layer: VocabularyLayer, terms: VocabularyTerms) -> None:
        """Add one batch of a vocabulary layer."""
        self._vocabulary[layer.name].add(terms)

    def settle(self) -> None:
        """Move recent products into the float64 sums."""
        for sums in self._sums.values():
            for part in sums:
                part.settle()
        for own in self._vocabulary.values():
            own.settle()

    def tensors(self) -> dict[str, Tensor]:
        """What is settled; the class rebuilds itself from it."""
        tensors = {}
        for name, (inputs, gradients) in self._sums.items():
            tensors[f"{name}.inputs"] = inputs.total
            tensors[f"{name}.gradients"] = gradients.total
            tensors[f"{name}.seen"] = self._seen[name]
        for name, own in self._vocabulary.items():
            tensors |= {f"{name}.{part}": value for part, value in own.tensors().items()}
        return tensors

    def eigenbases(self, layers: Sequence[LinearLayer]) -> dict[str, Eigenbasis]:
        """Decompose the mean covariances in float64 and let go of the sums.

        The results have the precision of the layers' weights, float32 at least. An expert that saw
        fewer tokens than its wider side has features gets those of all experts of its kind
        together: its own would leave most directions without curvature.

        Raises:
            ValueError: a layer saw no token or no gradient, or a covariance is not finite.
        """
        sides = Decompositions("input"), Decompositions(OUTPUT_GRADIENT)
        sharing = {layer.name for layer in layers if self._saw_too_little(layer)}
        members: dict[Kind, list[LinearLayer]] = {}
        for layer in layers:
            members.setdefault(kind_of(layer), []).append(layer)
        pools = {
            kind: self._pool(own, *sides)
            for kind, own in members.items()
            if any(layer.name in sharing for layer in own)
        }
        found = {}
        for layer in layers:
            if layer.name not in sharing:
                found[layer.name] = self._decompose(layer, *sides)
                continue
            self._sums.pop(layer.name)
            found[layer.name] = _member(pools[kind_of(layer)], int(self._seen[layer.name][1]))
        return found

    def _saw_too_little(self, layer: LinearLayer) -> bool:
        if layer.family is None:
            return False
        positions = int(self._seen[layer.name][1])
        return positions < max(layer.in_features, layer.out_features)

    def _pool(
        self,
        layers: Sequence[LinearLayer],
        of_inputs: Decompositions,
        of_gradients: Decompositions,
    ) -> Eigenbasis:
        """That of several experts' sums together, for one of them; the sums are kept."""
        sums = [self._sums[layer.name] for layer in layers]
        seen = torch.stack([self._seen[layer.name] for layer in layers])
        positions = int(seen[:, 1].sum())
        check_seen(layers[0], positions)
        inputs, gradients = (
            sum((own[side].total for own in sums[1:]), start=sums[0][side].total) / positions
            for side in (0, 1)
        )
        left, left_values = of_inputs(inputs, layers[0])
        right, right_values = of_gradients(gradients, layers[0])
        return Eigenbasis(
            left=left,
            right=right,
            left_values=left_values,
            right_values=right_values,
            positions=positions / int(seen[:, 0].sum()),
        )

    def _decompose(
        self, layer: LinearLayer, of_inputs: Decompositions, of_gradients: Decompositions
    ) -> Eigenbasis:
        if isinstance(layer, VocabularyLayer):
            return self._vocabulary.pop(layer.name).eigenbasis(layer)
        sequences, positions = self._seen[layer.name].tolist()
        check_seen(layer, positions)
        inputs, gradients = (part.total / positions for part in self._sums.pop(layer.name))
        left, left_values = of_inputs(inputs, layer)
        right, right_values = of_gradients(gradients, layer)
        return Eigenbasis(
            left=left,
            right=right,
            left_values=left_values,
            right_values=right_values,
            positions=positions / sequences,
        )


Kind = tuple[str | None, str, int, int]


def kind_of(layer: LinearLayer) -> Kind:
    """What the same block of the same matrix of every expert has in common."""
    own = "" if layer.family is not None else layer.name
    return layer.family, own, layer.first_input, layer.first_output


def _member(pool: Eigenbasis, positions: int) -> Eigenbasis:
    """A copy for an expert that saw so many positions itself."""
    assert pool.left is not None
    return replace(
        pool,
        left=pool.left.clone(),
        right=pool.right.clone(),
        left_values=pool.left_values.clone(),
        right_values=pool.right_values.clone(),
        shared=positions,
    )


def _take(
    values: Float[Tensor, "batch token feature"], positions: Int[Tensor, "position"]
) -> Float[Tensor, "position feature"]:
    return values.flatten(0, 1).index_select(0, positions)
