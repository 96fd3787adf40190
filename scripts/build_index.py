"""The batch indexing job: sketch every training example's gradient into an index."""

import tempfile
import time
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import typer

from index.codes.vectors import KINDS
from index.manifest import Manifest
from scripts import options
from scripts.console import (
    one_sentence_errors,
    print_json,
    print_plain,
    show_example,
    show_logs,
    show_prediction,
    show_progress,
    stderr,
)
from service.corpus.reading import read_examples
from service.indexing.building import BuildOptions, Mode, Worker, build_index, build_share
from service.indexing.plan import planned_slices
from service.indexing.prediction import peak_memory, predict_build
from service.models import load_model
from service.search.calibrating import calibrate_index
from service.search.opening import open_index

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
@one_sentence_errors
def main(
    model: options.Model,
    data: options.Data,
    factors: Annotated[Path, typer.Option(help="File that etymon fit wrote.")],
    out: Annotated[Path, typer.Option(help="Folder of the index.")],
    revision: options.Revision = None,
    tokenizer: options.Tokenizer = None,
    base_model: options.BaseModel = None,
    unused_weights: options.UnusedWeights = False,
    split: options.Split = "train",
    text_column: options.TextColumn = "text",
    id_column: options.IdColumn = None,
    document_column: options.DocumentColumn = None,
    metadata_column: options.MetadataColumn = None,
    limit: options.Limit = None,
    row_format: options.RowFormat = None,
    column: options.Column = None,
    append_eos: options.AppendEos = False,
    overlap: options.Overlap = 0,
    truncate: options.Truncate = False,
    beta: options.Beta = 0.1,
    reference: options.Reference = None,
    source_weight: options.SourceWeight = None,
    max_tokens: Annotated[
        int | None, typer.Option(help="Cut longer texts into windows of so many tokens.")
    ] = None,
    damping: Annotated[
        float, typer.Option(help="Relative damping: times each layer's mean eigenvalue.")
    ] = 0.1,
    dimensions: Annotated[
        int, typer.Option(help="Of the sketch, a power of two; 8 make a byte of one-bit codes.")
    ] = 16384,
    rank: Annotated[
        int | None,
        typer.Option(help="Of the sketch's first stage, a side; half the root of the dimensions."),
    ] = None,
    codes: Annotated[str, typer.Option(help=f"One of {', '.join(KINDS)}.")] = "one-bit",
    rows_per_shard: Annotated[int, typer.Option(help="What an interruption loses at most.")] = 1024,
    token_budget: options.TokenBudget = 1024,
    seed: Annotated[
        int | None, typer.Option(help="Of the sketch; drawn if not given (better: keep it so).")
    ] = None,
    slices: Annotated[
        int | None,
        typer.Option(
            help="Codes of each row; the first is scanned, the others lie on disk and are read for "
            "contenders, which saves exact scores. 16 for a new index with one-bit codes, which "
            "then takes 32 KB an example; 1 takes 2 KB. More than an index has are added to it."
        ),
    ] = None,
    refine_dir: Annotated[
        Path | None,
        typer.Option(
            help="Where all codes but the scanned ones are to lie, e.g. on a slower disk; an empty "
            "folder, which the index then has a link to."
        ),
    ] = None,
    append: Annotated[
        bool, typer.Option("--append", help="Add the corpus to the index that is there.")
    ] = False,
    supersede: Annotated[
        bool,
        typer.Option("--supersede", help="Append, and delete old rows with the id of a new one."),
    ] = False,
    shard_id: Annotated[
        int | None,
        typer.Option(help="Build one share only: this worker's number, from 0. See --num-shards."),
    ] = None,
    num_shards: Annotated[
        int | None,
        typer.Option(help="Workers in all, e.g. $SLURM_NTASKS; they share the folder."),
    ] = None,
    calibration_queries: Annotated[
        Path | None,
        typer.Option(
            help="Then score these against every row (JSONL with 'prompt' or 'messages', and "
            "'completion'), so that answers can say what recall most queries like them have. 59 at "
            "least; 100 allow one of them to be hard, 200 four."
        ),
    ] = None,
    show: options.Show = 0,
    dry_run: options.DryRun = False,
    device: options.Device = "cpu",
    dtype: options.DType = "auto",
    gradient_checkpointing: options.GradientCheckpointing = False,
) -> None:
    r"""Build an index, or finish one that was interrupted (run the same command again).

    Example:
    etymon build --model runs/demo/model --data runs/demo/corpus.jsonl \
      --id-column id --document-column document \
      --factors runs/demo/ekfac.safetensors --out runs/demo/index
    """
    show_logs()
    start = time.perf_counter()
    asked = None if calibration_queries is None else options.read_queries(calibration_queries)
    loaded = load_model(
        options.model_source(model, revision, tokenizer, base_model, unused_weights),
        device=device,
        dtype=dtype,
        gradient_checkpointing=gradient_checkpointing,
    )
    for note in loaded.notes:
        print_plain(note)
    source = options.corpus_source(
        data,
        split=split,
        text_column=text_column,
        id_column=id_column,
        document_column=document_column,
        metadata_column=metadata_column,
        limit=limit,
        row_format=row_format,
        column=column,
        append_eos=append_eos,
        overlap=overlap,
        truncate=truncate,
        beta=beta,
        reference=reference,
        source_weight=source_weight,
    )
    chosen = BuildOptions(
        max_tokens=max_tokens,
        damping=damping,
        dimensions=dimensions,
        rank=rank,
        codes=codes,
        rows_per_shard=rows_per_shard,
        token_budget=token_budget,
        seed=seed,
        slices=slices,
    )
    if show:
        examples = read_examples(source, loaded, max_tokens or loaded.context)
        for example in islice(examples, show):
            show_example(loaded.tokenizer, example)
        return
    if dry_run:
        loading = time.perf_counter() - start
        chosen = replace(chosen, slices=planned_slices(out, slices, codes))
        with tempfile.TemporaryDirectory() as scratch:
            prediction = predict_build(loaded, factors, source, chosen, Path(scratch))
        show_prediction(prediction, loading)
        return
    mode: Mode = "supersede" if supersede else "append" if append else "new"
    if shard_id is None and num_shards is None:
        manifest = build_index(
            out, loaded, factors, source, chosen, show_progress, mode, refine_dir
        )
    else:
        worker = Worker(number=shard_id or 0, count=num_shards or 1)
        share = build_share(
            out, loaded, factors, source, chosen, worker, show_progress, mode, refine_dir
        )
        if share is None:
            stderr.print("This share is done; other workers' shards are not.", highlight=False)
            print_json({"out": str(out), "complete": False})
            return
        manifest = share
    built = time.perf_counter() - start
    report = _report(manifest, out, built)
    if asked is not None:
        record = calibrate_index(open_index(out, loaded), asked, token_budget, show_progress)
        stderr.print(
            f"Calibrated with {len(asked)} queries in {record.seconds:.0f} s, "
            f"{record.seconds / (built + record.seconds):.0%} of the whole.",
            highlight=False,
        )
        report |= {"calibration_queries": len(asked), "calibration_seconds": record.seconds}
    print_json(report)


def _report(manifest: Manifest, out: Path, seconds: float) -> dict[str, Any]:
    """What was built, for programs; what was odd about it is told on stderr."""
    for failed in manifest.failed:
        stderr.print(f"row {failed.row} is not indexed: {failed.reason}", highlight=False)
    data = manifest.parts[-1].data
    merged, truncated = 0, 0
    if data.reading is not None:
        merged, truncated = data.reading.merged_rows, data.reading.truncated_rows
    for count, text in (
        (data.empty_rows, "without a token to predict, kept but never to be found"),
        (data.null_rows, "with null instead of text, kept as empty"),
        (data.replaced_rows, "with U+FFFD, the mark of bytes that are not UTF-8"),
        (data.duplicate_rows, "with the same tokens as an earlier row"),
        (merged, "whose prompt and completion share a token, which counts"),
        (truncated, "that were cut off because they are too long"),
    ):
        if count:
            stderr.print(f"rows {text}: {count:,}", highlight=False, soft_wrap=True)
    return {
        "out": str(out),
        "complete": True,
        "rows": manifest.rows - sum(len(part.deleted) for part in manifest.parts),
        "deleted_rows": sum(len(part.deleted) for part in manifest.parts),
        "failed_rows": len(manifest.failed),
        "corpora": [part.data.model_dump() for part in manifest.parts],
        "bytes_per_row": manifest.bytes_per_row,
        "noise": manifest.sketch.noise.model_dump(),
        "attributed_share": manifest.estimator.attributed_share,
        "memory_bytes": peak_memory(),
        "seconds": seconds,
    }


if __name__ == "__main__":
    app()
