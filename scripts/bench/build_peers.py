"""Bergson's build and kronfluence's EK-FAC fit over given batches, for scripts.bench.build."""

import logging
import tempfile
import warnings
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from estimators.model.tokens import Sequence1D
from scripts.bench.kronfluence import PeerTask, linear_twin

PROJECTION = 16
"""Of Bergson's layout: 16 x 16 numbers a layer, its default."""


def installed(package: str) -> str | None:
    """The version of a package, or None."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


class BergsonBuild:
    """Bergson's gradient store, projection 16 a side, written to disk by its own collector.

    Args:
        model: frozen; only the token embeddings require a gradient, as in Bergson's own set-up.
        sequences: training examples.
        batches: positions in ``sequences``, the same for every system.
    """

    def __init__(
        self, model: nn.Module, sequences: Sequence[Sequence1D], batches: Sequence[Sequence[int]]
    ) -> None:
        self._model = model
        self._sequences = sequences
        self._batches = [list(batch) for batch in batches]

    def __call__(self) -> None:
        """Build once, in a temporary folder."""
        from bergson import GradientProcessor, collect_gradients
        from bergson.config.config import IndexConfig
        from datasets import Dataset

        logging.getLogger("CollectorComputer").setLevel(logging.WARNING)
        tokens = [list(sequence.tokens) for sequence in self._sequences]
        data = Dataset.from_dict({"input_ids": tokens, "length": [len(t) for t in tokens]})
        embeddings: Any = self._model.get_input_embeddings()  # type: ignore[operator]
        embeddings.requires_grad_(True)
        try:
            with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
                warnings.simplefilter("ignore")
                config = IndexConfig(run_path=f"{folder}/index", projection_dim=PROJECTION)
                config.partial_run_path.mkdir(parents=True)
                processor = GradientProcessor(projection_dim=PROJECTION)
                collect_gradients(self._model, data, processor, config, batches=self._batches)
        finally:
            embeddings.requires_grad_(False)
            embeddings.weight.grad = None


class _Task(PeerTask):
    """The same task with labels drawn by inversion: ``torch.multinomial`` is ten times slower."""

    def compute_train_loss(
        self, batch: dict[str, Tensor], model: nn.Module, sample: bool = False
    ) -> Tensor:
        """Summed negative log-likelihood in nats, of labels drawn from the model if ``sample``."""
        logits, labels = self._logits(batch, model), batch["next"].flatten()
        if sample:
            with torch.no_grad():
                cumulative = logits.float().softmax(-1).cumsum(-1)
                u = torch.rand(len(logits), 1, device=logits.device) * cumulative[:, -1:]
                drawn = torch.searchsorted(cumulative, u).squeeze(-1)
                drawn = drawn.clamp_(max=logits.shape[-1] - 1)
            labels = torch.where(labels == -100, labels, drawn)
        return nn.functional.cross_entropy(logits, labels, reduction="sum")


class KronfluenceFit:
    """kronfluence's EK-FAC fit: covariances, eigendecomposition, corrected eigenvalues.

    Args:
        model: a copy of it with ``nn.Linear`` in place of ``Conv1D`` is fitted.
        sequences: training examples, all of the same length.
        batch: examples a batch.
    """

    def __init__(self, model: nn.Module, sequences: Sequence[Sequence1D], batch: int) -> None:
        twin = linear_twin(model)
        names = [n for n, m in twin.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"]
        self._task = _Task(names)
        self._twin = twin
        self._batch = batch
        self._data = []
        for sequence in sequences:
            ids = torch.tensor(sequence.tokens)
            following = torch.cat([ids[1:], torch.tensor([-100])])
            mask = torch.ones_like(ids)
            self._data.append({"input_ids": ids, "attention_mask": mask, "next": following})

    def __call__(self) -> None:
        """Fit once, in a temporary folder."""
        from kronfluence.analyzer import Analyzer, prepare_model
        from kronfluence.arguments import FactorArguments

        device = next(self._twin.parameters()).device
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            peer = Analyzer(
                "fit",
                prepare_model(self._twin, self._task),
                self._task,
                cpu=device.type == "cpu",
                disable_tqdm=True,
                log_level=logging.WARNING,
                output_dir=str(Path(folder)),
            )
            arguments = FactorArguments(strategy="ekfac")
            peer.fit_all_factors("f", self._data, self._batch, factor_args=arguments)
