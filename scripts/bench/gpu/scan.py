"""The scan of as many codes as fit, over a copy of the same bytes from device to device."""

import math
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from jaxtyping import Float, Float32, UInt8
from torch import Tensor

from index.codes.fourbit import BLOCK
from index.codes.onebit import OneBitIndex
from scripts.bench.gpu.measuring import Report, Row, measure
from scripts.bench.gpu.sizes import Sizes
from service.device_search import DeviceIndex

ROWS_AT_ONCE = 1 << 20
"""That are added together, and copied: 2 GB at 16,384 dimensions."""

ANSWER_BYTES = 4
"""On the device for a query and row."""

SPARE_SHARE = 0.08
"""Of the memory, for chunks as numbers and what the allocator cannot use."""


def scan(sizes: Sizes, device: torch.device, report: Report, *, kernel: bool) -> None:
    """Loading codes from the host, agreement with the host's scan, and scans over a copy.

    Args:
        sizes: how much.
        device: where.
        report: takes each row.
        kernel: whether the kernel for one-bit codes does it on a GPU; a CPU has none.

    Raises:
        RuntimeError: the GPU has no kernel.
    """
    index = DeviceIndex("one-bit", sizes.dimensions, str(device), kernel=kernel)
    if kernel and device.type == "cuda" and not index.has_kernel:
        raise RuntimeError("The kernel for one-bit codes cannot be used here; a warning says why.")
    common = {
        "part": "scan",
        "by": "kernel" if index.has_kernel else "matrix products",
        "dimensions": sizes.dimensions,
    }
    report({**common, **_load(index, sizes, device)})
    parts = _fill(index, sizes, device)
    buffer = torch.empty_like(parts[0])

    def copy() -> None:
        for part in parts:
            buffer[: len(part)].copy_(part)

    copied = measure(device, copy, sizes.repeats)
    rate = sum(part.nbytes for part in parts) / copied.seconds
    rows = sizes.loaded_rows + sum(len(part) for part in parts)
    size = rows * index.code_size
    floor = replace(copied, seconds=size / rate)
    for count in sizes.queries:
        action = partial(index.scan, _queries(count, sizes))
        found = measure(device, action, sizes.repeats if kernel else 1)
        report(
            {
                **common,
                "queries": count,
                "rows": rows,
                "bytes": size,
                **found.over(floor),
                "gb_per_second": round(size / found.seconds / 1e9, 2),
                "floor_gb_per_second": round(rate / 1e9, 2),
                "answers_to_host_seconds": _to_host(count, rows, device),
            }
        )


def _load(index: DeviceIndex, sizes: Sizes, device: torch.device) -> Row:
    """Add a shard as it comes from disk, and compare its scan with the host's."""
    rows, host = sizes.loaded_rows, OneBitIndex(sizes.dimensions)
    codes = _shard(rows, sizes.dimensions, host.code_size)
    found = measure(device, lambda: index.add(codes, rows), 1, warm=False)
    host.add(codes, rows)
    queries = _queries(8, sizes)
    ours, theirs = index.scan(queries), host.scan(queries)
    return {
        "what": "codes from the host onto the device",
        "rows": rows,
        "bytes": codes.nbytes,
        "seconds": round(found.seconds, 5),
        "gb_per_second": round(codes.nbytes / found.seconds / 1e9, 3),
        "largest_relative_difference": float(np.abs(ours - theirs).max() / np.abs(theirs).max()),
    }


def _shard(rows: int, dimensions: int, size: int) -> UInt8[np.ndarray, "padded byte"]:
    """Packed codes of random rows of unit length."""
    padded = -(-rows // BLOCK) * BLOCK
    content = bytearray(np.random.default_rng(0).bytes(padded * size))
    codes = np.frombuffer(content, dtype=np.uint8)
    codes[padded * (size - 4) :].view(np.float32)[:] = _factor(dimensions)
    return codes.reshape(padded, size)


def _fill(index: DeviceIndex, sizes: Sizes, device: torch.device) -> list[Tensor]:
    """Add random codes, drawn on the device; the words of each part."""
    size = index.code_size
    left = (sizes.rows or _fitting_rows(size, sizes, device)) - sizes.loaded_rows
    if left < 1:
        raise ValueError("The device has no room for more rows than come from the host.")
    generator = torch.Generator(device=device).manual_seed(0)
    parts = []
    while left:
        rows = min(left, ROWS_AT_ONCE)
        shape = (rows, size - 4)
        words = torch.randint(256, shape, dtype=torch.uint8, device=device, generator=generator)
        factors = torch.full((rows,), _factor(sizes.dimensions), device=device)
        index.add_unpacked(words, factors)
        parts.append(words)
        left -= rows
    return parts


def _fitting_rows(code_size: int, sizes: Sizes, device: torch.device) -> int:
    """As many as leave room for the answers of the most queries and for a copy's buffer."""
    free, whole = torch.cuda.mem_get_info(device)
    room = free - SPARE_SHARE * whole - ROWS_AT_ONCE * code_size
    return int(room / (code_size + ANSWER_BYTES * max(sizes.queries)))


def _factor(dimensions: int) -> float:
    """Of a row of unit length with normal coordinates."""
    return math.sqrt(math.pi / (2 * dimensions))


def _queries(count: int, sizes: Sizes) -> Float32[np.ndarray, "query dimension"]:
    shape = (count, sizes.dimensions)
    return np.random.default_rng(1).standard_normal(shape).astype(np.float32)


def _to_host(queries: int, rows: int, device: torch.device) -> float:
    """Seconds that copying the answers takes, which are part of a scan."""
    answers: Float[Tensor, "query row"] = torch.zeros(queries, rows, device=device)
    return round(measure(device, answers.cpu, 1, warm=False).seconds, 5)
