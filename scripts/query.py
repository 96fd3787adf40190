"""Ask a running service which training examples made the model say something."""

from typing import Annotated, Any

import httpx
import typer
from rich import box
from rich.table import Table
from rich.text import Text

from scripts.console import print_json, stderr

SHOWN_CHARACTERS = 240
"""So much of each example's text is shown; the JSON line has all of it."""
STATUS_STYLES = {"certified": "green", "exhaustive": "green", "refused": "red"}

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


class QueryFailedError(Exception):
    """The service gave no answer; the message says why, in one sentence."""


@app.command()
def main(
    prompt: Annotated[str, typer.Argument(help="What the model was asked.")],
    completion: Annotated[
        str | None,
        typer.Option(
            help="What it said; begin it with its space. Left out: the model's own completion."
        ),
    ] = None,
    url: Annotated[str, typer.Option(help="Of the service.")] = "http://127.0.0.1:8000",
    index: Annotated[str | None, typer.Option(help="Name of the index.")] = None,
    k: Annotated[int | None, typer.Option(help="Training examples to return.")] = None,
    ranking: Annotated[
        str | None, typer.Option(help="normalised (by the gradient's norm) or score.")
    ] = None,
    recall: Annotated[
        float | None, typer.Option(help="Recall of the top k to certify, e.g. 0.9.")
    ] = None,
    confidence: Annotated[
        float | None, typer.Option(help="Of each certificate, e.g. 0.95.")
    ] = None,
    until: Annotated[
        str | None,
        typer.Option(help="Certificate at which the search stops: sketch or calibration."),
    ] = None,
    budget: Annotated[int | None, typer.Option(help="Most rows to rescore exactly.")] = None,
    documents: Annotated[
        bool, typer.Option("--documents", help="Also score the whole documents of the examples.")
    ] = False,
    timeout: Annotated[float, typer.Option(help="Seconds to wait for the answer.")] = 600.0,
) -> None:
    """Show the training examples that most raised log p(completion | prompt), and how sure that is.

    What is left out is the service's default. People read stderr; the answer as the service gave it
    is the JSON line on stdout.

    Example: python -m scripts.query "The capital of France is" --completion " Paris" --k 5
    """
    choices = {
        "completion": completion,
        "index": index,
        "k": k,
        "ranking": ranking,
        "recall": recall,
        "confidence": confidence,
        "until": until,
        "budget": budget,
        "documents": documents or None,
    }
    given = {name: value for name, value in choices.items() if value is not None}
    try:
        answer = ask(url, {"prompt": prompt, **given}, timeout)
    except QueryFailedError as error:
        sentence = Text.assemble(("error: ", "bold red"), printable(str(error)))
        stderr.print(sentence, soft_wrap=True)
        raise typer.Exit(1) from error
    show(answer)
    print_json(answer)


def ask(url: str, question: dict[str, Any], timeout: float) -> dict[str, Any]:
    """The service's answer.

    Raises:
        QueryFailedError: it cannot be reached, or refuses the question.
    """
    try:
        response = httpx.post(f"{url.rstrip('/')}/v1/query", json=question, timeout=timeout)
    except httpx.TimeoutException as error:
        raise QueryFailedError(f"No answer from {url} within {timeout:g} seconds.") from error
    except (httpx.HTTPError, httpx.InvalidURL, UnicodeError) as error:
        raise QueryFailedError(
            f"Cannot ask the service at {url} ({str(error).rstrip('.')}); start it with "
            f"python -m scripts.serve, or name another with --url."
        ) from error
    document = _document(response)
    if response.status_code == httpx.codes.OK and "certificates" in document:
        return document
    if "detail" in document:
        raise QueryFailedError(
            f"{document.get('title', 'The service refused')}: {document['detail']}"
        )
    raise QueryFailedError(
        f"{url} answered with HTTP status {response.status_code} and is no service of this kind."
    )


def _document(response: httpx.Response) -> dict[str, Any]:
    try:
        document = response.json()
    except ValueError:
        return {}
    return document if isinstance(document, dict) else {}


def show(answer: dict[str, Any]) -> None:
    """Print the answer for people.

    Corpus text may hold anything, so it is shown without markup and without control characters.
    """
    own = "  (the model's own)" if answer["completed_by_model"] else ""
    stderr.print()
    stderr.print(
        Text.assemble(
            (printable(answer["prompt"]), ""),
            (printable(answer["completion"]), "bold reverse"),
            (own, "dim"),
        )
    )
    tokens = answer["completion_tokens"]
    stderr.print(
        Text(
            f"log p = {answer['log_probability']:+.3f} nats over {tokens} "
            f"{'token' if tokens == 1 else 'tokens'}; index '{printable(answer['index'])}', "
            f"ranked by {printable(answer['ranking'])}",
            style="dim",
        )
    )
    stderr.print(_table(answer["results"]))
    stderr.print(
        Text("score in nats: + raised log p(completion | prompt), - lowered it", style="dim")
    )
    for document in answer.get("documents", []):
        stderr.print(_whole_document(document))
    for certificate in answer["certificates"]:
        stderr.print(_certificate(certificate))
    stderr.print(
        Text(
            f"{answer['rescored_rows']:,} of {answer['rows']:,} rows rescored and "
            f"{answer['sampled_rows']:,} sampled, in {sum(answer['seconds'].values()):.2f} s",
            style="dim",
        )
    )


def _table(results: list[dict[str, Any]]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, expand=True, pad_edge=False)
    table.add_column("#", justify="right", no_wrap=True)
    table.add_column("score", justify="right", no_wrap=True)
    table.add_column("normalised", justify="right", no_wrap=True)
    table.add_column("document", ratio=2, overflow="fold")
    table.add_column("text", ratio=5, overflow="fold")
    for result in results:
        style = "green" if result["score"] >= 0 else "red"
        table.add_row(
            Text(str(result["rank"])),
            Text(signed(result["score"]), style=style),
            Text(signed(result["normalised_score"]), style=style),
            Text(printable(result["document"])),
            Text(shortened(printable(result["text"]))),
        )
    return table


def _whole_document(document: dict[str, Any]) -> Text:
    score = document["score"]
    told = "too many rows for the budget" if score is None else f"{signed(score)} nats"
    return Text.assemble(
        ("document ", "bold"),
        f"{printable(document['document'])}: {told} over its {document['rows']:,} rows, "
        f"{document['found']:,} of them above",
    )


def _certificate(certificate: dict[str, Any]) -> Text:
    status = certificate["status"]
    style = STATUS_STYLES.get(status, "yellow")
    if certificate["type"] == "audit" and status == "not certified":
        status, style = "too small a sample to bound recall", "dim"
    return Text.assemble(
        (f"{certificate['type']} certificate, ", "bold"),
        (status, f"bold {style}"),
        f": {printable(certificate['sentence'])}",
    )


def signed(value: float) -> str:
    """A score with its sign: four digits or so, never in powers of ten unless it is tiny."""
    if abs(value) >= 100:
        return f"{value:+,.0f}"
    return f"{value:+.3g}" if abs(value) < 1 else f"{value:+.2f}"


def printable(text: str) -> str:
    """``text`` on one line, without anything that could steer a terminal."""
    flat = "".join(" " if character.isspace() else character for character in text)
    return "".join(
        character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in flat
    )


def shortened(text: str) -> str:
    """The beginning of ``text``."""
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[: SHOWN_CHARACTERS - 1]}…"


if __name__ == "__main__":
    app()
