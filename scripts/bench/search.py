"""Time of an exhaustive scan against reading the codes, and what scanning fewer rows loses."""

import json
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import numpy as np
import torch
import typer
from jaxtyping import Float, Float32, Int, UInt8
from rich.table import Table

from index.codes.faiss_module import import_faiss, usable_processors
from index.codes.fourbit import BLOCK
from index.codes.onebit import OneBitIndex
from index.codes.vectors import VectorIndex, best_rows
from index.manifest import Manifest, ShardRecord
from index.mapped import map_tensors
from index.parts import part_folder
from index.shards import check_shard, codes_path, write_shard
from scripts.bench.record import write_record
from scripts.console import one_sentence_errors, print_json, show_progress, stderr
from service.device_search import make_search_index
from service.models import load_model
from service.search.opening import open_index
from service.search.retrieval import Retriever
from service.versions import revision

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

TRUE_ROWS, FOUND_ROWS = 10, 50
"""A recall is the share of the best 10 rows of the exact scan that are among the best 50 found."""

LISTS, PROBES = (16, 64), (1, 4, 16)
"""Inverted lists, and how many of them are looked at."""

PEER_ROWS = 100_000
ASKED = 64
"""Rows of FAISS's own index; queries for recall on a real index."""


@app.command()
@one_sentence_errors
def main(
    rows: Annotated[int, typer.Option(help="Rows of random codes.")] = 1_000_000,
    bits: Annotated[int, typer.Option(help="Dimensions, one bit each.")] = 16_384,
    threads: Annotated[int | None, typer.Option(help="All processors by default.")] = None,
    batch: Annotated[int, typer.Option(help="Queries of the larger batch.")] = 64,
    repeats: Annotated[int, typer.Option(help="Median of so many runs.")] = 7,
    rows_per_shard: Annotated[int, typer.Option(help="Rows of a file.")] = 65_536,
    device: Annotated[str, typer.Option(help="Where to search: cpu or cuda.")] = "cpu",
    index: Annotated[
        Path | None, typer.Option(help="A one-bit index on which inverted lists are tried.")
    ] = None,
    model: Annotated[str, typer.Option(help="The model of that index.")] = "runs/demo/model",
    queries: Annotated[Path, typer.Option(help="Its queries.")] = Path("runs/demo/queries.jsonl"),
    write: Annotated[bool, typer.Option(help="Keep a record under docs/benchmarks/.")] = True,
) -> None:
    """Time scans of random one-bit codes that are mapped from shards in a temporary folder.

    The floor of a scan is its bytes over the memory bandwidth of the same run: the best of several
    sums over 1 GB by PyTorch with the same threads. For a batch it counts the codes once for each
    query; ``floor_once_seconds`` counts them once for the batch.

    Example: python -m scripts.bench.search --rows 100000 --index runs/demo/index
    """
    threads = threads or usable_processors()
    with tempfile.TemporaryDirectory(prefix="etymon-search-") as name:
        records = _write_random_shards(Path(name), rows, bits, rows_per_shard)
        loading, searched = _load(Path(name), records, bits, threads, device)
        bandwidth = _bandwidth(threads, device, repeats)
        scans = _time_scans(searched, bits, (1, batch), repeats)
        before = _anonymous_bytes()
        recall = _recall_of_first_shard(Path(name), records[0], bits, threads)
        peers = _time_plain_faiss(min(rows, PEER_ROWS), bits, threads, repeats)
    bandwidth = max(bandwidth, _bandwidth(threads, device, repeats))  # the other work may be over
    size = searched.code_size
    table = [_row("one-bit", rows, bits, n, seconds, size, bandwidth) for n, seconds in scans]
    table += [
        _row("FAISS IndexRaBitQ", min(rows, PEER_ROWS), bits, n, seconds, size, bandwidth)
        for n, seconds in peers
    ]
    lists = [] if index is None else _inverted_lists(index, model, queries, repeats)
    document = {
        "command": "python -m scripts.bench.search",
        "threads": threads,
        "device": device,
        "faiss": import_faiss().__version__,
        "faiss_instructions": import_faiss().get_compile_options().strip(),
        "bandwidth_gb_per_second": round(bandwidth / 1e9, 2),
        "bandwidth_by": "best torch.sum over 1 GB, before and after the scans, same threads",
        "floor": "bytes scanned / bandwidth; in a batch, the codes once for each query",
        "anonymous_bytes_after_search": before,
        **loading,
        "recall_of_exact_scan": recall,
        "rows": [{**row, "commit": revision()} for row in (*table, *lists)],
    }
    _print_table(document["rows"])
    if write:
        stderr.print(f"written to {write_record('search', document)}", soft_wrap=True)
    print_json(document)


def _write_random_shards(folder: Path, rows: int, bits: int, size: int) -> list[ShardRecord]:
    generator = np.random.default_rng(0)
    records = []
    for number, first in enumerate(show_progress("writing shards", range(0, rows, size))):
        count = min(size, rows - first)
        codes = _random_codes(generator, count, bits)
        record = ShardRecord(
            number=number, first_row=first, rows=count, sha256="", examples_sha256="", failed=[]
        )
        norms = np.ones(count, dtype=np.float32)
        records.append(write_shard(folder, codes, norms, record))
    return records


def _random_codes(
    generator: np.random.Generator, rows: int, bits: int
) -> UInt8[np.ndarray, "padded byte"]:
    """Packed codes of random rows: random bytes, and the factor of a unit row."""
    padded, size = -(-rows // BLOCK) * BLOCK, OneBitIndex(bits).code_size
    codes = np.frombuffer(bytearray(generator.bytes(padded * size)), dtype=np.uint8)
    codes[padded * (size - 4) :].view(np.float32)[:] = np.sqrt(np.pi / (2 * bits))
    return codes.reshape(padded, size)


def _load(
    folder: Path, records: list[ShardRecord], bits: int, threads: int, device: str
) -> tuple[dict[str, Any], VectorIndex]:
    """An index over the mapped shards, and what mapping and verifying took (pages in memory)."""
    index = (
        OneBitIndex(bits, threads)
        if device == "cpu"
        else make_search_index("one-bit", bits, device)
    )
    anonymous = _anonymous_bytes()
    start = time.perf_counter()
    for record in records:
        index.add(map_tensors(codes_path(folder, record.number))["codes"], record.rows)
    mapped = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        paths = list(pool.map(lambda record: check_shard(folder, record), records))
    verified = time.perf_counter()
    return {
        "load_seconds": round(mapped - start, 4),
        "verify_seconds": round(verified - mapped, 3),
        "index_bytes": sum(path.stat().st_size for path in paths),
        "anonymous_bytes_of_load": _anonymous_bytes() - anonymous,
    }, index


def _anonymous_bytes() -> int:
    """Memory of this process that is not the page cache's."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    return 0


def _bandwidth(threads: int, device: str, repeats: int) -> float:
    """Bytes a second of the best of several sums over 1 GB."""
    torch.set_num_threads(threads)
    memory = torch.from_numpy(np.ones(1 << 27, dtype=np.int64)).to(device)
    return float(memory.nbytes / min(_times(memory.sum, repeats + 3, device)))


def _times(action: Callable[[], Any], repeats: int, device: str = "cpu") -> list[float]:
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        action()
        if device != "cpu":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return seconds


def _time_scans(
    index: VectorIndex, bits: int, batches: tuple[int, ...], repeats: int
) -> list[tuple[int, float]]:
    """Median seconds of a scan, by number of queries."""
    index.scan(_queries(1, bits))  # the first one maps the pages
    found = []
    for batch in batches:
        queries = _queries(batch, bits)
        found.append((batch, median(_times(partial(index.scan, queries), repeats))))
    return found


def _queries(count: int, bits: int) -> Float32[np.ndarray, "query dimension"]:
    return np.random.default_rng(1).standard_normal((count, bits)).astype(np.float32)


def _row(
    index: str, rows: int, bits: int, batch: int, seconds: float, code_size: int, bandwidth: float
) -> dict[str, Any]:
    once = rows * code_size / bandwidth
    return {
        "rows": rows,
        "bits": bits,
        "batch": batch,
        "index": index,
        "seconds": round(seconds, 5),
        "floor_seconds": round(batch * once, 5),
        "ratio": round(seconds / (batch * once), 3),
        "floor_once_seconds": round(once, 5),
    }


def _recall_of_first_shard(folder: Path, record: ShardRecord, bits: int, threads: int) -> float:
    """Share of the best rows by float64 arithmetic over the same codes that the scan finds."""
    codes = map_tensors(codes_path(folder, record.number))["codes"]
    index = OneBitIndex(bits, threads)
    index.add(codes, record.rows)
    queries = _queries(8, bits)
    exact = np.concatenate(list(_exact(index.unpack(codes, record.rows), queries)), axis=1)
    return _recall(exact, [best_rows(values, FOUND_ROWS) for values in index.scan(queries)])


def _exact(
    codes: UInt8[np.ndarray, "row byte"], queries: Float32[np.ndarray, "query dimension"]
) -> Any:
    """Inner products, a thousand rows at a time."""
    for start in range(0, len(codes), 1000):
        yield queries.astype(np.float64) @ _signs(codes[start : start + 1000], queries.shape[1]).T


def _signs(codes: UInt8[np.ndarray, "row byte"], bits: int) -> Float32[np.ndarray, "row dimension"]:
    """What codes stand for: a sign a dimension times the factor."""
    signs = np.unpackbits(codes[:, :-4], axis=1, count=bits, bitorder="little")
    factors = codes[:, -4:].copy().view(np.float32)
    return (2 * signs.astype(np.float32) - 1) * factors


def _recall(exact: Float[np.ndarray, "query row"], found: list[Int[np.ndarray, "best"]]) -> float:
    shares = [
        np.isin(best_rows(values, TRUE_ROWS), rows).mean()
        for values, rows in zip(exact, found, strict=True)
    ]
    return float(np.mean(shares))


def _time_plain_faiss(rows: int, bits: int, threads: int, repeats: int) -> list[tuple[int, float]]:
    """Median seconds of FAISS's own search of RaBitQ codes with 8-bit queries, for comparison."""
    faiss = import_faiss()
    faiss.omp_set_num_threads(threads)
    index = faiss.IndexRaBitQ(bits, faiss.METRIC_INNER_PRODUCT)
    index.qb = 8
    index.train(np.zeros((1, bits), dtype=np.float32))
    codes = np.random.default_rng(0).integers(0, 256, (rows, index.sa_code_size()), dtype=np.uint8)
    codes[:, -8:] = np.array([0.0, 1.0], dtype=np.float32).view(np.uint8)
    index.add_sa_codes(codes)
    found = []
    for batch in (1, 8):
        queries = _queries(batch, bits)
        seconds = median(_times(partial(index.search, queries, FOUND_ROWS), repeats))
        found.append((batch, seconds))
    return found


def _inverted_lists(folder: Path, model: str, queries: Path, repeats: int) -> list[dict[str, Any]]:
    """Recall and time of FAISS's inverted lists over the rows that an index' codes stand for."""
    opened = open_index(folder, load_model(model))
    retriever = Retriever(opened)
    bits = opened.manifest.sketch.dimensions
    asked = [json.loads(line) for line in queries.read_text().splitlines()[:ASKED]]
    directions = [
        retriever.directions(opened.loaded.encode_query(q["prompt"], q["completion"]))[0]
        for q in show_progress("query gradients", asked)
    ]
    sketches = [opened.sketch.query({n: d[None] for n, d in one.items()})[0] for one in directions]
    y = np.concatenate([sketch.cpu().numpy() for sketch in sketches])
    codes = _all_codes(folder, opened.manifest)
    codes = codes if opened.kept is None else codes[opened.kept]
    exact = np.concatenate(list(_exact(codes, y)), axis=1)
    flat = median(_times(lambda: [opened.vectors.inner_products(q) for q in y], repeats)) / len(y)
    common = {"rows": len(codes), "bits": bits, "batch": 1, "floor_seconds": None, "ratio": None}
    found = [best_rows(opened.inner_products(q), FOUND_ROWS) for q in y]
    rows = [
        {
            **common,
            "index": "one-bit, real sketches",
            "seconds": round(flat, 5),
            "recall": round(_recall(exact, found), 4),
            **_norm_bound(exact / np.linalg.norm(y, axis=1)[:, None], opened.norms),
        }
    ]
    return rows + [{**common, **row} for row in _try_lists(codes, exact, y, repeats)]


def _try_lists(
    codes: UInt8[np.ndarray, "row byte"],
    exact: Float[np.ndarray, "query row"],
    y: Float32[np.ndarray, "query dimension"],
    repeats: int,
) -> list[dict[str, Any]]:
    faiss = import_faiss()
    faiss.omp_set_num_threads(usable_processors())
    bits = y.shape[1]
    train = _signs(codes[:: max(1, len(codes) // 2560)], bits)
    rows = []
    for lists in LISTS:
        coarse = faiss.IndexFlatIP(bits)
        index = faiss.IndexIVFRaBitQ(coarse, bits, lists, faiss.METRIC_INNER_PRODUCT)
        index.qb = 8
        index.train(train)
        for start in range(0, len(codes), 1000):
            index.add(_signs(codes[start : start + 1000], bits))
        for probes in (p for p in PROBES if p <= lists):
            index.nprobe = probes
            _, found = index.search(y, FOUND_ROWS)
            one_by_one = partial(_search_one_by_one, index, y)
            seconds = median(_times(one_by_one, repeats))
            rows.append(
                {
                    "index": f"IVF, {probes} of {lists} lists",
                    "seconds": round(seconds / len(y), 5),
                    "recall": round(_recall(exact, list(found)), 4),
                }
            )
    return rows


def _search_one_by_one(index: Any, y: Float32[np.ndarray, "query dimension"]) -> None:
    for query in y:
        index.search(query[None], FOUND_ROWS)


def _norm_bound(
    cosines: Float[np.ndarray, "query row"], norms: Float[np.ndarray, "row"]
) -> dict[str, float]:
    """Share of rows that a scan in order of norm must look at before it may stop.

    It may stop when no cosine could lift the next norm to the 10th best score: at most 1, or, as an
    optimist would have it, at most the largest cosine that there is.
    """
    scores = cosines * norms
    tenth = np.sort(scores, axis=1)[:, -TRUE_ROWS]
    sure = np.mean([(norms >= value).mean() for value in tenth])
    largest = cosines.max(1)
    hoped = np.mean(
        [(norms * most >= value).mean() for value, most in zip(tenth, largest, strict=True)]
    )
    return {
        "rows_by_norm_surely": round(float(sure), 4),
        "rows_by_norm_at_the_largest_cosine": round(float(hoped), 4),
    }


def _all_codes(folder: Path, manifest: Manifest) -> UInt8[np.ndarray, "row byte"]:
    index = OneBitIndex(manifest.sketch.dimensions)
    return np.concatenate(
        [
            index.unpack(
                map_tensors(codes_path(part_folder(folder, part.name), shard.number))["codes"],
                shard.rows,
            )
            for part in manifest.parts
            for shard in part.shards
        ]
    )


def _print_table(rows: list[dict[str, Any]]) -> None:
    table = Table(title="Search")
    for name in ("index", "rows", "bits", "batch", "seconds", "floor", "ratio", "recall"):
        table.add_column(name, justify="left" if name == "index" else "right")
    for row in rows:
        floor, ratio, recall = row["floor_seconds"], row["ratio"], row.get("recall")
        table.add_row(
            row["index"],
            f"{row['rows']:,}",
            f"{row['bits']:,}",
            str(row["batch"]),
            f"{row['seconds']:.4f}",
            "" if floor is None else f"{floor:.4f}",
            "" if ratio is None else f"{ratio:.2f}",
            "" if recall is None else f"{recall:.3f}",
        )
    stderr.print(table)


if __name__ == "__main__":
    app()
