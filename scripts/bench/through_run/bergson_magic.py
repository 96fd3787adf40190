"""Bergson's MAGIC over the batches of a recorded run: its training, and its way back through it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from estimators.run.recorded import UNCOUNTED
from service.run.folder import RecordedRun
from service.tracing.walk import Question


class BergsonMagic:
    """One training by Bergson's own trainer and optimizer, and what it says of the rows.

    Args:
        run: of AdamW in float32 on the CPU, all weights trained alike, one pass a step.
        folder: for its checkpoints.
        root_epsilon: what Bergson adds to second moments inside of the root; None takes its
            default. The recorded optimizer adds nothing there.

    Raises:
        ValueError: it cannot repeat such a run.
    """

    def __init__(self, run: RecordedRun, folder: Path, root_epsilon: float | None = None) -> None:
        from bergson.magic.trainer import prepare_trainer

        _check(run)
        self._folder = folder
        self._config = _config(run, folder, root_epsilon)
        self._stream = _stream(run)
        rates = [step.rates[0] for step in run.steps]
        self._trainer, self._state, self._model = prepare_trainer(
            self._config, 0, lambda number: rates[int(number)]
        )
        first, own = run.state(0).parameters, self.weights
        if first.keys() != own.keys():
            raise ValueError("Bergson moves a tensor that is tied to another twice in each step.")
        if not all(torch.equal(value, first[name]) for name, value in own.items()):
            raise ValueError("Bergson loaded other weights than those that the run began with.")

    @property
    def root_epsilon(self) -> float:
        """Added to second moments inside of the root."""
        return float(self._config.eps_root)

    @property
    def weights(self) -> dict[str, Tensor]:
        """As they are now, by name."""
        return {name: value.detach() for name, value in self._state.params.items()}

    def train(self) -> None:
        """All steps, with the checkpoints that the way back needs."""
        self._state = self._trainer.train(
            self._state,
            self._stream,
            inplace=True,
            save_dir=str(self._folder / "checkpoints"),
            save_mode=self._config.save_mode,
            max_grad_norm=self._config.max_grad_norm,
        )

    def influences(self, questions: Sequence[Question]) -> Float[np.ndarray, "question row"]:
        """Of every row on each question, in nats of log p; one way back a question.

        Args:
            questions: of one sequence each, of weight 1.
        """
        from bergson.magic.cli import compute_per_query_magic_scores
        from bergson.magic.data_stream import Padding

        asked = [question[0][0] for question in questions]
        tokens = [list(one.tokens) for one in asked]
        labels = [
            [UNCOUNTED] * one.first_target + list(one.tokens[one.first_target :]) for one in asked
        ]
        scores: Tensor = compute_per_query_magic_scores(
            self._trainer,
            str(self._folder / "checkpoints"),
            self._stream,
            self._state,
            self._model,
            _dataset(tokens, labels),
            len(asked),
            self._config,
            world_size=1,
            global_rank=0,
            padding=Padding(),
        )
        # Derivatives of the mean loss of a question's tokens.
        targets = np.array([len(one.tokens) - one.first_target for one in asked])
        found: Float[np.ndarray, "question row"] = -scores.double().numpy().T * targets[:, None]
        return found


def _check(run: RecordedRun) -> None:
    plain = run.recipe.optimizer == "adamw" and run.recipe.clipping is None
    whole = run.facts.adapter is None and run.facts.dtype == "float32"
    if not (plain and whole and len(run.recipe.groups) == 1 and run.model is not None):
        raise ValueError("Bergson repeats a run of AdamW on all weights in float32 alone here.")
    for step in run.steps:
        for batch in step.batches:
            targets = sum(run.rows[row].targets for row in batch.rows)
            if len(step.batches) > 1 or batch.divisor != targets:
                raise ValueError("Bergson divides a step's losses by its counted tokens alone.")


def _config(run: RecordedRun, folder: Path, root_epsilon: float | None) -> Any:
    from bergson.magic.config import MagicConfig

    (group,) = run.recipe.groups
    given = {} if root_epsilon is None else {"eps_root": root_epsilon}
    return MagicConfig(
        run_path=str(folder),
        model=run.model.name if run.model else "",
        precision="fp32",
        adam_beta1=group.betas[0],
        adam_beta2=group.betas[1],
        adam_eps=group.epsilon,
        weight_decay=group.weight_decay,
        **given,
    )


def _stream(run: RecordedRun) -> Any:
    """The recorded batches, with a weight for each row of the run."""
    from bergson.magic.data_stream import DataStream

    batches = [list(step.batches[0].rows) for step in run.steps]

    class Recorded(DataStream):  # type: ignore[misc]
        def batch_rows(self, number: int) -> list[int]:
            return batches[number]

    rows = _dataset([list(r.tokens) for r in run.rows], [list(r.labels) for r in run.rows])
    stream = Recorded(rows, len(batches[0]))
    stream.num_batches = len(batches)
    return stream


def _dataset(tokens: Sequence[list[int]], labels: Sequence[list[int]]) -> Any:
    from datasets import Dataset

    return Dataset.from_dict({"input_ids": tokens, "labels": labels})
