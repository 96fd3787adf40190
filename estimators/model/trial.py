"""A trial pass on eight tokens: which linear modules can be attributed, and why others cannot."""

import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

TRIAL_SHAPE = (2, 4)
"""Sequences and tokens of the trial: the fewest that tell [batch, token] from other shapes."""

FORESIGHT = 0.02
"""Share of the largest logit by which rounding of packed weights may move others."""


def find_obstacles(model: nn.Module, modules: Mapping[str, nn.Module]) -> dict[str, str]:
    """Run the model forward and backward once and tell what keeps a module from being attributed.

    Such are modules that run more than once (their gradient is the sum over all uses), see inputs
    other than [batch, token, feature] (routed experts), never run or get no gradient. The same
    model gives the same answer wherever its layers are looked for. It is left as it was.

    Args:
        model: a causal language model; one without ``get_input_embeddings`` is not run.
        modules: linear modules by name.

    Returns:
        One clause for each module that cannot be attributed, by name.

    Raises:
        ValueError: the model does not run; gradients cannot pass through a module: those of
            all earlier layers would silently lack a part; or what it predicts depends on tokens
            that come later.
    """
    embeddings = getattr(model, "get_input_embeddings", None)
    if not callable(embeddings):
        return {}
    trial = _Trial()
    trained = [p for p in model.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    handles = [
        module.register_forward_hook(trial.watch(name), with_kwargs=True)
        for name, module in modules.items()
    ]
    try:
        with torch.enable_grad(), embeddings_require_grad(model), warnings.catch_warnings():
            # What an undifferentiable kernel warns of is raised below, with the module's name.
            warnings.filterwarnings("ignore", message=".*an autograd kernel was not registered")
            tokens = trial_tokens(embeddings())
            logits = model(**tokens, use_cache=False).logits
            if logits.requires_grad:
                logits.float().logsumexp(-1).sum().backward()
    except RuntimeError as error:
        raise ValueError(
            f"The model cannot be differentiated: a trial pass on eight tokens failed with "
            f"{type(error).__name__}: {error}"
        ) from error
    finally:
        for handle in handles:
            handle.remove()
        for parameter in trained:
            parameter.requires_grad_(True)
    trial.refuse_opaque(modules)
    _refuse_foresight(model, tokens, logits.detach())
    found = {name: trial.obstacle(name) for name in modules}
    return {name: reason for name, reason in found.items() if reason is not None}


@contextmanager
def embeddings_require_grad(model: nn.Module) -> Iterator[None]:
    """Make the token embeddings' output require a gradient, so that no weight needs to."""
    embeddings = getattr(model, "get_input_embeddings", None)
    if not callable(embeddings):
        yield
        return
    handle = embeddings().register_forward_hook(_require_grad)
    try:
        yield
    finally:
        handle.remove()


def trial_tokens(embeddings: nn.Module) -> dict[str, Tensor]:
    """Arguments of a trial pass: different tokens that the embeddings know."""
    weight: Tensor = embeddings.weight  # type: ignore[assignment]
    count = TRIAL_SHAPE[0] * TRIAL_SHAPE[1]
    vocabulary = int(getattr(embeddings, "num_embeddings", len(weight)))
    ids = (torch.arange(count, device=weight.device) % vocabulary).view(TRIAL_SHAPE)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@torch.no_grad()
def _refuse_foresight(model: nn.Module, tokens: dict[str, Tensor], logits: Tensor) -> None:
    """Raise ValueError if another last token changes what is predicted at an earlier one."""
    ids = tokens["input_ids"].clone()
    ids[:, -1] = ids[:, 0]
    other = model(**{**tokens, "input_ids": ids}, use_cache=False).logits
    moved = (other - logits)[:, :-1].abs().max()
    if moved > FORESIGHT * logits.abs().max():
        raise ValueError(
            "The model is not causal: what it predicts for a token depends on tokens that come "
            "later, so that its probabilities are none of what it would say. Give a model that "
            "reads from left to right (is_decoder in its configuration)."
        )


class _Trial:
    """What the watched modules did."""

    def __init__(self) -> None:
        self._runs: Counter[str] = Counter()
        self._shapes: dict[str, str] = {}
        self._opaque: set[str] = set()
        self._reached: set[str] = set()

    def watch(self, name: str) -> Any:
        """A forward hook; runs without gradients, as a checkpointed block's first, do not count."""

        def after_forward(
            module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], output: Any
        ) -> None:
            if not torch.is_grad_enabled():
                return
            self._runs[name] += 1
            if not inputs or not isinstance(inputs[0], Tensor):
                self._shapes[name] = f"named {', '.join(named)}"
                return
            if inputs[0].ndim != 3 or inputs[0].shape[:2] != TRIAL_SHAPE:
                self._shapes[name] = f"of shape {tuple(inputs[0].shape)}"
            if inputs[0].requires_grad and not _passes_gradients(module, inputs[0]):
                self._opaque.add(name)
            if isinstance(output, Tensor) and output.requires_grad:
                output.register_hook(  # type: ignore[no-untyped-call]
                    lambda _: self._reached.add(name)
                )

        return after_forward

    def refuse_opaque(self, modules: Mapping[str, nn.Module]) -> None:
        """Raise ValueError if gradients cannot pass through a module that they have to pass."""
        if self._opaque:
            listing = [f"{n} ({type(modules[n]).__name__})" for n in modules if n in self._opaque]
            raise ValueError(
                f"Gradients cannot pass through {len(listing)} of the model's layers, so those of "
                f"all earlier layers would be wrong: {', '.join(listing[:3])}"
                f"{', ...' if len(listing) > 3 else ''}. Load the model in floating point or with "
                f"a quantisation that can be differentiated, e.g. bitsandbytes."
            )

    def obstacle(self, name: str) -> str | None:
        """Why the module cannot be attributed, or None."""
        if self._runs[name] == 0:
            return "did not run in a trial pass"
        if self._runs[name] > 1:
            return "runs more than once in a forward pass"
        if name in self._shapes:
            return f"its inputs are {self._shapes[name]}, not [batch, token, feature]"
        if name not in self._reached:
            return "no gradient reaches it"
        return None


def _passes_gradients(module: nn.Module, inputs: Tensor) -> bool:
    """Whether the module's output has a derivative with respect to its inputs."""
    probe = inputs.detach().requires_grad_()
    try:
        output = module.forward(probe)
        if not output.requires_grad:
            return False
        (gradient,) = torch.autograd.grad(output.float().sum(), probe, allow_unused=True)
    except RuntimeError:
        return False
    return gradient is not None


def _require_grad(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
    return output if output.requires_grad else output.detach().requires_grad_(True)
