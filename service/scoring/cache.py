"""What estimators fitted for an index when they were asked, kept beside it."""

import logging
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from index.errors import DiskFull
from index.files import write_whole

log = logging.getLogger(__name__)


class FileCache:
    """One safetensors file a key; kept in memory where the folder cannot be written to.

    Args:
        folder: made when the first file is kept.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._memory: dict[str, Mapping[str, Tensor]] = {}

    def load(self, key: str) -> Mapping[str, Tensor] | None:
        """What was kept under ``key``; a file that cannot be read is as good as none."""
        if key in self._memory:
            return self._memory[key]
        path = self._path(key)
        if not path.is_file():
            return None
        try:
            tensors: dict[str, Tensor] = load(path.read_bytes())
        except (OSError, SafetensorError) as error:
            log.warning("%s cannot be read and is made anew: %s", path, error)
            return None
        return tensors

    def keep(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        """Keep ``tensors`` under ``key``."""
        contents = {name: tensor.contiguous().cpu() for name, tensor in tensors.items()}
        try:
            self._folder.mkdir(exist_ok=True)
            write_whole(self._path(key), save(contents))
        except (OSError, DiskFull) as error:  # a read-only index is served all the same
            log.warning("%s is kept in memory only: %s", key, error)
            self._memory[key] = contents

    def _path(self, key: str) -> Path:
        if not key or key.strip("abcdefghijklmnopqrstuvwxyz0123456789.-") or key.startswith("."):
            raise ValueError(f"'{key}' is no key of a cache; use a-z, digits, dots and hyphens.")
        return self._folder / f"{key}.safetensors"
