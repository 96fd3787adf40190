"""The batch indexing job: examples, sketches, shards, noise, manifest; resumable at every shard."""

import json
import math
import secrets
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float

from estimators.layers import LayerSelection, find_layers
from estimators.progress import Progress, no_progress
from estimators.sketch import Sketch, SketchPlan
from estimators.storage import load_estimator
from estimators.tokens import Sequence1D, collate, plan_batches
from index.errors import IndexMismatch
from index.examples import Example, check_ids, corpus_sha256, write_examples
from index.files import exclusive, sha256_of, write_whole
from index.manifest import (
    DataRecord,
    EstimatorRecord,
    FailedRow,
    FileRecord,
    Manifest,
    ModelRecord,
    NoiseRecord,
    ShardRecord,
    SketchRecord,
    SkippedRecord,
)
from index.shards import find_receipt, write_shard
from index.vectors import make_index
from service.corpus import CorpusSource, describe, read_examples
from service.models import LoadedModel
from service.noise import measure_noise
from service.versions import versions

PLAN_NAME = "plan.json"
FACTORS_NAME = "factors/estimator.safetensors"


@dataclass(frozen=True, kw_only=True)
class BuildOptions:
    """What a user chooses about an index.

    Attributes:
        max_tokens: longest window of a document, in tokens; None takes the model's context.
        damping: relative damping of the whitening (and the default of queries).
        dimensions: of the sketch; with one-bit codes an eighth of a byte each.
        rank: of the sketch's first stage; None takes half the root of the dimensions, which keeps
            its noise small beside that of the codes.
        codes: kind of code, see ``index.vectors.CODES``.
        rows_per_shard: the unit of work that an interrupted build loses at most.
        token_budget: padded tokens in a batch.
        seed: of the sketch; None draws one. Keep it from whoever writes corpus or queries.
    """

    max_tokens: int | None = None
    damping: float = 0.1
    dimensions: int = 16384
    rank: int | None = None
    codes: str = "one-bit"
    rows_per_shard: int = 1024
    token_budget: int = 1024
    seed: int | None = None

    def sketch_plan(self, seed: int) -> SketchPlan:
        """The sketch of these options."""
        rank = math.isqrt(self.dimensions) // 2 if self.rank is None else self.rank
        return SketchPlan(seed=seed, dimensions=self.dimensions, rank=max(1, rank))


def build_index(
    folder: Path,
    loaded: LoadedModel,
    factors: Path,
    source: CorpusSource,
    options: BuildOptions,
    progress: Progress = no_progress,
) -> Manifest:
    """Build, or finish building, the index of a corpus in ``folder``.

    The layers attributed are those that the factors were fitted for.

    Shards that are whole on disk are kept; the result is the same as without the interruption.

    Raises:
        IndexMismatch: the factors belong to another model, or the folder holds a build with
            other inputs or settings.
        IndexBusy: another process builds in the folder.
        DiskFull: no room; run again when there is.
        DuplicateIds: two examples have the same id.
        ValueError: the corpus cannot be read or has no row.
    """
    name, estimator, facts = load_estimator(factors)
    check_factors(facts, loaded)
    coverage = find_layers(loaded.model, LayerSelection.from_facts(facts))
    loaded = replace(loaded, coverage=coverage)
    with exclusive(folder):
        max_tokens = options.max_tokens or loaded.context
        examples = list(read_examples(source, loaded, max_tokens))
        if not examples:
            raise ValueError(f"The corpus '{source.data}' has no row.")
        check_ids(examples)
        plan = _settle_plan(folder, loaded, factors, examples, options)
        whitening = estimator.whitening(loaded.coverage.layers, options.damping)
        sketch = Sketch(loaded.coverage.layers, whitening, options.sketch_plan(plan["seed"]))
        paths = write_examples(folder, examples, options.rows_per_shard)
        job = _Job(folder=folder, loaded=loaded, sketch=sketch, options=options)
        shards = job.run(examples, progress)
        write_whole(folder / FACTORS_NAME, factors.read_bytes())
        failed = {failed.row for shard in shards for failed in shard.failed}
        index = make_index(options.codes, options.dimensions)
        budget = options.token_budget
        noise = measure_noise(
            loaded, estimator, options.damping, sketch, index, examples, failed, budget
        )
        manifest = Manifest(
            schema_version=1,
            model=ModelRecord(
                source=loaded.source,
                model_sha256=loaded.model_sha256,
                tokenizer_sha256=loaded.tokenizer_sha256,
            ),
            estimator=_estimator_record(name, factors, facts, loaded, options),
            sketch=_sketch_record(sketch, noise),
            codes=options.codes,
            bytes_per_row=index.code_size + 4,
            data=_data_record(source, plan["corpus_sha256"], examples, max_tokens),
            shards=shards,
            files=_file_records(folder, [*paths, folder / FACTORS_NAME]),
            versions=versions(),
        )
        manifest.write(folder)
    return manifest


@dataclass(frozen=True, kw_only=True)
class _Job:
    folder: Path
    loaded: LoadedModel
    sketch: Sketch
    options: BuildOptions

    def run(self, examples: Sequence[Example], progress: Progress) -> list[ShardRecord]:
        size = self.options.rows_per_shard
        starts = list(range(0, len(examples), size))
        records = []
        for number, start in enumerate(progress("index", starts)):
            record = find_receipt(self.folder, number)
            if record is None:
                record = self.run_shard(number, start, examples[start : start + size])
            records.append(record)
        return records

    def run_shard(self, number: int, first_row: int, examples: Sequence[Example]) -> ShardRecord:
        """Sketch, encode and write one shard; safe to repeat."""
        sketches, norms, failed = self._sketch(first_row, examples)
        codes = make_index(self.options.codes, self.options.dimensions).encode(sketches)
        return write_shard(self.folder, number, first_row, codes, norms, failed)

    def _sketch(
        self, first_row: int, examples: Sequence[Example]
    ) -> tuple[Float[np.ndarray, "row dimension"], Float[np.ndarray, "row"], list[FailedRow]]:
        sketches = np.zeros((len(examples), self.options.dimensions), dtype=np.float32)
        norms = np.zeros(len(examples), dtype=np.float32)
        lengths = [len(example.tokens) for example in examples]
        for positions in plan_batches(lengths, self.options.token_budget):
            batch = collate([Sequence1D(tokens=examples[p].tokens) for p in positions])
            x, norm = self.sketch.training(self.loaded.model, batch.to(self.loaded.device))
            length = torch.linalg.vector_norm(x, dim=1, keepdim=True)
            unit = torch.where(length > 0, x / length, 0)
            sketches[positions] = unit.cpu().numpy()
            norms[positions] = norm.cpu().numpy()
        failed = []
        for position in np.flatnonzero(~np.isfinite(norms) | ~np.isfinite(sketches).all(1)):
            failed.append(
                FailedRow(row=first_row + int(position), reason="its gradient is not finite")
            )
            sketches[position], norms[position] = 0, 0
        return sketches, norms, failed


def _settle_plan(
    folder: Path,
    loaded: LoadedModel,
    factors: Path,
    examples: Sequence[Example],
    options: BuildOptions,
) -> dict[str, Any]:
    """Write what the build is made of, or compare it with what an earlier run wrote."""
    plan: dict[str, Any] = {
        **asdict(options),
        "model_sha256": loaded.model_sha256,
        "tokenizer_sha256": loaded.tokenizer_sha256,
        "factors_sha256": sha256_of(factors),
        "corpus_sha256": corpus_sha256(examples),
    }
    path = folder / PLAN_NAME
    if path.is_file():
        found = json.loads(path.read_bytes())
        if plan["seed"] is None:
            plan["seed"] = found["seed"]
        changed = sorted(key for key in plan if plan[key] != found.get(key))
        if changed:
            listing = "; ".join(f"{key}: {found.get(key)} -> {plan[key]}" for key in changed)
            raise IndexMismatch(
                f"{folder} holds a build with other inputs or settings ({listing}). Repeat them, "
                f"or choose another folder."
            )
        return plan
    if plan["seed"] is None:
        plan["seed"] = secrets.randbits(62)
    write_whole(path, json.dumps(plan, indent=1).encode())
    return plan


def check_factors(facts: dict[str, str], loaded: LoadedModel) -> None:
    """Raise IndexMismatch unless the factors were fitted on this very model."""
    if facts["model_sha256"] != loaded.model_sha256:
        raise IndexMismatch(
            f"The factors were fitted on the model with SHA-256 {facts['model_sha256']}, "
            f"'{loaded.source}' has {loaded.model_sha256}; fit the estimator on this model."
        )


def _estimator_record(
    name: str, factors: Path, facts: dict[str, str], loaded: LoadedModel, options: BuildOptions
) -> EstimatorRecord:
    coverage = loaded.coverage
    selection = LayerSelection.from_facts(facts)
    return EstimatorRecord(
        name=name,
        sha256=sha256_of(factors),
        damping=options.damping,
        layer_patterns=list(selection.patterns),
        widest=selection.widest,
        layers=[layer.name for layer in coverage.layers],
        attributed_share=coverage.attributed_share,
        skipped=[SkippedRecord(**asdict(module)) for module in coverage.skipped],
    )


def _data_record(
    source: CorpusSource, sha256: str, examples: Sequence[Example], max_tokens: int
) -> DataRecord:
    return DataRecord(
        source=describe(source),
        sha256=sha256,
        documents=len({example.document for example in examples}),
        rows=len(examples),
        empty_rows=sum(len(example.tokens) < 2 for example in examples),
        tokens=sum(len(example.tokens) for example in examples),
        max_tokens=max_tokens,
    )


def _sketch_record(sketch: Sketch, noise: NoiseRecord) -> SketchRecord:
    return SketchRecord(
        seed=sketch.plan.seed,
        dimensions=sketch.plan.dimensions,
        rank=sketch.plan.rank,
        entries=sketch.entries,
        noise=noise,
    )


def _file_records(folder: Path, paths: Sequence[Path]) -> list[FileRecord]:
    return [FileRecord(path=str(p.relative_to(folder)), sha256=sha256_of(p)) for p in paths]
