"""Which layers of a model are wanted, as fitted factors and manifests remember it."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self


@dataclass(frozen=True, kw_only=True)
class LayerSelection:
    """Which layers are wanted, and how wide a block of curvature may be.

    It is stored with fitted factors and in the manifest: whoever uses the factors must find the
    same layers.

    Attributes:
        patterns: shell patterns over dotted module names; a layer is wanted if any matches.
        widest: a side of a weight matrix with more features is split into equal blocks; None never
            splits.
        embeddings: whether the token embeddings and the output head are wanted too, which no
            pattern matches; they are never split.
        norms: whether the vectors of norms are wanted, too, among those that a pattern matches.

    Raises:
        ValueError: no pattern, or ``widest`` below 1.
    """

    patterns: tuple[str, ...] = ("*",)
    widest: int | None = None
    embeddings: bool = False
    norms: bool = False

    def __post_init__(self) -> None:
        if not self.patterns:
            raise ValueError("No layer pattern was given; '*' takes every linear layer.")
        if self.widest is not None and self.widest < 1:
            raise ValueError(
                f"The widest side of a block must be 1 or more, got {self.widest}; give the number "
                f"of features, e.g. 4096."
            )

    def to_facts(self) -> dict[str, str]:
        """The selection as header entries of a factors file."""
        facts = {"layer_patterns": json.dumps(self.patterns)}
        if self.widest is not None:
            facts["widest"] = str(self.widest)
        if self.embeddings:
            facts["embeddings"] = "true"
        if self.norms:
            facts["norms"] = "true"
        return facts

    @classmethod
    def from_facts(cls, facts: Mapping[str, str]) -> Self:
        """The selection that ``to_facts`` wrote; other entries are ignored."""
        widest = facts.get("widest")
        return cls(
            patterns=tuple(json.loads(facts["layer_patterns"])),
            widest=None if widest is None else int(widest),
            embeddings="embeddings" in facts,
            norms="norms" in facts,
        )


EVERY_LAYER = LayerSelection()
"""Every linear layer, unsplit."""
