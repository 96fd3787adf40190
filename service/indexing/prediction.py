"""What a fit or a build will take, predicted from a few of its own batches; nothing is written."""

import resource
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from estimators.contracts import Factors
from estimators.curvature.fitting import fit_estimator
from estimators.model.layers import find_layers
from estimators.model.selection import LayerSelection
from estimators.model.tokens import Sequence1D, plan_batches
from estimators.sketching.slices import SketchSlices
from estimators.storage import load_factors, serialise_factors
from index.examples import Example, ExampleStore, examples_path, serialise_examples, write_examples
from service.coding import coded_index, further_bytes
from service.corpus.reading import read_examples, sequence_of
from service.corpus.source import CorpusSource
from service.indexing.building import BuildOptions, check_factors
from service.indexing.fitting import FitOptions, draw_sequences
from service.indexing.noise import ROWS, measure_noise
from service.indexing.reading import chunks
from service.indexing.sketching import ShardJob
from service.models import LoadedModel
from service.scoring.estimators import Estimators

TRIAL_BATCHES = 12
"""Batches that are really computed, spread over the lengths, after one to warm up."""

TRIAL_ROWS = (24, 96)
"""Rows on which the measuring of the noise is tried, the first time also to warm up."""

ALLOCATOR_GROWTH = 1.3
"""What hundreds of batches of different shapes hold at their peak over what the trial's few hold:
the allocator's heap grows as shapes alternate. As measured by ``scripts.bench.prediction``."""

SMALL_FILES = 4096
"""Bytes of a shard's receipt and its share of the manifest, plan and record, about."""


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What a job will take.

    Attributes:
        rows: examples, windows counted singly.
        tokens: in all.
        disk_bytes: of what it writes: factors, or an index.
        memory_bytes: at the peak of the process.
        seconds: reading included, loading the model not.
    """

    rows: int
    tokens: int
    disk_bytes: int
    memory_bytes: int
    seconds: float


def predict_build(
    loaded: LoadedModel, factors: Path, source: CorpusSource, options: BuildOptions, scratch: Path
) -> Prediction:
    """Predict disk, memory and time; the corpus is read once, and some of it computed on.

    Args:
        loaded: the model.
        factors: what ``etymon fit`` wrote.
        source: the corpus.
        options: of the build.
        scratch: a temporary folder, where some examples are put.

    Raises:
        IndexMismatch: the factors belong to another model.
        ValueError: the corpus cannot be read or has nothing to learn from.
    """
    start_memory = peak_memory()
    name, fitted, facts = load_factors(factors)
    check_factors(facts, loaded)
    loaded = replace(loaded, coverage=find_layers(loaded.model, LayerSelection.from_facts(facts)))
    layers = loaded.coverage.layers
    survey = _Survey()
    start = time.perf_counter()
    examples = read_examples(source, loaded, options.max_tokens or loaded.context)
    for chunk in chunks(examples, options.rows_per_shard):
        survey.add(chunk)
    reading = time.perf_counter() - start
    whitening = fitted.whitening(layers, options.damping)
    plan = options.sketch_plan(seed=0, layers=len(layers))
    sketches = SketchSlices(layers, whitening, plan, options.slices or 1)
    sketching = _time_of_shards(loaded, sketches, options, survey)
    noise = _time_of_noise(loaded, (name, fitted), sketches, options, survey, scratch)
    code_size = coded_index(options.codes, sketches.first).code_size + further_bytes(sketches)
    rows = sum(map(len, survey.shards))
    small = SMALL_FILES * len(survey.shards)
    return Prediction(
        rows=rows,
        tokens=sum(map(sum, survey.shards)),
        disk_bytes=rows * (code_size + 4) + survey.bytes + factors.stat().st_size + small,
        memory_bytes=int(start_memory + ALLOCATOR_GROWTH * (peak_memory() - start_memory)),
        seconds=reading + sketching + noise,
    )


def predict_fit(
    loaded: LoadedModel, source: CorpusSource, options: FitOptions, interval: float = 60.0
) -> Prediction:
    """Predict disk, memory and time of ``service.indexing.fitting.fit_factors``.

    A few batches are fitted in earnest. That includes the eigendecompositions, whose time does not
    depend on the number of examples: with very wide layers they make the prediction slow.

    Args:
        loaded: the model with the layers to attribute.
        source: fitting examples.
        options: of the fit.
        interval: seconds between checkpoints.

    Raises:
        ValueError: the corpus cannot be read, or no example predicts anything.
    """
    start = time.perf_counter()
    sequences = draw_sequences(loaded, source, options)
    reading = time.perf_counter() - start
    lengths = [sequence.padded for sequence in sequences]
    batches = list(plan_batches(lengths, options.token_budget))
    chosen = {int(i) for i in np.linspace(0, len(batches) - 1, TRIAL_BATCHES)}
    trial = [sequences[p] for i in sorted(chosen) for p in batches[i]]
    stopwatch = _Stopwatch()
    start = time.perf_counter()
    fitted = fit_estimator(
        options.estimator,
        loaded.model,
        loaded.coverage.layers,
        trial,
        token_budget=options.token_budget,
        seed=options.seed,
        labels=options.labels,
        progress=stopwatch,
    )
    size = len(serialise_factors(options.estimator, fitted, {}))
    once = time.perf_counter() - start - stopwatch.all
    tried = [sequence.padded for sequence in trial]
    computed = sum(_padded([tried[p] for p in b]) for b in stopwatch.timed)
    padded = sum(_padded([lengths[p] for p in batch]) for batch in batches)
    seconds = reading + once + stopwatch.seconds * stopwatch.passes * padded / max(1, computed)
    checkpoints = 2 * _checkpoint_bytes(loaded) if seconds > interval else 0
    return Prediction(
        rows=len(sequences),
        tokens=sum(lengths),
        disk_bytes=size,
        memory_bytes=peak_memory() + checkpoints,
        seconds=seconds,
    )


def _checkpoint_bytes(loaded: LoadedModel) -> int:
    """The larger of the sums of the two passes: covariances; bases and squares."""
    sides = sum(layer.curvature_entries for layer in loaded.coverage.layers)
    entries = sum(layer.parameters for layer in loaded.coverage.layers)
    return max(8 * sides, 4 * sides + 8 * entries)


class _Stopwatch:
    """A ``Progress`` that times the batches; the first of each pass only warms up."""

    def __init__(self) -> None:
        self.passes = 0
        self.all = 0.0
        self.seconds = 0.0
        self.timed: list[Sequence[int]] = []

    def __call__(self, description: str, items: Iterable[Any]) -> Iterator[Any]:
        self.passes += 1
        for number, item in enumerate(items):
            start = time.perf_counter()
            yield item
            elapsed = time.perf_counter() - start
            self.all += elapsed
            if number:
                self.seconds += elapsed
                self.timed.append(item)


def peak_memory() -> int:
    """Largest resident memory of this process so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


@dataclass
class _Survey:
    """Lengths of all rows by shard, the size of their files, and some examples."""

    shards: list[list[int]] = field(default_factory=list)
    bytes: int = 0
    examples: list[Example] = field(default_factory=list)

    def add(self, chunk: list[Example]) -> None:
        self.shards.append([sequence_of(example).padded for example in chunk])
        self.bytes += len(serialise_examples(chunk))
        useful = [example for example in chunk if len(example.tokens) >= 4]
        self.examples.extend(islice(useful, max(0, max(TRIAL_ROWS) - len(self.examples))))

    def sequence(self, length: int) -> Sequence1D:
        """A sequence of that many real tokens."""
        tokens = [token for example in self.examples for token in example.tokens] or [0]
        return Sequence1D(tokens=tuple(np.resize(tokens, length).tolist()))


def _time_of_shards(
    loaded: LoadedModel, sketches: SketchSlices, options: BuildOptions, survey: _Survey
) -> float:
    """Seconds of all shards: some batches are computed, the rest goes by padded tokens."""
    budget = options.token_budget
    job = ShardJob(
        part=Path(), loaded=loaded, sketches=sketches, codes=options.codes, token_budget=budget
    )
    batches = [
        [lengths[p] for p in positions]
        for lengths in survey.shards
        for positions in plan_batches(lengths, budget)
    ]
    batches.sort(key=max)
    chosen = sorted({int(i) for i in np.linspace(0, len(batches) - 1, TRIAL_BATCHES)})

    def seconds(lengths: Sequence[int]) -> float:
        sequences = [survey.sequence(length) for length in lengths]
        start = time.perf_counter()
        job.encode(sequences)
        return time.perf_counter() - start

    seconds(batches[-1])
    elapsed = sum(seconds(batches[i]) for i in chosen)
    computed = sum(_padded(batches[i]) for i in chosen)
    return elapsed * sum(map(_padded, batches)) / max(1, computed)


def _time_of_noise(
    loaded: LoadedModel,
    factors: tuple[str, Factors],
    sketches: SketchSlices,
    options: BuildOptions,
    survey: _Survey,
    scratch: Path,
) -> float:
    """Seconds of measuring the noise: tried on few rows and on more, then along the line."""
    tried = []
    for number, count in enumerate(TRIAL_ROWS):
        path = examples_path(scratch, number)
        write_examples(path, survey.examples[:count])
        store = ExampleStore([path])
        estimators = Estimators.of_factors(loaded, store, *factors, options.damping)
        start = time.perf_counter()
        measure_noise(
            loaded,
            estimators.own.directions,
            sketches,
            options.codes,
            store,
            options.token_budget,
        )
        tried.append((min(count, len(survey.examples)), time.perf_counter() - start))
    (few, short), (more, long) = tried
    slope = max(0.0, long - short) / (more - few) if more > few else long / more
    rows = min(ROWS, sum(map(len, survey.shards)))
    return long + slope * max(0, rows - more)


def _padded(lengths: Sequence[int]) -> int:
    return len(lengths) * max(lengths)
