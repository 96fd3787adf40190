"""Answers as a terminal shows them: one, or two side by side."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from scripts.console import stderr
from scripts.texts import SHOWN_CHARACTERS, printable, shortened, signed
from service.client.comparing import SIDES, ComparedRow
from service.schemas.answers import QueryResponse
from service.search.answer import NO_SCALE

SHOWN_LAYERS = 5
LEAST_SHARE = 0.05
"""Tokens with less of the largest token's part are not coloured."""
STATUS_STYLES = {"certified": "green", "exhaustive": "green", "refused": "red"}


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


def show_comparison(
    rows: Sequence[ComparedRow], answers: tuple[QueryResponse, QueryResponse]
) -> None:
    """Print two answers side by side: the ranks of each row, best of both first."""
    names = [printable(answer.estimator) for answer in answers]
    for side in SIDES:
        found = [row for row in rows if row.direction == side]
        if not found:
            continue
        both = sum(None not in row.ranks for row in found)
        stderr.print(Text(f"\n{names[0]} beside {names[1]}, {side}", style="bold"))
        table = Table(box=box.SIMPLE_HEAD, expand=True, pad_edge=False)
        for name in names:
            table.add_column(f"# {name}", justify="right", no_wrap=True)
        for name in names:
            table.add_column(f"score {name}", justify="right", no_wrap=True)
        table.add_column("text", ratio=1, overflow="fold")
        for row in found:
            ranks = ["-" if rank is None else str(rank) for rank in row.ranks]
            scores = ["" if score is None else signed(score) for score in row.scores]
            style = "" if None not in row.ranks else "yellow"
            text = Text(shortened(printable(row.text)))
            table.add_row(*(Text(part, style=style) for part in (*ranks, *scores)), text)
        stderr.print(table)
        told = f"{both} of {len(found)} rows are among the best of both; - is not among them"
        stderr.print(Text(f"{told}. {answers[1].sign_and_unit}", style="dim"))
    for note in answers[1].notes:
        stderr.print(Text(printable(note)))
