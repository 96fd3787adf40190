"""Inverse curvature that is diagonal in a Kronecker-factored eigenbasis."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar, Self

from jaxtyping import Float
from torch import Tensor

from estimators.grounds import DAMPING, Grounds, Parameter, Questions, Unavailable
from estimators.model.gradients import Gradients, negated
from estimators.model.layers import LinearLayer
from estimators.sketching.whitening import LayerWhitening, noise_optimal_weights


class EigenbasisOperator(ABC):
    """``H = (Q_A x Q_S) diag(L) (Q_A x Q_S)^T`` for each layer, in units of the mean training loss.

    Applied to a gradient (George et al. 2018, eq. 8; Grosse et al. 2023, eq. 20):
    ``(H + lambda I)^-1 G = Q_A [(Q_A^T G Q_S) / (L + lambda)] Q_S^T``.

    Args:
        tensors: for each layer NAME, ``NAME.right`` (Q_S, [out, out]), ``NAME.left`` (Q_A, [in,
            in]; over a vocabulary none, for the identity) and what the eigenvalues L [in, out]
            come from (``needs``).

    Raises:
        ValueError: a tensor is missing.
    """

    parameters: ClassVar[Mapping[str, Parameter]] = {"damping": DAMPING}
    needs: ClassVar[tuple[str, ...]]
    """Parts of a layer's factors without which there are no eigenvalues."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = dict(tensors)
        sides = [key for key in tensors if key.endswith((".left", ".right"))]
        self._names = list(dict.fromkeys(key.rpartition(".")[0] for key in sides))
        for name in self._names:
            values = tensors.get(f"{name}.left_values")
            sides = ["right"] if values is not None and values.ndim == 2 else ["left", "right"]
            for part in (*sides, *self.needs):
                if f"{name}.{part}" not in tensors:
                    raise ValueError(f"The factors of layer {name} lack '{part}'; fit again.")

    @classmethod
    def open(cls, grounds: Grounds) -> Self:
        """From the factors of an index, whichever estimator they were fitted for.

        Raises:
            Unavailable: they lack something.
        """
        try:
            operator = cls(grounds.factors)
        except ValueError as error:
            raise Unavailable(str(error)) from error
        missing = [layer.name for layer in grounds.layers if layer.name not in operator._names]
        if missing:
            raise Unavailable(
                f"The index has no curvature factors for {len(missing)} of its "
                f"{len(grounds.layers)} layers ({missing[0]}); build it with factors of EK-FAC."
            )
        return operator

    def tensors(self) -> Mapping[str, Tensor]:
        """The fitted tensors."""
        return self._tensors

    def directions(self, questions: Questions, values: Mapping[str, float]) -> dict[str, Tensor]:
        """``-(H + lambda I)^-1 grad f``."""
        return negated(self.precondition(questions.gradients, values["damping"]))

    def precondition(self, gradients: Gradients, damping: float) -> dict[str, Tensor]:
        """Multiply ``gradients`` ([..., in, out] a layer) by the damped inverse curvature.

        ``damping`` is relative: lambda of a layer is ``damping`` times its mean eigenvalue.

        Raises:
            ValueError: a layer has no factors, or damping is not positive.
        """
        result = {}
        for name, gradient in gradients.items():
            left, right = self._bases(name)
            right = right.to(gradient)
            inverse = self._inverse(name, damping).to(gradient)
            if left is None:
                result[name] = (gradient @ right * inverse) @ right.T
                continue
            left = left.to(gradient)
            result[name] = left @ (left.T @ gradient @ right * inverse) @ right.T
        return result

    def whitening(self, layers: Sequence[LinearLayer], damping: float) -> dict[str, LayerWhitening]:
        """Noise-optimal separable whitening in the eigenbasis; no pass over data."""
        result = {}
        for layer in layers:
            left, right = self._bases(layer.name)
            eigenvalues = self.eigenvalues(layer.name)
            inverse = self._inverse(layer.name, damping)
            u, v = noise_optimal_weights(eigenvalues, inverse)
            result[layer.name] = LayerWhitening(
                left_basis=left,
                right_basis=right,
                left_scale=u.sqrt().to(right.dtype),
                right_scale=v.sqrt().to(right.dtype),
                energy=float(u @ eigenvalues.double() @ v),
            )
        return result

    @abstractmethod
    def eigenvalues(self, name: str) -> Float[Tensor, "in out"]:
        """L of one layer, never negative."""

    def _inverse(self, name: str, damping: float) -> Float[Tensor, "in out"]:
        if not damping > 0:
            raise ValueError(f"Damping must be positive, got {damping}; the usual value is 0.1.")
        eigenvalues = self.eigenvalues(name)
        mean = eigenvalues.mean()
        if mean <= 0:
            raise ValueError(
                f"All curvature of layer {name} is zero: no gradient reached it while fitting; "
                f"leave it out with a layer pattern."
            )
        return 1 / (eigenvalues + damping * mean)

    def _bases(self, name: str) -> tuple[Tensor | None, Tensor]:
        if name not in self._names:
            raise ValueError(
                f"No curvature factors for layer {name}; they exist for {self._names}. "
                f"Fit the estimator on this model with the same layer patterns."
            )
        return self._tensors.get(f"{name}.left"), self._tensors[f"{name}.right"]
