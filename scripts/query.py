"""Ask a running service which training examples made the model say something."""

from collections import Counter
from dataclasses import asdict
from typing import Annotated, Any

import typer
from rich import box
from rich.table import Table
from rich.text import Text

from scripts.console import parse_estimator, parse_filters, print_json, stderr
from scripts.side_by_side import show_comparison
from scripts.texts import SHOWN_CHARACTERS, printable, shortened, signed
from service.client import Client, Connection, ServiceError
from service.client.comparing import compare
from service.schemas.answers import ProgressEvent, QueryResponse
from service.search.answer import NO_SCALE

SHOWN_LAYERS = 5
LEAST_SHARE = 0.05
"""Tokens with less of the largest token's part are not coloured."""
STATUS_STYLES = {"certified": "green", "exhaustive": "green", "refused": "red"}

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    prompt: Annotated[str, typer.Argument(help="What the model was asked.")],
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
        "completion": completion,
        "against": against,
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
        if estimator is not None:
            given["estimator"], given["parameters"] = parse_estimator(estimator)
        if only:
            given["filters"] = parse_filters(only)
        if budget is not None:
            given["budget"] = parse_budget(budget)
        connection = Connection(url=url, key=key, timeout=timeout)
        answer = ask(connection, {"prompt": prompt, **given}, watch=watch)
        other = None
        if with_other is not None:
            name, parameters = parse_estimator(with_other)
            again = {key: given[key] for key in given if key not in ("tokens", "layers")}
            again |= {"prompt": prompt, "estimator": name, "parameters": parameters}
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


def show(answer: dict[str, Any]) -> None:
    """Print the answer for people.

    Corpus text may hold anything, so it is shown without markup and without control characters.
    """
    stderr.print()
    for term in answer["measurement"]["terms"]:
        stderr.print(_term(term))
        if term["caution"] is not None:
            stderr.print(Text(printable(term["caution"]), style="yellow"))
    tokens = sum(term["completion_tokens"] for term in answer["measurement"]["terms"])
    what = "difference of log p" if _contrasts(answer) else "log p"
    stderr.print(
        Text(
            f"{what} = {answer['measurement']['value']:+.3f} nats over {tokens} "
            f"{'token' if tokens == 1 else 'tokens'}; index '{printable(answer['index'])}', "
            f"ranked by {printable(answer['ranking'])}",
            style="dim",
        )
    )
    if answer["partial"]:
        stderr.print(Text("The deadline ended the search: this is what it had found.", "yellow"))
    for direction in ("proponents", "opponents"):
        results = [r for r in answer["results"] if r["direction"] == direction]
        certificates = [c for c in answer["certificates"] if c["direction"] == direction]
        if not certificates:
            continue
        if len({c["direction"] for c in answer["certificates"]}) > 1:
            stderr.print(Text(direction, style="bold"))
        stderr.print(_table(results))
        for removal in answer["removals"]:
            if removal["direction"] == direction:
                stderr.print(Text(printable(removal["sentence"])))
        heat = "; tokens: red +, blue -" if any(r["tokens"] for r in results) else ""
        ranks = f"score ranks within this question: + raised the measured value, - lowered it{heat}"
        unit = ranks if answer["by_gradients"] else answer["sign_and_unit"]
        stderr.print(Text(unit, style="dim"))
        for share in answer["shares"]:
            if share["direction"] == direction:
                stderr.print(Text(printable(share["sentence"])))
        _show_layers(results)
        for certificate in certificates:
            stderr.print(_certificate(certificate))
    for note in answer["notes"]:
        stderr.print(Text(printable(note)))
    for document in answer["documents"]:
        stderr.print(_whole_document(document))
    if answer["by_gradients"] and answer["effect_reason"] != NO_SCALE:
        stderr.print(Text(_worth(answer), style="dim"))
    stderr.print(
        Text(
            f"{answer['rescored_rows']:,} of {answer['rows']:,} rows rescored and "
            f"{answer['sampled_rows']:,} sampled, in {sum(answer['seconds'].values()):.2f} s",
            style="dim",
        )
    )
    if answer["seconds_to_certify"] is not None:
        stderr.print(
            Text(
                f"certifying it takes about {answer['rows_to_certify']:,} more rows, "
                f"{answer['seconds_to_certify']:,.1f} s: --budget auto",
                style="dim",
            )
        )


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


def _contrasts(answer: dict[str, Any]) -> bool:
    return any(term["against"] is not None for term in answer["measurement"]["terms"])


def _term(term: dict[str, Any]) -> Text:
    against = () if term["against"] is None else (" not ", (printable(term["against"]), "reverse"))
    own = "  (the model's own)" if term["completed_by_model"] else ""
    weight = "" if term["weight"] == 1 else f"{term['weight']:g} x "
    return Text.assemble(
        weight,
        (printable(term["prompt"]), ""),
        (printable(term["completion"]), "bold reverse"),
        *against,
        (own, "dim"),
    )


def _table(results: list[dict[str, Any]]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, expand=True, pad_edge=False)
    table.add_column("#", justify="right", no_wrap=True)
    table.add_column("score", justify="right", no_wrap=True)
    table.add_column("normalised", justify="right", no_wrap=True)
    measured = any(r["effect_of_removal"] is not None for r in results)
    if measured:
        table.add_column("without it, nats", justify="right", no_wrap=True)
    table.add_column("document", ratio=2, overflow="fold")
    table.add_column("text", ratio=5, overflow="fold")
    copies = Counter(r["cluster"] for r in results if r["cluster"] is not None)
    shown: set[int] = set()
    for result in results:
        cluster = result["cluster"]
        if cluster in shown:
            continue
        text = _coloured(result)
        if cluster is not None:
            shown.add(cluster)
            if copies[cluster] > 1:
                text.append(f"  (+{copies[cluster] - 1} near-duplicates)", style="dim")
        style = "green" if result["score"] >= 0 else "red"
        normalised = result["normalised_score"]
        table.add_row(
            Text(str(result["rank"])),
            Text(signed(result["score"]), style=style),
            Text("" if normalised is None else signed(normalised), style=style),
            *([Text(_removal(result["effect_of_removal"]))] if measured else []),
            Text(printable(result["document"])),
            text,
        )
    return table


def _removal(removal: dict[str, Any] | None) -> str:
    """The change and below it the interval."""
    if removal is None:
        return ""
    if removal["low"] == removal["high"]:
        return f"{removal['nats']:+.2g}"
    return f"{removal['nats']:+.2g}\n{removal['low']:+.2g} to {removal['high']:+.2g}"


def _worth(answer: dict[str, Any]) -> str:
    """What a unit of score is worth, or why that is not known."""
    effect = answer["effect"]
    if effect is None:
        return printable(answer["effect_reason"])
    shown = next((r["effect_of_removal"] for r in answer["results"]), None)
    removed = "" if shown is None else f" 'Without it' has {shown['confidence']:.0%} intervals."
    return printable(
        f"one unit of score: {effect['nats_per_unit']:.3g} nats ({effect['low']:.3g} to "
        f"{effect['high']:.3g} at {effect['confidence']:.0%} confidence).{removed} "
        f"{effect['measured_by']}"
    )


def _coloured(result: dict[str, Any]) -> Text:
    """The text; with its tokens, each as strongly coloured as it takes part in the score."""
    if not result["tokens"]:
        return Text(shortened(printable(result["text"])))
    largest = max(abs(token["score"]) for token in result["tokens"]) or 1.0
    text = Text()
    for token in result["tokens"]:
        share = token["score"] / largest
        level = round(255 * (1 - min(abs(share), 1.0)))
        colour = f"rgb({level},{level},255)" if share < 0 else f"rgb(255,{level},{level})"
        style = f"black on {colour}" if abs(share) > LEAST_SHARE else ""
        text.append(printable(token["text"]), style=style)
    text.truncate(SHOWN_CHARACTERS, overflow="ellipsis")
    return text


def _show_layers(results: list[dict[str, Any]]) -> None:
    """The layers through which most of the results' scores pass."""
    sums: Counter[str] = Counter()
    for result in results:
        for name, score in (result["layers"] or {}).items():
            sums[name] += abs(score)
    whole = sum(sums.values())
    if whole:
        named = ", ".join(f"{n} {v / whole:.0%}" for n, v in sums.most_common(SHOWN_LAYERS))
        stderr.print(Text(f"layers by their share of all parts: {printable(named)}", style="dim"))


def _whole_document(document: dict[str, Any]) -> Text:
    score = document["score"]
    told = "too many rows for the budget" if score is None else f"score {signed(score)}"
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


if __name__ == "__main__":
    app()
