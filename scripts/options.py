"""Command-line options that several commands share."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

if TYPE_CHECKING:  # they import torch or datasets, which take seconds
    from service.checkpoints import ModelSource
    from service.corpus.source import CorpusSource, Format
    from service.search.query import Term

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
    list[str],
    typer.Option(
        help="Training examples: a .jsonl, .json, .parquet, .arrow, .csv or .txt file (also .gz, "
        ".bz2, .xz, .zst around lines), a pattern such as 'shard-*.jsonl', a folder, also one of "
        "save_to_disk, or the name of a data set (NAME or NAME:CONFIGURATION). May be repeated."
    ),
]
Split = Annotated[str, typer.Option(help="Split of a named or saved data set.")]
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
RowFormat = Annotated[
    str | None,
    typer.Option(
        "--format",
        help="What a row is: text; messages (a conversation, of which the assistant's turns "
        "count); prompt-completion (the completion counts); preference (chosen and rejected, with "
        "DPO's loss); tokens (input_ids, with labels -100 where a token does not count). Told by "
        "the columns if not given.",
    ),
]
Column = Annotated[
    list[str] | None,
    typer.Option(
        help="ROLE=NAME where a column has not its usual name, e.g. messages=conversations; a dot "
        "leads into a nested column. May be repeated. Roles: text, messages, tools, prompt, "
        "completion, chosen, rejected, ref_chosen_logps, ref_rejected_logps, input_ids, labels, "
        "attention_mask, position_ids, seq_lengths, weight (times which a row counts)."
    ),
]
AppendEos = Annotated[
    bool,
    typer.Option("--append-eos", help="End each text and completion with the end-of-text token."),
]
Overlap = Annotated[
    int,
    typer.Option(
        help="Tokens that a window repeats of the one before; they are its context and do not "
        "count twice."
    ),
]
Truncate = Annotated[
    bool,
    typer.Option(
        "--truncate",
        help="Cut rows off after --max-tokens, as trainers do, instead of reading what follows as "
        "further windows.",
    ),
]
Beta = Annotated[float, typer.Option(help="Of DPO's loss, for rows with chosen and rejected.")]
Reference = Annotated[
    str | None,
    typer.Option(
        help="Folder or name of the model that DPO compared with, if no columns have its "
        "log-probabilities."
    ),
]
SourceWeight = Annotated[
    list[float] | None,
    typer.Option(
        help="Times which the rows of each --data count, e.g. epochs or mixture weights; once for "
        "each, in the same order."
    ),
]
Limit = Annotated[int | None, typer.Option(help="Read only this many rows.")]
TokenBudget = Annotated[
    int,
    typer.Option(
        help="Padded tokens in a batch. 1024 is best on a CPU (activations stay in its caches); a "
        "GPU wants more, up to its memory."
    ),
]

Show = Annotated[
    int,
    typer.Option(
        help="Only show so many examples as the model reads them, with the tokens whose loss "
        "counts in colour; write nothing."
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
    data: list[str],
    *,
    split: str,
    text_column: str,
    id_column: str | None,
    document_column: str | None,
    metadata_column: list[str] | None,
    limit: int | None,
    row_format: str | None,
    column: list[str] | None,
    append_eos: bool,
    overlap: int,
    truncate: bool,
    beta: float,
    reference: str | None,
    source_weight: list[float] | None,
) -> "CorpusSource":
    """The corpus that the options name.

    Raises:
        ValueError: a column is not named as ROLE=NAME, or options exclude each other.
    """
    from service.corpus.source import CorpusSource

    return CorpusSource(
        data=data[0] if len(data) == 1 else tuple(data),
        split=split,
        text_column=text_column,
        id_column=id_column,
        document_column=document_column,
        metadata_columns=tuple(metadata_column) if metadata_column else None,
        limit=limit,
        format=cast("Format | None", row_format),
        columns=_named_columns(column or []),
        append_eos=append_eos,
        overlap=overlap,
        truncate=truncate,
        beta=beta,
        reference=reference,
        weights=tuple(source_weight or ()),
    )


def _named_columns(given: list[str]) -> dict[str, str]:
    found = {}
    for one in given:
        role, equals, name = one.partition("=")
        if not (role and equals and name):
            raise ValueError(
                f"A column is named as ROLE=NAME, e.g. messages=conversations; got '{one}'."
            )
        found[role] = name
    return found


def read_queries(path: Path, limit: int | None = None) -> list["Term"]:
    """Prompts or conversations of a JSONL file, with completions where it has them.

    Raises:
        ValueError: there is no such file, a line is not such an object, or there is none.
    """
    if not path.is_file():
        raise ValueError(
            f"There is no file {path}; give a JSONL file with a 'prompt' or 'messages' a line."
        )
    found: list[Term] = []
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    for number, line in enumerate(lines[:limit], start=1):
        try:
            item = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"Line {number} of {path} is not JSON: {error}.") from error
        if not isinstance(item, dict) or not {"prompt", "messages"} & set(item):
            has = sorted(item) if isinstance(item, dict) else type(item).__name__
            raise ValueError(f"Line {number} of {path} has no 'prompt'; it has {has}.")
        found.append(_query(item, f"line {number} of {path}"))
    if not found:
        raise ValueError(f"{path} holds no query.")
    return found


def _query(item: dict[str, Any], where: str) -> "Term":
    from service.conversation import check_question, read_messages
    from service.search.query import Term

    messages = None
    if item.get("messages") is not None:
        messages = read_messages(item["messages"], where)
    try:
        check_question(item.get("prompt"), messages, item.get("completion"))
    except ValueError as error:
        raise ValueError(f"{where[0].upper()}{where[1:]} is no query: {error}") from error
    return Term(
        prompt=item.get("prompt") or "",
        messages=messages or (),
        completion=item.get("completion"),
    )
