"""What all commands share: progress on stderr, one JSON line on stdout, errors as one sentence."""

import functools
import json
import logging
import math
import re
import sys
import time
from collections.abc import Callable, Iterable, Sized
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, TypeVar

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from scripts.texts import printable

if TYPE_CHECKING:  # they import torch, which takes seconds
    from estimators.model.layers import SkippedModule
    from estimators.model.tokens import Sequence1D
    from index.examples import Example
    from service.indexing.prediction import Prediction
    from service.models import LoadedModel

stderr = Console(stderr=True)
"""For people."""

LINE_EVERY = 10_000

Command = TypeVar("Command", bound=Callable[..., Any])


def show_progress(description: str, items: Iterable[Any]) -> Iterable[Any]:
    """Yield ``items`` behind a progress bar with time elapsed and time left.

    Where stderr is no terminal, a line is printed at every tenth of the way, or at every
    ``LINE_EVERY`` items that have no length.
    """
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    total = len(items) if isinstance(items, Sized) else None
    start = time.monotonic()
    with Progress(*columns, console=stderr, disable=not stderr.is_terminal) as progress:
        task = progress.add_task(description, total=total)
        for number, item in enumerate(items, start=1):
            yield item
            progress.advance(task)
            if not stderr.is_terminal:
                print_progress(description, number, total, time.monotonic() - start)


def print_progress(
    description: str, done: int, total: int | None, elapsed: float, note: str = ""
) -> None:
    """A line on stderr whenever another tenth of the way is done; ``elapsed`` in seconds."""
    if total is None:
        if done % LINE_EVERY == 0:
            print(f"{description}: {done:,}{note}, {elapsed:.0f} s so far", file=sys.stderr)
    elif done * 10 // total != (done - 1) * 10 // total:
        left = elapsed * (total - done) / done
        tail = f", about {left:.0f} s left" if done < total else f", took {elapsed:.0f} s"
        print(f"{description}: {done} of {total}{note}{tail}", file=sys.stderr, flush=True)


def show_logs() -> None:
    """Print what the jobs log, warnings and plain facts, as lines on stderr from now on."""
    log = logging.getLogger("service")
    log.setLevel(logging.INFO)
    if not any(isinstance(handler, _PlainLines) for handler in log.handlers):
        log.addHandler(_PlainLines())


class _PlainLines(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        mark = "warning: " if record.levelno >= logging.WARNING else ""
        print_plain(f"{mark}{record.getMessage()}")


def show_model(loaded: "LoadedModel") -> None:
    """Print how the model was loaded, what share of it is attributed and everything that is not.

    Modules that differ only in the numbers of their names, as those of identical blocks do, share
    a line; the manifest lists each.
    """
    for note in loaded.notes:
        print_plain(note)
    coverage = loaded.coverage
    blocks = sum(layer.is_block for layer in coverage.layers)
    split = f", {blocks} of them blocks of wider ones" if blocks else ""
    experts = sum(layer.family is not None for layer in coverage.layers)
    routed = f", {experts} of them of experts" if experts else ""
    print_plain(
        f"attributed: {len(coverage.layers)} layers{split}{routed}, "
        f"{coverage.attributed_share:.2%} of the parameters"
    )
    groups: dict[tuple[str, str, str], list[SkippedModule]] = {}
    for module in coverage.skipped:
        name = re.sub(r"(?<=\.)\d+(?=\.|$)", "*", module.name)
        groups.setdefault((name, module.kind, module.reason), []).append(module)
    for (name, kind, reason), modules in groups.items():
        count = f"{len(modules)} modules, " if len(modules) > 1 else ""
        share = sum(module.share for module in modules)
        shown = name if len(modules) > 1 else modules[0].name
        print_plain(
            f"not attributed: {shown} ({kind}, {count}{share:.2%} of the parameters): {reason}"
        )


def show_example(tokenizer: Any, example: "Example") -> None:
    """Print an example token by token: those that count in green, or in ⟦ ⟧ without colours.

    Of a pair what was preferred, and then what was rejected.
    """
    from service.corpus.reading import sequence_of

    members = sequence_of(example).members
    for (member, _), name in zip(members, ("", ", rejected"), strict=False):
        total = len(member.tokens)
        print_plain(f"{example.id}{name}: {member.targets} of {total} tokens count")
        stderr.print(_counted_text(tokenizer, member), soft_wrap=True)


def _counted_text(tokenizer: Any, sequence: "Sequence1D") -> Text:
    from service.scoring.explaining import token_texts

    starts, stops = ({ends[i] for ends in sequence.target_spans} for i in (0, 1))
    marks = not stderr.is_terminal
    text, counts = Text(), False
    for place, piece in enumerate([*token_texts(tokenizer, sequence.tokens), ""]):
        counts = place in starts or (counts and place not in stops)
        text.append("⟧" * (marks and place in stops) + "⟦" * (marks and place in starts))
        text.append(printable(piece, keep="\n"), style="green" if counts else "dim")
    return text


def print_plain(line: str) -> None:
    """A line on stderr as it is, neither coloured nor wrapped."""
    stderr.print(line, highlight=False, markup=False, soft_wrap=True)


def print_json(document: Any) -> None:
    """Print the one JSON line that programs read."""
    print(json.dumps(document, ensure_ascii=False))


def one_sentence_errors(command: Command) -> Command:
    """Turn errors that people can mend into one sentence on stderr and exit status 1."""

    @functools.wraps(command)
    def run(*arguments: Any, **options: Any) -> Any:
        try:
            return command(*arguments, **options)
        except typer.Exit:  # a RuntimeError
            raise
        except (ValueError, RuntimeError, OSError) as error:
            stderr.print(Text.assemble(("error: ", "bold red"), str(error)), soft_wrap=True)
            raise typer.Exit(1) from error

    return run  # type: ignore[return-value]


def parse_estimator(text: str) -> tuple[str, dict[str, float]]:
    """Name and parameters from NAME or NAME:PARAMETER=VALUE,PARAMETER=VALUE.

    Raises:
        ValueError: it has another form.
    """
    name, _, rest = text.partition(":")
    parameters = {}
    for part in rest.split(",") if rest else []:
        key, _, value = part.partition("=")
        try:
            parameters[key.strip()] = float(value)
        except ValueError as error:
            raise ValueError(
                f"'{part}' in --estimator {text} is not PARAMETER=NUMBER; write it as in "
                f"ekfac:damping=0.01."
            ) from error
    return name, parameters


def parse_filters(conditions: list[str]) -> dict[str, dict[str, Any]]:
    """Conditions by column, from COLUMN=VALUE, COLUMN>=VALUE and COLUMN<=VALUE.

    Values that read as JSON numbers or booleans are such, after = the same text too; two conditions
    of one kind on a column are alternatives (=) or an error (>=, <=).

    Raises:
        ValueError: a condition of another form.
    """
    found: dict[str, dict[str, Any]] = {}
    for condition in conditions:
        parts = re.fullmatch(r"(.+?)(>=|<=|=)(.*)", condition, re.DOTALL)
        if parts is None:
            raise ValueError(
                f"--filter must be COLUMN=VALUE, COLUMN>=VALUE or COLUMN<=VALUE, got '{condition}'."
            )
        column, sign, text = parts.groups()
        asked = found.setdefault(column, {})
        value = _value(text)
        if sign == "=":
            # Years and the like are texts in some corpora and numbers in others.
            asked.setdefault("any_of", []).extend([value] if value == text else [value, text])
        elif (name := {">=": "at_least", "<=": "at_most"}[sign]) in asked:
            raise ValueError(f"--filter gives '{column}{sign}' twice; give it once.")
        else:
            asked[name] = text if isinstance(value, bool) else value
    return found


def _value(text: str) -> str | int | float | bool:
    try:
        value = json.loads(text)
        number = isinstance(value, (int, float)) and math.isfinite(value)
    except (ValueError, OverflowError):
        return text
    return value if number else text


def show_prediction(prediction: "Prediction", loading: float) -> None:
    """What a job will take, for people and as its JSON line; ``loading`` seconds come on top."""
    seconds = loading + prediction.seconds
    stderr.print(
        f"{prediction.rows:,} rows ({prediction.tokens:,} tokens) will take about "
        f"{prediction.disk_bytes / 1e6:,.0f} MB of disk, "
        f"{prediction.memory_bytes / 1e6:,.0f} MB of memory and "
        f"{seconds / 60:,.1f} minutes.",
        highlight=False,
        soft_wrap=True,
    )
    print_json({**asdict(prediction), "seconds": seconds})
