"""What a run is made of besides its rows, steps and states."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from estimators.run.recorded import Group, Recipe
from service.checkpoints import ModelSource

SCHEMA = 1


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """Known before the first step is made.

    Attributes:
        recipe: how gradients become steps.
        source: where the model comes from, of an adapter its base model; None if it was made up.
        weights_sha256: of all weights before the first step, adapters included.
        adapter: configuration of a PEFT adapter, if one is trained.
        differentiated: parameters that have gradients, in the model's order; all are clipped.
        foreach: as the optimizer has it.
        fused: as the optimizer has it.
        padding: token id of padding.
        attention_mask: whether the model was given one.
        arguments: what else the model was given.
        attention: which implementation of attention it has; None where it has no choice.
        dtype: of most parameters.
        autocast: dtype of automatic mixed precision, if any.
        device: where it was trained.
        threads: of the CPU.
        matmul_precision: of float32 matrix products.
        every: a state is kept each so many steps.
        total: how many steps were planned, if that was known.
        seeds: those that are known, by name.
        versions: of libraries, by name.
    """

    recipe: Recipe
    source: ModelSource | None
    weights_sha256: str
    adapter: Mapping[str, Any] | None
    differentiated: tuple[str, ...]
    foreach: bool | None
    fused: bool | None
    padding: int
    attention_mask: bool
    arguments: Mapping[str, Any]
    attention: str | None
    dtype: str
    autocast: str | None
    device: str
    threads: int
    matmul_precision: str
    every: int
    total: int | None
    seeds: Mapping[str, int] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)

    def document(self) -> dict[str, Any]:
        """As JSON has it."""
        return {"schema": SCHEMA, **asdict(self)}

    @classmethod
    def of(cls, document: Mapping[str, Any]) -> "RunFacts":
        """From what ``document`` gave."""
        fields = {name: value for name, value in document.items() if name != "schema"}
        recipe = fields.pop("recipe")
        source = fields.pop("source")
        return cls(
            recipe=Recipe(
                optimizer=recipe["optimizer"],
                groups=tuple(_group(group) for group in recipe["groups"]),
                clipping=recipe["clipping"],
            ),
            source=source and ModelSource(**source),
            differentiated=tuple(fields.pop("differentiated")),
            **fields,
        )


def _group(document: Mapping[str, Any]) -> Group:
    first, second = document["betas"]
    return Group(
        **{
            **document,
            "parameters": tuple(document["parameters"]),
            "betas": (first, second),
        }
    )


@dataclass(frozen=True, kw_only=True)
class Finished:
    """Written last: its presence means that the run is whole.

    Attributes:
        steps: how many were made.
        rows: how many different ones they read.
        run_sha256: of the file of facts.
        trained_sha256: of the trained parameters after the last step.
        steps_sha256: of the file of steps.
        rows_sha256: of the file of rows.
        states: SHA-256 of each state's file, by the number of steps made.
    """

    steps: int
    rows: int
    run_sha256: str
    trained_sha256: str
    steps_sha256: str
    rows_sha256: str
    states: Mapping[int, str]

    def document(self) -> dict[str, Any]:
        """As JSON has it."""
        return {**asdict(self), "states": {str(step): sha for step, sha in self.states.items()}}

    @classmethod
    def of(cls, document: Mapping[str, Any]) -> "Finished":
        """From what ``document`` gave."""
        states = {int(step): sha for step, sha in document["states"].items()}
        return cls(**{**document, "states": states})
