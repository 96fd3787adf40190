"""Write the description of the HTTP API, docs/openapi.json, as the code has it."""

import json
from pathlib import Path

import typer

from index.files import write_whole
from scripts.console import one_sentence_errors, print_json
from service.http.app import create_app
from service.settings import Settings

OPENAPI = Path(__file__).parents[2] / "docs" / "openapi.json"

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
@one_sentence_errors
def main() -> None:
    """Write docs/openapi.json, which a test compares with the code.

    Example: python -m scripts.dev.openapi
    """
    write_whole(OPENAPI, serialised().encode())
    print_json({"written": str(OPENAPI)})


def serialised() -> str:
    """The description as it is kept."""
    service = create_app(Settings(model="unloaded", indexes={"default": Path("unloaded")}))
    return json.dumps(service.openapi(), indent=1, sort_keys=True, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    app()
