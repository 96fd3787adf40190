"""The service under load: latency, refusals, memory over time, the gain of micro-batching."""

import asyncio
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import httpx
import numpy as np
import typer
from rich.table import Table

from scripts.bench.fuzz import count, fuzz
from scripts.bench.record import write_record
from scripts.console import one_sentence_errors, print_json, stderr
from service.versions import revision

PARTS = ("latency", "overload", "soak", "fuzz")
CONCURRENCIES = (1, 2, 4, 8)
TOGETHER = 8
"""Queries computed at a time, and accepted at once, by the service that is measured."""
DEADLINE = 30.0
REFUSED = 429

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@dataclass(frozen=True, kw_only=True)
class Reply:
    """What became of a request: an HTTP status (0 if none came), after so many seconds."""

    status: int
    seconds: float
    partial: bool = False


@dataclass(kw_only=True)
class Service:
    """A service in a process of its own."""

    url: str
    process: subprocess.Popen[bytes]

    def memory_mb(self) -> float:
        """Resident memory of the process."""
        pages = Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]
        return int(pages) * os.sysconf("SC_PAGE_SIZE") / 2**20


@app.command()
@one_sentence_errors
def main(
    model: Annotated[str, typer.Option(help="Folder of the model.")] = "runs/demo/model",
    index: Annotated[str, typer.Option(help="Folder of the index.")] = "runs/demo/index",
    queries: Annotated[Path, typer.Option(help="JSONL with prompt and completion.")] = Path(
        "runs/demo/queries.jsonl"
    ),
    parts: Annotated[str, typer.Option(help=f"Of {', '.join(PARTS)}.")] = ",".join(PARTS),
    each: Annotated[int, typer.Option(min=8, help="Queries for each concurrency.")] = 80,
    overload_seconds: Annotated[float, typer.Option(min=1, help="Of offering too much.")] = 60.0,
    soaked: Annotated[int, typer.Option(min=100, help="Queries while memory is watched.")] = 10_000,
    fuzz_examples: Annotated[int, typer.Option(min=1, help="Cases for each operation.")] = 200,
    before: Annotated[
        Path | None,
        typer.Option(
            help="A checkout of an earlier revision where `make demo` ran: its service is measured "
            "beside this one's, on its own index, with the same queries."
        ),
    ] = None,
    record: Annotated[bool, typer.Option(help="Write docs/benchmarks/service_*.json.")] = True,
) -> None:
    """Load a service with the demo's queries, as people and scripts would, and then far beyond.

    Needs the index of `make demo`. The service runs in a process of its own, and shares the
    processors with the clients, which take little. Parts that are measured alone replace those of
    the same day's record.
    """
    for path in (model, index, str(queries)):
        if not Path(path).exists():
            raise ValueError(f"There is no {path}; run `make demo` first, or name another.")
    wanted = parts.split(",")
    unknown = sorted(set(wanted) - set(PARTS))
    if unknown:
        raise ValueError(f"Unknown part '{unknown[0]}'; choose of {', '.join(PARTS)}.")
    asked = [json.loads(line) for line in queries.read_text().splitlines()]
    questions = [{n: q[n] for n in ("prompt", "completion")} for q in asked]
    commits = dict.fromkeys(wanted, revision())
    report: dict[str, Any] = {"questions": len(questions), "commits": commits}
    if "latency" in wanted:
        if before is not None:
            parts_of = (str(before / "runs/demo/model"), str(before / "runs/demo/index"))
            with serving(*parts_of, TOGETHER, before) as service:
                rows = latencies(service, questions, each, (1, TOGETHER))
            report["before"] = {"commit": revision(before), "latency": rows}
        with serving(model, index, TOGETHER) as service:
            report["latency"] = latencies(service, questions, each)
        with serving(model, index, 1) as service:
            alone = asyncio.run(closed_loop(service, questions, TOGETHER, each))
        together = report["latency"][-1]["throughput"]
        report["throughput_one_at_a_time"] = throughput(alone)
        report["batching_gain"] = together / throughput(alone)
    if "overload" in wanted:
        with serving(model, index, TOGETHER) as service:
            report["overload"] = overload(service, questions, each, overload_seconds)
    if "soak" in wanted:
        with serving(model, index, TOGETHER) as service:
            report["soak"] = soak(service, questions, soaked)
    if "fuzz" in wanted:
        with serving(model, index, TOGETHER) as service:
            found = fuzz(Path("docs/openapi.json"), service.url, None, fuzz_examples, 0)
            report["fuzz"] = count(found)
    show(report)
    if record:
        stderr.print(f"Recorded in {write_record('service', report, merge=True)}.")
    print_json(report)


@contextmanager
def serving(model: str, index: str, together: int, checkout: Path = Path()) -> Iterator[Service]:
    """A service that is ready, by the code of a checkout; ends with the block."""
    command = [sys.executable, "-m", "scripts.serve", "--model", str(Path(model).resolve())]
    command.append("--index")
    jobs = tempfile.TemporaryDirectory()
    settings = {
        "ETYMON_MAX_TOGETHER": str(together),
        "ETYMON_MAX_IN_FLIGHT": str(TOGETHER),
        "ETYMON_JOBS_PATH": f"{jobs.name}/jobs.sqlite",
    }
    process = subprocess.Popen(
        [*command, f"default={Path(index).resolve()}", "--port", "0"],
        cwd=checkout,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, **settings},
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            raise ValueError(
                f"The service did not start; run `{' '.join(command)} default={index}` to see why."
            )
        yield Service(url=json.loads(line)["url"], process=process)
    finally:
        process.terminate()
        process.wait()
        jobs.cleanup()


async def ask(client: httpx.AsyncClient, question: dict[str, Any]) -> Reply:
    """Ask one query."""
    start = time.perf_counter()
    try:
        response = await client.post("/v1/query", json=question)
    except httpx.HTTPError:
        return Reply(status=0, seconds=time.perf_counter() - start)
    partial = response.status_code == httpx.codes.OK and response.json()["partial"]
    seconds = time.perf_counter() - start
    return Reply(status=response.status_code, seconds=seconds, partial=partial)


@asynccontextmanager
async def connected(service: Service) -> AsyncIterator[httpx.AsyncClient]:
    """A client with as many connections as are wanted."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
    async with httpx.AsyncClient(base_url=service.url, timeout=600, limits=limits) as client:
        yield client


async def closed_loop(
    service: Service, questions: Sequence[dict[str, Any]], concurrency: int, count: int
) -> tuple[list[Reply], float]:
    """So many clients, each of which asks again as soon as it is answered; seconds in all."""
    waiting = iter(list(itertools.islice(itertools.cycle(questions), count)))
    replies: list[Reply] = []

    async def one(client: httpx.AsyncClient) -> None:
        for question in waiting:
            replies.append(await ask(client, question))

    async with connected(service) as client:
        start = time.perf_counter()
        await asyncio.gather(*(one(client) for _ in range(concurrency)))
        return replies, time.perf_counter() - start


def throughput(measured: tuple[list[Reply], float]) -> float:
    """Answers a second.

    Raises:
        ValueError: a query got no answer.
    """
    replies, seconds = measured
    bad = [reply.status for reply in replies if reply.status != httpx.codes.OK]
    if bad:
        raise ValueError(f"{len(bad)} of {len(replies)} queries got no answer, but {set(bad)}.")
    return len(replies) / seconds


def latencies(
    service: Service,
    questions: Sequence[dict[str, Any]],
    each: int,
    concurrencies: Sequence[int] = CONCURRENCIES,
) -> list[dict[str, Any]]:
    """Throughput and quantiles of the time to the answer, by concurrency."""
    asyncio.run(closed_loop(service, questions, 1, 8))  # what is computed only once
    rows = []
    for concurrency in concurrencies:
        measured = asyncio.run(closed_loop(service, questions, concurrency, each))
        times = [1000 * reply.seconds for reply in measured[0]]
        rows.append(
            {
                "concurrency": concurrency,
                "throughput": throughput(measured),
                **{f"p{q}_ms": float(np.percentile(times, q)) for q in (50, 95, 99)},
            }
        )
        stderr.print(f"concurrency {concurrency}: {rows[-1]['throughput']:.2f} a second")
    return rows


def overload(
    service: Service, questions: Sequence[dict[str, Any]], each: int, seconds: float
) -> dict[str, Any]:
    """Four times as many queries a second as it can answer, whether or not it answers."""
    capacity = throughput(asyncio.run(closed_loop(service, questions, TOGETHER, each)))
    pause = 1 / (4 * capacity)
    count = int(seconds / pause)

    async def offered() -> list[Reply]:
        async with connected(service) as client:
            tasks = []
            start = time.perf_counter()
            for number in range(count):
                question = {**questions[number % len(questions)], "deadline": DEADLINE}
                tasks.append(asyncio.create_task(ask(client, question)))
                late = time.perf_counter() - start - (number + 1) * pause
                await asyncio.sleep(max(0.0, -late))
            return await asyncio.gather(*tasks)

    replies = asyncio.run(offered())
    accepted = [reply for reply in replies if reply.status == httpx.codes.OK]
    refused = [reply for reply in replies if reply.status == REFUSED]
    return {
        "capacity_per_second": capacity,
        "offered": len(replies),
        "accepted": len(accepted),
        "refused": len(refused),
        "lost": len(replies) - len(accepted) - len(refused),
        "late": sum(reply.seconds > DEADLINE for reply in accepted),
        "partial": sum(reply.partial for reply in accepted),
        "deadline_seconds": DEADLINE,
        "accepted_p99_ms": float(np.percentile([1000 * r.seconds for r in accepted], 99)),
        "refusal_p99_ms": float(np.percentile([1000 * r.seconds for r in refused], 99)),
    }


def soak(service: Service, questions: Sequence[dict[str, Any]], count: int) -> dict[str, Any]:
    """Memory over many short queries, after a tenth of them."""
    short = {"k": 3, "budget": 8, "calibration_rows": 4, "audit_rows": 4, "tokens": True}
    asked = [{**question, **short} for question in questions]
    asyncio.run(closed_loop(service, asked, TOGETHER, count // 10))
    before, sizes = service.memory_mb(), []
    for _ in range(10):
        throughput(asyncio.run(closed_loop(service, asked, TOGETHER, count // 10)))
        sizes.append(service.memory_mb())
        stderr.print(f"{len(sizes) * count // 10:,} queries: {sizes[-1]:,.0f} MB", highlight=False)
    return {"queries": count, "rss_mb": sizes, "rss_growth_mb": sizes[-1] - before}


def show(report: dict[str, Any]) -> None:
    """Print the tables for people."""
    if "latency" in report:
        table = Table(title="demo index, closed loop")
        for column in ("clients", "answers a second", "p50 ms", "p95 ms", "p99 ms"):
            table.add_column(column, justify="right")
        earlier = report.get("before", {"latency": []})["latency"]
        for row in [*earlier, *report["latency"]]:
            times = [f"{row[f'p{q}_ms']:,.0f}" for q in (50, 95, 99)]
            table.add_row(str(row["concurrency"]), f"{row['throughput']:.2f}", *times)
        stderr.print(table)
        gain = report["batching_gain"]
        stderr.print(f"queries together: {gain:.2f} times the throughput of one at a time")
    for part in ("overload", "soak", "fuzz"):
        if part in report:
            facts = ", ".join(
                f"{name} {value:,.6g}"
                for name, value in report[part].items()
                if isinstance(value, (int, float))
            )
            stderr.print(f"{part}: {facts}", highlight=False)


if __name__ == "__main__":
    app()
