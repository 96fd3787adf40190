"""What a build will take, predicted from a few of its own batches before anything is written."""

import resource
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import numpy as np

from estimators.contracts import Estimator
from estimators.layers import LayerSelection, find_layers
from estimators.sketch import Sketch
from estimators.storage import load_estimator
from estimators.tokens import Sequence1D, plan_batches
from index.examples import Example, ExampleStore, examples_path, serialise_examples, write_examples
from index.vectors import make_index
from service.building import BuildOptions, check_factors
from service.corpus import CorpusSource, read_examples
from service.models import LoadedModel
from service.noise import ROWS, measure_noise
from service.reading import chunks
from service.sketching import ShardJob

TRIAL_BATCHES = 12
"""Batches that are really computed, spread over the lengths, after one to warm up."""

TRIAL_ROWS = 64
"""Rows on which the measuring of the noise is tried."""

SMALL_FILES = 4096
"""Bytes of a shard's receipt and its share of the manifest, plan and record, about."""


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What ``build_index`` will take.

    Attributes:
        rows: examples, windows counted singly.
        tokens: in all.
        disk_bytes: of the finished index.
        memory_bytes: at the peak of the process.
        seconds: of the build, reading included; loading the model is not.
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
        factors: what ``scripts.fit_estimator`` wrote.
        source: the corpus.
        options: of the build.
        scratch: a temporary folder, where some examples are put.

    Raises:
        IndexMismatch: the factors belong to another model.
        ValueError: the corpus cannot be read or has no row.
    """
    _, estimator, facts = load_estimator(factors)
    check_factors(facts, loaded)
    layers = find_layers(loaded.model, LayerSelection.from_facts(facts)).layers
    survey = _Survey()
    start = time.perf_counter()
    examples = read_examples(source, loaded, options.max_tokens or loaded.context)
    for chunk in chunks(examples, options.rows_per_shard):
        survey.add(chunk)
    reading = time.perf_counter() - start
    if not survey.shards:
        raise ValueError(f"The corpus '{source.data}' has no row.")
    sketch = Sketch(
        layers, estimator.whitening(layers, options.damping), options.sketch_plan(seed=0)
    )
    sketching = _time_of_shards(loaded, sketch, options, survey)
    noise = _time_of_noise(loaded, estimator, sketch, options, survey, scratch)
    code_size = make_index(options.codes, options.dimensions).code_size
    rows = sum(map(len, survey.shards))
    small = SMALL_FILES * len(survey.shards)
    return Prediction(
        rows=rows,
        tokens=sum(map(sum, survey.shards)),
        disk_bytes=rows * (code_size + 4) + survey.bytes + factors.stat().st_size + small,
        memory_bytes=peak_memory(),
        seconds=reading + sketching + noise,
    )


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
        self.shards.append([len(example.tokens) for example in chunk])
        self.bytes += len(serialise_examples(chunk))
        useful = [example for example in chunk if len(example.tokens) >= 4]
        self.examples.extend(islice(useful, max(0, TRIAL_ROWS - len(self.examples))))

    def sequence(self, length: int) -> Sequence1D:
        """A sequence of that many real tokens."""
        tokens = [token for example in self.examples for token in example.tokens] or [0]
        return Sequence1D(tokens=tuple(np.resize(tokens, length).tolist()))


def _time_of_shards(
    loaded: LoadedModel, sketch: Sketch, options: BuildOptions, survey: _Survey
) -> float:
    """Seconds of all shards: some batches are computed, the rest goes by padded tokens."""
    budget = options.token_budget
    job = ShardJob(
        part=Path(), loaded=loaded, sketch=sketch, codes=options.codes, token_budget=budget
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
    estimator: Estimator,
    sketch: Sketch,
    options: BuildOptions,
    survey: _Survey,
    scratch: Path,
) -> float:
    """Seconds of measuring the noise, with all its queries on some of its rows."""
    path = examples_path(scratch, 0)
    write_examples(path, survey.examples)
    index = make_index(options.codes, options.dimensions)
    start = time.perf_counter()
    measure_noise(
        loaded,
        estimator,
        options.damping,
        sketch,
        index,
        ExampleStore([path]),
        options.token_budget,
    )
    seconds = time.perf_counter() - start
    rows = min(ROWS, sum(map(len, survey.shards)))
    return seconds * max(1.0, rows / len(survey.examples))


def _padded(lengths: Sequence[int]) -> int:
    return len(lengths) * max(lengths)
