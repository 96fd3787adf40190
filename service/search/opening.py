"""Opening a finished index: everything is checked against the manifest and the model."""

import hashlib
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8

from estimators.contracts import Factors
from estimators.model.layers import Coverage, find_layers
from estimators.model.selection import LayerSelection
from estimators.sketching.sketch import Sketch, SketchPlan
from estimators.sketching.slices import SketchSlices
from estimators.storage import load_factors
from index.codes.faiss_module import usable_processors
from index.codes.vectors import LOW_RANK, VectorIndex
from index.errors import IndexCorrupt, IndexMismatch
from index.examples import ExampleStore, examples_path
from index.files import sha256_of
from index.manifest import Manifest, ShardRecord
from index.parts import example_files, kept_rows, part_folder
from index.shards import read_shard
from index.slices import SliceStore, check_link, check_slices
from service.coding import FACTORS_NAME, OPERATORS_NAME, code_blocks
from service.device_search import make_search_index
from service.models import LoadedModel
from service.scoring.cache import FileCache
from service.scoring.estimators import Estimators
from service.scoring.scale import IndexScales, find_scales
from service.search.calibration import IndexCalibration, find_calibration
from service.tracing.served import ServedTrace


@dataclass(frozen=True, kw_only=True)
class OpenIndex:
    """A whole index, ready to be searched. Deleted rows are left out of it, the rest numbered anew.

    Attributes:
        folder: where it is.
        loaded: the model, with the layers that the index attributes.
        manifest: what it is made of.
        examples: texts and tokens by row.
        vectors: codes of all rows on disk.
        kept: numbers on disk of the rows that were not deleted; None if none was.
        norms: whitened norm of each row's gradient; 0 for rows that failed or are empty.
        failed: True for rows whose gradient is not finite.
        estimators: that it can answer for.
        sketches: drawn as during the build; the first slice is that of ``vectors``.
        slices: codes of the further slices, if there are any.
        scales: what its scores are worth, where that was measured.
        calibration: of its queries' recall, if it was made.
        trace: of the run that trained the model, if it is served with one.
    """

    folder: Path
    loaded: LoadedModel
    manifest: Manifest
    examples: ExampleStore
    vectors: VectorIndex
    kept: Int[np.ndarray, "row"] | None
    norms: Float[np.ndarray, "row"]
    failed: Bool[np.ndarray, "row"]
    estimators: Estimators
    sketches: SketchSlices
    slices: SliceStore | None
    scales: IndexScales
    calibration: IndexCalibration | None = None
    trace: ServedTrace | None = None

    @property
    def sketch(self) -> Sketch:
        """Of the slice that is scanned."""
        return self.sketches.first

    def inner_products(self, query: Float[np.ndarray, "dimension"]) -> Float[np.ndarray, "row"]:
        """Estimated inner product of a query's sketch with every row, in order of row."""
        values = self.vectors.inner_products(query)
        return values if self.kept is None else values[self.kept]


def open_index(
    folder: Path,
    loaded: LoadedModel,
    search_device: str = "cpu",
    trace: Path | None = None,
    run: Path | None = None,
) -> OpenIndex:
    """Load the index in ``folder`` for use with ``loaded``.

    Args:
        folder: of the index.
        loaded: the model.
        search_device: where codes are scanned: "cpu", in place, or a device of PyTorch, whose
            memory they are copied to.
        trace: folder of a trace of the run that trained the model; None for none.
        run: where that run lies; None takes what the trace says.

    Raises:
        IndexMissing: there is no finished index.
        IndexCorrupt: a file is truncated or was changed.
        IndexMismatch: it was built with another model or tokenizer.
        RunMismatch: the trace is none, or of a run that has nothing to do with model or index.
        ValueError: its kind of code cannot be searched on that device.
    """
    manifest = Manifest.read(folder)
    wanted = LayerSelection(
        patterns=tuple(manifest.estimator.layer_patterns),
        widest=manifest.estimator.widest,
        embeddings=manifest.estimator.embeddings,
        norms=manifest.estimator.norms,
    )
    with loaded.turn:
        coverage = find_layers(loaded.model, wanted)
    loaded = replace(loaded, coverage=only(coverage, manifest.estimator.layers))
    _check_model(manifest, loaded)
    check_link(folder)
    for record in manifest.files:
        _check_file(folder / record.path, record.sha256)
    _, fitted, _ = load_factors(folder / FACTORS_NAME)
    sketches = _sketches(manifest, loaded, fitted)
    blocks = code_blocks(manifest.codes, sketches.first, manifest.sketch.components)
    vectors = make_search_index(manifest.codes, manifest.sketch.dimensions, search_device, blocks)
    norms = []
    for codes, shard_norms in _read_shards(folder, manifest):
        vectors.add(codes, len(shard_norms))
        norms.append(shard_norms)
    keep = kept_rows(manifest.parts)
    failed = np.zeros(len(keep), dtype=bool)
    failed[[record.row for record in manifest.failed]] = True
    whole = bool(keep.all())
    examples = ExampleStore(example_files(folder, manifest.parts), None if whole else keep)
    traced = None if trace is None else ServedTrace(trace, examples, loaded, run)
    estimators = Estimators.of_factors(
        loaded,
        examples,
        manifest.estimator.name,
        fitted,
        manifest.estimator.damping,
        sha256=_grounds_sha256(manifest),
        cache=FileCache(folder / OPERATORS_NAME),
        traced=traced,
    )
    return OpenIndex(
        folder=folder,
        loaded=loaded,
        manifest=manifest,
        examples=examples,
        vectors=vectors,
        kept=None if whole else np.flatnonzero(keep),
        norms=np.concatenate(norms)[keep],
        failed=failed[keep],
        estimators=estimators,
        sketches=sketches,
        slices=SliceStore(folder, manifest.parts) if len(sketches) > 1 else None,
        calibration=find_calibration(folder, estimators.own),
        scales=find_scales(folder),
        trace=traced,
    )


def only(coverage: Coverage, names: Sequence[str]) -> Coverage:
    """The layers of these names, if all of them are there.

    Others were not attributed yet when an index was built: experts and routers of mixtures.
    """
    known = set(names)
    layers = tuple(layer for layer in coverage.layers if layer.name in known)
    return replace(coverage, layers=layers) if len(layers) == len(known) else coverage


def _sketches(manifest: Manifest, loaded: LoadedModel, fitted: Factors) -> SketchSlices:
    layers = loaded.coverage.layers
    whitening = fitted.whitening(layers, manifest.estimator.damping)
    plan = SketchPlan(
        seed=manifest.sketch.seed,
        dimensions=manifest.sketch.dimensions,
        rank=manifest.sketch.rank,
        folded=manifest.codes != LOW_RANK,
    )
    rank = manifest.sketch.further_rank or None
    return SketchSlices(layers, whitening, plan, manifest.sketch.slices, rank)


def _grounds_sha256(manifest: Manifest) -> str:
    """Of everything that an estimator may have fitted from, deleted rows included."""
    parts = [(part.data.sha256, part.deleted) for part in manifest.parts]
    facts = [manifest.model.model_sha256, manifest.estimator.sha256, parts]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _read_shards(
    folder: Path, manifest: Manifest
) -> list[tuple[UInt8[np.ndarray, "padded byte"], Float[np.ndarray, "row"]]]:
    """Codes and norms of all shards in order, mapped; their hashes and their examples' are checked.

    Files are hashed in threads, one for each processor; that is what opening an index takes.
    """

    def read(
        place: tuple[Path, ShardRecord],
    ) -> tuple[UInt8[np.ndarray, "padded byte"], Float[np.ndarray, "row"]]:
        part, shard = place
        _check_file(examples_path(part, shard.number), shard.examples_sha256)
        for record in shard.slices:
            check_slices(part, shard.number, record)
        return read_shard(part, shard)

    places = [
        (part_folder(folder, part.name), shard) for part in manifest.parts for shard in part.shards
    ]
    with ThreadPoolExecutor(usable_processors()) as pool:
        return list(pool.map(read, places))


def _check_file(path: Path, sha256: str) -> None:
    actual = sha256_of(path) if path.is_file() else "missing"
    if actual != sha256:
        raise IndexCorrupt(
            f"{path} is truncated or was changed: its SHA-256 is {actual}, the manifest says "
            f"{sha256}. Run the build again."
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
