"""What a manifest says of estimator and sketch."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from estimators.model.layers import Coverage
from estimators.model.selection import LayerSelection
from estimators.sketching.slices import SketchSlices
from index.files import sha256_of
from index.manifest import EstimatorRecord, LookRecord, NoiseRecord, SketchRecord, SkippedRecord
from service.coding import later_looks


def estimator_record(
    name: str, factors: Path, damping: float, facts: Mapping[str, str], coverage: Coverage
) -> EstimatorRecord:
    """The estimator, the layers it attributes and those it leaves out.

    Args:
        name: of the estimator.
        factors: their file.
        damping: of the whitening.
        facts: that lie with the factors.
        coverage: of the model by their layers.
    """
    selection = LayerSelection.from_facts(facts)
    return EstimatorRecord(
        name=name,
        sha256=sha256_of(factors),
        damping=damping,
        layer_patterns=list(selection.patterns),
        widest=selection.widest,
        embeddings=selection.embeddings,
        norms=selection.norms,
        layers=[layer.name for layer in coverage.layers],
        attributed_share=coverage.attributed_share,
        skipped=[SkippedRecord(**asdict(module)) for module in coverage.skipped],
    )


def sketch_record(
    sketches: SketchSlices, noise: Sequence[NoiseRecord], components: list[int]
) -> SketchRecord:
    """The sketch of the slice that is scanned, and the error after each look.

    Args:
        sketches: of all slices.
        noise: after each look.
        components: of each layer, in low-rank codes.
    """
    sketch = sketches.first
    looks = zip(later_looks(len(sketches)), noise[1:], strict=True)
    return SketchRecord(
        seed=sketch.plan.seed,
        dimensions=sketch.plan.dimensions,
        rank=sketch.plan.rank,
        entries=sketch.entries,
        further_rank=sketches.rank if len(sketches) > 1 else 0,
        components=components,
        noise=noise[0],
        later=[LookRecord(slices=slices, noise=error) for slices, error in looks],
    )
