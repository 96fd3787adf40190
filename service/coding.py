"""What build and search agree on: which index holds a build's sketches, where its factors lie."""

from collections.abc import Sequence

from estimators.sketching.sketch import Sketch
from estimators.sketching.slices import SketchSlices
from index.codes.lowrank import Block, allocate
from index.codes.signs import sign_bytes
from index.codes.vectors import LOW_RANK, VectorIndex, make_index

FACTORS_NAME = "factors/estimator.safetensors"
"""Of the factors, in the folder of an index."""

OPERATORS_NAME = "operators"
"""Folder of what estimators fitted for an index when they were asked, beside its manifest."""


def code_blocks(codes: str, sketch: Sketch, kept: Sequence[int] | None = None) -> tuple[Block, ...]:
    """The blocks that low-rank codes consist of; none for other kinds.

    Together they take as many bytes as one bit for each of the sketch's dimensions.

    Args:
        codes: kind of code.
        sketch: of the rows.
        kept: components of each block, as a manifest has them; None shares the bytes out.

    Raises:
        ValueError: not even one component fits.
    """
    if codes != LOW_RANK:
        return ()
    if kept is None:
        return allocate(sketch.shapes, sketch.energies, sketch.plan.dimensions // 8)
    return tuple(
        Block(rows=rows, columns=columns, components=count)
        for (rows, columns), count in zip(sketch.shapes, kept, strict=True)
    )


def later_looks(slices: int) -> list[int]:
    """How many slices the estimates after each later look are made of: 4, 16, ... and all.

    Each look halves the errors of the one before.
    """
    looks: list[int] = []
    while 4 ** (len(looks) + 1) < slices:
        looks.append(4 ** (len(looks) + 1))
    return [*looks, slices] if slices > 1 else []


def coded_index(codes: str, sketch: Sketch) -> VectorIndex:
    """An empty index of a kind of code for rows of a sketch.

    Raises:
        ValueError: no such kind of code, or it cannot be had in this size.
    """
    return make_index(codes, sketch.plan.dimensions, blocks=code_blocks(codes, sketch))


def further_bytes(sketches: SketchSlices) -> int:
    """Bytes a row of all slices but the first."""
    return (len(sketches) - 1) * sign_bytes(sketches.first.plan.dimensions)
