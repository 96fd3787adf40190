"""Delete examples from an index; answers no longer contain them."""

from pathlib import Path
from typing import Annotated

import typer

from index.editing import Column, delete_rows
from scripts.console import one_sentence_errors, print_json

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
@one_sentence_errors
def main(
    index: Annotated[Path, typer.Option(help="Folder of the index.")],
    values: Annotated[
        list[str] | None, typer.Argument(help="Ids; that of a text stands for its windows.")
    ] = None,
    file: Annotated[Path | None, typer.Option(help="A file with one id a line.")] = None,
    column: Annotated[Column, typer.Option(help="What is given: ids or documents.")] = "id",
) -> None:
    """Delete examples by id or document: no answer contains them any more.

    Their codes and texts stay on disk until the index is built anew.

    Example:
    etymon delete --index runs/demo/index --column document Nepal
    """
    wanted = [*(values or []), *(file.read_text().splitlines() if file else [])]
    if not wanted:
        raise ValueError("Nothing to delete: give ids as arguments or in a --file.")
    deleted = delete_rows(index, wanted, column)
    print_json({"index": str(index), "deleted_rows": deleted})


if __name__ == "__main__":
    app()
