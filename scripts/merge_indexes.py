"""Merge indexes that were built apart into one."""

from pathlib import Path
from typing import Annotated

import typer

from index.editing import merge_indexes
from scripts.console import one_sentence_errors, print_json

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
@one_sentence_errors
def main(
    indexes: Annotated[list[Path], typer.Argument(help="Folders of finished indexes, in order.")],
    out: Annotated[Path, typer.Option(help="Folder of the merged index.")],
) -> None:
    """Merge indexes of the same model, factors, options and sketch seed (--seed of their builds).

    Example:
    etymon merge runs/a/index runs/b/index --out runs/all/index
    """
    merged = merge_indexes(out, indexes)
    rows = merged.rows - sum(len(part.deleted) for part in merged.parts)
    print_json({"out": str(out), "rows": rows, "parts": len(merged.parts)})


if __name__ == "__main__":
    app()
