"""What a training run did, step by step: enough to repeat it and to differentiate through it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

OptimizerName = Literal["sgd", "adam", "adamw"]
UNCOUNTED = -100
"""The label of a token that does not count, as in ``torch.nn.functional.cross_entropy``."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One sequence as the model was trained on it, without padding.

    Attributes:
        id: of the row; the hash of its content where no id is known.
        tokens: token ids.
        labels: at each position its own token, or ``UNCOUNTED`` where that token does not count.
    """

    id: str
    tokens: tuple[int, ...]
    labels: tuple[int, ...]

    @property
    def targets(self) -> int:
        """How many tokens count; the first never does, since nothing precedes it."""
        return sum(label != UNCOUNTED for label in self.labels[1:])


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One forward and backward pass: ``loss = sum_i weight_i * loss_i / divisor``.

    ``loss_i`` is the sum over the row's counted tokens of the next-token negative log-likelihood.

    Attributes:
        rows: numbers of the rows in the run, in order.
        divisor: what the summed losses are divided by, e.g. the counted tokens of the whole step.
        width: tokens of the batch, padding on the right included.
    """

    rows: tuple[int, ...]
    divisor: float
    width: int


@dataclass(frozen=True, kw_only=True)
class Step:
    """One step of the optimizer.

    Attributes:
        batches: whose gradients are added up.
        rates: learning rate of each parameter group.
    """

    batches: tuple[Batch, ...]
    rates: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class Group:
    """Parameters that share constants, those of ``torch.optim``.

    Attributes:
        parameters: names in the model, each tensor once.
        weight_decay: decoupled from the gradient for AdamW, added to it otherwise.
        betas: of Adam and AdamW.
        epsilon: of Adam and AdamW, outside of the root.
        momentum: of SGD.
        dampening: of SGD's momentum.
        nesterov: of SGD.
    """

    parameters: tuple[str, ...]
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    epsilon: float = 1e-8
    momentum: float = 0.0
    dampening: float = 0.0
    nesterov: bool = False


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How gradients become steps.

    Attributes:
        optimizer: "sgd", "adam" or "adamw".
        groups: of parameters, in the optimizer's order.
        clipping: largest norm of the whole gradient, as ``clip_grad_norm_`` has it; None for none.
    """

    optimizer: OptimizerName
    groups: tuple[Group, ...]
    clipping: float | None = None


@dataclass(frozen=True, kw_only=True)
class State:
    """Everything that a step changes.

    Attributes:
        step: how many steps were made.
        parameters: trained tensors by name.
        moments: by kind ("exp_avg", "exp_avg_sq", "momentum_buffer"), then by parameter; a kind is
            missing before the first step.
    """

    step: int
    parameters: Mapping[str, Tensor]
    moments: Mapping[str, Mapping[str, Tensor]]
