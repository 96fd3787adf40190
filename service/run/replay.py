"""A recorded run made again: as it was, with other weights of its rows, or without some."""

import collections
import math
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from estimators.model.progress import Progress, no_progress
from estimators.run.recorded import UNCOUNTED, Batch, State, Step
from index.files import exclusive
from service.run.errors import RunMismatch
from service.run.folder import RecordedRun
from service.run.loading import in_training, put_first
from service.run.optimizers import build_optimizer, named_parameters, state_of, trained_names
from service.run.recording import check_room
from service.run.writing import RunWriter


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """How a run made again differs from its record.

    Attributes:
        states: how many were compared.
        first_difference: after how many steps a state differed first; None if all are identical.
        largest_difference: over all states and tensors, of the largest difference of any number
            relative to the largest number of the tensor.
    """

    states: int
    first_difference: int | None
    largest_difference: float


def retrain(
    run: RecordedRun,
    model: nn.Module,
    weights: Sequence[float],
    progress: Progress = no_progress,
) -> State:
    """Train again with a weight on each row's loss, from the first step on.

    Rows of weight 0 keep their place in batches and in what losses are divided by. The model is
    left in the last state.

    Args:
        run: the run.
        model: the run's, in any state: as ``load_first_model`` gave it, or from ``load_model``.
        weights: one a row.
        progress: shows how far it is.

    Returns:
        The last state, copied.

    Raises:
        RunMismatch: it is another model, or there are more or fewer weights than rows.
    """
    return _copied(collections.deque(_states(run, model, weights, progress), maxlen=1).pop())


def replay(
    run: RecordedRun, model: nn.Module, progress: Progress = no_progress
) -> tuple[State, Comparison]:
    """Train again as it was, and compare with every state that was kept.

    Args:
        run: the run.
        model: the run's, in any state.
        progress: shows how far it is.

    Returns:
        The last state, copied, and how it all compares.

    Raises:
        RunMismatch: it is another model.
    """
    kept = set(run.state_steps)
    state = run.state(0)
    compared, first, largest = 0, None, 0.0
    for state in _states(run, model, [1.0] * len(run.rows), progress):
        if state.step in kept:
            compared += 1
            difference = difference_of(state, run.state(state.step))
            if difference is not None:
                first = state.step if first is None else first
                largest = max(largest, difference)
    comparison = Comparison(states=compared, first_difference=first, largest_difference=largest)
    return _copied(state), comparison


def record_without(
    run: RecordedRun,
    model: nn.Module,
    left_out: Collection[int],
    folder: Path,
    progress: Progress = no_progress,
) -> State:
    """Train again without some rows, and record that as a run of its own.

    It can be replayed and traced like any other. Passes keep their width, and what losses are
    divided by; rows keep their ids, and are numbered as they are read. The model is left in the
    last state.

    Args:
        run: the run.
        model: the run's, in any state.
        left_out: numbers of rows.
        folder: for the new run.
        progress: shows how far it is.

    Returns:
        The last state, copied.

    Raises:
        RunMismatch: it is another model, or a step would read no row.
        Unrecordable: the folder holds a run already.
        RunFault: there is no room for the states.
    """
    absent = set(left_out)
    rest = replace(run, steps=tuple(_step_without(s, absent, n) for n, s in enumerate(run.steps)))
    put_first(run, model)
    trained = {n: p for n, p in named_parameters(model).items() if n in trained_names(run.recipe)}
    check_room(folder, run.recipe, trained, len(rest.steps), run.facts.every)
    with exclusive(folder):
        writer = RunWriter(folder, {row.tokens: row.id for row in run.rows})
        writer.begin(run.facts)
        state = run.state(0)
        try:
            for state in _states(rest, model, [1.0] * len(run.rows), progress):
                if state.step:
                    _write_step(writer, rest, rest.steps[state.step - 1])
                if state.step % run.facts.every == 0:
                    writer.state(state)
            writer.finish(state)
        except BaseException as error:
            writer.stop(f"it ended with {type(error).__name__} {error}".strip() + ".")
            raise
    return _copied(state)


def _step_without(step: Step, absent: Collection[int], number: int) -> Step:
    batches = [
        replace(batch, rows=tuple(row for row in batch.rows if row not in absent))
        for batch in step.batches
    ]
    left = tuple(batch for batch in batches if batch.rows)
    if not left:
        raise RunMismatch(
            f"Step {number + 1} would read no row, so it would not be a step; leave fewer rows out."
        )
    return replace(step, batches=left)


def _write_step(writer: RunWriter, run: RecordedRun, step: Step) -> None:
    batches = []
    for batch in step.batches:
        rows = [run.rows[number] for number in batch.rows]
        numbers = [writer.number(np.array(r.tokens), np.array(r.labels)) for r in rows]
        batches.append(replace(batch, rows=tuple(numbers)))
    writer.step(batches, step.rates)


def difference_of(state: State, other: State) -> float | None:
    """The largest relative difference of their tensors; None if every bit is the same."""
    pairs = [(state.parameters, other.parameters)]
    pairs += [(values, other.moments.get(kind, {})) for kind, values in state.moments.items()]
    worst, same = 0.0, True
    for values, others in pairs:
        for name, value in values.items():
            if name not in others:
                return math.inf
            reference = others[name].to(value.device)
            if not torch.equal(value, reference):
                same = False
                gap = float((value.float() - reference.float()).abs().max())
                worst = max(worst, gap / max(float(reference.float().abs().max()), 1e-30))
    return None if same else worst


def _states(
    run: RecordedRun, model: nn.Module, weights: Sequence[float], progress: Progress
) -> Iterator[State]:
    """The state before the first step and after each; views of what goes on to change."""
    if len(weights) != len(run.rows):
        raise RunMismatch(
            f"Expected a weight for each of {len(run.rows)} rows, got {len(weights)}."
        )
    put_first(run, model)
    parameters = named_parameters(model)
    differentiated = [parameters[name] for name in run.facts.differentiated]
    trained = {name: parameters[name] for name in trained_names(run.recipe)}
    optimizer = build_optimizer(
        run.recipe, parameters, foreach=run.facts.foreach, fused=run.facts.fused
    )
    yield state_of(0, trained, optimizer)
    with in_training(run, model), _same_arithmetic(run):
        for number, step in enumerate(progress("steps", run.steps), start=1):
            model.zero_grad()
            for batch in step.batches:
                batch_loss(run, model, batch, weights).backward()  # type: ignore[no-untyped-call]
            if run.recipe.clipping is not None:
                nn.utils.clip_grad_norm_(differentiated, run.recipe.clipping)
            for group, rate in zip(optimizer.param_groups, step.rates, strict=True):
                group["lr"] = rate
            optimizer.step()
            yield state_of(number, trained, optimizer)


def batch_loss(
    run: RecordedRun, model: nn.Module, batch: Batch, weights: Sequence[float]
) -> Tensor:
    """``sum_i weight_i * loss_i / divisor`` of one pass.

    Its gradients are those of ``transformers``' own loss to the last bit where all weights are 1:
    the loss of each token is multiplied by ``1 / divisor``, rounded once.
    """
    device = next(model.parameters()).device
    tokens, labels, mask = (part.to(device) for part in batch_tensors(run, batch))
    given = dict(run.facts.arguments)
    if run.facts.attention_mask:
        given["attention_mask"] = mask
    with _autocast(run, device):
        logits = model(input_ids=tokens, **given).logits.float()
        targets = nn.functional.pad(labels, (0, 1), value=UNCOUNTED)[:, 1:]
        losses = nn.functional.cross_entropy(
            logits.view(-1, logits.shape[-1]),
            targets.reshape(-1),
            ignore_index=UNCOUNTED,
            reduction="none",
        )
    sums = losses.view(targets.shape).sum(1)
    chosen = torch.tensor([weights[row] for row in batch.rows], dtype=sums.dtype, device=device)
    return (chosen * sums).sum() * (1 / batch.divisor)


def batch_tensors(run: RecordedRun, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids, labels and attention mask of a pass, padded on the right."""
    size = (len(batch.rows), batch.width)
    tokens = torch.full(size, run.facts.padding)
    labels = torch.full(size, UNCOUNTED)
    mask = torch.zeros(size, dtype=torch.long)
    for place, number in enumerate(batch.rows):
        row = run.rows[number]
        tokens[place, : len(row.tokens)] = torch.tensor(row.tokens)
        labels[place, : len(row.tokens)] = torch.tensor(row.labels)
        mask[place, : len(row.tokens)] = 1
    return tokens, labels, mask


@contextmanager
def _same_arithmetic(run: RecordedRun) -> Iterator[None]:
    """Threads and precision of matrix products as they were when the run was recorded."""
    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    torch.set_num_threads(run.facts.threads)
    torch.set_float32_matmul_precision(run.facts.matmul_precision)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision(precision)


def _autocast(run: RecordedRun, device: torch.device) -> torch.autocast | nullcontext[None]:
    if run.facts.autocast is None:
        return nullcontext()
    return torch.autocast(device.type, dtype=getattr(torch, run.facts.autocast))


def _copied(state: State) -> State:
    return State(
        step=state.step,
        parameters={name: value.clone() for name, value in state.parameters.items()},
        moments={
            kind: {name: value.clone() for name, value in values.items()}
            for kind, values in state.moments.items()
        },
    )
