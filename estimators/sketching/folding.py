"""The second stage of a sketch: random signs, balanced buckets, Hadamard rotation."""

import math

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from estimators.sketching.near import Near

TILE = 16
"""Neighbouring entries that ``TiledFold`` keeps together: in float32 one line of a cache."""


class Fold:
    """Every entry goes into a bucket of its own drawing; all buckets are rotated together.

    Args:
        entries: of a row.
        seed: of the drawing.
        dimensions: buckets, a power of two.
    """

    def __init__(self, entries: int, seed: int, dimensions: int) -> None:
        k = dimensions
        self.padded = max(k, k * math.ceil(entries / k))
        generator = np.random.Generator(np.random.Philox(key=[seed, 2**32]))
        self._near = Near()
        self._near.add("order", torch.from_numpy(generator.permutation(self.padded)))
        self._near.add("signs", torch.from_numpy(_signs(generator, self.padded)))
        power = int(math.log2(k))
        self._near.add("first", hadamard(power // 2))
        self._near.add("second", hadamard(power - power // 2))

    def __call__(self, blocks: Float[Tensor, "batch entry"]) -> Float[Tensor, "batch dimension"]:
        """The folded and rotated rows."""
        order, signs, first, second = (
            self._near(name, blocks) for name in ("order", "signs", "first", "second")
        )
        k = len(first) * len(second)
        padded = nn.functional.pad(blocks, (0, self.padded - blocks.shape[1]))
        mixed = padded[:, order] * signs
        buckets = mixed.view(len(blocks), -1, k).sum(1)
        rotated = first @ buckets.view(-1, len(first), len(second)) @ second
        return rotated.reshape(len(blocks), k)


class TiledFold:
    """The same for many buckets, of which each slice of the result is a rotation by itself.

    Entries move in tiles, whose places are drawn, so that what is read and written stays in the
    processor's caches; every entry has a sign of its own. Entries of one tile never share a bucket,
    those of the same place in two tiles do more often, and the pairs of a row by as much as in
    ``Fold`` on average. Slice s of the result is the sum of all runs of ``dimensions`` buckets with
    the signs of row s of a Hadamard matrix, rotated by one of ``dimensions``.

    Args:
        entries: of a row.
        seed: of the drawing.
        dimensions: of a slice, a power of two.
        slices: a power of two.
    """

    def __init__(self, entries: int, seed: int, dimensions: int, slices: int) -> None:
        buckets = self._buckets = dimensions * slices
        times = max(1, math.ceil(entries / buckets))
        self.padded = times * buckets
        tile = math.gcd(TILE, buckets)
        generator = np.random.Generator(np.random.Philox(key=[seed, 2**32]))
        order = generator.permutation(self.padded // tile).reshape(times, -1)
        signs = _signs(generator, self.padded).reshape(times, -1, tile)
        self._near = Near()
        self._near.add("order", torch.from_numpy(order))
        self._near.add("signs", torch.from_numpy(signs))
        power = int(math.log2(dimensions))
        self._near.add("runs", hadamard(int(math.log2(slices))))
        self._near.add("first", hadamard(power // 2))
        self._near.add("second", hadamard(power - power // 2))

    def __call__(self, blocks: Float[Tensor, "batch entry"]) -> Float[Tensor, "batch dimension"]:
        """The folded and rotated rows, slice after slice; a CPU takes them one by one."""
        at_once = 1 if blocks.device.type == "cpu" else max(1, len(blocks))
        result = blocks.new_empty(len(blocks), self._buckets)
        pairs = zip(torch.split(blocks, at_once), torch.split(result, at_once), strict=True)
        for rows, into in pairs:
            self._rotate(self._folded(rows), into)
        return result

    def _folded(self, blocks: Float[Tensor, "row entry"]) -> Float[Tensor, "row bucket"]:
        order, signs = self._near("order", blocks), self._near("signs", blocks)
        missing = self.padded - blocks.shape[1]
        padded = nn.functional.pad(blocks, (0, missing)) if missing else blocks
        tiles = padded.view(len(blocks), -1, signs.shape[-1])
        buckets = blocks.new_zeros(len(blocks), *signs.shape[1:])
        for places, factors in zip(order, signs, strict=True):
            buckets.addcmul_(tiles.index_select(1, places), factors)
        return buckets.view(len(blocks), -1)

    def _rotate(
        self, buckets: Float[Tensor, "row bucket"], into: Float[Tensor, "row bucket"]
    ) -> None:
        runs, first, second = (self._near(name, buckets) for name in ("runs", "first", "second"))
        mixed = runs @ buckets.view(len(buckets), len(runs), -1)
        squares = mixed.view(-1, len(first), len(second))
        torch.matmul(first @ squares, second, out=into.view(squares.shape))


def hadamard(power: int) -> Float[Tensor, "n n"]:
    """The orthonormal symmetric matrix of ``2 ** power`` rows with entries of one size."""
    matrix = torch.ones(1, 1)
    step = torch.tensor([[1.0, 1.0], [1.0, -1.0]]) / math.sqrt(2)
    for _ in range(power):
        matrix = torch.kron(matrix, step)
    return matrix


def _signs(generator: np.random.Generator, count: int) -> Float[np.ndarray, "count"]:
    return generator.integers(0, 2, count).astype(np.float32) * 2 - 1
