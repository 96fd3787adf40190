"""Products of queries with signs that stay one bit each until they reach the multipliers.

A program of the kernel holds the sums of ``BLOCK_ROWS`` rows and all queries. It reads the rows'
codes once, ``BLOCK_BYTES`` at a time, turns one bit of each byte into -1 and +1 in float16 and
multiplies them, eight times over, with the queries' coordinates in the order in which those bits
come; sums are in float32. Importing this file needs Triton.
"""

import subprocess

import torch
import triton
import triton.language as tl
from jaxtyping import Float, UInt8
from torch import Tensor
from triton.errors import TritonError

BLOCK_ROWS, BLOCK_BYTES, WARPS = 128, 32, 8
"""Of a program, and of a step. Compiled for compute capability 9.0 this takes 61 (16 queries) to
108 (64 queries) registers a thread, none spilled; not yet tuned on any GPU."""

FEWEST_QUERIES, MOST_QUERIES = 16, 64
"""Queries of a launch: what the multipliers want at least, and what the registers hold."""


def multiply_signs(
    queries: Float[Tensor, "query dimension"],
    words: UInt8[Tensor, "row byte"],
    factors: Float[Tensor, "row"],
    found: Float[Tensor, "query row"],
) -> None:
    """Write ``factors * <query, signs>`` into ``found``; bit j of byte b is dimension ``8 b + j``.

    Args:
        queries: rounded to float16.
        words: bits, 1 for +1 and 0 for -1.
        factors: float32.
        found: float32, rows next to each other.
    """
    rows, width = words.shape
    for start in range(0, len(queries), MOST_QUERIES):
        some = queries[start : start + MOST_QUERIES]
        padded = max(FEWEST_QUERIES, triton.next_power_of_2(len(some)))
        # [bit, byte, query]: the coordinates that one bit of consecutive bytes is multiplied with.
        y = torch.zeros(padded, 8 * width, dtype=torch.float16, device=words.device)
        y[: len(some), : some.shape[1]] = some
        y = y.view(padded, width, 8).permute(2, 1, 0).contiguous()
        into = found[start : start + MOST_QUERIES]
        with torch.cuda.device_of(words):  # type: ignore[no-untyped-call]
            _multiply[(triton.cdiv(rows, BLOCK_ROWS),)](
                words,
                y,
                factors,
                into,
                rows,
                len(some),
                into.stride(0),
                WIDTH=width,
                BLOCK_ROWS=BLOCK_ROWS,
                BLOCK_BYTES=BLOCK_BYTES,
                QUERIES=padded,
                num_warps=WARPS,
            )


def find_obstacle(device: torch.device) -> str | None:
    """Try the kernel on one row, with few queries and with many: why it cannot be used, or None.

    A device may lack memory for it, a machine the compiler that Triton calls.
    """
    words = torch.ones(1, 1, dtype=torch.uint8, device=device)  # +1 and seven times -1
    factors = torch.ones(1, device=device)
    for count in (1, MOST_QUERIES):
        found = torch.empty(count, 1, device=device)
        try:
            multiply_signs(torch.ones(count, 8, device=device), words, factors, found)
        except (TritonError, RuntimeError, OSError, subprocess.CalledProcessError) as error:
            return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        if not found.eq(-6).all():
            return "it computes something else here"
    return None


@triton.jit  # type: ignore[untyped-decorator]
def _multiply(  # type: ignore[no-untyped-def]
    words,
    queries,
    factors,
    found,
    rows,
    count,
    stride,
    WIDTH: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_BYTES: tl.constexpr,
    QUERIES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    byte = tl.arange(0, BLOCK_BYTES)
    query = tl.arange(0, QUERIES).to(tl.int64)
    there = row < rows
    total = tl.zeros((BLOCK_ROWS, QUERIES), tl.float32)
    for start in range(0, WIDTH, BLOCK_BYTES):
        inside = start + byte < WIDTH
        codes = tl.load(
            words + row[:, None] * WIDTH + (start + byte)[None, :],
            mask=there[:, None] & inside[None, :],
            other=0,
        ).to(tl.uint16)
        for bit in tl.static_range(8):
            # The bit becomes the sign of a one in float16.
            signs = ((codes << (15 - bit)) & 0x8000) ^ 0xBC00
            y = tl.load(
                queries + (bit * WIDTH + start + byte)[:, None] * QUERIES + query[None, :],
                mask=inside[:, None],
                other=0.0,
            )
            total = tl.dot(signs.to(tl.uint16).to(tl.float16, bitcast=True), y, total)
    scaled = total * tl.load(factors + row, mask=there, other=0.0)[:, None]
    tl.store(
        found + query[None, :] * stride + row[:, None],
        scaled,
        mask=there[:, None] & (query < count)[None, :],
    )
