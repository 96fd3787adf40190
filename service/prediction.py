"""What a build will take, predicted from a few of its own batches before anything is written."""

import resource
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from estimators.layers import LayerSelection, find_layers
from estimators.sketch import Sketch
from estimators.storage import load_estimator
from estimators.tokens import Sequence1D, collate, plan_batches
from index.vectors import make_index
from service.building import BuildOptions, check_factors
from service.corpus import CorpusSource, read_examples
from service.models import LoadedModel

TRIAL_BATCHES = 8
"""Batches that are really computed, spread over the lengths, after one to warm up."""


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What ``build_index`` will take.

    Attributes:
        rows: examples, windows counted singly.
        tokens: in all.
        disk_bytes: of the finished index.
        memory_bytes: at the peak of the process.
        seconds: of computing; reading and tokenising not counted.
    """

    rows: int
    tokens: int
    disk_bytes: int
    memory_bytes: int
    seconds: float


def predict_build(
    loaded: LoadedModel, factors: Path, source: CorpusSource, options: BuildOptions
) -> Prediction:
    """Predict disk, memory and time; nothing is written.

    Raises:
        IndexMismatch: the factors belong to another model.
        ValueError: the corpus cannot be read or has no row.
    """
    _, estimator, facts = load_estimator(factors)
    check_factors(facts, loaded)
    layers = find_layers(loaded.model, LayerSelection.from_facts(facts)).layers
    examples = list(read_examples(source, loaded, options.max_tokens or loaded.context))
    if not examples:
        raise ValueError(f"The corpus '{source.data}' has no row.")
    whitening = estimator.whitening(layers, options.damping)
    sketch = Sketch(layers, whitening, options.sketch_plan(seed=0))
    index = make_index(options.codes, options.dimensions)
    lengths = [len(example.tokens) for example in examples]
    batches = list(plan_batches(lengths, options.token_budget))
    chosen = sorted({int(i) for i in np.linspace(0, len(batches) - 1, TRIAL_BATCHES)})

    def compute(number: int) -> float:
        start = time.perf_counter()
        sequences = [Sequence1D(tokens=examples[p].tokens) for p in batches[number]]
        x, _ = sketch.training(loaded.model, collate(sequences).to(loaded.device))
        index.encode(x.cpu().numpy())
        return time.perf_counter() - start

    compute(chosen[-1])
    elapsed = sum(compute(number) for number in chosen)
    computed = sum(len(batches[n]) * max(lengths[p] for p in batches[n]) for n in chosen)
    padded = sum(len(batch) * max(lengths[p] for p in batch) for batch in batches)
    text = sum(len(e.text.encode()) + len(e.id) + len(e.document) for e in examples)
    shard = min(options.rows_per_shard, len(examples)) * (4 * options.dimensions + index.code_size)
    return Prediction(
        rows=len(examples),
        tokens=sum(lengths),
        disk_bytes=len(examples) * (index.code_size + 4)
        + text
        + 4 * sum(lengths)
        + factors.stat().st_size,
        memory_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 + shard,
        seconds=elapsed * padded / max(1, computed),
    )
