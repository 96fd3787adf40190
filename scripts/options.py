"""Command-line options that several commands share."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:  # they import torch or datasets, which take seconds
    from service.checkpoints import ModelSource
    from service.indexing.corpus import CorpusSource

Model = Annotated[
    str,
    typer.Option(
        help="Folder or name of a causal language model (Hugging Face format), or of a PEFT "
        "adapter; NAME@REVISION for a branch, tag or commit of a repository."
    ),
]
Revision = Annotated[
    str | None,
    typer.Option(help="Branch, tag or commit of the model's repository, e.g. step1000."),
]
Tokenizer = Annotated[
    str | None,
    typer.Option(
        help="Folder or name of the tokenizer that the model was trained with, where none lies "
        "beside the weights. An index remembers it."
    ),
]
BaseModel = Annotated[
    str | None,
    typer.Option(
        help="Folder or name of an adapter's base model, where it no longer lies where the "
        "adapter says. An index remembers it."
    ),
]
UnusedWeights = Annotated[
    bool,
    typer.Option(
        "--unused-weights",
        help="Go on although the checkpoint holds weights that the model does not use, e.g. a "
        "value head.",
    ),
]
Layers = Annotated[
    list[str] | None,
    typer.Option(
        "--layers",
        help="Shell pattern over layer names to attribute, e.g. '*.mlp.*'; may be repeated. "
        "All linear layers but the output head by default.",
    ),
]
Embeddings = Annotated[
    bool,
    typer.Option(
        "--embeddings",
        help="Also attribute the token embeddings and the output head, whatever --layers says.",
    ),
]
Norms = Annotated[
    bool,
    typer.Option("--norms", help="Also attribute weights and biases of norms that --layers names."),
]
Widest = Annotated[
    int | None,
    typer.Option(
        help="Split a layer whose inputs or outputs are more than this many into equal blocks, "
        "each with curvature of its own: less memory and time for very wide layers."
    ),
]
Device = Annotated[str, typer.Option(help="Where to compute, e.g. cpu or cuda.")]
DType = Annotated[str, typer.Option(help="auto (as stored), float32, bfloat16 or float16.")]
GradientCheckpointing = Annotated[
    bool,
    typer.Option(
        "--gradient-checkpointing",
        help="Compute each block again in the backward pass instead of keeping its activations: "
        "less memory, more time, the same numbers.",
    ),
]
Data = Annotated[
    str,
    typer.Option(
        help="Training examples: a .jsonl, .json, .parquet, .csv or .txt file, or the name of a "
        "data set (NAME or NAME:CONFIGURATION)."
    ),
]
Split = Annotated[str, typer.Option(help="Split of a named data set.")]
TextColumn = Annotated[str, typer.Option(help="Column with the text.")]
IdColumn = Annotated[
    str | None, typer.Option(help="Column with unique ids; rows are numbered without it.")
]
DocumentColumn = Annotated[
    str | None, typer.Option(help="Column naming the document that a row is a part of.")
]
MetadataColumn = Annotated[
    list[str] | None,
    typer.Option(help="Column to keep beside the text; may be repeated. All others by default."),
]
Limit = Annotated[int | None, typer.Option(help="Read only this many rows.")]
TokenBudget = Annotated[
    int,
    typer.Option(
        help="Padded tokens in a batch. 1024 is best on a CPU (activations stay in its caches); a "
        "GPU wants more, up to its memory."
    ),
]

DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Only predict disk, memory and time; write nothing.")
]


def model_source(
    model: str,
    revision: str | None,
    tokenizer: str | None,
    base_model: str | None,
    unused_weights: bool,
) -> "ModelSource":
    """The model that the options name, with what belongs to it."""
    from service.checkpoints import ModelSource

    return ModelSource.of(
        model,
        revision,
        tokenizer=tokenizer,
        base_model=base_model,
        unused_weights=unused_weights,
    )


def corpus_source(
    data: str,
    split: str,
    text_column: str,
    id_column: str | None,
    document_column: str | None,
    metadata_column: list[str] | None,
    limit: int | None,
) -> "CorpusSource":
    """The corpus that the options name."""
    from service.indexing.corpus import CorpusSource

    return CorpusSource(
        data=data,
        split=split,
        text_column=text_column,
        id_column=id_column,
        document_column=document_column,
        metadata_columns=tuple(metadata_column) if metadata_column else None,
        limit=limit,
    )


def read_queries(path: Path, limit: int | None = None) -> list[tuple[str, str | None]]:
    """Prompts and completions of a JSONL file; None where the model is to complete.

    Raises:
        ValueError: there is no such file, a line is not such an object, or there is none.
    """
    if not path.is_file():
        raise ValueError(f"There is no file {path}; give a JSONL file with a 'prompt' a line.")
    found: list[tuple[str, str | None]] = []
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    for number, line in enumerate(lines[:limit], start=1):
        try:
            item = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"Line {number} of {path} is not JSON: {error}.") from error
        if not isinstance(item, dict) or "prompt" not in item:
            has = sorted(item) if isinstance(item, dict) else type(item).__name__
            raise ValueError(f"Line {number} of {path} has no 'prompt'; it has {has}.")
        found.append((item["prompt"], item.get("completion")))
    if not found:
        raise ValueError(f"{path} holds no query.")
    return found
