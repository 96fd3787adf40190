"""Fitting an estimator: passes over examples with labels drawn from the model."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Literal, Protocol

import numpy as np
from torch import Tensor, nn

from estimators.contracts import PASSES, Accumulator, Factors, Sums
from estimators.layers.rows import NOWHERE
from estimators.model.capture import Places, TermsVisitor, Visitor, visit_gradients
from estimators.model.layers import LinearLayer, VocabularyLayer
from estimators.model.memory import BackOff
from estimators.model.progress import Progress, no_progress
from estimators.model.terms import VocabularyTerms
from estimators.model.tokens import Sequence1D, collate, plan_batches
from estimators.registry import factors_class

Labels = Literal["sampled", "empirical"]

SETTLE_TOKENS = 16384
"""Padded tokens whose sums stay in float32 before they are added in float64: 16 batches of 1,024,
so that the addition of large matrices costs little beside their products."""


class Checkpoint(Protocol):
    """Where an interrupted fit left its sums."""

    def load(self, name: str) -> tuple[int, Mapping[str, Tensor]] | None:
        """Batches done and tensors of the sums, if the pass ``name`` was interrupted."""
        ...

    def offer(self, name: str, done: int, sums: Accumulator) -> None:
        """A moment at which ``sums`` are settled after ``done`` batches and may be kept."""
        ...


class NoCheckpoint:
    """Keeps nothing."""

    def load(self, name: str) -> None:
        """Nothing was kept."""

    def offer(self, name: str, done: int, sums: Accumulator) -> None:
        """Keep nothing."""


def fit_estimator(
    name: str,
    model: nn.Module,
    layers: Sequence[LinearLayer],
    sequences: Sequence[Sequence1D],
    *,
    token_budget: int = 1024,
    seed: int = 0,
    labels: Labels = "sampled",
    progress: Progress = no_progress,
    checkpoint: Checkpoint | None = None,
) -> Factors:
    """Fit the factors ``name`` on ``sequences``.

    Sequences that predict nothing (fewer than two tokens) are left out of the mean.

    Args:
        name: a name of the registry.
        model: frozen, in evaluation mode.
        layers: attributed layers.
        sequences: examples; their ``row`` seeds their sampled labels.
        token_budget: padded tokens in a batch; changes memory and speed, not the result beyond
            float32 rounding.
        seed: of the sampled labels.
        labels: "sampled" for the true Fisher, "empirical" for the examples' own tokens.
        progress: shows each pass.
        checkpoint: of an earlier, interrupted call with the same arguments; the result is the same
            to the bit as without the interruption.

    Raises:
        ValueError: no sequence predicts anything, or the model gives non-finite values.
        OutOfMemory: not even one sequence fits into memory.
    """
    useful = [sequence for sequence in sequences if sequence.targets > 0]
    if not useful:
        raise ValueError(
            f"None of the {len(sequences)} fitting examples has two tokens or more; "
            f"check the text column."
        )
    lengths = [sequence.padded for sequence in useful]
    batches = _batches_of_a_kind(useful, lengths, token_budget)
    kept = checkpoint or NoCheckpoint()

    def run_pass(
        name: str, kind: Callable[[Mapping[str, Tensor]], Sums], begin: Callable[[], Sums]
    ) -> Sums:
        found = kept.load(name)
        done, sums = (0, begin()) if found is None else (found[0], kind(found[1]))
        kept.offer(name, done, sums)
        label_seed = None if labels == "empirical" else len(PASSES) * seed + PASSES.index(name)
        adding = _Adding(model, layers, useful, label_seed, sums)
        backing = BackOff(lengths)
        unsettled = 0
        for number, positions in enumerate(progress(name, batches[done:]), start=done + 1):
            backing.run(positions, adding.batch())
            unsettled += len(positions) * max(lengths[p] for p in positions)
            if unsettled >= SETTLE_TOKENS or number == len(batches):
                sums.settle()
                unsettled = 0
                kept.offer(name, number, sums)
        return sums

    return factors_class(name).fit(layers, run_pass)


def _batches_of_a_kind(
    sequences: Sequence[Sequence1D], lengths: Sequence[int], token_budget: int
) -> list[list[int]]:
    """Texts and pairs apart: of texts labels are drawn, of pairs which one won."""
    found = []
    for paired in (False, True):
        places = [i for i, s in enumerate(sequences) if (s.rejected is not None) is paired]
        plan = plan_batches([lengths[place] for place in places], token_budget)
        found += [[places[i] for i in batch] for batch in plan]
    return found


def as_fitted(sequence: Sequence1D, label_seed: int | None) -> Sequence1D:
    """What of an example makes curvature: its weight does not.

    Of a pair it is drawn which one the model prefers, as labels of tokens are: the moments of such
    gradients are the Fisher matrix of preferences.

    Args:
        sequence: a training example.
        label_seed: None takes the preference that there was.
    """
    rejected = sequence.rejected
    if rejected is not None and label_seed is not None:
        generator = np.random.Generator(np.random.Philox(key=[label_seed, sequence.row]))
        chance = 1 / (1 + math.exp(rejected.margin))
        rejected = replace(rejected, won=bool(generator.random() < chance))
    return replace(sequence, weight=1.0, rejected=rejected)


class _Adding:
    """Adds batches to the sums of one pass."""

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[LinearLayer],
        sequences: Sequence[Sequence1D],
        label_seed: int | None,
        sums: Accumulator,
    ) -> None:
        self._model = model
        self._layers = layers
        self._sequences = sequences
        self._label_seed = label_seed
        self._sums = sums
        self._device = next(model.parameters()).device

    def batch(self) -> Callable[[Sequence[int]], None]:
        """Work on the parts of one batch, each of which a layer counts once.

        A part that ran out of memory in the middle of its backward pass is done again in halves:
        the layers that it reached have counted all of it and leave the halves out.
        """
        counted: dict[str, set[int]] = {layer.name: set() for layer in self._layers}

        def work(part: Sequence[int]) -> None:
            batch = collate([as_fitted(self._sequences[p], self._label_seed) for p in part])
            placed = batch.to(self._device)
            places: Places = {}
            visit, visit_terms = self._visitors(
                part, placed.position_mask.view(batch.shape), places, counted
            )
            visit_gradients(
                self._model,
                self._layers,
                placed,
                visit,
                None if batch.group > 1 else self._label_seed,
                visit_terms=visit_terms,
                places=places,
            )

        return work

    def _visitors(
        self,
        part: Sequence[int],
        mask: Tensor,
        places: Places,
        counted: dict[str, set[int]],
    ) -> tuple[Visitor, TermsVisitor]:
        served = mask.flatten().nonzero().squeeze(1)

        def visit(layer: LinearLayer, a: Tensor, d: Tensor) -> None:
            if not counted[layer.name].issuperset(part):
                own = places.get(layer.name)
                rows = served if own is None else _served_rows(own, mask)
                self._sums.add(layer, a, d, rows)
                counted[layer.name].update(part)

        def visit_terms(layer: VocabularyLayer, terms: VocabularyTerms) -> None:
            if not counted[layer.name].issuperset(part):
                self._sums.add_terms(layer, terms)
                counted[layer.name].update(part)

        return visit, visit_terms


def _served_rows(places: Tensor, mask: Tensor) -> Tensor:
    """Which rows, flattened, are of tokens that serve a counted one."""
    counts = mask.gather(1, places.clamp_min(0)) & (places != NOWHERE)
    return counts.flatten().nonzero().squeeze(1)
