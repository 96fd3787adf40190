"""``python -m scripts.bench.coverage``: every causal architecture of transformers, tiny and random.

Each is built from its config with small sizes, its log-probabilities and one exact score are
compared with slow independent sums in float64, and its attributed share is taken down: of the tiny
model, and of one of the sizes that transformers has as defaults.
"""

import re
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import transformers
import typer
from rich.progress import track

from scripts.bench.coverage.architectures import architectures
from scripts.bench.coverage.checks import Row, check
from scripts.bench.record import write_record
from scripts.console import one_sentence_errors, print_json, stderr
from service.versions import revision

TABLE = Path(__file__).parents[3] / "docs" / "coverage.md"
BEGIN = "<!-- architectures: python -m scripts.bench.coverage -->"
END = "<!-- end of architectures -->"

app = typer.Typer(add_completion=False)


@app.command()
@one_sentence_errors
def main(
    only: Annotated[
        list[str] | None, typer.Option(help="Model types to try; all of them if none is given.")
    ] = None,
    keep: Annotated[
        bool, typer.Option(help="Write the record and the table in docs/coverage.md.")
    ] = True,
) -> None:
    """Try every causal architecture that transformers can build."""
    transformers.logging.set_verbosity_error()
    kinds = only or architectures()
    rows = [check(kind) for kind in track(kinds, console=stderr, description="architectures")]
    document = {
        "transformers": transformers.__version__,
        "architectures": [asdict(row) | {"commit": revision()} for row in rows],
    }
    if keep and only is None:
        path = write_record("coverage", document)
        write_table(rows, path)
    counts = {
        what: sum(row.status.startswith(what) for row in rows)
        for what in ("works", "wrong", "refused", "not built")
    }
    print_json({"tried": len(rows), **counts, **({"rows": document} if only else {})})


def write_table(rows: list[Row], record: Path) -> None:
    """Put the rows into docs/coverage.md, in place of those that are there."""
    text = TABLE.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    body = "\n".join(table_lines(rows, record.name))
    TABLE.write_text(f"{before}{BEGIN}\n{body}\n{END}{after}", encoding="utf-8")


def table_lines(rows: list[Row], record: str) -> list[str]:
    """The table and what stands above it."""
    works = sum(row.status == "works" for row in rows)
    lines = [
        f"{works} of {len(rows)} work with transformers {transformers.__version__} "
        f"([record](benchmarks/{record})); errors are relative, in float64.",
        "",
        "| architecture | share | with everything | at full size | with everything "
        "| log p error | score error |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        if row.status != "works":
            continue
        figures: list[Any] = [
            row.attributed_share,
            row.attributed_share_all,
            row.full_share,
            row.full_share_all,
        ]
        shares = " | ".join("" if value is None else f"{value:.1%}" for value in figures)
        lines.append(
            f"| {row.architecture} | {shares} | {row.log_p_error:.0e} | {row.score_error:.0e} |"
        )
    lines += ["", "| refused, or not built from a config alone | why |", "|---|---|"]
    for row in rows:
        if row.status != "works":
            why = re.sub(r"([|<>*_`\\])", r"\\\1", row.status)
            lines.append(f"| {row.architecture} | {why} |")
    return lines


if __name__ == "__main__":
    app()
