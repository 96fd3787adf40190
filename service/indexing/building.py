"""The batch indexing job: examples, shards, noise, manifest; resumable at every file."""

import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

from estimators.model.layers import find_layers
from estimators.model.progress import Progress, no_progress
from estimators.model.selection import LayerSelection
from estimators.sketching.sketch import Sketch, SketchPlan
from estimators.sketching.slices import SketchSlices
from estimators.storage import load_factors
from index.codes.vectors import LOW_RANK
from index.errors import IndexMismatch
from index.examples import ExampleStore
from index.files import exclusive, remove_leftovers, sha256_of, write_whole
from index.manifest import (
    SCHEMA_VERSION,
    CorpusRecord,
    FileRecord,
    Manifest,
    PartRecord,
    ShardRecord,
)
from index.parts import (
    check_new_ids,
    example_files,
    find_manifest,
    kept_rows,
    part_folder,
    supersede,
)
from index.shards import find_receipt
from index.slices import link_slices
from service.coding import FACTORS_NAME, code_blocks, coded_index, further_bytes
from service.corpus.source import CorpusSource, fingerprint_source
from service.indexing.noise import measure_noise
from service.indexing.plan import settle_plan, settle_slices
from service.indexing.plausibility import tell_loss
from service.indexing.reading import find_corpus, read_corpus
from service.indexing.records import estimator_record, sketch_record
from service.indexing.sketching import ShardJob
from service.models import LoadedModel
from service.scoring.estimators import Estimators
from service.versions import numerical_versions, versions

Mode = Literal["new", "append", "supersede"]


@dataclass(frozen=True, kw_only=True)
class BuildOptions:
    """What a user chooses about an index.

    Attributes:
        max_tokens: longest window of a document, in tokens; None takes the model's context.
        damping: relative damping of the whitening (and the default of queries).
        dimensions: of the sketch; with one-bit codes an eighth of a byte each. Low-rank codes take
            as many bytes as one-bit codes would.
        rank: of the sketch's first stage; None takes half the root of the dimensions, which keeps
            its noise small beside that of the codes. For low-rank codes as many as there are bytes
            a layer, from 16 to the root of the dimensions, so that a few components a layer fit.
        codes: kind of code, see ``index.codes.vectors.CODES``.
        rows_per_shard: the unit of work that an interrupted build loses at most.
        token_budget: padded tokens in a batch.
        seed: of the sketch; None draws one. Keep it from whoever writes corpus or queries.
        slices: of every row's sketch; searches scan the first and read the others for
            contenders. None takes as many as the index has, sixteen for a new one with one-bit
            codes; more than it has are added to all of its rows.
    """

    max_tokens: int | None = None
    damping: float = 0.1
    dimensions: int = 16384
    rank: int | None = None
    codes: str = "one-bit"
    rows_per_shard: int = 1024
    token_budget: int = 1024
    seed: int | None = None
    slices: int | None = None

    def sketch_plan(self, seed: int, layers: int) -> SketchPlan:
        """The sketch of these options for so many layers."""
        root, factored = math.isqrt(self.dimensions), self.codes == LOW_RANK
        usual = min(root, max(16, self.dimensions // (8 * layers))) if factored else root // 2
        rank = usual if self.rank is None else self.rank
        return SketchPlan(
            seed=seed, dimensions=self.dimensions, rank=max(1, rank), folded=not factored
        )


@dataclass(frozen=True, kw_only=True)
class Worker:
    """Which shards this process builds: those whose number leaves ``number`` modulo ``count``."""

    number: int = 0
    count: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.number < self.count:
            raise ValueError(
                f"The worker's number must be from 0 to {self.count - 1} for {self.count} "
                f"workers, got {self.number}."
            )


def build_index(
    folder: Path,
    loaded: LoadedModel,
    factors: Path,
    source: CorpusSource,
    options: BuildOptions,
    progress: Progress = no_progress,
    mode: Mode = "new",
    refine: Path | None = None,
) -> Manifest:
    """Build, or finish building, the index of a corpus in ``folder``.

    The layers attributed are those that the factors were fitted for. What is whole on disk is
    kept; the result is the same as without the interruption. The manifest is written last: until
    then an index that was there before stays as it was.

    Args:
        folder: of the index.
        loaded: the model.
        factors: what ``etymon fit`` wrote.
        source: the corpus.
        options: sizes and seed; an appended corpus must repeat those of the index.
        progress: shows the steps.
        mode: "append" adds the corpus to the index that is there, as a further part; "supersede"
            also deletes rows there that have the id of an appended row.
        refine: where further slices are to lie; None: in the folder, or where they are.

    Raises:
        IndexMismatch: the factors belong to another model, or the folder holds a build with
            other inputs or settings.
        IndexBusy: another process builds in the folder.
        DiskFull: no room; run again when there is.
        DuplicateIds: two examples have the same id.
        ValueError: the corpus cannot be read or has nothing to learn from.
    """
    build = _Build(folder, loaded, factors, source, options, mode)
    with exclusive(folder):
        link_slices(folder, refine)
        remove_leftovers(folder)
        part, corpus = build.read(progress)
        build.run_shards(part, corpus, Worker(), progress)
        shards = build.receipts(part, corpus)
        assert shards is not None
        return build.finish(part, corpus, shards)


def build_share(
    folder: Path,
    loaded: LoadedModel,
    factors: Path,
    source: CorpusSource,
    options: BuildOptions,
    worker: Worker,
    progress: Progress = no_progress,
    mode: Mode = "new",
    refine: Path | None = None,
) -> Manifest | None:
    """One worker's share of ``build_index``; all workers get the same arguments and one folder.

    The first to come reads the corpus while the others wait; the last to finish its shards writes
    the manifest. A worker that failed or was killed is started again with the same arguments.

    Returns:
        The manifest, or None as long as other workers' shards are missing.

    Raises:
        IndexBusy: a worker of the same number is running; otherwise as ``build_index``.
    """
    build = _Build(folder, loaded, factors, source, options, mode)
    with exclusive(folder, f".worker-{worker.number}-of-{worker.count}.lock"):
        with exclusive(folder, wait=True):
            link_slices(folder, refine)
            part, corpus = build.read(progress)
        build.run_shards(part, corpus, worker, progress)
        with exclusive(folder, wait=True):
            shards = build.receipts(part, corpus)
            return None if shards is None else build.finish(part, corpus, shards)


@dataclass(frozen=True, kw_only=True)
class _Part:
    """The part under construction.

    Attributes:
        name: of its folder.
        path: its folder.
        sketches: drawn for it.
    """

    name: str
    path: Path
    sketches: SketchSlices

    @property
    def sketch(self) -> Sketch:
        """Of the slice that is scanned."""
        return self.sketches.first


class _Build:
    """Inputs of a build, checked against each other."""

    def __init__(
        self,
        folder: Path,
        loaded: LoadedModel,
        factors: Path,
        source: CorpusSource,
        options: BuildOptions,
        mode: Mode,
    ) -> None:
        self.folder, self.factors, self.source = folder, factors, source
        self.options, self.mode = options, mode
        self.estimator_name, self.fitted, self.facts = load_factors(factors)
        check_factors(self.facts, loaded)
        coverage = find_layers(loaded.model, LayerSelection.from_facts(self.facts))
        self.loaded = replace(loaded, coverage=coverage)

    def read(self, progress: Progress) -> tuple[_Part, CorpusRecord]:
        """Settle the part and its plan, and read the corpus unless that was done."""
        options = asdict(self.options)
        wanted = options.pop("slices")  # may grow later, so that no plan binds it
        plan = {
            **options,
            "model_sha256": self.loaded.model_sha256,
            "tokenizer_sha256": self.loaded.tokenizer_sha256,
            "factors_sha256": sha256_of(self.factors),
            "source_sha256": fingerprint_source(self.source),
            "versions": numerical_versions(),
        }
        name, seed = settle_plan(self.folder, plan, append=self.mode != "new")
        layers = self.loaded.coverage.layers
        whitening = self.fitted.whitening(layers, self.options.damping)
        slices = settle_slices(self.folder, wanted, self.options.codes)
        drawn = self.options.sketch_plan(seed, len(layers))
        sketches = SketchSlices(layers, whitening, drawn, slices)
        self._components(sketches.first)  # refused before the first gradient, if they must be
        part = _Part(name=name, path=part_folder(self.folder, name), sketches=sketches)
        corpus = find_corpus(part.path)
        if corpus is None:
            rows = self.options.rows_per_shard
            longest = self.options.max_tokens or self.loaded.context
            corpus = read_corpus(
                part.path,
                self.source,
                self.loaded,
                longest,
                rows,
                progress,
                self._check_new_ids,
            )
        tell_loss(corpus.data.loss)
        return part, corpus

    def _check_new_ids(self, files: list[Path]) -> None:
        """Before the first gradient: an appended corpus must not repeat ids of the index."""
        manifest = find_manifest(self.folder)
        if manifest is not None and self.mode == "append":
            check_new_ids(self.folder, manifest.parts, files)

    def run_shards(
        self, part: _Part, corpus: CorpusRecord, worker: Worker, progress: Progress
    ) -> None:
        """Build this worker's shards, of all parts, that are not whole on disk or lack slices."""
        for path, record in [(part.path, corpus), *self._other_parts(part)]:
            job = ShardJob(
                part=path,
                loaded=self.loaded,
                sketches=part.sketches,
                codes=self.options.codes,
                token_budget=self.options.token_budget,
            )
            numbers = range(worker.number, len(record.examples), worker.count)
            for number in progress("index", numbers):
                file = record.examples[number]
                receipt = find_receipt(path, number, file.sha256)
                if receipt is None:
                    job.run(number, number * self.options.rows_per_shard, file)
                elif 1 + receipt.further_slices < len(part.sketches):
                    job.extend(receipt, file)

    def _other_parts(self, part: _Part) -> list[tuple[Path, CorpusRecord]]:
        """Folders and corpora of the index' other parts, if these have fewer slices."""
        manifest = find_manifest(self.folder)
        if manifest is None or manifest.sketch.slices == len(part.sketches):
            return []
        paths = [part_folder(self.folder, p.name) for p in manifest.parts if p.name != part.name]
        return [(path, record) for path in paths if (record := find_corpus(path)) is not None]

    def receipts(self, part: _Part, corpus: CorpusRecord) -> dict[str, list[ShardRecord]] | None:
        """The receipts of all shards, by part; None as long as one is missing or lacks slices.

        Of the other parts only where these get more slices.
        """
        found: dict[str, list[ShardRecord]] = {}
        for path, record in [(part.path, corpus), *self._other_parts(part)]:
            found[path.name] = []
            for number, file in enumerate(record.examples):
                receipt = find_receipt(path, number, file.sha256)
                if receipt is None or 1 + receipt.further_slices < len(part.sketches):
                    return None
                found[path.name].append(receipt)
        return found

    def finish(
        self, part: _Part, corpus: CorpusRecord, shards: dict[str, list[ShardRecord]]
    ) -> Manifest:
        """Write the manifest of the parts that were there and this one."""
        write_whole(self.folder / FACTORS_NAME, self.factors.read_bytes())
        fresh = PartRecord(name=part.name, data=corpus.data, shards=shards[part.name], deleted=[])
        parts = [
            found.model_copy(update={"shards": shards.get(found.name, found.shards)})
            for found in self._parts(fresh)
        ]
        index = coded_index(self.options.codes, part.sketch)
        examples = ExampleStore(example_files(self.folder, parts), kept_rows(parts, failed=False))
        name, damping = self.estimator_name, self.options.damping
        estimators = Estimators.of_factors(self.loaded, examples, name, self.fitted, damping)
        noise = measure_noise(
            self.loaded,
            estimators.own.directions,
            part.sketches,
            self.options.codes,
            examples,
            self.options.token_budget,
        )
        manifest = Manifest(
            schema_version=SCHEMA_VERSION,
            model=self.loaded.record,
            estimator=estimator_record(
                name, self.factors, damping, self.facts, self.loaded.coverage
            ),
            sketch=sketch_record(part.sketches, noise, self._components(part.sketch)),
            codes=self.options.codes,
            bytes_per_row=index.code_size + 4 + further_bytes(part.sketches),
            parts=parts,
            files=[FileRecord(path=FACTORS_NAME, sha256=sha256_of(self.folder / FACTORS_NAME))],
            versions=versions(),
        )
        manifest.write(self.folder)
        return manifest

    def _parts(self, fresh: PartRecord) -> list[PartRecord]:
        """All parts, ``fresh`` in its place; rows that it supersedes are marked as deleted."""
        manifest = find_manifest(self.folder)
        found = [] if manifest is None else manifest.parts
        if fresh.name in (part.name for part in found):
            return [
                fresh.model_copy(update={"deleted": part.deleted})
                if part.name == fresh.name
                else part
                for part in found
            ]
        files = example_files(self.folder, [fresh])
        if self.mode == "supersede":
            found = supersede(self.folder, found, files)
        else:
            check_new_ids(self.folder, found, files)
        return [*found, fresh]

    def _components(self, sketch: Sketch) -> list[int]:
        """Components of low-rank codes, which must be those of an index that is there.

        Raises:
            IndexMismatch: they are not, e.g. since another machine rounds otherwise.
        """
        manifest = find_manifest(self.folder)
        found = [block.components for block in code_blocks(self.options.codes, sketch)]
        if manifest is not None and manifest.sketch.components != found:
            raise IndexMismatch(
                f"The index has {manifest.sketch.components} components by layer, this build "
                f"{found}; append on the machine that built it."
            )
        return found


def check_factors(facts: dict[str, str], loaded: LoadedModel) -> None:
    """Raise IndexMismatch unless the factors were fitted on this very model."""
    if facts["model_sha256"] != loaded.model_sha256:
        raise IndexMismatch(
            f"The factors were fitted on the model with SHA-256 {facts['model_sha256']}, "
            f"'{loaded.source}' has {loaded.model_sha256}; fit the estimator on this model."
        )
