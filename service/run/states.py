"""States of a run as safetensors files."""

import os
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from estimators.run.recorded import State
from index.files import sha256_of
from service.run.errors import RunCorrupt, RunFault

PARAMETERS = "parameters"
MOMENTS = "moments"


def write_state(path: Path, state: State) -> str:
    """Write a state, whole or not at all.

    Returns:
        The file's SHA-256.

    Raises:
        RunFault: it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    tensors = {name: value.detach().cpu().contiguous() for name, value in _named(state)}
    try:
        save_file(tensors, temporary, metadata={"step": str(state.step)})
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        sha256 = sha256_of(temporary)
        temporary.replace(path)
    except (OSError, SafetensorError, RuntimeError) as error:
        temporary.unlink(missing_ok=True)
        raise RunFault(f"Cannot write the state {path}: {error}.") from error
    return sha256


def read_state(path: Path, sha256: str) -> State:
    """Read what ``write_state`` wrote.

    Raises:
        RunCorrupt: it is missing or another file.
    """
    if not path.is_file():
        raise RunCorrupt(f"{path} is missing, but the run has this state; copy it again.")
    if (found := sha256_of(path)) != sha256:
        raise RunCorrupt(
            f"{path} was changed after it was written: its SHA-256 is {found}, the run has "
            f"{sha256}; copy it again, or record the run again."
        )
    parameters: dict[str, Tensor] = {}
    moments: dict[str, dict[str, Tensor]] = {}
    with safe_open(path, framework="pt") as file:
        step = int(file.metadata()["step"])
        for key in file.keys():  # noqa: SIM118 - no mapping
            kind, _, name = key.partition("/")
            if kind == PARAMETERS:
                parameters[name] = file.get_tensor(key)
            else:
                moment, _, parameter = name.partition("/")
                moments.setdefault(moment, {})[parameter] = file.get_tensor(key)
    return State(step=step, parameters=parameters, moments=moments)


def _named(state: State) -> Iterator[tuple[str, Tensor]]:
    for name, value in state.parameters.items():
        yield f"{PARAMETERS}/{name}", value
    for kind, moments in state.moments.items():
        for name, value in moments.items():
            yield f"{MOMENTS}/{kind}/{name}", value
