"""Ask a running service which training examples made the model say something."""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from scripts.answers import show, show_comparison
from scripts.console import parse_estimator, parse_filters, print_json, stderr
from scripts.texts import printable
from service.client import Client, Connection, ServiceError
from service.client.comparing import compare
from service.conversation import read_messages
from service.schemas.answers import ProgressEvent, QueryResponse

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    prompt: Annotated[str | None, typer.Argument(help="What the model was asked.")] = None,
    messages: Annotated[
        str | None,
        typer.Option(
            help="A conversation in place of the prompt: a JSON file with a list of messages, each "
            "with 'role' and 'content', or - for stdin. If the last is the assistant's, that is "
            "what the model said."
        ),
    ] = None,
    completion: Annotated[
        str | None,
        typer.Option(
            help="What it said; begin it with its space. Left out: the model's own completion."
        ),
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(help="What it did not say: asks what made the completion likelier than this."),
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(help="Most tokens of the model's own completion.")
    ] = None,
    samples: Annotated[
        int | None,
        typer.Option(
            help="Measure the mean log p of so many of the model's own completions, drawn at "
            "temperature 1."
        ),
    ] = None,
    sample_seed: Annotated[int | None, typer.Option(help="Of these samples.")] = None,
    url: Annotated[str, typer.Option(help="Of the service.")] = "http://127.0.0.1:8000",
    key: Annotated[
        str | None, typer.Option(envvar="ETYMON_KEY", help="That the service asks for.")
    ] = None,
    index: Annotated[str | None, typer.Option(help="Name of the index.")] = None,
    estimator: Annotated[
        str | None,
        typer.Option(
            help="That scores: NAME or NAME:PARAMETER=VALUE,..., e.g. kfac or ekfac:damping=0.01. "
            "Left out: the one that the index was built for."
        ),
    ] = None,
    with_other: Annotated[
        str | None,
        typer.Option(
            "--compare",
            help="Another estimator, likewise: also ask it, and show which rows both have among "
            "their best, and at which rank.",
        ),
    ] = None,
    k: Annotated[int | None, typer.Option(help="Training examples to return.")] = None,
    direction: Annotated[
        str | None, typer.Option(help="proponents, opponents or both; k of each.")
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option(
            "--filter",
            help="Only examples whose metadata meet this: COLUMN=VALUE, COLUMN>=VALUE or "
            "COLUMN<=VALUE; may be repeated.",
        ),
    ] = None,
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
    budget: Annotated[
        str | None,
        typer.Option(
            help="Most rows to rescore exactly; auto: as many as the certificate takes, best with "
            "a deadline."
        ),
    ] = None,
    patience: Annotated[
        int | None,
        typer.Option(
            help="Where the budget cannot buy the certificate, end after so many rows in vain."
        ),
    ] = None,
    deadline: Annotated[
        float | None, typer.Option(help="Seconds after which the answer so far is returned.")
    ] = None,
    documents: Annotated[
        bool, typer.Option("--documents", help="Also score the whole documents of the examples.")
    ] = False,
    tokens: Annotated[
        bool, typer.Option("--tokens", help="Colour each token by its part of the score.")
    ] = False,
    layers: Annotated[
        bool, typer.Option("--layers", help="Also split scores over the model's layers.")
    ] = False,
    clusters: Annotated[bool, typer.Option("--clusters", help="Fold near-duplicates.")] = False,
    watch: Annotated[
        bool, typer.Option("--watch", help="Say how far the search is while it runs.")
    ] = False,
    timeout: Annotated[float, typer.Option(help="Seconds to wait for the answer.")] = 600.0,
) -> None:
    """Show the training examples that most raised log p(completion | prompt), and how sure that is.

    Options that are left out take the service's defaults. The table on stderr
    is for people; the JSON line on stdout is the answer as the service gave it,
    with --compare both answers and the rows of either.

    Example:
    etymon query "The capital of France is" --completion " Paris" --k 5
    """
    choices = {
        "prompt": prompt,
        "completion": completion,
        "against": against,
        "max_new_tokens": max_new_tokens,
        "samples": samples,
        "sample_seed": sample_seed,
        "index": index,
        "k": k,
        "direction": direction,
        "ranking": ranking,
        "recall": recall,
        "confidence": confidence,
        "until": until,
        "patience": patience,
        "deadline": deadline,
        "documents": documents or None,
        "tokens": tokens or None,
        "layers": layers or None,
        "clusters": clusters or None,
    }
    given: dict[str, Any] = {name: value for name, value in choices.items() if value is not None}
    try:
        if messages is not None:
            given["messages"] = read_conversation(messages)
        if estimator is not None:
            given["estimator"], given["parameters"] = parse_estimator(estimator)
        if only:
            given["filters"] = parse_filters(only)
        if budget is not None:
            given["budget"] = parse_budget(budget)
        connection = Connection(url=url, key=key, timeout=timeout)
        answer = ask(connection, given, watch=watch)
        other = None
        if with_other is not None:
            name, parameters = parse_estimator(with_other)
            again = {key: given[key] for key in given if key not in ("tokens", "layers")}
            again |= {"estimator": name, "parameters": parameters}
            other = ask(connection, again, watch=watch)
    except (ServiceError, ValueError) as error:
        told = printable(str(error))
        stderr.print(Text.assemble(("error: ", "bold red"), told), soft_wrap=True)
        raise typer.Exit(1) from error
    document = answer.model_dump(mode="json")
    show(document)
    if other is None:
        print_json(document)
        return
    rows = compare(answer, other)
    show_comparison(rows, (answer, other))
    answers = [document, other.model_dump(mode="json")]
    print_json({"answers": answers, "rows": [asdict(row) for row in rows]})


def ask(connection: Connection, question: dict[str, Any], *, watch: bool) -> QueryResponse:
    """The service's answer.

    Raises:
        ServiceError: it cannot be reached, or refuses the question.
        ValueError: the question is none.
    """
    with Client(connection) as client:
        if not watch:
            return client.query(**question)
        for name, event in client.stream(**question):
            if isinstance(event, ProgressEvent):
                bound = event.recall_lower_bound
                certified = "no bound yet" if not bound else f"recall at least {bound:.0%}"
                said = f"{event.direction}: {event.rescored_rows:,} rows rescored, {certified}"
            else:
                said = name
            if not isinstance(event, QueryResponse):
                stderr.print(said, style="dim", highlight=False)
        assert isinstance(event, QueryResponse)  # which ends every stream that does not fail
        return event


def read_conversation(source: str) -> list[dict[str, str]]:
    """The messages of a JSON file; ``-`` is stdin.

    Raises:
        ValueError: there is no such file, or it holds no messages.
    """
    where = "stdin" if source == "-" else source
    if source != "-" and not Path(source).is_file():
        raise ValueError(
            f"There is no file {source}; give a JSON file with messages, or - (stdin)."
        )
    try:
        text = sys.stdin.read() if source == "-" else Path(source).read_text(encoding="utf-8")
        value = json.loads(text)
    except ValueError as error:
        raise ValueError(f"The messages of {where} are not JSON: {error}.") from error
    return [vars(message) for message in read_messages(value, where)]


def parse_budget(text: str) -> int | str:
    """A number of rows, or auto.

    Raises:
        ValueError: it is neither.
    """
    if text == "auto":
        return text
    if not text.isdecimal():
        raise ValueError(f"--budget takes a number of rows, or auto, got '{text}'.")
    return int(text)


if __name__ == "__main__":
    app()
