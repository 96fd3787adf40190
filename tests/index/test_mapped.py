"""Tensors of a file are mapped, not copied, and a file that is none of ours is refused."""

import json
import os
import struct

import numpy as np
import pytest
from safetensors.numpy import save, save_file

from index.errors import IndexCorrupt
from index.mapped import map_tensors


def test_all_tensors_are_as_they_were_saved(tmp_path):
    generator = np.random.default_rng(0)
    tensors = {
        "codes": generator.integers(0, 256, (7, 13), dtype=np.uint8),
        "norms": generator.standard_normal(7).astype(np.float32),
        "half": generator.standard_normal((2, 3)).astype(np.float16),
        "rows": np.arange(5),
        "nothing": np.empty((0, 4), dtype=np.float32),
    }
    save_file(tensors, tmp_path / "file", metadata={"made": "here"})
    mapped = map_tensors(tmp_path / "file")
    assert mapped.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert mapped[name].dtype == tensor.dtype
        np.testing.assert_array_equal(mapped[name], tensor)
        assert not mapped[name].flags.writeable
        assert not mapped[name].flags.owndata


def test_views_outlive_the_file_s_name(tmp_path):
    path = tmp_path / "file"
    save_file({"codes": np.arange(10, dtype=np.uint8)}, path)
    mapped = map_tensors(path)["codes"]
    save_file({"codes": np.zeros(10, dtype=np.uint8)}, tmp_path / "new")
    (tmp_path / "new").replace(path)
    assert mapped.tolist() == list(range(10))


def test_mapping_a_large_file_costs_no_memory(tmp_path):
    path = tmp_path / "file"
    header = {"codes": {"dtype": "U8", "shape": [1 << 34], "data_offsets": [0, 1 << 34]}}
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
    os.truncate(path, 8 + len(text) + (1 << 34))  # 16 GB of holes
    assert map_tensors(path)["codes"][-1] == 0


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"short",
        struct.pack("<Q", 1 << 60) + b"{}",
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", 9) + b'{"a": [1}',
        save({"codes": np.arange(100, dtype=np.uint8)})[:-1],
        save({"codes": np.arange(100, dtype=np.uint8)}).replace(b"U8", b"Q9"),
        save({"codes": np.arange(100, dtype=np.uint8)}).replace(b"[100]", b"[101]"),
    ],
)
def test_another_layout_is_refused_by_the_name_of_the_file(tmp_path, content):
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(IndexCorrupt, match=r"file is not a safetensors file .*build again"):
        map_tensors(path)
