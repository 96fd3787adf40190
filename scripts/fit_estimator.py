"""Fit an estimator's curvature factors on training examples (two passes for EK-FAC)."""

import time
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from estimators.fitting import Labels, fit_estimator
from estimators.layers import LayerSelection
from estimators.registry import ESTIMATORS
from estimators.storage import serialise_estimator
from estimators.tokens import Sequence1D
from index.files import write_whole
from scripts import options
from scripts.console import one_sentence_errors, print_json, show_coverage, show_progress
from service.corpus import read_examples
from service.models import load_model

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
@one_sentence_errors
def main(
    model: options.Model,
    data: options.Data,
    out: Annotated[Path, typer.Option(help="File to write, e.g. runs/mine/ekfac.safetensors.")],
    estimator: Annotated[str, typer.Option(help=f"One of {', '.join(ESTIMATORS)}.")] = "ekfac",
    examples: Annotated[
        int, typer.Option(help="Fit on at most this many examples, drawn at random.")
    ] = 4096,
    labels: Annotated[
        Labels, typer.Option(help="sampled: true Fisher (the default); empirical: own tokens.")
    ] = "sampled",
    layers: options.Layers = None,
    widest: options.Widest = None,
    split: options.Split = "train",
    text_column: options.TextColumn = "text",
    limit: options.Limit = None,
    max_tokens: Annotated[
        int | None, typer.Option(help="Cut longer texts into windows of so many tokens.")
    ] = None,
    token_budget: options.TokenBudget = 1024,
    seed: Annotated[int, typer.Option(help="Of the drawn examples and sampled labels.")] = 0,
    device: options.Device = "cpu",
    dtype: options.DType = "auto",
    gradient_checkpointing: options.GradientCheckpointing = False,
) -> None:
    """Fit curvature factors and write them to one safetensors file.

    Example: python -m scripts.fit_estimator --model runs/demo/model
    --data runs/demo/corpus.jsonl --out runs/demo/ekfac.safetensors
    """
    start = time.perf_counter()
    selection = LayerSelection(patterns=tuple(layers or ["*"]), widest=widest)
    loaded = load_model(
        model,
        layers=selection,
        device=device,
        dtype=dtype,
        gradient_checkpointing=gradient_checkpointing,
    )
    show_coverage(loaded.coverage)
    source = options.corpus_source(data, split, text_column, None, None, [], limit)
    everything = list(read_examples(source, loaded, max_tokens or loaded.context))
    generator = np.random.default_rng(seed)
    chosen = np.sort(generator.permutation(len(everything))[:examples])
    sequences = [Sequence1D(tokens=everything[i].tokens, row=int(i)) for i in chosen]
    fitted = fit_estimator(
        estimator,
        loaded.model,
        loaded.coverage.layers,
        sequences,
        token_budget=token_budget,
        seed=seed,
        labels=labels,
        progress=show_progress,
    )
    facts = {
        "model_sha256": loaded.model_sha256,
        **selection.to_facts(),
        "labels": labels,
        "examples": str(len(sequences)),
        "seed": str(seed),
    }
    write_whole(out, serialise_estimator(estimator, fitted, facts))
    print_json(
        {
            "estimator": estimator,
            "out": str(out),
            "examples": len(sequences),
            "layers": len(loaded.coverage.layers),
            "attributed_share": loaded.coverage.attributed_share,
            "seconds": time.perf_counter() - start,
        }
    )


if __name__ == "__main__":
    app()
