"""Whether the mean loss tells a wrong tokenizer: models with their own and with each other's."""

import json
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from estimators.model.tokens import Sequence1D
from scripts.bench.record import write_record
from scripts.console import one_sentence_errors, print_json, show_progress, stderr
from service.checkpoints import ModelSource, UnusableModel
from service.indexing.plausibility import SUSPICIOUS, TextSample, measure_loss
from service.models import load_model

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
@one_sentence_errors
def main(
    subject: Annotated[
        list[str],
        typer.Option(
            help="NAME=FOLDER with a folder 'model' and a 'corpus.jsonl' that it was trained on, "
            "e.g. those of `make demo` and of the other benchmarks; NAME=FOLDER,CORPUS for another "
            "file; twice and more."
        ),
    ],
    record: Annotated[bool, typer.Option(help="Write docs/benchmarks/plausibility_*.json.")] = True,
) -> None:
    """Measure the mean loss of every model with every tokenizer, on the model's own corpus.

    Of the pairs of one name none may be warned of, of all others each must be: by a warning, or by
    a refusal since the tokenizer has ids that the model's embedding lacks.

    Example:
    python -m scripts.bench.plausibility --subject demo=runs/demo --subject fields=runs/fields
    """
    found = dict(_parse(text) for text in subject)
    pairs = list(product(found, found))
    rows = [_measure(found, *pair) for pair in show_progress("pairs", pairs)]
    _show(rows)
    if record:
        stderr.print(f"Record: {write_record('plausibility', {'rows': rows})}")
    wrong = [row for row in rows if row["told"] == (row["model"] == row["tokenizer"])]
    print_json({"pairs": len(rows), "wrong": wrong})
    if wrong:
        raise typer.Exit(2)


def _parse(text: str) -> tuple[str, tuple[Path, Path]]:
    name, _, rest = text.partition("=")
    folder, _, corpus = rest.partition(",")
    return name, (Path(folder) / "model", Path(corpus or f"{folder}/corpus.jsonl"))


def _measure(found: dict[str, tuple[Path, Path]], model: str, tokenizer: str) -> dict[str, Any]:
    """One pair: the loss, or why the model cannot be loaded so; whether the user is told."""
    folder, corpus = found[model]
    row: dict[str, Any] = {"model": model, "tokenizer": tokenizer}
    try:
        loaded = load_model(ModelSource.of(str(folder), tokenizer=str(found[tokenizer][0])))
    except UnusableModel as error:
        return {**row, "refused": str(error), "told": True}
    sample = TextSample()
    with corpus.open(encoding="utf-8") as file:
        for line in file:
            sample.add(Sequence1D(tokens=tuple(loaded.encode(json.loads(line)["text"]))))
    loss = measure_loss(loaded, sample)
    assert loss is not None
    share = loss.mean / loss.uniform
    return {**row, **loss.model_dump(), "share": share, "told": share > SUSPICIOUS}


def _show(rows: list[dict[str, Any]]) -> None:
    table = Table(title="Mean loss a token beside that of a uniform guess", title_justify="left")
    for heading in ("model and corpus", "tokenizer", "loss", "guess", "share", "told"):
        table.add_column(heading)
    for row in rows:
        figures = ["refused", "", ""]
        if "mean" in row:
            figures = [f"{row['mean']:.2f}", f"{row['uniform']:.2f}", f"{row['share']:.2f}"]
        table.add_row(row["model"], row["tokenizer"], *figures, "yes" if row["told"] else "no")
    stderr.print(table)


if __name__ == "__main__":
    app()
