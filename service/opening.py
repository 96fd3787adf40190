"""Opening a finished index: everything is checked against the manifest and the model."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from jaxtyping import Float

from estimators.contracts import Estimator
from estimators.layers import LayerSelection, find_layers
from estimators.sketch import Sketch, SketchPlan
from estimators.storage import load_estimator
from index.errors import IndexCorrupt, IndexMismatch
from index.examples import ExampleStore
from index.files import sha256_of
from index.manifest import Manifest
from index.shards import read_shard
from index.vectors import VectorIndex, make_index
from service.building import FACTORS_NAME
from service.models import LoadedModel


@dataclass(frozen=True, kw_only=True)
class OpenIndex:
    """A whole index in memory, ready to be searched.

    Attributes:
        folder: where it is.
        loaded: the model, with the layers that the index attributes.
        manifest: what it is made of.
        examples: texts and tokens by row.
        vectors: codes by row.
        norms: whitened norm of each row's gradient; 0 for rows that failed or are empty.
        failed: rows whose gradient is not finite.
        estimator: fitted.
        sketch: drawn as during the build.
    """

    folder: Path
    loaded: LoadedModel
    manifest: Manifest
    examples: ExampleStore
    vectors: VectorIndex
    norms: Float[np.ndarray, "row"]
    failed: tuple[int, ...]
    estimator: Estimator
    sketch: Sketch


def open_index(folder: Path, loaded: LoadedModel) -> OpenIndex:
    """Load the index in ``folder`` for use with ``loaded``.

    Raises:
        IndexMissing: there is no finished index.
        IndexCorrupt: a file is truncated or was changed.
        IndexMismatch: it was built with another model or tokenizer.
    """
    manifest = Manifest.read(folder)
    wanted = LayerSelection(
        patterns=tuple(manifest.estimator.layer_patterns), widest=manifest.estimator.widest
    )
    loaded = replace(loaded, coverage=find_layers(loaded.model, wanted))
    _check_model(manifest, loaded)
    for record in manifest.files:
        path = folder / record.path
        actual = sha256_of(path) if path.is_file() else "missing"
        if actual != record.sha256:
            raise IndexCorrupt(
                f"{path} is truncated or was changed: its SHA-256 is {actual}, the manifest says "
                f"{record.sha256}. Run the build again."
            )
    _, estimator, _ = load_estimator(folder / FACTORS_NAME)
    layers = loaded.coverage.layers
    sketch = Sketch(
        layers,
        estimator.whitening(layers, manifest.estimator.damping),
        SketchPlan(
            seed=manifest.sketch.seed,
            dimensions=manifest.sketch.dimensions,
            rank=manifest.sketch.rank,
        ),
    )
    vectors = make_index(manifest.codes, manifest.sketch.dimensions)
    norms = []
    for shard in manifest.shards:
        codes, shard_norms = read_shard(folder, shard)
        vectors.add(codes)
        norms.append(shard_norms)
    paths = [folder / r.path for r in manifest.files if r.path.startswith("examples/")]
    return OpenIndex(
        folder=folder,
        loaded=loaded,
        manifest=manifest,
        examples=ExampleStore(paths),
        vectors=vectors,
        norms=np.concatenate(norms),
        failed=tuple(failed.row for failed in manifest.failed),
        estimator=estimator,
        sketch=sketch,
    )


def _check_model(manifest: Manifest, loaded: LoadedModel) -> None:
    pairs = (
        ("model", manifest.model.model_sha256, loaded.model_sha256),
        ("tokenizer", manifest.model.tokenizer_sha256, loaded.tokenizer_sha256),
    )
    for what, built, given in pairs:
        if built != given:
            raise IndexMismatch(
                f"The index was built with another {what}: the manifest says SHA-256 {built}, "
                f"'{loaded.source}' has {given}. Serve it with the {what} of the build "
                f"({manifest.model.source}), or build an index for this one."
            )
