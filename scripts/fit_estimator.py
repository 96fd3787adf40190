"""Fit an estimator's curvature factors on training examples (two passes for EK-FAC)."""

import time
from pathlib import Path
from typing import Annotated

import typer

from estimators.curvature.fitting import Labels
from estimators.model.selection import LayerSelection
from estimators.registry import FACTORS
from scripts import options
from scripts.console import (
    one_sentence_errors,
    print_json,
    show_logs,
    show_model,
    show_prediction,
    show_progress,
)
from service.indexing.fitting import FitOptions, fit_factors
from service.indexing.prediction import peak_memory, predict_fit
from service.models import load_model

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
@one_sentence_errors
def main(
    model: options.Model,
    data: options.Data,
    out: Annotated[Path, typer.Option(help="File to write, e.g. runs/mine/ekfac.safetensors.")],
    revision: options.Revision = None,
    tokenizer: options.Tokenizer = None,
    base_model: options.BaseModel = None,
    unused_weights: options.UnusedWeights = False,
    estimator: Annotated[str, typer.Option(help=f"One of {', '.join(FACTORS)}.")] = "ekfac",
    examples: Annotated[
        int, typer.Option(help="Fit on at most this many examples, drawn at random.")
    ] = 4096,
    labels: Annotated[
        Labels, typer.Option(help="sampled: true Fisher (the default); empirical: own tokens.")
    ] = "sampled",
    layers: options.Layers = None,
    widest: options.Widest = None,
    embeddings: options.Embeddings = False,
    norms: options.Norms = False,
    split: options.Split = "train",
    text_column: options.TextColumn = "text",
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
    token_budget: options.TokenBudget = 1024,
    seed: Annotated[int, typer.Option(help="Of the drawn examples and sampled labels.")] = 0,
    checkpoint_seconds: Annotated[
        float, typer.Option(help="An interruption loses about this much at most.")
    ] = 60.0,
    dry_run: options.DryRun = False,
    device: options.Device = "cpu",
    dtype: options.DType = "auto",
    gradient_checkpointing: options.GradientCheckpointing = False,
) -> None:
    r"""Fit curvature factors and write them to one safetensors file.

    A fit that was interrupted goes on where it was if the same command is
    run again.

    Example:
    etymon fit --model runs/demo/model --data runs/demo/corpus.jsonl \
      --out runs/demo/ekfac.safetensors
    """
    show_logs()
    start = time.perf_counter()
    selection = LayerSelection(
        patterns=tuple(layers or ["*"]), widest=widest, embeddings=embeddings, norms=norms
    )
    loaded = load_model(
        options.model_source(model, revision, tokenizer, base_model, unused_weights),
        layers=selection,
        device=device,
        dtype=dtype,
        gradient_checkpointing=gradient_checkpointing,
    )
    show_model(loaded)
    source = options.corpus_source(
        data,
        split=split,
        text_column=text_column,
        id_column=None,
        document_column=None,
        metadata_column=[],
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
    chosen = FitOptions(
        estimator=estimator,
        examples=examples,
        labels=labels,
        max_tokens=max_tokens,
        token_budget=token_budget,
        seed=seed,
    )
    if dry_run:
        loading = time.perf_counter() - start
        show_prediction(predict_fit(loaded, source, chosen, checkpoint_seconds), loading)
        return
    count = fit_factors(out, loaded, selection, source, chosen, show_progress, checkpoint_seconds)
    print_json(
        {
            "estimator": estimator,
            "out": str(out),
            "examples": count,
            "layers": len(loaded.coverage.layers),
            "attributed_share": loaded.coverage.attributed_share,
            "memory_bytes": peak_memory(),
            "seconds": time.perf_counter() - start,
        }
    )


if __name__ == "__main__":
    app()
