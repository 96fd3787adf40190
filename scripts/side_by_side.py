"""Two answers to one question, printed side by side."""

from collections.abc import Sequence

from rich import box
from rich.table import Table
from rich.text import Text

from scripts.console import stderr
from scripts.texts import printable, shortened, signed
from service.client.comparing import SIDES, ComparedRow
from service.schemas.answers import QueryResponse


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
