"""A training while it is recorded: what it reads and what it reaches, step by step."""

import logging
import math
import shutil
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from estimators.model.layers import plain_name
from estimators.run.recorded import Recipe
from estimators.storage import fingerprint_tensors
from index.errors import IndexFault
from index.files import exclusive
from service.checkpoints import ModelSource
from service.run.batches import ReadBatch, read_batch
from service.run.dropout import active_dropout
from service.run.errors import RunFault, Unrecordable
from service.run.facts import RunFacts
from service.run.model_facts import (
    adapter_of,
    attention_of,
    check_placement,
    main_dtype,
    padding_of,
    source_of,
)
from service.run.optimizers import (
    bytes_of_state,
    constants_of,
    flag_of,
    named_parameters,
    recipe_of,
    state_of,
    states_kept,
    trained_names,
)
from service.run.writing import RowIds, RunWriter
from service.versions import versions

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """What a recording cannot see by itself.

    Attributes:
        source: where the model comes from; None takes what its configuration says.
        clipping: largest norm of the gradient, all of the model's parameters together.
        total: how many steps are planned.
        every: keep a state each so many steps; None takes the root of ``total``.
        accumulation: by what each pass' mean loss is divided where no divisor is told: a number,
            or None for the number of passes of the step.
        padding: token id of padding; None takes what the configuration says.
        ids: of rows, by their tokens.
        seeds: those that are known, by name.
        autocast: dtype of automatic mixed precision; None looks at the first pass.
        whole_model_trains: whether modules that are in evaluation mode now will not be.
    """

    source: ModelSource | None = None
    clipping: float | None = None
    total: int | None = None
    every: int | None = None
    accumulation: int | None = 1
    padding: int | None = None
    ids: RowIds | None = None
    seeds: Mapping[str, int] = field(default_factory=dict)
    autocast: str | None = None
    whole_model_trains: bool = False


class Recording:
    """Writes what a model reads and what its optimizer makes of it.

    What cannot be recorded is refused before the first step. Whatever is met later ends the
    recording with a warning, not the training.

    Args:
        folder: for the run.
        model: about to be trained.
        optimizer: of torch.optim, without a step made.
        settings: what cannot be seen.

    Raises:
        Unrecordable: the training has something that cannot be repeated.
        RunFault: there is no room for the states.
    """

    def __init__(
        self,
        folder: Path,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        settings: RunSettings,
    ) -> None:
        self._model, self._optimizer, self._settings = model, optimizer, settings
        self.recipe = recipe_of(optimizer, model, settings.clipping)
        self._constants = constants_of(optimizer)
        self._every = _interval(settings)
        parameters = named_parameters(model)
        self._trained = {name: parameters[name] for name in trained_names(self.recipe)}
        self._check()
        check_room(folder, self.recipe, self._trained, settings.total, self._every)
        self._padding = padding_of(model, settings.padding)
        self._batches: list[ReadBatch] = []
        self._given: dict[str, Any] | None = None
        self._hold = ExitStack()
        self._hold.enter_context(exclusive(folder))
        with ExitStack() as undo:
            undo.callback(self._hold.close)
            self._writer = RunWriter(folder, settings.ids)
            undo.pop_all()
        self.is_open = True
        self._handles = [
            optimizer.register_step_pre_hook(lambda *_: self._guarded(self._before_step)),
            optimizer.register_step_post_hook(lambda *_: self._guarded(self._after_step)),
        ]

    def batch(
        self,
        input_ids: Tensor,
        labels: Tensor,
        attention_mask: Tensor | None = None,
        divisor: float | None = None,
        **arguments: Any,
    ) -> None:
        """Take a forward pass whose gradient will be part of the next step.

        Args:
            input_ids: token ids, padded on the right.
            labels: at each position its own token, or -100 where it does not count.
            attention_mask: as the model was given it.
            divisor: what the summed losses of its tokens are divided by; None for their number,
                times the settings' ``accumulation``.
            arguments: what else the model was given.
        """

        def take() -> None:
            self._agree(
                {
                    "attention_mask": attention_mask is not None,
                    "arguments": arguments,
                    "autocast": self._settings.autocast or _autocast(input_ids.device),
                }
            )
            self._batches.append(
                read_batch(input_ids, labels, attention_mask, divisor, self._padding)
            )

        self._guarded(take)

    def refuse(self, reason: str) -> None:
        """Something cannot be recorded: raised before the first step, a warning later."""

        def say() -> None:
            raise Unrecordable(reason)

        self._guarded(say)

    def finish(self) -> None:
        """The training is over: keep the last state; nothing if the recording has ended."""
        self._guarded(self._finish)

    def abandon(self, reason: str) -> None:
        """The training ended early: the run is not whole."""
        if self.is_open:
            self._end()
            with suppress(IndexFault, OSError):  # a full disk is no reason to end the training
                self._writer.stop(reason) if self._writer.steps else self._writer.discard()

    def detach(self) -> None:
        """Watch the optimizer no longer; never in one of its hooks, which it is going through."""
        for handle in self._handles:
            handle.remove()

    def _guarded(self, act: Callable[[], None]) -> None:
        """Before the first step errors are the caller's; later they end the recording only."""
        if not self.is_open:
            return
        try:
            act()
        except (RunFault, IndexFault, OSError) as error:
            steps = self._writer.steps
            self.abandon(str(error))
            if steps == 0:
                raise
            _log.warning("The run is recorded no longer, after %d steps: %s", steps, error)

    def _before_step(self) -> None:
        if not self._batches:
            raise Unrecordable(
                "The optimizer makes a step, but no forward pass of the model in training mode was "
                "seen before it; call model.train(), or tell the passes with run.batch(...)."
            )
        if self._writer.steps == 0:
            self._begin()
        if constants_of(self._optimizer) != self._constants:
            raise Unrecordable("A constant of the optimizer other than the learning rate changed.")
        passes = self._settings.accumulation or len(self._batches)
        batches = [self._writer.batch(b, exact_divisor(b, passes)) for b in self._batches]
        rates = [float(group["lr"]) for group in self._optimizer.param_groups]
        self._batches = []
        self._writer.step(batches, rates)

    def _after_step(self) -> None:
        step = self._writer.steps
        if step % self._every == 0 or step == self._settings.total:
            self._writer.state(state_of(step, self._trained, self._optimizer))

    def _finish(self) -> None:
        if self._writer.steps == 0:
            self.abandon("No step was made.")
            return
        self._writer.finish(state_of(self._writer.steps, self._trained, self._optimizer))
        self._end()

    def _end(self) -> None:
        self.is_open = False
        self._hold.close()

    def _begin(self) -> None:
        self._check()
        assert self._given is not None
        model, settings = self._model, self._settings
        weights = {plain_name(name): value for name, value in model.state_dict().items()}
        facts = RunFacts(
            recipe=self.recipe,
            source=source_of(model, settings.source),
            weights_sha256=fingerprint_tensors(weights),
            adapter=adapter_of(model),
            differentiated=tuple(n for n, p in named_parameters(model).items() if p.requires_grad),
            foreach=flag_of(self._optimizer, "foreach"),
            fused=flag_of(self._optimizer, "fused"),
            padding=self._padding or 0,
            attention=attention_of(model),
            dtype=main_dtype(model),
            device=str(next(model.parameters()).device),
            threads=torch.get_num_threads(),
            matmul_precision=torch.get_float32_matmul_precision(),
            every=self._every,
            total=settings.total,
            seeds={"torch": torch.initial_seed(), **settings.seeds},
            versions=versions(),
            **self._given,
        )
        self._writer.begin(facts)
        self._writer.state(state_of(0, self._trained, self._optimizer))

    def _agree(self, given: dict[str, Any]) -> None:
        """Raise Unrecordable unless the model is given the same arguments as ever."""
        if given["autocast"] == "float16":
            raise Unrecordable(
                "The training is in float16 with scaled gradients; record one in float32 or "
                "bfloat16."
            )
        if self._given is None:
            odd = [n for n, v in given["arguments"].items() if not _is_plain(v)]
            if odd:
                raise Unrecordable(
                    f"The model is given {', '.join(sorted(odd))}, which a record does not hold; "
                    f"pass input_ids, labels and attention_mask alone."
                )
            self._given = given
        if given != self._given:
            raise Unrecordable(
                f"The model was given {self._given} at first and is given {given} now; give it the "
                f"same arguments in every pass."
            )

    def _check(self) -> None:
        """Raise Unrecordable for what shows in model and optimizer."""
        check_placement(self._model)
        everywhere = self._settings.whole_model_trains
        found = list(active_dropout(self._model, in_training_only=not everywhere))
        if found:
            raise Unrecordable(
                f"Dropout is on in {len(found)} places ({', '.join(found[:3])}), and its masks are "
                f"not recorded; set it to 0 in the model's configuration."
            )
        for flag in ("foreach", "fused"):
            flag_of(self._optimizer, flag)
        if self._optimizer.state and not self._started():
            raise Unrecordable(
                "The optimizer has made steps already, e.g. before a checkpoint that the training "
                "goes on from; record a training from its first step."
            )

    def _started(self) -> bool:
        return hasattr(self, "_writer") and self._writer.steps > 0


def exact_divisor(batch: ReadBatch, passes: int) -> float:
    """What divides a pass' summed losses, to the last bit of its gradients.

    A mean that is divided again is rounded to float32 in between: ``1 / divisor`` in float32 is
    what the gradient of each token's loss was.
    """
    if not batch.is_mean or batch.divisor == 0 or not math.isfinite(batch.divisor):
        return batch.divisor
    scale = np.float32(1) / np.float32(passes) / np.float32(batch.divisor)
    whole = passes * batch.divisor
    return whole if np.float32(1 / whole) == scale else 1 / float(scale)


def check_room(
    folder: Path,
    recipe: Recipe,
    trained: Mapping[str, Tensor],
    total: int | None,
    every: int,
) -> None:
    """Raise RunFault if the states will not fit on the disk; without a total, the first two."""
    states = states_kept(total, every) if total else 2
    needed = states * bytes_of_state(recipe, trained.values())
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise RunFault(
            f"{states} states take {needed / 1e9:,.1f} GB, but {existing} has room for "
            f"{free / 1e9:,.1f} GB; keep fewer with a larger 'every', or choose another disk."
        )


def _interval(settings: RunSettings) -> int:
    if settings.every is not None:
        if settings.every < 1:
            raise Unrecordable(f"'every' is {settings.every}; keep a state each 1 or more steps.")
        return settings.every
    if not settings.total:
        raise Unrecordable(
            "Neither 'total', the number of steps, nor 'every' is given; a state is kept each "
            "'every' steps."
        )
    return max(1, round(math.sqrt(settings.total)))


def _autocast(device: torch.device) -> str | None:
    if not torch.is_autocast_enabled(device.type):
        return None
    return str(torch.get_autocast_dtype(device.type)).removeprefix("torch.")


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, bool | int | float | str)
