"""Swap the index that is served from a root folder."""

from pathlib import Path
from typing import Annotated

import typer

from index.current import current_folder, point_to
from index.manifest import Manifest
from scripts.console import one_sentence_errors, print_json

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
@one_sentence_errors
def main(
    root: Annotated[Path, typer.Argument(help="Folder that holds indexes, and is served.")],
    name: Annotated[str, typer.Argument(help="Of the index's folder in it.")],
) -> None:
    """Make ROOT/NAME the index that is served from ROOT: at once, or not at all.

    A running service opens it within seconds; queries under way keep the
    old one.

    Example:
    etymon point-to runs/mine v2
    """
    if (root / name).is_dir():
        Manifest.read(root / name)  # an index that is whole, or the reason why it is none
    point_to(root, name)
    print_json({"current": str(current_folder(root))})


if __name__ == "__main__":
    app()
