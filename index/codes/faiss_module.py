"""Loading FAISS, of which two distributions may be in each other's way."""

import importlib.metadata
import os
from typing import Any


def usable_processors() -> int:
    """How many processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def import_faiss() -> Any:
    """The ``faiss`` module, after checking that exactly one distribution provides it.

    Raises:
        RuntimeError: none does, or both faiss-cpu and faiss-gpu are installed (they overwrite each
            other's files).
    """
    names = sorted(
        {
            name
            for name in ("faiss-cpu", "faiss-gpu", "faiss-gpu-cu12", "faiss-gpu-cu11")
            if _installed(name)
        }
    )
    if len(names) > 1:
        raise RuntimeError(
            f"{' and '.join(names)} are both installed and overwrite each other; "
            f"uninstall both and install one: pip install -e '.[cpu]' or '.[gpu]'."
        )
    try:
        import faiss
    except ImportError as error:
        raise RuntimeError(
            "FAISS is not installed; install the extra for your machine: pip install "
            "-e '.[cpu]' or '.[gpu]'."
        ) from error
    return faiss


def _installed(name: str) -> bool:
    try:
        importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
