"""Tensors of a safetensors file, mapped into memory rather than read."""

import json
import mmap
import struct
from pathlib import Path

import numpy as np

from index.errors import IndexCorrupt

DTYPES = {"U8": "u1", "I32": "<i4", "I64": "<i8", "F16": "<f2", "F32": "<f4", "F64": "<f8"}
"""The format's names of the types that an index stores, and NumPy's."""


def map_tensors(path: Path) -> dict[str, np.ndarray]:
    """The tensors of a safetensors file as read-only views of its pages.

    Nothing is copied: pages are read when they are first looked at, are shared by all processes
    that map the file, and may be dropped again when memory is short. The file must not be cut
    short while it is mapped; replacing it by another (as ``index.files`` does) is safe.

    The layout (https://huggingface.co/docs/safetensors): eight bytes, the length of a JSON header;
    the header, with the type, shape and place of each tensor; the tensors.

    Raises:
        IndexCorrupt: the file has another layout.
        OSError: it cannot be opened.
    """
    with path.open("rb") as file:
        try:
            content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except ValueError as error:  # an empty file
            raise _corrupt(path, error) from error
    try:
        (length,) = struct.unpack_from("<Q", content)
        if length > len(content) - 8:
            raise ValueError(f"a header of {length} bytes goes beyond the file's end")
        header = json.loads(content[8 : 8 + length])
        header.pop("__metadata__", None)
        return {
            name: _view(content, 8 + length, **description) for name, description in header.items()
        }
    except (ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise _corrupt(path, error) from error


def _view(
    content: mmap.mmap, start: int, *, dtype: str, shape: list[int], data_offsets: list[int]
) -> np.ndarray:
    first, last = data_offsets
    if not 0 <= first <= last <= len(content) - start:
        raise ValueError(f"a tensor should be at bytes {first} to {last}, beyond the file's end")
    array = np.frombuffer(content, dtype=np.uint8, count=last - first, offset=start + first)
    return array.view(DTYPES[dtype]).reshape(shape)


def _corrupt(path: Path, error: Exception) -> IndexCorrupt:
    return IndexCorrupt(
        f"{path} is not a safetensors file ({error!r}). Run the build again: it replaces this "
        f"shard and keeps the others."
    )
