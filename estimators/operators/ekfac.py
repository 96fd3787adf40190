"""EK-FAC: K-FAC's eigenbasis with eigenvalues measured in it (George et al. 2018)."""

from collections.abc import Mapping, Sequence
from typing import ClassVar, Self

import torch
from jaxtyping import Float
from torch import Tensor

from estimators.contracts import RunPass
from estimators.curvature.accumulation import LongSum, pad_columns
from estimators.curvature.eigenbasis import Eigenbasis
from estimators.curvature.kronecker import Covariances
from estimators.model.gradients import widen
from estimators.model.layers import LinearLayer, VocabularyLayer
from estimators.model.terms import VocabularyTerms
from estimators.operators.eigenbasis import EigenbasisOperator


class EKFac(EigenbasisOperator):
    """EK-FAC influence: curvature in K-FAC's eigenbasis with eigenvalues measured in it.

    ``L_ij = E_example[(Q_A^T G Q_S)_ij^2]``, exact second moments along the eigenvectors.
    """

    needs: ClassVar[tuple[str, ...]] = ("eigenvalues",)

    @classmethod
    def fit(cls, layers: Sequence[LinearLayer], run_pass: RunPass) -> Self:
        """One pass for the covariances, one for the corrected eigenvalues."""

        def begin() -> CorrectedEigenvalues:
            covariances = run_pass("covariances", Covariances, lambda: Covariances.begin(layers))
            return CorrectedEigenvalues.begin(covariances.eigenbases(layers))

        return cls(run_pass("eigenvalues", CorrectedEigenvalues, begin).operator())

    def eigenvalues(self, name: str) -> Float[Tensor, "in out"]:
        """As they were measured."""
        return self._tensors[f"{name}.eigenvalues"]


class CorrectedEigenvalues:
    """Sums over examples of squared per-example gradients in an eigenbasis.

    Short sums are in the model's precision (float32 at least), long sums in float64.

    Args:
        tensors: for each layer NAME those of its ``Eigenbasis``, ``NAME.squares`` [in, out] in
            float64 and ``NAME.examples``, the number of examples.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        names = [key.removesuffix(".squares") for key in tensors if key.endswith(".squares")]
        own = (".squares", ".examples")
        self._bases = {key: value for key, value in tensors.items() if not key.endswith(own)}
        self._padded: dict[str, tuple[Tensor, Tensor]] = {}
        self._sums = {name: LongSum(tensors[f"{name}.squares"]) for name in names}
        self._examples = {name: tensors[f"{name}.examples"].clone() for name in names}

    @classmethod
    def begin(cls, bases: Mapping[str, Eigenbasis]) -> Self:
        """Nothing added yet."""
        tensors: dict[str, Tensor] = {}
        for name, basis in bases.items():
            tensors |= basis.tensors(name)
            tensors[f"{name}.squares"] = basis.right.new_zeros(basis.shape, dtype=torch.float64)
            tensors[f"{name}.examples"] = torch.zeros((), dtype=torch.int64)
        return cls(tensors)

    def add(self, layer: LinearLayer, a: Tensor, d: Tensor, positions: Tensor) -> None:
        """Add the examples of one batch: ``a`` [batch, token, in], ``d`` [batch, token, out].

        ``d`` is 0 outside ``positions``, which are not needed therefore. All memory is taken before
        the sums are touched: running out of it leaves them alone.
        """
        if a.shape[1] == 0:  # an expert that no token reached
            self._examples[layer.name] += len(a)
            return
        a, d = (pad_columns(widen(values)) for values in (a, d))
        left, right = self._rotations(layer.name, a)
        rotation = Rotation(a, d, left, right)
        recent = self._sums[layer.name].recent(a)
        for number in range(len(a)):
            rotated = rotation(number)
            recent.addcmul_(rotated, rotated)
        self._examples[layer.name] += len(a)

    def add_terms(self, layer: VocabularyLayer, terms: VocabularyTerms) -> None:
        """Add the examples of one batch of a vocabulary layer; likewise.

        The gradient of one example at a time is formed, all uses of the weight together.
        """
        right = pad_columns(self._bases[f"{layer.name}.right"].to(terms.empty(0)))
        turned = terms.turned(right)
        recent = self._sums[layer.name].recent(right)[: layer.in_features]
        gradient, fresh = torch.empty_like(recent), torch.zeros_like(recent)
        for number in range(len(terms.batch.rows)):
            turned.of(number).add_to([gradient.zero_()], [1.0])
            fresh.addcmul_(gradient, gradient)
        recent += fresh  # a head needs memory for each example
        self._examples[layer.name] += len(terms.batch.rows)

    def _rotations(self, name: str, like: Tensor) -> tuple[Tensor, Tensor]:
        """Q_A and Q_S padded with zeros, on the device and in the precision of ``like``."""
        if name not in self._padded:
            bases = (self._bases[f"{name}.{side}"] for side in ("left", "right"))
            left, right = (pad_columns(pad_columns(q.to(like)).T).T for q in bases)
            self._padded[name] = left.contiguous(), right.contiguous()
        return self._padded[name]

    def settle(self) -> None:
        """Move recent squares into the float64 sums."""
        for part in self._sums.values():
            part.settle()

    def tensors(self) -> dict[str, Tensor]:
        """What is settled; the class rebuilds itself from it."""
        tensors = dict(self._bases)
        for name, sums in self._sums.items():
            tensors[f"{name}.squares"] = sums.total
            tensors[f"{name}.examples"] = self._examples[name]
        return tensors

    def operator(self) -> dict[str, Tensor]:
        """The tensors of an ``EigenbasisOperator``: bases and mean squares, in their precision.

        An expert that saw too few tokens to have a basis of its own saw too few for mean squares,
        too: its eigenvalues are K-FAC's, of all experts of its kind together.
        """
        tensors = dict(self._bases)
        for name, sums in self._sums.items():
            if f"{name}.shared" in tensors:
                sides = tensors[f"{name}.left_values"], tensors[f"{name}.right_values"]
                rate = float(tensors[f"{name}.positions"])
                tensors[f"{name}.eigenvalues"] = torch.outer(*sides) * rate
                continue
            means = sums.total / int(self._examples[name])
            tensors[f"{name}.eigenvalues"] = means.to(tensors[f"{name}.right"].dtype).cpu()
        return tensors


class Rotation:
    """``Q_A^T G Q_S`` of each sequence of a batch, one at a time, in memory taken at once.

    Rotates whichever costs less: all tokens beforehand, or each gradient.
    """

    def __init__(
        self,
        a: Float[Tensor, "batch token in"],
        d: Float[Tensor, "batch token out"],
        left: Float[Tensor, "in in"],
        right: Float[Tensor, "out out"],
    ) -> None:
        tokens, width, out = a.shape[1], a.shape[2], d.shape[2]
        by_tokens = tokens * (width**2 + out**2) < width * out * (width + out)
        self._a, self._d = (a @ left, d @ right) if by_tokens else (a, d)
        self._bases = None if by_tokens else (left, right)
        self._gradient = a.new_empty(width, out)
        self._half = a.new_empty(0 if by_tokens else width, out)

    def __call__(self, number: int) -> Float[Tensor, "in out"]:
        """Of sequence ``number``; valid until the next call."""
        torch.mm(self._a[number].T, self._d[number], out=self._gradient)
        if self._bases is not None:
            left, right = self._bases
            torch.mm(left.T, self._gradient, out=self._half)
            torch.mm(self._half, right, out=self._gradient)
        return self._gradient
