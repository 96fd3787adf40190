"""Files are whole or absent, one builder holds a folder, and a manifest proves what it says."""

import errno
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from index.errors import DiskFull, IndexBusy, IndexCorrupt, IndexMissing
from index.files import exclusive, sha256_of, write_sealed, write_whole
from index.manifest import (
    FILE_NAME,
    DataRecord,
    EstimatorRecord,
    FailedRow,
    FileRecord,
    Manifest,
    ModelRecord,
    NoiseRecord,
    PartRecord,
    ShardRecord,
    SketchRecord,
    SkippedRecord,
)

ROOT = Path(__file__).parents[2]


def example_manifest() -> Manifest:
    failed = [FailedRow(row=3, reason="its gradient is not finite")]
    return Manifest(
        schema_version=2,
        model=ModelRecord(source="tiny", model_sha256="aa" * 32, tokenizer_sha256="bb" * 32),
        estimator=EstimatorRecord(
            name="ekfac",
            sha256="cc" * 32,
            damping=0.1,
            layer_patterns=["*"],
            layers=["h.0.mlp"],
            attributed_share=0.75,
            skipped=[
                SkippedRecord(
                    name="wte", kind="Embedding", parameters=9, share=0.25, reason="not linear"
                )
            ],
        ),
        sketch=SketchRecord(
            seed=2**61 + 1,
            dimensions=1024,
            rank=8,
            entries=512,
            noise=NoiseRecord(predicted=0.1, measured=0.11, relative=0.02, kurtosis=3.0, pairs=100),
        ),
        codes="one-bit",
        bytes_per_row=140,
        parts=[
            PartRecord(
                name="000",
                data=DataRecord(
                    source="Málaga.jsonl",
                    sha256="dd" * 32,
                    documents=5,
                    rows=6,
                    empty_rows=0,
                    null_rows=0,
                    replaced_rows=0,
                    duplicate_rows=1,
                    tokens=60,
                    max_tokens=32,
                ),
                shards=[
                    ShardRecord(
                        number=0,
                        first_row=0,
                        rows=4,
                        sha256="ee" * 32,
                        examples_sha256="11" * 32,
                        failed=failed,
                    ),
                    ShardRecord(
                        number=1,
                        first_row=4,
                        rows=2,
                        sha256="ff" * 32,
                        examples_sha256="22" * 32,
                        failed=[],
                    ),
                ],
                deleted=[],
            )
        ],
        files=[FileRecord(path="examples/00000.arrow", sha256="00" * 32)],
        versions={"numpy": "2.0"},
    )


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("old", [b"old content", None])
def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, number, old):
    path = tmp_path / "folder" / "file.bin"
    if old is not None:
        write_whole(path, old)

    def full(descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(DiskFull, match=r"No room on the disk for .*file\.bin"):
            write_whole(path, b"new content")
    assert [p.read_bytes() for p in path.parent.iterdir()] == ([] if old is None else [old])
    write_whole(path, b"new content")
    assert [p.read_bytes() for p in path.parent.iterdir()] == [b"new content"]


def test_other_errors_of_the_disk_pass_through_and_leave_nothing(tmp_path, monkeypatch):
    def broken(descriptor: int) -> None:
        raise OSError(errno.EIO, "input/output error")

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(OSError, match="input/output error") as caught:
        write_whole(tmp_path / "file", b"content")
    assert not isinstance(caught.value, DiskFull)
    assert list(tmp_path.iterdir()) == []


def test_the_file_and_its_folder_reach_the_disk_around_the_rename(tmp_path, monkeypatch):
    events = []
    fsync, replace = os.fsync, Path.replace

    def watched_fsync(descriptor: int) -> None:
        events.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)
        fsync(descriptor)

    def watched_replace(self: Path, target: Path) -> Path:
        events.append(f"rename to {target.name}")
        return replace(self, target)

    if not Path("/proc/self/fd").is_dir():
        pytest.skip("needs /proc to name descriptors")
    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(Path, "replace", watched_replace)
    write_whole(tmp_path / "file", b"content")
    assert events[0].endswith(".tmp")
    assert events[1:] == ["rename to file", tmp_path.name]


def test_sha256_of_a_known_content(tmp_path):
    (tmp_path / "abc").write_bytes(b"abc")
    known = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2, B.1
    assert sha256_of(tmp_path / "abc") == known


HOLDER = """
import sys, time
from pathlib import Path
from index.files import exclusive
with exclusive(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_folder_is_held_by_one_process_and_free_after_its_death(tmp_path):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(IndexBusy, match=re.escape(str(tmp_path))), exclusive(tmp_path):
            raise AssertionError("two processes hold the folder")
        holder.send_signal(signal.SIGKILL)
        holder.wait(timeout=30)
        with exclusive(tmp_path):
            held_again = True
        assert held_again
    finally:
        holder.kill()
        holder.communicate(timeout=30)


def test_a_folder_is_free_after_an_error_inside(tmp_path):
    with pytest.raises(KeyError), exclusive(tmp_path):
        raise KeyError("inside")
    with exclusive(tmp_path), pytest.raises(IndexBusy), exclusive(tmp_path):
        raise AssertionError("held twice in one process")


def test_a_manifest_comes_back_as_written(tmp_path):
    manifest = example_manifest()
    manifest.write(tmp_path)
    assert Manifest.read(tmp_path) == manifest
    assert [f.row for f in manifest.failed] == [3]
    first = (tmp_path / FILE_NAME).read_bytes()
    manifest.write(tmp_path)
    assert (tmp_path / FILE_NAME).read_bytes() == first


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"ekfac"', '"ekfab"'),
        ("0.75", "0.76"),
        ('"row": 3', '"row": 4'),
        ('"numpy"', '"nunpy"'),
        ("M\\u00e1laga", "M\\u00e2laga"),
        ("2305843009213693953", "2305843009213693952"),  # equal as floats
    ],
)
def test_one_changed_character_is_found_out_with_both_checksums(tmp_path, old, new):
    example_manifest().write(tmp_path)
    path = tmp_path / FILE_NAME
    content = path.read_text()
    assert content.count(old) == 1
    path.write_text(content.replace(old, new))
    with pytest.raises(IndexCorrupt, match="changed after it was written") as caught:
        Manifest.read(tmp_path)
    hashes = set(re.findall(r"\b[0-9a-f]{64}\b", str(caught.value)))
    assert json.loads(content)["checksum"] in hashes
    assert len(hashes) == 2


def test_an_edited_checksum_is_found_out_too(tmp_path):
    example_manifest().write(tmp_path)
    path = tmp_path / FILE_NAME
    document = json.loads(path.read_text())
    document["checksum"] = "0" * 64
    path.write_text(json.dumps(document))
    with pytest.raises(IndexCorrupt, match="0" * 64):
        Manifest.read(tmp_path)
    del document["checksum"]
    path.write_text(json.dumps(document))
    with pytest.raises(IndexCorrupt, match="None"):
        Manifest.read(tmp_path)


def test_without_a_manifest_there_is_no_index(tmp_path):
    with pytest.raises(IndexMissing, match=re.escape(str(tmp_path))):
        Manifest.read(tmp_path)
    with pytest.raises(IndexMissing, match="not_there"):
        Manifest.read(tmp_path / "not_there")


@pytest.mark.parametrize("version", [1, 3, 0, None])
def test_another_schema_version_is_named(tmp_path, version):
    example_manifest().write(tmp_path)
    path = tmp_path / FILE_NAME
    content = {**json.loads(path.read_text()), "schema_version": version}
    del content["checksum"]
    write_sealed(path, content)
    with pytest.raises(IndexCorrupt, match=re.escape(f"schema version {version!r}")):
        Manifest.read(tmp_path)


@pytest.mark.parametrize("content", ["", "{", "[]", "3", '"text"', "null", "\udcff"])
def test_a_manifest_that_is_no_json_object_is_corrupt(tmp_path, content):
    path = tmp_path / FILE_NAME
    path.write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(IndexCorrupt, match="not a JSON object"):
        Manifest.read(tmp_path)


def test_a_truncated_manifest_is_corrupt(tmp_path):
    example_manifest().write(tmp_path)
    path = tmp_path / FILE_NAME
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(IndexCorrupt, match="not a JSON object"):
        Manifest.read(tmp_path)


def test_a_manifest_older_than_the_choice_of_embeddings_has_none(tmp_path):
    example_manifest().write(tmp_path)
    content = json.loads((tmp_path / FILE_NAME).read_text())
    del content["checksum"], content["estimator"]["embeddings"]
    write_sealed(tmp_path / FILE_NAME, content)
    assert not Manifest.read(tmp_path).estimator.embeddings


def test_unknown_fields_are_refused(tmp_path):
    class Newer(Manifest):
        colour: str

    Newer(**example_manifest().model_dump(), colour="blue").write(tmp_path)
    with pytest.raises(IndexCorrupt, match="colour"):
        Manifest.read(tmp_path)
