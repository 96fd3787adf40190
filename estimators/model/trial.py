"""A trial pass on eight tokens: which linear modules can be attributed, and why others cannot."""

import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from estimators.layers.judging import FOLLOWED_SHAPE, Findings
from estimators.layers.scale import ScaleTrial
from estimators.layers.trying import try_following
from estimators.model.recomputation import kept_activations

TRIAL_SHAPE = (2, 4)
"""Sequences and tokens of the trial: the fewest that tell [batch, token] from other shapes."""

FORESIGHT = 1e-4
"""Share of the largest logit by which rounding may move others, in float32 and wider."""

COARSE_FORESIGHT = 0.02
"""The same of packed weights and narrower precision."""


@dataclass(frozen=True, kw_only=True)
class Trial:
    """What a trial pass found.

    Attributes:
        obstacles: one clause for each linear module that cannot be attributed as it is, by name.
        unusual: those whose rows may be followed: they saw others than [batch, token, feature], or
            did not run.
        opaque: those whose output is not that of an affine map of their input: what they multiply
            by may be seen inside.
        idle: those that did not run: others may multiply by their weights.
    """

    obstacles: dict[str, str] = field(default_factory=dict)
    unusual: frozenset[str] = frozenset()
    opaque: frozenset[str] = frozenset()
    idle: frozenset[str] = frozenset()


def run_trial(model: nn.Module, modules: Mapping[str, nn.Module]) -> Trial:
    """Run the model forward and backward once and tell what keeps a module from being attributed.

    Such are modules that run more than once (their gradient is the sum over all uses), see inputs
    other than [batch, token, feature] (routed experts), never run or get no gradient. The same
    model gives the same answer wherever its layers are looked for. It is left as it was.

    Args:
        model: a causal language model; one without ``get_input_embeddings`` is not run.
        modules: linear modules by name.

    Raises:
        ValueError: the model does not run; gradients cannot pass through a module: those of
            all earlier layers would silently lack a part; or what it predicts depends on tokens
            that come later, or on padding.
    """
    embeddings = getattr(model, "get_input_embeddings", None)
    if not callable(embeddings):
        return Trial()
    trial = _Trial()
    handles = [
        module.register_forward_hook(trial.watch(name), with_kwargs=True)
        for name, module in modules.items()
    ]
    try:
        with _frozen(model), torch.enable_grad():
            tokens = trial_tokens(embeddings())
            logits = _logits(model, tokens)
            if logits.requires_grad:
                logits.float().logsumexp(-1).sum().backward()  # type: ignore[no-untyped-call]
    except FAILURES as error:
        raise _cannot_run(error) from error
    finally:
        for handle in handles:
            handle.remove()
    trial.refuse_opaque(modules)
    _refuse_foresight(model, tokens, logits.detach())
    found = {name: trial.obstacle(name) for name in modules}
    return Trial(
        obstacles={name: reason for name, reason in found.items() if reason is not None},
        unusual=frozenset(trial.unusual(modules)),
        opaque=frozenset(trial.changed),
        idle=frozenset(trial.idle(modules)),
    )


def follow_rows(
    model: nn.Module, modules: Mapping[str, nn.Module], holders: Mapping[str, nn.Module]
) -> Findings:
    """Try what is not simply [batch, token, feature]: see ``estimators.layers.trying``.

    Args:
        model: a causal language model; one without ``get_input_embeddings`` is not run.
        modules: linear modules whose rows may be followed, by name.
        holders: modules whose own parameters may be matrices, by name.

    Raises:
        ValueError: the model does not run on ten tokens.
    """
    embeddings = getattr(model, "get_input_embeddings", None)
    if not callable(embeddings) or not (modules or holders):
        return Findings()
    tokens = trial_tokens(embeddings(), FOLLOWED_SHAPE)
    try:
        with _frozen(model), kept_activations(model):
            return try_following(model, lambda: _logits(model, tokens), modules, holders)
    except FAILURES as error:
        raise _cannot_run(error) from error


def find_scales(
    model: nn.Module, modules: Mapping[str, nn.Module]
) -> tuple[dict[str, list[str]], dict[str, str]]:
    """Which vectors of modules are scales: see ``estimators.layers.scale``.

    Args:
        model: a causal language model; one without ``get_input_embeddings`` is not run.
        modules: by name, whose own vectors are tried.

    Returns:
        Scales of each module by name; why others are none.

    Raises:
        ValueError: the model does not run.
    """
    embeddings = getattr(model, "get_input_embeddings", None)
    if not callable(embeddings) or not modules:
        return {}, {}
    tokens = trial_tokens(embeddings())
    trial = ScaleTrial(modules, TRIAL_SHAPE)
    try:
        with _frozen(model), kept_activations(model), torch.enable_grad():
            with trial.frozen():
                _logits(model, tokens)
            vectors = list(trial.parameters().values())
            for vector in vectors:
                vector.requires_grad_(True)
            try:
                with trial.watching():
                    logits = _logits(model, tokens)
                return trial.judge(logits.float().logsumexp(-1).sum())
            finally:
                for vector in vectors:
                    vector.requires_grad_(False)
    except FAILURES as error:
        raise _cannot_run(error) from error


FAILURES = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    NotImplementedError,
    RuntimeError,
    TypeError,
    ValueError,
)
"""What a model's own code may raise on tokens alone."""


def _cannot_run(error: Exception) -> ValueError:
    text = " ".join(str(error).split())
    return ValueError(
        f"The model cannot be differentiated: a trial pass on eight tokens failed with "
        f"{type(error).__name__}: {text[:500]}"
    )


def _logits(model: nn.Module, tokens: Mapping[str, Tensor]) -> Tensor:
    """What the model says of tokens: [batch, token, vocabulary].

    Raises:
        ValueError: it says something else.
    """
    logits = getattr(model(**tokens, use_cache=False), "logits", None)
    shape = tokens["input_ids"].shape
    if not isinstance(logits, Tensor) or logits.shape[:-1] != shape:
        found = tuple(logits.shape) if isinstance(logits, Tensor) else "none"
        raise ValueError(
            f"a causal language model gives logits for each of {tuple(shape)} tokens, this one: "
            f"{found}"
        )
    return logits


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """No weight requires a gradient meanwhile, and the embeddings' output does."""
    trained = [p for p in model.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        with embeddings_require_grad(model), warnings.catch_warnings():
            # What an undifferentiable kernel warns of is raised later, with the module's name.
            warnings.filterwarnings("ignore", message=".*an autograd kernel was not registered")
            yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


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


def trial_tokens(embeddings: nn.Module, shape: tuple[int, int] = TRIAL_SHAPE) -> dict[str, Tensor]:
    """Arguments of a trial pass: different tokens that the embeddings know."""
    weight: Tensor = embeddings.weight  # type: ignore[assignment]
    count = shape[0] * shape[1]
    vocabulary = int(getattr(embeddings, "num_embeddings", len(weight)))
    ids = (torch.arange(count, device=weight.device) % vocabulary).view(shape)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@torch.no_grad()
def _refuse_foresight(model: nn.Module, tokens: dict[str, Tensor], logits: Tensor) -> None:
    """Raise ValueError if later tokens change a prediction: another one, or padding after all."""
    ids = tokens["input_ids"].clone()
    ids[:, -1] = ids[:, 0]
    changed = model(input_ids=ids, attention_mask=tokens["attention_mask"], use_cache=False).logits
    _compare(model, changed[:, :-1], logits[:, :-1], "tokens that come later")
    most = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    room = len(PADDING) if not isinstance(most, int) else most - ids.shape[1]
    if not (padding := PADDING[: max(room, 0)]):
        return
    padded = nn.functional.pad(tokens["input_ids"], (0, len(padding)))
    padded[:, -len(padding) :] = padded.new_tensor(padding)
    try:
        everything = torch.ones_like(padded)  # as batches are given
        longer = model(input_ids=padded, attention_mask=everything, use_cache=False).logits
    except FAILURES as error:
        raise _cannot_run(error) from error
    _compare(model, longer[:, : logits.shape[1]], logits, "the padding after a text")


PADDING = (0, 0, 0)
"""Tokens of a batch beyond the end of a sequence, see ``estimators.model.tokens.collate``."""


def _compare(model: nn.Module, found: Tensor, expected: Tensor, what: str) -> None:
    coarse = expected.dtype not in (torch.float32, torch.float64) or any(
        not p.is_floating_point() or p.dtype not in (torch.float32, torch.float64)
        for p in (*model.parameters(), *model.buffers())
        if p.numel() > 1 and p.dtype not in (torch.bool, torch.int64)
    )
    limit = COARSE_FORESIGHT if coarse else FORESIGHT
    if (found - expected).abs().max() > limit * expected.abs().max():
        raise ValueError(
            f"The model is not causal: what it predicts for a token depends on {what}, so that its "
            f"probabilities are none of what it would say. Give a model that reads from left to "
            f"right (is_decoder in its configuration)."
        )


class _Trial:
    """What the watched modules did."""

    def __init__(self) -> None:
        self._runs: Counter[str] = Counter()
        self._shapes: dict[str, str] = {}
        self._opaque: set[str] = set()
        self._reached: set[str] = set()
        self.changed: set[str] = set()

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
            if not _is_affine(module, inputs, output):
                self.changed.add(name)
            first = _first_tensor(output)
            if inputs[0].requires_grad and not _passes_gradients(module, inputs[0]):
                self._opaque.add(name)
            if first is not None and first.requires_grad:
                first.register_hook(  # type: ignore[no-untyped-call]
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

    def idle(self, names: Iterable[str]) -> list[str]:
        """Of these modules those that did not run."""
        return [name for name in names if self._runs[name] == 0]

    def unusual(self, names: Iterable[str]) -> list[str]:
        """Of these modules those that saw other rows than one a token, or none."""
        rare = (n for n in names if self._runs[n] < 2 and n not in self.changed)
        return [n for n in rare if self._runs[n] == 0 or n in self._shapes]

    def obstacle(self, name: str) -> str | None:
        """Why the module cannot be attributed, or None."""
        if self._runs[name] == 0:
            return "did not run in a trial pass"
        if self._runs[name] > 1:
            return "runs more than once in a forward pass"
        if name in self.changed:
            return "its output is not an affine map of its input"
        if name in self._shapes:
            return f"its inputs are {self._shapes[name]}, not [batch, token, feature]"
        if name not in self._reached:
            return "no gradient reaches it"
        return None


def _is_affine(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> bool:
    """Whether the module's output is ``x W + b``, as far as its weights are known."""
    forward = type(module).forward
    if forward in (nn.Linear.forward, Conv1D.forward):
        return True
    if not isinstance(output, Tensor):
        return False
    weight = getattr(module, "weight", None)
    if not isinstance(module, nn.Linear) or not isinstance(weight, nn.Parameter):
        return True
    if not weight.is_floating_point() or weight.shape != (output.shape[-1], inputs[0].shape[-1]):
        return True  # packed
    with torch.no_grad():
        expected = nn.Linear.forward(module, inputs[0])
        return bool(torch.allclose(output, expected, rtol=1e-3, atol=1e-5))


def _first_tensor(output: Any) -> Tensor | None:
    """What a module gives, or the first of several."""
    values = output if isinstance(output, (tuple, list)) else [output]
    return next((value for value in values if isinstance(value, Tensor)), None)


def _passes_gradients(module: nn.Module, inputs: Tensor) -> bool:
    """Whether the module's output has a derivative with respect to its inputs."""
    probe = inputs.detach().requires_grad_()
    try:
        output = _first_tensor(module.forward(probe))
        if output is None or not output.requires_grad:
            return False
        (gradient,) = torch.autograd.grad(output.float().sum(), probe, allow_unused=True)
    except RuntimeError:
        return False
    return gradient is not None


def _require_grad(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
    if output.requires_grad:
        return output
    return output.detach().requires_grad_(True).clone()  # no leaf: models may scale it in place
