"""Command-line options that several commands share."""

from typing import Annotated

import typer

from service.corpus import CorpusSource

Model = Annotated[
    str, typer.Option(help="Folder or name of a causal language model (Hugging Face format).")
]
Layers = Annotated[
    list[str] | None,
    typer.Option(
        "--layers",
        help="Shell pattern over layer names to attribute, e.g. '*.mlp.*'; may be repeated. "
        "All linear layers but the output head by default.",
    ),
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
        help="Padded tokens in a batch. 1024 is best on a CPU (logits stay in its caches); a GPU "
        "wants more, up to its memory."
    ),
]

DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Only predict disk, memory and time; write nothing.")
]


def corpus_source(
    data: str,
    split: str,
    text_column: str,
    id_column: str | None,
    document_column: str | None,
    metadata_column: list[str] | None,
    limit: int | None,
) -> CorpusSource:
    """The corpus that the options name."""
    return CorpusSource(
        data=data,
        split=split,
        text_column=text_column,
        id_column=id_column,
        document_column=document_column,
        metadata_columns=tuple(metadata_column) if metadata_column else None,
        limit=limit,
    )
