"""The fitting job: curvature factors in one file; resumable, one process a file."""

import hashlib
import json
import logging
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from estimators.contracts import Accumulator
from estimators.curvature.fitting import Labels, fit_estimator
from estimators.model.memory import ran_out
from estimators.model.progress import Progress, no_progress
from estimators.model.selection import LayerSelection
from estimators.model.tokens import Sequence1D
from estimators.registry import factors_class
from estimators.storage import fingerprint_tensors, serialise_factors
from index.errors import DiskFull, IndexMismatch
from index.files import exclusive, write_whole
from service.corpus.reading import read_examples, sequence_of
from service.corpus.source import CorpusSource
from service.indexing.plausibility import TextSample, measure_loss, tell_loss
from service.models import LoadedModel

logger = logging.getLogger(__name__)

MOST_TIME_KEEPING = 0.05
"""Share of the time that writing checkpoints may take."""


@dataclass(frozen=True, kw_only=True)
class FitOptions:
    """What a user chooses about a fit.

    Attributes:
        estimator: a name of the registry of factors.
        examples: fit on at most this many, drawn at random.
        labels: "sampled" for the true Fisher, "empirical" for the examples' own tokens.
        max_tokens: longest window of a document, in tokens; None takes the model's context.
        token_budget: padded tokens in a batch.
        seed: of the drawn examples and sampled labels.
    """

    estimator: str = "ekfac"
    examples: int = 4096
    labels: Labels = "sampled"
    max_tokens: int | None = None
    token_budget: int = 1024
    seed: int = 0


def fit_factors(
    out: Path,
    loaded: LoadedModel,
    selection: LayerSelection,
    source: CorpusSource,
    options: FitOptions,
    progress: Progress = no_progress,
    interval: float = 60.0,
) -> int:
    """Fit curvature factors and write them to ``out``, or finish a fit that was interrupted.

    While it runs, its sums are kept in the folder ``OUT.partial``. Whenever it is killed, the same
    call goes on from there, and the factors are the same to the bit.

    Args:
        out: file to write.
        loaded: the model with the layers to attribute.
        selection: how those were chosen; kept with the factors.
        source: fitting examples.
        options: what the user chose.
        progress: shows each pass.
        interval: seconds between two checkpoints, at least; more where writing one takes long.

    Returns:
        The number of fitting examples.

    Raises:
        IndexBusy: another process fits into the same file.
        IndexMismatch: an interrupted fit with other inputs or settings is kept there.
        DiskFull: no room for the factors.
        OutOfMemory: not even one sequence fits into memory.
        ValueError: the corpus cannot be read, or the model gives non-finite values.
    """
    factors_class(options.estimator)
    sequences = draw_sequences(loaded, source, options)
    sample = TextSample()
    for sequence in sequences:
        sample.add(sequence)
    tell_loss(measure_loss(loaded, sample))
    facts = {
        "model_sha256": loaded.model_sha256,
        **selection.to_facts(),
        "labels": options.labels,
        "examples": str(len(sequences)),
        "seed": str(options.seed),
    }
    folder = out.with_name(f"{out.name}.partial")
    with exclusive(folder):
        checkpoint = FileCheckpoint(folder, _belongs(facts, loaded, options, sequences), interval)
        try:
            fitted = fit_estimator(
                options.estimator,
                loaded.model,
                loaded.coverage.layers,
                sequences,
                token_budget=options.token_budget,
                seed=options.seed,
                labels=options.labels,
                progress=progress,
                checkpoint=checkpoint,
            )
            facts |= _tell_shared(fitted.tensors())
            write_whole(out, serialise_factors(options.estimator, fitted, facts))
            checkpoint.remove()
        finally:
            for left in out.parent.glob(f".{out.name}.*.tmp"):  # of a process that was killed
                left.unlink(missing_ok=True)
            if not checkpoint.path.exists():
                shutil.rmtree(folder)
    return len(sequences)


def _tell_shared(factors: Mapping[str, Tensor]) -> dict[str, str]:
    """Log how many experts saw too few tokens; they, as an entry of the factors' header."""
    shared = sorted(key.removesuffix(".shared") for key in factors if key.endswith(".shared"))
    if not shared:
        return {}
    logger.warning(
        "%d matrices of experts saw fewer tokens than they have features and have the curvature of "
        "all experts of their kind together, e.g. %s; fit on more examples for their own.",
        len(shared),
        shared[0],
    )
    return {"shared_experts": json.dumps(shared)}


def draw_sequences(
    loaded: LoadedModel, source: CorpusSource, options: FitOptions
) -> list[Sequence1D]:
    """The fitting examples; their rows seed their sampled labels.

    Raises:
        ValueError: the corpus cannot be read, or nothing drawn from it has two tokens.
    """
    everything = list(read_examples(source, loaded, options.max_tokens or loaded.context))
    generator = np.random.default_rng(options.seed)
    chosen = np.sort(generator.permutation(len(everything))[: options.examples])
    drawn = [sequence_of(everything[i], int(i)) for i in chosen]
    if not any(sequence.targets for sequence in drawn):
        raise ValueError(
            f"There is nothing to fit on: of {len(everything)} examples {len(drawn)} were drawn, "
            f"none of which has two tokens of which the second counts. Fit on more examples, or "
            f"take the empty ones out."
        )
    return drawn


def _belongs(
    facts: Mapping[str, str],
    loaded: LoadedModel,
    options: FitOptions,
    sequences: Sequence[Sequence1D],
) -> dict[str, str]:
    """Everything that the bits of the sums depend on but the number of threads."""
    digest = hashlib.sha256()
    for sequence in sequences:
        counted = "" if sequence.counted is None else f":{sequence.counted}"
        pair = "" if sequence.rejected is None else f":{sequence.rejected}"
        digest.update(f"{sequence.row}:{sequence.tokens}{counted}{pair}".encode())
    chosen = {key: str(value) for key, value in asdict(options).items()}
    return {
        **chosen,
        **facts,
        "data_sha256": digest.hexdigest(),
        "dtype": str(next(loaded.model.parameters()).dtype),
        "device": loaded.device.type,
        "torch": torch.__version__,
    }


class FileCheckpoint:
    """The sums of an unfinished fit in one safetensors file, replaced as a whole.

    Args:
        folder: where the file is kept.
        belongs: what the fit is made of.
        interval: least number of seconds between two writes.

    Raises:
        IndexMismatch: the file belongs to a fit with other inputs or settings.
    """

    def __init__(self, folder: Path, belongs: Mapping[str, str], interval: float) -> None:
        self.path = folder / "sums.safetensors"
        self._belongs = dict(belongs)
        self._interval = interval
        self._next = time.monotonic() + interval
        self._header = self._read_header()
        self._check()

    def load(self, name: str) -> tuple[int, Mapping[str, Tensor]] | None:
        """Batches done and tensors of the sums, if the pass ``name`` was interrupted."""
        if self._header.get("pass") != name:
            return None
        with safe_open(self.path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        if fingerprint_tensors(tensors) != self._header["sha256"]:
            logger.warning("%s was damaged; beginning the fit again.", self.path)
            return None
        done = int(self._header["done"])
        logger.warning("Going on with an interrupted fit: %s, %d batches are done.", name, done)
        return done, tensors

    def offer(self, name: str, done: int, sums: Accumulator) -> None:
        """Write ``sums`` if the interval is over.

        No room on the disk or in memory is told and costs only the checkpoint.
        """
        start = time.monotonic()
        if start < self._next:
            return
        try:
            self._write(name, done, sums.tensors())
        except (DiskFull, RuntimeError, MemoryError) as error:
            if not (isinstance(error, DiskFull) or ran_out(error)):
                raise
            logger.warning("The fit goes on without this checkpoint: %s", error)
        now = time.monotonic()
        self._next = now + max(self._interval, (now - start) / MOST_TIME_KEEPING)

    def remove(self) -> None:
        """The fit is finished."""
        self.path.unlink(missing_ok=True)

    def _write(self, name: str, done: int, tensors: Mapping[str, Tensor]) -> None:
        contents = {key: value.contiguous() for key, value in tensors.items()}
        header = {"pass": name, "done": str(done), "sha256": fingerprint_tensors(contents)}
        metadata = json.dumps({**header, "belongs": self._belongs}, sort_keys=True)
        write_whole(self.path, bytes(save(contents, metadata={"etymon": metadata})))

    def _read_header(self) -> dict[str, Any]:
        if not self.path.exists():
            return {}
        try:
            with safe_open(self.path, framework="pt") as file:
                return dict(json.loads(file.metadata()["etymon"]))
        except (SafetensorError, KeyError, TypeError, ValueError, OSError) as error:
            logger.warning("%s is damaged (%s); beginning the fit again.", self.path, error)
            return {}

    def _check(self) -> None:
        found = self._header.get("belongs", self._belongs)
        keys = sorted({*found, *self._belongs})
        changed = [key for key in keys if found.get(key) != self._belongs.get(key)]
        if changed:
            listing = "; ".join(
                f"{key}: {found.get(key)} -> {self._belongs.get(key)}" for key in changed
            )
            raise IndexMismatch(
                f"{self.path.parent} holds an interrupted fit with other inputs or settings "
                f"({listing}). Repeat them, delete the folder, or choose another file to write."
            )
