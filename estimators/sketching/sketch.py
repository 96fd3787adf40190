"""Random linear sketches of whitened gradients: two-sided first stage, fold, Hadamard rotation.

A sketch P is a random linear map, drawn from a seed that neither data nor queries can depend on,
with ``E<P psi, P phi> = <psi, phi>``. It is applied in two stages:

1. Each layer's whitened gradient is multiplied on both sides by random orthonormal frames (Haar,
   scaled by ``sqrt(width / rank)``) down to ``rank x rank``. Whitening, eigenbasis and frame fold
   into one matrix a side, so that no gradient of the layer's own size is formed. A side narrower
   than ``rank`` is kept whole, without noise. A vocabulary is hashed into more buckets instead:
   see ``estimators.sketching.hashing``.
2. The entries of all layers get random signs, are folded into ``dimensions`` buckets of equal size
   by a random permutation (CountSketch with balanced buckets) and rotated by a Hadamard matrix, so
   that each coordinate is nearly Gaussian, as one-bit codes need.
"""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from estimators.model.capture import visit_gradients
from estimators.model.gradients import Gradients, apply_layer, widen
from estimators.model.layers import LinearLayer, VocabularyLayer
from estimators.model.terms import VocabularyTerms
from estimators.model.tokens import TokenBatch
from estimators.sketching import hashing
from estimators.sketching.folding import Fold, TiledFold
from estimators.sketching.hashing import VocabularyFrame
from estimators.sketching.near import Near
from estimators.sketching.whitening import LayerWhitening


@dataclass(frozen=True, kw_only=True)
class SketchPlan:
    """How a sketch is drawn.

    Attributes:
        seed: of all its randomness.
        dimensions: coordinates of the sketch, a power of two.
        rank: width of each side of a layer's block after the first stage.
        folded: whether there is a second stage; without it the sketch consists of the blocks, each
            rotated on both sides, and ``dimensions`` has no effect.
        slices: parts of ``dimensions`` coordinates that the second stage gives, a power of two.
    """

    seed: int
    dimensions: int = 16384
    rank: int = 64
    folded: bool = True
    slices: int = 1

    def __post_init__(self) -> None:
        if self.dimensions < 8 or self.dimensions & (self.dimensions - 1):
            raise ValueError(
                f"Sketch dimensions must be a power of two, 8 or more, got {self.dimensions}; "
                f"16384 is the usual choice."
            )
        if self.rank < 1:
            raise ValueError(f"The first stage's rank must be at least 1, got {self.rank}.")

    def further(self, number: int, slices: int, rank: int) -> "SketchPlan":
        """The plan of the ``number``-th independent sketch besides this one, of so many slices."""
        digest = hashlib.sha256(f"{self.seed} further {number}".encode()).digest()
        return replace(self, seed=int.from_bytes(digest[:8]) >> 2, slices=slices, rank=rank)


class Sketch:
    """The sketch of a set of layers, for training gradients and for preconditioned queries.

    Args:
        layers: attributed layers; their order fixes which random numbers each one gets.
        whitening: of each layer, by name.
        plan: seed and sizes.
    """

    def __init__(
        self,
        layers: Sequence[LinearLayer],
        whitening: Mapping[str, LayerWhitening],
        plan: SketchPlan,
    ) -> None:
        self.plan = plan
        self._layers = tuple(layers)
        self._whitening = dict(whitening)
        self._near = Near()
        self._frames: dict[str, VocabularyFrame] = {}
        self._slices: dict[str, slice] = {}
        self._shapes: list[tuple[int, int]] = []
        start = 0
        for number, layer in enumerate(layers):
            start = self._add_layer(number, layer, start)
        self._entries = start
        self._kept = torch.empty(0, 0)
        self._fold = _fold(start, plan) if plan.folded else None

    def _add_layer(self, number: int, layer: LinearLayer, start: int) -> int:
        white = self._whitening[layer.name]
        if isinstance(layer, VocabularyLayer):
            return self._add_vocabulary(number, layer, start)
        frames = [
            _orthonormal_frame(width, self.plan, 2 * number + side)
            for side, width in enumerate((layer.in_features, layer.out_features))
        ]
        maps = {
            "train left": _fold_frame(frames[0], white.left_basis, white.left_scale),
            "train right": _fold_frame(frames[1], white.right_basis, white.right_scale),
            "query left": _fold_frame(frames[0], None, 1 / white.left_scale),
            "query right": _fold_frame(frames[1], None, 1 / white.right_scale),
        }
        shape = len(maps["train left"]), len(maps["train right"])
        return self._add_block(layer, maps | {"left basis": white.left_basis}, shape, start)

    def _add_vocabulary(self, number: int, layer: VocabularyLayer, start: int) -> int:
        white = self._whitening[layer.name]
        count = self.plan.rank * (hashing.BUCKETS_A_RANK if self.plan.folded else 1)
        count = min(count, layer.in_features)
        rotation = None
        if not self.plan.folded:
            rotation = _orthonormal_frame(count, self.plan, 2 * number)
        generator = np.random.Generator(np.random.Philox(key=[self.plan.seed, 2**33 + number]))
        self._frames[layer.name] = VocabularyFrame(white.left_scale, count, generator, rotation)
        frame = _orthonormal_frame(layer.out_features, self.plan, 2 * number + 1)
        maps = {
            "train right": _fold_frame(frame, white.right_basis, white.right_scale),
            "query right": _fold_frame(frame, None, 1 / white.right_scale),
        }
        return self._add_block(layer, maps, (count, len(maps["train right"])), start)

    def _add_block(
        self,
        layer: LinearLayer,
        maps: Mapping[str, Tensor | None],
        shape: tuple[int, int],
        start: int,
    ) -> int:
        """Keep what a layer's blocks are made with, and the entries that they take."""
        bases = {"right basis": self._whitening[layer.name].right_basis}
        for what, matrix in {**maps, **bases}.items():
            if matrix is not None:
                self._near.add(f"{layer.name} {what}", matrix)
        self._shapes.append(shape)
        end = start + math.prod(shape)
        self._slices[layer.name] = slice(start, end)
        return end

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """Rows and columns of each layer's block, in order."""
        return list(self._shapes)

    @property
    def energies(self) -> list[float]:
        """Expected squared norms of the layers' blocks, one unit for all."""
        return [self._whitening[layer.name].energy for layer in self._layers]

    @property
    def width(self) -> int:
        """Coordinates of a sketch."""
        return self.plan.dimensions * self.plan.slices if self.plan.folded else self._entries

    @property
    def entries(self) -> int:
        """Entries of all layers' blocks after the first stage."""
        return self._entries

    def predicted_noise(
        self, distortion: float = math.pi / 2 - 1, slices: int | None = None
    ) -> float:
        """Standard deviation of a code's estimate of a cosine, by the second stage alone.

        For vectors whose energy is spread over many entries. Two entries share a bucket of the
        balanced fold with probability ``(c - 1) / (P - 1)``, P being the padded entries and c the
        entries a bucket; coding n coordinates after a random rotation adds ``distortion / n``. With
        independent buckets the first would be ``1 / n``, and the sum for one bit the familiar
        ``pi / (2 n)``. The mean over m of S slices does not see apart entries whose buckets differ
        only in which of the S runs of buckets they lie in: of the squared mean over m rows of the
        product of two columns of a Hadamard matrix, ``(S / m - 1) / (S - 1)`` is left on average.
        0 where there is no second stage.

        Args:
            distortion: squared length of the code's error at right angles to a unit vector; that of
                one bit a dimension by default.
            slices: those that the estimate is made of, the first ones; all by default.
        """
        if self._fold is None:
            return 0.0
        padded, every = self._fold.padded, self.plan.slices
        used = slices or every
        bucket = padded // self.width
        collision = (bucket - 1 + bucket * (every / used - 1)) / (padded - 1)
        return math.sqrt(collision + distortion / (used * self.plan.dimensions))

    def training(
        self, model: nn.Module, batch: TokenBatch
    ) -> tuple[Float[Tensor, "batch dimension"], Float[Tensor, "batch"]]:
        """Sketches and whitened norms of the loss gradients of a batch's sequences.

        One forward and one backward pass. The norm is that of the first stage's blocks: exact where
        no side is wider than the rank, otherwise an estimate with a relative error of about
        ``1 / rank`` over the square root of the number of layers.

        Returns:
            The sketch P phi of each sequence and its norm ``|phi|``.
        """
        return training_sketches([self], model, batch)[0]

    def _fill(self, blocks: Tensor, layer: LinearLayer, a: Tensor, d: Tensor) -> None:
        left, right = (self._near(f"{layer.name} train {s}", a) for s in ("left", "right"))
        inputs = apply_layer(left.T, a, layer.has_bias).transpose(1, 2)
        place, gradients = blocks[:, self._slices[layer.name]], d @ right.T
        if self.plan.slices > 1 and inputs.dtype == blocks.dtype:
            torch.bmm(inputs, gradients, out=place.view(len(place), len(left), len(right)))
        else:
            place.copy_(torch.bmm(inputs, gradients).flatten(1))

    def _fill_terms(self, blocks: Tensor, layer: VocabularyLayer, terms: VocabularyTerms) -> None:
        right = self._near(f"{layer.name} train right", terms.empty(0))
        block = self._frames[layer.name].training(terms, right)
        blocks[:, self._slices[layer.name]] = block.flatten(1).to(blocks)

    def query(
        self, directions: Gradients
    ) -> tuple[Float[Tensor, "query dimension"], Float[Tensor, "query"]]:
        """Sketches and norms of preconditioned query gradients ``-(H + lambda)^-1 grad f``.

        With the sign of the score: ``<P psi, P phi>`` estimates the score itself when
        ``directions`` holds ``-(H + lambda)^-1 grad f``.

        Args:
            directions: [query, in, out] a layer.

        Returns:
            The sketch P psi of each query and the exact norm ``|psi|``.
        """
        return query_sketches([self], directions)[0]

    def _fill_query(self, blocks: Tensor, name: str, rotated: Tensor) -> None:
        right = self._near(f"{name} query right", rotated)
        if (frame := self._frames.get(name)) is not None:
            block = frame.query(rotated @ right.T)
        else:
            block = self._near(f"{name} query left", rotated) @ rotated @ right.T
        blocks[:, self._slices[name]] = block.flatten(1).to(blocks)

    def _blocks(self, rows: int, device: torch.device) -> Float[Tensor, "row padded"]:
        """Zeros for the entries of so many rows.

        Many of a wide sketch, in memory that is used again: to have it anew for each batch takes
        longer than to fill it.
        """
        if self._fold is None or self.plan.slices == 1:
            return torch.zeros(rows, self._entries, device=device)
        if self._kept.device != device or len(self._kept) < rows:
            self._kept = torch.zeros(rows, self._fold.padded, device=device)
        return self._kept[:rows].zero_()

    def _folded(self, blocks: Float[Tensor, "row entry"]) -> Float[Tensor, "row dimension"]:
        return blocks if self._fold is None else self._fold(blocks)

    def _rotated(self, name: str, gradient: Tensor) -> Float[Tensor, "query in out"]:
        """``Q_A^T F Q_S``, in the eigenbasis."""
        white = self._whitening[name]
        if white.left_basis is not None:
            gradient = self._near(f"{name} left basis", gradient).T @ gradient
        if white.right_basis is not None:
            gradient = gradient @ self._near(f"{name} right basis", gradient)
        return gradient

    def _whitened_square(self, name: str, rotated: Tensor) -> Float[Tensor, "query"]:
        white = self._whitening[name]
        psi = rotated / white.left_scale.to(rotated)[:, None] / white.right_scale.to(rotated)
        if name in self._frames:  # too large for a copy in float64
            norms = [torch.linalg.vector_norm(one, dtype=torch.float64) for one in psi]
            return torch.stack(norms).square()
        return psi.double().square().sum((-2, -1))


def training_sketches(
    sketches: Sequence[Sketch], model: nn.Module, batch: TokenBatch
) -> list[tuple[Float[Tensor, "batch dimension"], Float[Tensor, "batch"]]]:
    """``Sketch.training`` of several sketches of the same layers, by one pass through the model."""
    rows, device = len(batch.rows), batch.input_ids.device
    blocks = [sketch._blocks(rows, device) for sketch in sketches]

    def visit(layer: LinearLayer, a: Tensor, d: Tensor) -> None:
        a, d = widen(a), widen(d)
        for sketch, block in zip(sketches, blocks, strict=True):
            sketch._fill(block, layer, a, d)

    def visit_terms(layer: VocabularyLayer, terms: VocabularyTerms) -> None:
        for sketch, block in zip(sketches, blocks, strict=True):
            sketch._fill_terms(block, layer, terms)

    layers = sketches[0]._layers
    visit_gradients(model, layers, batch, visit, append_one=False, visit_terms=visit_terms)
    return [
        (sketch._folded(block), torch.linalg.vector_norm(block, dim=1))
        for sketch, block in zip(sketches, blocks, strict=True)
    ]


def query_sketches(
    sketches: Sequence[Sketch], directions: Gradients
) -> list[tuple[Float[Tensor, "query dimension"], Float[Tensor, "query"]]]:
    """``Sketch.query`` of several sketches of the same layers, whose gradients are rotated once."""
    count, device = next((len(g), g.device) for g in directions.values())
    blocks = [sketch._blocks(count, device) for sketch in sketches]
    square = torch.zeros(count, dtype=torch.float64, device=device)
    for name, gradient in directions.items():
        rotated = sketches[0]._rotated(name, gradient)
        for sketch, block in zip(sketches, blocks, strict=True):
            sketch._fill_query(block, name, rotated)
        square += sketches[0]._whitened_square(name, rotated)
    norms = square.sqrt()
    return [(s._folded(block), norms) for s, block in zip(sketches, blocks, strict=True)]


def _fold(entries: int, plan: SketchPlan) -> Fold | TiledFold:
    if plan.slices == 1:
        return Fold(entries, plan.seed, plan.dimensions)
    return TiledFold(entries, plan.seed, plan.dimensions, plan.slices)


def _orthonormal_frame(
    width: int, plan: SketchPlan, stream: int
) -> Float[Tensor, "rank width"] | None:
    """Transposed Haar frame scaled by sqrt(width / rank).

    Where nothing is to be reduced, None; or a rotation, if the second stage does not rotate.
    """
    if width <= plan.rank and plan.folded and plan.slices == 1:
        return None
    rank = min(plan.rank, width)
    generator = np.random.Generator(np.random.Philox(key=[plan.seed, stream]))
    q, r = np.linalg.qr(generator.standard_normal((width, rank)))
    q *= np.sign(np.diag(r)) * math.sqrt(width / rank)
    return torch.from_numpy(q.T.copy())


def _fold_frame(frame: Tensor | None, basis: Tensor | None, scale: Tensor) -> Tensor:
    """``frame diag(scale) basis^T``; nothing as wide as a vocabulary on both sides is formed."""
    if frame is None:
        return torch.diag(scale) if basis is None else scale[:, None] * basis.T
    if basis is None:
        return (frame * scale.double()).to(scale.dtype)
    return (frame @ (scale[:, None] * basis.T).double()).to(scale.dtype)
