"""Figures in the documents are those of the newest records: none can go stale.

``FIGURES`` has, for each family of records, the passages that a document must contain: they are
made of the newest record, rounded as they are printed. Tables of measurements may hold no other
figure.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
RECORDS = ROOT / "docs" / "benchmarks"
HARDWARE = "cpu2"

Record = dict[str, Any]

MEASURED = "docs/measured.md"
TABLES = ("README.md", MEASURED, "docs/pretrained.md")
"""Documents whose tables are of measurements."""

NOT_RECORDED = {
    "README.md": ("log p = -5.306 nats over 3 tokens",),
    "docs/measured.md": ("15.0 minutes, 1.9 GB",),
    "docs/pretrained.md": (
        "24 minutes, 10.9 GB",
        "160 facts and 40 paragraphs | 157 s",
        "| 175 s |",
        "| 211 s |",
        "recall 1.000, no bound broken",
        "75 % | 88 %",
        "25 % | 50 %",
    ),
}
"""Figures that no record holds. Each document says so; this list may only become shorter."""


def newest(family: str, has: Callable[[Record], Any] = bool) -> Record:
    """The last record of a family that has what is wanted."""
    paths = sorted(RECORDS.glob(f"{family}_{HARDWARE}_*.json"), reverse=True)
    records = (json.loads(path.read_text()) for path in paths)
    return next(record for record in records if has(record))


def newest_rows(family: str, part: str) -> list[Record]:
    """Rows of one part, of the last record that has it: parts can be measured alone."""

    def rows(record: Record) -> list[Record]:
        return [row for row in record["rows"] if row["part"] == part]

    return rows(newest(family, rows))


def one(rows: list[Record], **wanted: Any) -> Record:
    """The only row with these values."""
    (found,) = [row for row in rows if all(row[key] == value for key, value in wanted.items())]
    return found


def percent(share: float) -> str:
    """Per cent with one decimal, which is left out if it is 0."""
    return f"{100 * share:.1f}".removesuffix(".0") + " %"


def whole_percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def day(record: Record) -> str:
    return str(record["date"][:10])


def demo() -> list[str]:
    record = newest("demo")
    train = record["train"]
    rows = {row["method"]: row for row in record["table"]["rows"]}
    first = {name: whole_percent(row["first"]) for name, row in rows.items()}
    passages = [
        f"on {train['rows']:,} sentences and paragraphs",
        f"completes {whole_percent(train['facts_correct_share'])} of {train['facts']:,} facts",
        f"over {record['table']['right']} queries that the model answers rightly and "
        f"{record['table']['wrong']} that",
        f"first in {first['Etymon, normalised']} of queries (normalised); the plain dot product "
        f"does in {first['dot product']}.",
    ]
    for name, row in rows.items():
        gains = ("gain", "gain_without_source", "gain_wrong_answers")
        told = [f"{row[gain]:+.2f} ± {row[f'{gain}_error']:.2f}" for gain in gains]
        found = [f"{row[key]:.0%}" for key in ("first", "in_first_ten")]
        cells = [name, *found, f"{row['mean_reciprocal_rank']:.2f}", *told]
        passages.append(f"| {' | '.join(cells)} |")
    return passages


def demo_costs() -> list[str]:
    record = newest("demo")
    commands, audit = record["commands"], record["audit"]
    assert audit["lowest_recall"] == audit["mean_recall"]
    assert not any(kind["violations"] for kind in audit["certificates"].values())
    return [
        f"{commands['make demo']['seconds'] / 60:.1f} minutes, after "
        f"{commands['make setup']['seconds'] / 60:.1f} minutes to set up",
        f"{record['peak_memory_mb'] / 1000:.1f} GB |",
        f"Recall@{audit['k']} of {audit['queries']} queries",
        f"{audit['mean_recall']:.3f} in each; {audit['median_rescored_rows']:.0f} of "
        f"{audit['rows']:,} rows rescored (median)",
        f"recall 0.9 certified at 95 % for {audit['certificates']['sketch']['certified']} of "
        f"{audit['queries']}, no bound broken",
    ]


def kronfluence() -> list[str]:
    record = newest("kronfluence")
    rows = record["rows"]

    def largest(dtype: str) -> float:
        kept = [r for r in rows if (r["labels"], r["dtype"]) == ("empirical", dtype)]
        return max(float(row["max_relative_difference"]) for row in kept)

    sampled = [one(rows, model=model, labels="sampled") for model in ("gpt2", "llama")]
    (examples,) = {row["fitting_examples"] for row in sampled}
    return [
        f"kronfluence {record['versions']['kronfluence']} with the empirical Fisher, where nothing "
        f"is random (GPT-2 and Llama style)",
        f"difference {largest('float32'):.0e} of the largest score in float32, "
        f"{largest('float64'):.0e} in float64",
        f"{examples:,} fitting examples: least Pearson correlation of any query "
        + " and ".join(f"{row['pearson_min']:.3f}" for row in sampled)
        + "; two of our own fits reach "
        + " and ".join(f"{row['pearson_min_redraw']:.3f}" for row in sampled),
    ]


def coverage() -> list[str]:
    rows = newest_rows("certificates", "coverage")

    def rates(certificate: str, broken: bool) -> list[float]:
        return [
            row["violations"] / row["trials"]
            for row in rows
            if row["certificate"] == certificate and row.get("expected_to_fail", False) is broken
        ]

    shuffled = one(
        rows,
        certificate="sketch",
        configuration="EK-FAC, 15 % of proxies shuffled, 3,000 rows, k = 10",
    )
    wrong, refused = (
        whole_percent(shuffled[what] / shuffled["trials"]) for what in ("violations", "refused")
    )
    sketch = [row for row in rows if row["certificate"] == "sketch"]
    audits = [row for row in rows if row["certificate"] == "audit"]
    calibrated = [row for row in rows if row["certificate"] == "calibration"]
    (trials,), (draws,) = {r["trials"] for r in sketch}, {r["draws"] for r in sketch}
    (redraws,), (drawn,) = {r["trials"] for r in audits}, {r["trials"] for r in calibrated}
    assert not any(row["violations"] for row in audits)
    assert all(f"{n} rows, k = {k}" in str(rows) for n in ("20,000", "3,000") for k in (10, 100))
    return [
        "(nominal 95 %)",
        f"at most {percent(max(rates('sketch', broken=False)))} of {trials:,} trials: {draws} "
        f"draws of the sketch x {trials // draws} queries, k = 10 and 100, for 20,000 rows and "
        f"for 3,000 rows",
        f"15 % of the proxies shuffled: {wrong} wrong at k = 10, and its check refuses only "
        f"{refused}",
        f"none of {redraws:,} redraws wrong in any of {len(audits)} configurations",
        f"at most {percent(max(rates('calibration', broken=False)))} of {drawn} draws wrong",
        f"up to {whole_percent(max(rates('calibration', broken=True)))} wrong",
    ]


def usefulness() -> list[str]:
    rows = newest_rows("certificates", "usefulness")
    whole = max(row["corpus_rows"] for row in rows)

    def certified(codes: str, kilobytes: int, k: int, certificate: str) -> Record:
        kept = [r for r in rows if r["bytes_per_example"] // 1024 == kilobytes]
        return one(kept, codes=codes, corpus_rows=whole, k=k, certificate=certificate)

    ten, ten_low = (
        certified("one-bit", 2, 10, "sketch"),
        certified("low-rank", 2, 10, "calibration"),
    )
    hundred = certified("one-bit", 2, 100, "sketch")
    low = certified("low-rank", 2, 100, "calibration")
    wide = [certified("one-bit", 8, 100, kind) for kind in ("sketch", "calibration")]
    wide_low = certified("low-rank", 8, 100, "calibration")
    (cost,) = newest_rows("certificates", "cost")
    share = "certified_share"
    return [
        f"recall {ten['target']} at 95 %, of {whole:,} examples, {ten['queries']} queries, 2 KB an "
        f"example, top 10",
        f"within {percent(ten['rescored_share_max'])} of the corpus scored exactly: "
        f"{percent(ten[share])} of queries by the sketch, {percent(ten_low[share])} by calibration",
        f"top 100 | within {percent(hundred['rescored_share_max'])} of the corpus: "
        f"{percent(hundred[share])} by the sketch, {percent(low[share])} by calibration with "
        f"low-rank codes (median {percent(low['rescored_share_median'])} scored; "
        f"{percent(low['sufficient_share_median'])} would do in truth)",
        f"top 100, 8 KB an example | within {percent(wide[0]['rescored_share_max'])} of the "
        f"corpus: {percent(wide[0][share])} by the sketch, {percent(wide[1][share])} (signs) and "
        f"{percent(wide_low[share])} (low-rank) by calibration",
        f"same batches | {cost['ratio_to_forward']:.2f} |",
    ]


def kills() -> list[str]:
    record = newest("kills")
    assert record["identical"]
    return [
        f"{record['kills']} kills at random moments in {record['rounds']} rounds: all "
        f"{record['files']} files the same"
    ]


def ratios(record: Record, system: str, phase: str, decimals: int) -> str:
    """Of GPT-2-small's shapes and of the demo's model."""
    rows = record["rows"]
    found = [one(rows, model=m, system=system, phase=phase) for m in ("gpt2-small-shapes", "demo")]
    return " and ".join(f"{r['seconds'] / r['floor_seconds']:.{decimals}f}" for r in found)


def build() -> list[str]:
    record = newest("build")
    beside = newest("build", lambda r: r["versions"]["bergson"] and r["versions"]["kronfluence"])
    first, second = ratios(record, "etymon", "build", 2).split(" and ")
    fit, kronfluence_fit = (ratios(beside, name, "fit", 1) for name in ("etymon", "kronfluence"))
    return [
        f"{first} (layers of GPT-2-small's shapes) and {second} (the demo's model) for one slice, "
        f"{ratios(record, 'etymon, 16 slices', 'build', 2)} for the usual sixteen. On "
        f"{day(beside)}, on another processor and for one slice: "
        f"{ratios(beside, 'etymon', 'build', 2)}, Bergson {ratios(beside, 'bergson', 'build', 2)}",
        f"{ratios(record, 'etymon', 'fit', 1)}. On {day(beside)}: {fit}, kronfluence "
        f"{kronfluence_fit}",
        f"for one query, over the same | {ratios(record, 'etymon', 'rescore', 2)} |",
    ]


def search() -> list[str]:
    record = newest("search")
    alone, many = (one(record["rows"], index="one-bit", batch=batch) for batch in (1, 64))
    return [
        f"Scan of {alone['rows']:,} examples at {alone['bits']:,} bits "
        f"({record['index_bytes'] / 1e9:.2f} GB), one query",
        f"{alone['seconds']:.3f} s, {alone['ratio']:.1f} times reading",
        f"{many['batch']} queries at once",
        f"{many['seconds']:.1f} s, {many['ratio']:.1f} times reading the codes once a query; "
        f"share of the exact best found: {record['recall_of_exact_scan']:.3f}",
        f"{1000 * record['load_seconds']:.0f} ms to map its codes, "
        f"{record['verify_seconds']:.1f} s to check",
    ]


def service() -> list[str]:
    record = newest("service", lambda r: "latency" in r)
    alone, eight = (one(record["latency"], concurrency=count) for count in (1, 8))
    earlier, earlier_eight = (
        one(record["before"]["latency"], concurrency=count) for count in (1, 8)
    )
    flood, soak, fuzz = (
        newest("service", lambda r, part=part: part in r)[part]
        for part in ("overload", "soak", "fuzz")
    )
    warm, memory = soak["rss_mb"][-1] - soak["rss_growth_mb"], soak["rss_mb"]
    tenth = soak["queries"] // 10
    return [
        "k = 10, default budget of 1,000 rows, one client",
        f"p50 {alone['p50_ms'] / 1000:.1f} s, p95 {alone['p95_ms'] / 1000:.1f} s; of the revision "
        f"before, with 8 KB an example in one slice, {earlier['p50_ms'] / 1000:.1f} and "
        f"{earlier['p95_ms'] / 1000:.1f} s",
        f"8 clients | {eight['throughput']:.2f} answers a second, {record['batching_gain']:.2f} "
        f"times what one at a time gives; p95 {eight['p95_ms'] / 1000:.0f} s; before, "
        f"{earlier_eight['throughput']:.2f} a second and {earlier_eight['p95_ms'] / 1000:.0f} s",
        f"{flood['offered']} offered, {flood['accepted']} answered, {flood['refused']} refused "
        f"(99 % within {flood['refusal_p99_ms']:.0f} ms), {flood['lost']} lost, {flood['late']} "
        f"past their deadline of {flood['deadline_seconds']:.0f} s",
        f"{soak['queries']:,} short queries by 8 clients",
        f"{warm:.0f} MB after {tenth:,} to warm up, {memory[3]:.0f} MB after {4 * tenth:,}, "
        f"{memory[-1]:.0f} MB after {soak['queries']:,}",
        f"{fuzz['cases']:,} valid and invalid requests of {fuzz['operations']} operations: "
        f"{fuzz['server_errors']} errors of the service, {fuzz['undocumented']} answers",
    ]


def prediction() -> list[str]:
    rows = newest("prediction")["rows"]

    def worst(quantity: str) -> float:
        kept = [row for row in rows if row["quantity"].endswith(quantity)]
        return max(abs(float(row["relative_error"])) for row in kept)

    assert len(rows) == 3 * (1 + 3)
    return [
        f"memory off by at most {100 * worst('memory_bytes'):.0f} %, disk "
        f"{100 * worst('disk_bytes'):.1f} %, time {100 * worst('seconds'):.0f} %"
    ]


def recall() -> list[str]:
    record = newest("recall", lambda r: r["bergson"])
    rows = [row for row in record["rows"] if row["ranking"] == "normalised"]

    def line(title: str, size: int, **layout: str) -> str:
        cells = [title, f"{size:,}"]
        for corpus in ("factbook", "profiles"):
            row = one(rows, corpus=corpus, bytes_per_example=size, **layout)
            cells.append(f"{row['r10_at_50']:.2f} / {row['r50_at_250']:.2f}")
        return f"| {' | '.join(cells)} |"

    (queries,) = {row["queries"] for row in rows}
    return [
        f"with {queries} queries",
        line("`one-bit` (the default)", 2064, layout="etymon", codes="one-bit"),
        line("`low-rank`", 2052, layout="etymon", codes="low-rank"),
        line("`low-rank`", 8203, layout="etymon", codes="low-rank"),
        line(
            "Bergson 16x16, inverse autocorrelation",
            16384,
            layout="bergson 16x16, float32, inverse autocorrelation",
        ),
        line("Rank-2 factors in float16", 32832, layout="rank-2 factors, float16, EK-FAC query"),
    ]


def one_index() -> list[str]:
    passages = []
    for row in newest("one_index")["rows"]:
        values = ", ".join(f"{key} {value:g}" for key, value in row["parameters"].items())
        name = f"`{row['estimator']}`" + (f", {values}" if values else "")
        passages.append(
            f"| {row['corpus']} | {name} | {row['r10_at_50']:.2f} | {row['noise_seen']:.4f} "
            f"({row['noise_law']:.4f}) | {row['certified']} of {row['queries']} | "
            f"{row['violations']} | {row['recall']:.3f} |"
        )
    return passages


def plausibility() -> list[str]:
    rows = newest("plausibility")["rows"]
    own = [row["share"] for row in rows if row["model"] == row["tokenizer"]]
    others = [row for row in rows if row["model"] != row["tokenizer"]]
    shares = [row["share"] for row in others if "share" in row]
    assert all(row["told"] is (row["model"] != row["tokenizer"]) for row in rows)
    return [
        f"{len(own)} models with their own tokenizer: a mean loss of {min(own):.2f} to "
        f"{max(own):.2f} of a uniform guess's, none warned of",
        f"{len(shares)} pairs with another's: {min(shares):.2f} to {max(shares):.2f}, each warned "
        f"of; {len(others) - len(shares)} more refused at load",
    ]


def shares() -> list[str]:
    record = newest("shares")
    rows = record["rows"]
    held = [row["coverage"] for row in rows]
    (queries,), (answers,) = {row["queries"] for row in rows}, {row["answers"] for row in rows}
    corpora = list(dict.fromkeys(row["corpus"] for row in rows))
    assert len(rows) == 4 * len(corpora)

    def range_of(figure: str, corpus: str) -> str:
        values = [100 * row[figure] for row in rows if row["corpus"] == corpus]
        return f"{min(values):.0f} to {max(values):.0f}"

    lines = [
        f"| ... {corpus} | shares of {range_of('median_share', corpus)} %, intervals "
        f"{range_of('median_width', corpus)} points wide (medians) | the same |"
        for corpus in corpora
    ]
    return [
        "(nominal 95 %, approximate)",
        f"in {percent(min(held))} to {percent(max(held))} of {answers} answers, by corpus, ranking "
        f"and direction: {queries} queries x {answers // queries} draws of the random rows; of the "
        f"worst query in {whole_percent(min(row['coverage_of_worst_query'] for row in rows))}",
        f"`{record['command']}`",
        *lines,
    ]


def one_run() -> list[str]:
    record = newest("run")
    labels = {"run": "the run itself (`etymon trace`)", "dot product": "`identity` (dot product)"}

    def lds(row: Record, share: int) -> str:
        low, high = row[f"lds_{share}_low"], row[f"lds_{share}_high"]
        return f"{row[f'lds_{share}']:.3f} ({low:.2f} to {high:.2f})"

    passages = [
        f"{record['trainings_a_query']:.2f} trainings a question",
        record["task"],
        "| scores | LDS, 5 % left out | LDS, half left out | top 20 shared with the run's |",
    ]
    for row in record["rows"]:
        label = labels.get(row["estimator"], row["estimator"].replace("ekfac,", "`ekfac`,"))
        told = [lds(row, 5), lds(row, 50), f"{row['top20_shared']:.2f}", f"{row['slope']:.2g}"]
        passages.append(f"| {label} | {' | '.join(told)} |")
    return passages


def through_run() -> list[str]:
    record = newest("through_run")
    heading = (
        "| scores | LDS, 5 % left out | LDS, half left out | top 20 shared with the run's | slope"
    )
    more = "its top 20 left out, nats | 20 rows added, nats | trainings a question"
    passages = [f"{heading} | {more} |"]
    for name, facts in record["tasks"].items():
        passages += [
            f"**{name}**: {facts['description']}",
            f"recording it took {100 * facts['recorder_share']:.1f} % more",
            *(rank_line(row) for row in facts["ranks"]),
        ]
        passages += [run_line(row) for row in record["rows"] if row["task"] == name]
    return passages


def rank_line(row: Record) -> str:
    """What a number of directions leaves out."""
    return (
        f"{row['rank']} leave out {100 * row['left_out']:.0f} % of the norm of a gradient, and are "
        f"off by {100 * row['relative_error']:.0f} % of the influences "
        f"({row['error_over_said']:.2f} of what is said)"
    )


def run_line(row: Record) -> str:
    """An estimator's line of the table of runs."""
    labels = {"run": "the run itself (`etymon trace`)", "dot product": "`identity` (dot product)"}

    def lds(share: int) -> str:
        if f"lds_{share}" not in row:
            return ""
        low, high = row[f"lds_{share}_low"], row[f"lds_{share}_high"]
        return f"{row[f'lds_{share}']:.3f} ({low:.2f} to {high:.2f})"

    def number(name: str, form: str) -> str:
        return "" if row.get(name) is None else format(row[name], form)

    told = [lds(5), lds(50), number("top20_shared", ".2f"), number("slope", ".2g")]
    told += [number("removal_change", "+.2f"), number("addition_change", "+.2f")]
    told += [number("trainings_a_query", ".2f")]
    label = labels.get(row["estimator"], row["estimator"])
    return flat(f"| {label} | {' | '.join(told)} |")


def magic() -> list[str]:
    record = newest("magic")
    rows = {row["system"]: row for row in record["rows"]}
    bergson, exact, floor = (
        rows[name] for name in ("Bergson's MAGIC", "etymon, exact derivative", "etymon")
    )
    other_exact, other_floor = (
        rows[f"{row['system']}, other attention"]["rounding"] for row in (exact, floor)
    )
    other = rows["etymon, other attention"]["weights_difference"]
    plain = record["plain_training_seconds"]

    def same(row: Record, decimals: int) -> str:
        numbers = ", ".join(f"{row[name]:.{decimals}f}" for name in ("pearson", "spearman"))
        return f"{numbers}, {20 * row['top20_shared']:.0f} of 20"

    assert exact["weights_difference"] == floor["weights_difference"] == 0
    assert rows["Bergson's MAGIC, no epsilon inside the root"]["finite_rows"] == 0
    return [
        f"Bergson {record['versions']['bergson']}'s MAGIC",
        f"{record['train_rows']} rows, {record['steps']} steps",
        f"top 20 shared: {same(exact, 5)}",
        f"no part of it: {same(floor, 3)}",
        f"with itself to {same(other_exact, 4)}, the default to {same(other_floor, 4)}",
        f"by at most {other:.4f}, from Bergson's by {bergson['weights_difference']:.4f}",
        f"epsilon of {bergson['root_epsilon']:.0e} inside the root",
        f"fastest took {min(plain):.1f} s and the slowest {max(plain):.1f} s",
        f"{bergson['backward_ratio']:.1f} by Bergson, {exact['backward_ratio']:.1f} by the exact "
        f"derivative, {floor['backward_ratio']:.1f} by the default and "
        f"{floor['together_ratio']:.1f} a question of {record['questions_together']} together",
        f"{bergson['training_ratio']:.1f} by Bergson, {floor['training_ratio']:.1f} recorded",
        f"{bergson['peak_mb']:.0f} MB of memory by Bergson, {exact['peak_mb']:.0f} MB and "
        f"{floor['peak_mb']:.0f} MB",
    ]


def progressive() -> list[str]:
    """Certificates by slices, a line for each corpus and number of slices."""
    record = newest("progressive")
    passages = []
    for name in record["corpora"]:
        for slices in sorted({row["slices"] for row in record["rows"]}):
            told = []
            for k in (10, 100):
                row = one(record["rows"], corpus=name, slices=slices, k=k)
                rows = f"{row['exact_median']:,.0f}, {row['exact_p95']:,.0f}"
                told.append(
                    f"{100 * row['certified_share']:.0f} %, {rows}, {row['recall_mean']:.3f}"
                )
            found = f"{row['rows']:,} | {slices} | {row['bytes_per_example']:,}"
            passages.append(f"| {name} | {found} | {' | '.join(told)} | {row['build_ratio']:.1f} |")
    wrong = sum(row["violations"] for row in record["rows"])
    asked = sum(row["queries"] for row in record["rows"])
    return [*passages, f"{wrong} of {asked} statements were wrong"]


FIGURES: dict[str, tuple[Callable[[], list[str]], ...]] = {
    "README.md": (demo,),
    MEASURED: (
        *(kronfluence, coverage, usefulness, kills, build, search, service, prediction),
        *(demo_costs, recall, one_index, plausibility, shares, one_run, through_run, magic),
        progressive,
    ),
}
"""By document, what it must contain of the records."""


def flat(text: str) -> str:
    """Text without its line breaks."""
    return " ".join(text.split())


@pytest.mark.parametrize(
    ("document", "passages"),
    [(document, family) for document, families in FIGURES.items() for family in families],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_figures_are_those_of_the_newest_record(
    document: str, passages: Callable[[], list[str]]
) -> None:
    text = flat((ROOT / document).read_text())
    missing = [passage for passage in passages() if passage not in text]
    assert not missing, f"{document} must say, by the records: {missing}"


def table_rows(document: str) -> list[str]:
    """Rows of its tables; those of claims that the tests themselves show are no measurements."""
    lines = (ROOT / document).read_text().splitlines()
    return [line for line in lines if line.startswith("| ") and "| `make test` |" not in line]


@pytest.mark.parametrize("document", TABLES)
def test_tables_of_measurements_hold_no_other_figure(document: str) -> None:
    known = [passage for family in FIGURES.get(document, ()) for passage in family()]
    known += NOT_RECORDED.get(document, ())
    for row in table_rows(document):
        if row in known or row.startswith("| method |"):
            continue
        left = row
        for passage in known:
            left = left.replace(passage, "")
        left = re.sub(r"`[^`]*`", "", left)  # names and commands
        assert not re.search(r"(?<![\w-])\d", left), f"no record behind: {left}"


@pytest.mark.parametrize("document", NOT_RECORDED)
def test_figures_without_a_record_are_there_and_said_to_be_so(document: str) -> None:
    text = flat((ROOT / document).read_text())
    assert all(figure in text for figure in NOT_RECORDED[document])
    assert "not in a record" in text
