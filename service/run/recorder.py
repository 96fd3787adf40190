"""Recording a training: beside a ``transformers`` Trainer, or around one's own loop."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import TrainerCallback

from estimators.run.recorded import UNCOUNTED
from service.checkpoints import ModelSource
from service.run.errors import Unrecordable
from service.run.optimizers import bare_optimizer
from service.run.recording import Recording, RunSettings
from service.run.writing import RowIds

LOSS_TOLERANCE = 1e-3
"""Relative; the sum over the tokens of a pass is taken in another order, in float32."""


class RunRecorder(TrainerCallback):  # type: ignore[misc]
    """Records the run of a Trainer, of TRL's SFTTrainer too: ``Trainer(callbacks=[...])``.

    Args:
        folder: for the run; it must not hold one.
        model_source: folder or name of the model before training; by default what its
            configuration says. Of an adapter, its base model.
        every: keep a state each so many steps; the root of their number by default.
        ids: of rows, by their tokens; by default the hash of tokens and labels.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        model_source: str | ModelSource | None = None,
        every: int | None = None,
        ids: RowIds | None = None,
    ) -> None:
        self._folder = Path(folder)
        self._source = _as_source(model_source)
        self._every = every
        self._ids = ids
        self._recording: Recording | None = None
        self._watch: list[RemovableHandle] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Refuse what cannot be recorded, and watch the model and its optimizer from now on."""
        _check_arguments(args)
        if self._recording is not None:  # of a training that failed
            self._recording.abandon("another training began")
            self._finish()
        model = given["model"]
        tokenizer = given.get("processing_class")
        settings = RunSettings(
            source=self._source,
            clipping=args.max_grad_norm or None,
            total=state.max_steps - state.global_step,
            every=self._every,
            accumulation=None,
            padding=getattr(tokenizer, "pad_token_id", None),
            ids=self._ids,
            seeds={"seed": args.seed, "data_seed": args.data_seed or args.seed},
            autocast="bfloat16" if args.bf16 else None,
            whole_model_trains=True,
        )
        optimizer = bare_optimizer(given["optimizer"])
        self._recording = Recording(self._folder, model, optimizer, settings)
        self._watch = _watch_passes(model, self._recording)

    def on_log(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """The closing log comes before the best checkpoint is put in place of the last state."""
        if "train_runtime" in (given.get("logs") or {}):
            self._finish()

    def on_train_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """The same where nothing is logged."""
        self._finish()

    def _finish(self) -> None:
        if self._recording is not None:
            self._recording.finish()
            self._recording.detach()
        for handle in self._watch:
            handle.remove()
        self._recording, self._watch = None, []


@contextmanager
def record_run(
    folder: str | Path,
    model: nn.Module,
    optimizer: Any,
    *,
    model_source: str | ModelSource | None = None,
    clipping: float | None = None,
    total: int | None = None,
    every: int | None = None,
    accumulation: int = 1,
    padding: int | None = None,
    ids: RowIds | None = None,
    seeds: Mapping[str, int] | None = None,
    watch: bool = True,
) -> Iterator[Recording]:
    """Record the training loop inside of ``with``.

    Args:
        folder: for the run; it must not hold one.
        model: in training mode while it trains.
        optimizer: torch.optim's SGD, Adam or AdamW, without a step made.
        model_source: folder or name of the model before training.
        clipping: ``max_norm`` of ``clip_grad_norm_(model.parameters(), max_norm)``; None for none.
        total: how many steps there will be.
        every: keep a state each so many steps; the root of ``total`` by default.
        accumulation: by what the loop divides each pass' mean loss; not for passes that are told
            with a divisor or are given ``num_items_in_batch``.
        padding: token id of padding, where the model's configuration has none.
        ids: of rows, by their tokens; by default the hash of tokens and labels.
        seeds: to be kept with the run.
        watch: take passes from the model itself, which must be given ``labels``; otherwise each is
            told by ``run.batch(input_ids, labels, attention_mask, divisor)``.

    Raises:
        Unrecordable: the training has something that cannot be repeated.
        RunFault: there is no room for the states.
    """
    settings = RunSettings(
        source=_as_source(model_source),
        clipping=clipping,
        total=total,
        every=every,
        accumulation=accumulation,
        padding=padding,
        ids=ids,
        seeds=seeds or {},
    )
    recording = Recording(Path(folder), model, bare_optimizer(optimizer), settings)
    handles = _watch_passes(model, recording) if watch else []
    try:
        yield recording
    except BaseException as error:
        recording.abandon(f"the training raised {type(error).__name__}: {error}")
        raise
    else:
        recording.finish()
    finally:
        recording.detach()
        for handle in handles:
            handle.remove()


def _as_source(source: str | ModelSource | None) -> ModelSource | None:
    return ModelSource.of(source) if isinstance(source, str) else source


def _check_arguments(args: Any) -> None:
    """Raise Unrecordable for what a Trainer's arguments ask for."""
    if args.world_size > 1 or args.n_gpu > 1:
        raise Unrecordable(
            f"The training runs in {args.world_size} processes on {args.n_gpu} devices each; "
            f"record one in a single process on one device."
        )
    asked = {
        "fp16": "scaled gradients are not recorded; use bf16 or float32",
        "torch_compile": "a compiled model is not watched; leave it off",
        "label_smoothing_factor": "another loss is not recorded; set it to 0",
        "neftune_noise_alpha": "its noise is not recorded; leave it off",
    }
    for name, reason in asked.items():
        if getattr(args, name, None):
            raise Unrecordable(f"The training has {name} on: {reason}.")


def _watch_passes(model: nn.Module, recording: Recording) -> list[RemovableHandle]:
    """Take each forward pass of a training, and check the first one's loss."""

    def before(module: nn.Module, positional: tuple[Any, ...], named: dict[str, Any]) -> None:
        if module.training and torch.is_grad_enabled():
            _take(recording, positional, named)

    def after(
        module: nn.Module, positional: tuple[Any, ...], named: dict[str, Any], output: Any
    ) -> None:
        if module.training and torch.is_grad_enabled() and recording.is_open:
            check.remove()
            fault = _loss_fault(named["labels"], named.get("num_items_in_batch"), output)
            if fault is not None:
                recording.refuse(fault)

    check = model.register_forward_hook(after, with_kwargs=True)
    return [model.register_forward_pre_hook(before, with_kwargs=True), check]


def _take(recording: Recording, positional: tuple[Any, ...], named: dict[str, Any]) -> None:
    given = dict(named)
    if len(positional) == 1:
        given["input_ids"] = positional[0]
    missing = [name for name in ("input_ids", "labels") if given.get(name) is None]
    if missing or len(positional) > 1:
        recording.refuse(
            f"The model is given no {' and no '.join(missing) or 'names of its arguments'} in "
            f"training, so its loss is computed elsewhere; a run is recorded from "
            f"model(input_ids=..., labels=...), or tell each pass with "
            f"record_run(..., watch=False) and run.batch(...)."
        )
        return
    divisor = given.pop("num_items_in_batch", None)
    recording.batch(
        given.pop("input_ids"),
        given.pop("labels"),
        given.pop("attention_mask", None),
        None if divisor is None else float(divisor),
        **given,
    )


@torch.no_grad()
def _loss_fault(labels: Tensor, divisor: Any, output: Any) -> str | None:
    """What is wrong if the model's loss is not that of the next tokens alone."""
    loss, logits = getattr(output, "loss", None), getattr(output, "logits", None)
    if loss is None or logits is None or logits.shape[:2] != labels.shape:
        return None
    total = sum(  # a row at a time: logits are large
        float(nn.functional.cross_entropy(row[:-1].float(), own[1:], reduction="sum"))
        for row, own in zip(logits, labels, strict=True)
    )
    expected = total / float((labels[:, 1:] != UNCOUNTED).sum() if divisor is None else divisor)
    if abs(float(loss) - expected) <= LOSS_TOLERANCE * abs(expected):
        return None
    return (
        f"The model's loss is {float(loss):.6g}, but that of the next tokens is {expected:.6g}: "
        f"it has a further part (e.g. of a router) or is scaled; only the loss of the next tokens "
        f"is recorded."
    )
