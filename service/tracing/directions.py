"""The run's direction for each question: what gradients of any rows meet, in nats."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors.torch import load_file, save
from torch import Tensor, nn

from estimators.model.progress import Progress, no_progress
from estimators.run.adjoint import Adjoint
from estimators.run.direction import (
    DirectionPlan,
    Directions,
    StepBack,
    direction_back,
    reading_weights,
)
from estimators.run.recorded import State
from estimators.run.updates import SMALLEST
from index.files import exclusive, read_sealed, sha256_of, write_sealed, write_whole
from service.checkpoints import ModelSource
from service.run.errors import RunMismatch
from service.run.folder import RecordedRun
from service.tracing.carried import Timed, carry
from service.tracing.price import predict_trace, segments_of
from service.tracing.walk import Parameters, Question, Walk, check_same, trace_facts

MANIFEST = "directions.json"
PARTIAL = "directions-partial.safetensors"
WEIGHTS = "readings.safetensors"


@dataclass(frozen=True, kw_only=True)
class RunDirections:
    """Directions of traced questions, read when they are asked for.

    Attributes:
        folder: where they are.
        values: f of each question after the run, in nats.
        norms: of each question's adjoint before each step, then after the last: [question][step].
        files: of each question its file and that one's SHA-256.
        weights: how much each row of the run was read in each segment, 1 for once.
        checked: files whose hashes were compared; they are large.
    """

    folder: Path
    values: list[float]
    norms: list[list[float]]
    files: Sequence[tuple[str, str]]
    weights: Float[Tensor, "segment row"]
    checked: set[str] = field(default_factory=set, compare=False)

    def segments(self, question: int) -> list[dict[str, Tensor]]:
        """A question's direction in each segment, by name of parameter.

        Its inner product with the gradient of a row's summed loss is the influence, in nats of f,
        of that row, were it read once in the segment.

        Raises:
            RunMismatch: the file was changed.
        """
        name, sha256 = self.files[question]
        path = self.folder / name
        if name not in self.checked:
            if not path.is_file() or sha256_of(path) != sha256:
                raise RunMismatch(f"{path} is missing or was changed; trace the run again.")
            self.checked.add(name)
        found: list[dict[str, Tensor]] = [{} for _ in range(len(self.weights))]
        for key, value in load_file(path).items():
            segment, parameter = key.split("|", 1)
            found[int(segment)][parameter] = value
        return found

    def whole(self, question: int) -> dict[str, Tensor]:
        """The one direction of the whole run, for a row that is read once in each segment."""
        parts = self.segments(question)
        return {name: torch.stack([part[name] for part in parts]).sum(0) for name in parts[0]}


def trace_directions(
    run: RecordedRun,
    model: nn.Module,
    questions: Sequence[Question],
    out: Path,
    about: Mapping[str, Any],
    plan: DirectionPlan | None = None,
    progress: Progress = no_progress,
    interval: float = 60.0,
    *,
    source: ModelSource | None = None,
) -> RunDirections:
    """Walk questions backward through a run for their directions alone, into the folder ``out``.

    No row is scored. An interrupted walk goes on where it was, and ends with the same bits.

    Args:
        run: recorded, in float32 or float64 without autocast.
        model: the run's, in any state; it is left as it was.
        questions: what is measured.
        out: folder to write.
        about: further facts for the manifest, e.g. the questions in words.
        plan: None takes the defaults.
        progress: shows the steps.
        interval: least number of seconds between two records of how far it is.
        source: where the model before training was loaded from; None takes what the run says.

    Raises:
        RunMismatch: the folder holds directions of another run or of other questions, or the run's
            precision has no faithful derivative.
    """
    plan = plan or DirectionPlan()
    facts = {
        **trace_facts(run, questions, about),
        "plan": asdict(plan),
        "smallest_moment": SMALLEST,
    }
    out.mkdir(parents=True, exist_ok=True)
    with exclusive(out):
        if (out / MANIFEST).is_file():
            check_same(out / MANIFEST, facts)
            return read_directions(out)
        walk = Walk(run, model, questions, out / PARTIAL, facts, interval)
        visit = _Met(run, model, plan, len(questions))
        timed = Timed(progress)
        walk.go(visit, timed)
        files = [_write(out, number, parts) for number, parts in enumerate(visit.sums.found)]
        weights = reading_weights(len(run.rows), run.steps, visit.segments)
        write_whole(out / WEIGHTS, bytes(save({"weights": weights})))
        manifest = {
            **facts,
            **carry(run, model, out, source),
            "seconds": timed.seconds(len(run.steps)),
            "price": asdict(predict_trace(run, model, questions[:1], plan)),
            "values": walk.values,
            "norms": [norms[::-1] for norms in walk.norms],
            "files": files,
            "weights_sha256": sha256_of(out / WEIGHTS),
        }
        write_sealed(out / MANIFEST, manifest)
        (out / PARTIAL).unlink(missing_ok=True)
        return read_directions(out)


def read_directions(folder: Path) -> RunDirections:
    """Read what ``trace_directions`` wrote.

    Raises:
        RunMismatch: there is none, or it was changed.
    """
    if not (folder / MANIFEST).is_file():
        raise RunMismatch(
            f"There are no directions in {folder} ({MANIFEST}); run etymon trace with --direction."
        )
    manifest = read_sealed(folder / MANIFEST, "trace the run again")
    if sha256_of(folder / WEIGHTS) != manifest["weights_sha256"]:
        raise RunMismatch(f"{folder / WEIGHTS} was changed; trace the run again.")
    return RunDirections(
        folder=folder,
        values=manifest["values"],
        norms=manifest["norms"],
        files=[(name, sha256) for name, sha256 in manifest["files"]],
        weights=load_file(folder / WEIGHTS)["weights"],
    )


def _write(out: Path, number: int, parts: Sequence[Mapping[str, Tensor]]) -> tuple[str, str]:
    name = f"direction-{number:04}.safetensors"
    tensors = {
        f"{segment}|{parameter}": value.detach().cpu().contiguous()
        for segment, part in enumerate(parts)
        for parameter, value in part.items()
    }
    write_whole(out / name, bytes(save(tensors)))
    return name, sha256_of(out / name)


class _Met:
    """Sums of what the rows of each segment meet."""

    def __init__(
        self, run: RecordedRun, model: nn.Module, plan: DirectionPlan, questions: int
    ) -> None:
        self._run, self._model, self._plan = run, model, plan
        self.segments = segments_of(run, plan)
        self.sums = Directions(run.steps, self.segments, questions)

    def back(
        self,
        parameters: Parameters,
        number: int,
        before: State,
        after: State,
        adjoints: Sequence[Adjoint],
    ) -> list[Adjoint]:
        """See ``Visit``."""
        run = self._run
        how = StepBack(
            model=self._model,
            parameters=parameters,
            recipe=run.recipe,
            rows=run.rows,
            curvature=self._plan.curvature,
            seed=self._plan.seed,
        )
        found, met = direction_back(
            how, run.steps[number], before, after, [one.parameters for one in adjoints]
        )
        self.sums.add(number, met)
        return [Adjoint(parameters=one, moments={}) for one in found]

    def tensors(self) -> dict[str, Tensor]:
        """See ``Visit``."""
        return {
            f"{question}|{segment}|{name}": value
            for question, parts in enumerate(self.sums.found)
            for segment, part in enumerate(parts)
            for name, value in part.items()
        }

    def take_up(self, tensors: Mapping[str, Tensor]) -> None:
        """See ``Visit``."""
        for key, value in tensors.items():
            question, segment, name = key.split("|", 2)
            self.sums.found[int(question)][int(segment)][name] = value
