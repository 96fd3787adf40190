"""Tail patch: what one training step on retrieved examples does to log p(completion).

The causal check of a retrieval method: take one plain gradient step on the examples it found, see
how much more likely the completion became, undo the step.
"""

from collections.abc import Sequence

import torch
from torch import nn

from estimators.model.measurement import negative_log_likelihood, next_token_logits
from estimators.model.tokens import Sequence1D, collate


class TailPatch:
    """One-step causal effects on a model, which is left as it was after each measurement.

    Args:
        model: its weights are changed during a measurement and restored bit by bit.
        learning_rate: of the step, on the mean loss a token of the examples.
    """

    def __init__(self, model: nn.Module, learning_rate: float) -> None:
        self._model = model
        self._rate = learning_rate
        self._kept = [parameter.detach().clone() for parameter in model.parameters()]

    def gain(self, query: Sequence1D, examples: Sequence[Sequence1D]) -> float:
        """Change of log p(completion | prompt) in nats by one step on ``examples``.

        Raises:
            ValueError: no example predicts anything.
        """
        tokens = sum(example.targets for example in examples)
        if tokens == 0:
            raise ValueError("None of the examples has two tokens or more; nothing to step on.")
        before = self._log_probability(query)
        parameters = list(self._model.parameters())
        for parameter in parameters:
            parameter.requires_grad_(True)
        batch = collate(examples).to(parameters[0].device)
        loss = negative_log_likelihood(next_token_logits(self._model, batch), batch).sum() / tokens
        gradients = torch.autograd.grad(loss, parameters)
        with torch.no_grad():
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.requires_grad_(False).sub_(gradient, alpha=self._rate)
            after = self._log_probability(query)
            for parameter, kept in zip(parameters, self._kept, strict=True):
                parameter.copy_(kept)
        return after - before

    @torch.no_grad()
    def _log_probability(self, query: Sequence1D) -> float:
        batch = collate([query]).to(next(self._model.parameters()).device)
        return -float(negative_log_likelihood(next_token_logits(self._model, batch), batch)[0])
