"""What this program is made of: library versions and the revision of its repository."""

import importlib.metadata
import platform
import subprocess
from pathlib import Path

NAMES = ("etymon", "torch", "transformers", "numpy", "faiss-cpu", "faiss-gpu")


def revision(folder: Path = Path(__file__).parent) -> str:
    """The revision of a folder's repository, with -dirty if files differ; else "unknown"."""
    arguments = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        done = subprocess.run(arguments, cwd=folder, capture_output=True, text=True, check=False)
    except OSError:  # no git on this machine
        return "unknown"
    return done.stdout.strip() or "unknown"


def numerical_versions() -> dict[str, str]:
    """Versions of the libraries whose arithmetic an index is made of."""
    wanted = ("torch", "transformers", "numpy", "faiss-cpu", "faiss-gpu")
    return {name: version for name, version in versions().items() if name in wanted}


def versions() -> dict[str, str]:
    """Versions by name, of those that are installed."""
    found = {"python": platform.python_version(), "revision": revision()}
    for name in NAMES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
