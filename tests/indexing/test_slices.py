"""Indexes of several slices: built, extended, resumed, edited, and read again."""

import errno
import itertools
import os
import shutil
import stat
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from index.codes.signs import encode_signs, estimate_signs, estimate_slices, sign_bytes
from index.editing import delete_rows, merge_indexes
from index.errors import DiskFull, IndexCorrupt, IndexMismatch, IndexMissing
from index.files import read_sealed, sha256_of, write_sealed
from index.manifest import FILE_NAME, Manifest
from index.slices import SliceStore
from service.search.opening import open_index
from tests.index_fixtures import Workshop, write_jsonl

pytest_plugins = ["tests.index_fixtures"]

SLICES = 5


def files_of(folder: Path) -> dict[str, str]:
    """Hash of every file of an index, plans and locks aside."""
    return {
        str(path.relative_to(folder)): sha256_of(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.startswith(".")
    }


@pytest.fixture(scope="module")
def sliced(workshop: Workshop) -> Path:
    """A finished index of five slices; tests only read it."""
    folder = workshop.folder / "sliced"
    workshop.build(folder, slices=SLICES)
    return folder


# --- codes --------------------------------------------------------------------------------------


def test_signs_are_estimated_as_their_formula_says():
    generator = np.random.default_rng(0)
    rows = generator.standard_normal((40, 1024)).astype(np.float32)
    rows[7] = 0
    queries = generator.standard_normal((3, 1024)).astype(np.float32)
    codes = encode_signs(rows)
    assert codes.shape == (40, sign_bytes(1024))
    found = estimate_signs(codes, queries)
    lengths, absolute = np.square(rows).sum(1), np.abs(rows).sum(1)
    factors = np.divide(lengths, absolute, out=np.zeros(40), where=absolute > 0)
    wanted = (queries @ np.where(rows > 0, 1.0, -1.0).T) * factors
    scale = np.linalg.norm(queries, axis=1, keepdims=True) * np.linalg.norm(rows, axis=1)
    assert (np.abs(found - wanted) <= 1e-3 * scale + 1e-6).all()
    assert (found[:, 7] == 0).all()


def test_company_changes_no_estimate():
    generator = np.random.default_rng(1)
    codes = encode_signs(generator.standard_normal((300, 512)))
    query = generator.standard_normal((1, 512))
    together = estimate_signs(codes, query, threads=2)[0]
    some = generator.permutation(300)[:37]
    np.testing.assert_array_equal(estimate_signs(codes[some], query)[0], together[some])
    twice = np.stack([codes[some], codes[:37]])
    asked = np.concatenate([query, -query]).astype(np.float32)
    found = estimate_slices(twice, asked)
    np.testing.assert_array_equal(found[0], together[some])
    np.testing.assert_array_equal(found[1], estimate_signs(codes[:37], -query)[0])
    assert estimate_slices(twice[:, :0], asked).shape == (2, 0)


def test_rows_with_nan_are_refused():
    with pytest.raises(ValueError, match="NaN"):
        encode_signs(np.array([[1.0, np.nan]]))


# --- building -----------------------------------------------------------------------------------


def test_one_slice_is_the_index_of_before(workshop, built, tmp_path):
    workshop.build(tmp_path / "one", slices=1)
    assert files_of(tmp_path / "one") == files_of(built)
    assert not list(built.rglob("slices*"))
    text = (built / FILE_NAME).read_text()
    assert '"later"' not in text
    assert '"slices"' not in text


def test_the_first_slice_is_that_of_an_index_of_one(built, sliced):
    one, many = files_of(built), files_of(sliced)
    codes = [name for name in one if name.endswith(".safetensors") and "shards" in name]
    assert len(codes) == 4
    assert all(many[name] == one[name] for name in codes)
    before, after = Manifest.read(built).sketch, Manifest.read(sliced).sketch
    assert (before.slices, after.slices) == (1, SLICES)
    assert before.noise == after.noise
    assert [look.slices for look in after.later] == [4, 5]


def test_slices_average_out(sliced):
    sketch = Manifest.read(sliced).sketch
    assert sketch.further_rank > sketch.rank
    for look in sketch.later:
        assert look.noise.predicted < sketch.noise.predicted
        assert look.noise.measured < 0.8 * sketch.noise.measured
        assert look.noise.relative < sketch.noise.relative


def test_stored_slices_are_those_of_their_sketches(workshop, sliced):
    opened = open_index(sliced, workshop.loaded)
    assert opened.slices is not None
    assert len(opened.sketches) == SLICES
    rows = np.array([119, 3, 64, 3])
    codes = opened.slices.read(rows, SLICES - 1)
    assert codes.shape == (SLICES - 1, 4, sign_bytes(2048))
    np.testing.assert_array_equal(codes[:, 1], codes[:, 3])
    np.testing.assert_array_equal(codes[:2], opened.slices.read(rows, 2))
    alone = opened.slices.read(rows[:1], SLICES - 1)
    np.testing.assert_array_equal(codes[:, :1], alone)


def test_slices_added_later_are_those_built_at_once(workshop, sliced, tmp_path):
    workshop.build(tmp_path)
    for slices in (3, SLICES):
        workshop.build(tmp_path, slices=slices)
    assert Manifest.read(tmp_path).sketch == Manifest.read(sliced).sketch
    wanted = SliceStore(sliced, Manifest.read(sliced).parts)
    found = SliceStore(tmp_path, Manifest.read(tmp_path).parts)
    rows = np.arange(120)
    np.testing.assert_array_equal(found.read(rows, SLICES - 1), wanted.read(rows, SLICES - 1))


def test_a_killed_extension_leaves_the_index_and_goes_on(workshop, sliced, tmp_path):
    workshop.build(tmp_path)
    before = (tmp_path / FILE_NAME).read_bytes()

    def stops(description, items):
        for number, item in enumerate(items):
            if description == "index" and number == 2:
                raise KeyboardInterrupt
            yield item

    with pytest.raises(KeyboardInterrupt):
        workshop.build(tmp_path, slices=SLICES, progress=stops)
    assert (tmp_path / FILE_NAME).read_bytes() == before
    assert open_index(tmp_path, workshop.loaded).slices is None
    workshop.build(tmp_path)  # it is remembered how many there are to be
    assert files_of(tmp_path) == files_of(sliced)


def test_a_disk_full_at_every_write_of_an_extension_is_resumable(workshop, tmp_path, monkeypatch):
    source = replace(workshop.source, limit=16)
    options = {"rows_per_shard": 8, "source": source}
    workshop.build(tmp_path / "one", **options)
    shutil.copytree(tmp_path / "one", tmp_path / "whole")
    workshop.build(tmp_path / "whole", slices=3, **options)
    before = (tmp_path / "one" / FILE_NAME).read_bytes()
    real, room = os.fsync, 0

    def fsync(descriptor: int) -> None:
        nonlocal room
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            if room == 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            room -= 1
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    failures = 0
    for files in itertools.count():
        folder = tmp_path / str(files)
        shutil.copytree(tmp_path / "one", folder)
        room = files
        try:
            workshop.build(folder, slices=3, **options)
            break
        except DiskFull:
            failures += 1
            assert (folder / FILE_NAME).read_bytes() == before
            room = 1000
            workshop.build(folder, slices=3, **options)
            assert files_of(folder) == files_of(tmp_path / "whole")
    assert failures == 7  # the number of slices; two files and receipts; factors and manifest


def test_a_damaged_file_of_slices_is_found_and_mended(workshop, sliced, tmp_path):
    workshop.build(tmp_path, slices=SLICES)
    path = tmp_path / "slices/000/00001-001.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(IndexCorrupt, match="00001-001"):
        open_index(tmp_path, workshop.loaded)
    workshop.build(tmp_path)
    assert files_of(tmp_path) == files_of(sliced)


@pytest.mark.parametrize(
    ("slices", "codes", "told"),
    [(0, "one-bit", "from 1 to"), (300, "one-bit", "from 1 to"), (2, "flat", "one-bit codes")],
)
def test_slices_that_cannot_be_had_are_refused(workshop, tmp_path, slices, codes, told):
    with pytest.raises(ValueError, match=told):
        workshop.build(tmp_path, slices=slices, codes=codes)


def test_fewer_slices_than_there_are_are_refused(workshop, sliced):
    with pytest.raises(IndexMismatch, match="5 slices"):
        workshop.build(sliced, slices=2)


# --- editing ------------------------------------------------------------------------------------


def halves(workshop: Workshop, folder: Path) -> list[Workshop]:
    lines = workshop.corpus.read_text().splitlines(keepends=True)
    found = []
    for name, some in (("a", lines[:64]), ("b", lines[64:])):
        path = folder / f"{name}.jsonl"
        path.write_text("".join(some))
        found.append(replace(workshop, corpus=path))
    return found


def test_append_merge_and_delete_keep_the_slices(workshop, sliced, tmp_path):
    first, second = halves(workshop, tmp_path)
    first.build(tmp_path / "grown", slices=SLICES)
    second.build(tmp_path / "grown", mode="append")
    first.build(tmp_path / "one", slices=SLICES)
    second.build(tmp_path / "two", slices=SLICES)
    merge_indexes(tmp_path / "merged", [tmp_path / "one", tmp_path / "two"])
    rows = np.arange(120)
    wanted = SliceStore(sliced, Manifest.read(sliced).parts).read(rows, SLICES - 1)
    for name in ("grown", "merged"):
        manifest = Manifest.read(tmp_path / name)
        assert manifest.sketch.slices == SLICES
        found = SliceStore(tmp_path / name, manifest.parts).read(rows, SLICES - 1)
        np.testing.assert_array_equal(found, wanted)
    delete_rows(tmp_path / "merged", ["fact-0"])
    assert Manifest.read(tmp_path / "merged").sketch.slices == SLICES
    assert open_index(tmp_path / "merged", workshop.loaded).slices is not None


def test_all_parts_of_an_index_get_more_slices(workshop, sliced, tmp_path):
    first, second = halves(workshop, tmp_path)
    first.build(tmp_path / "grown")
    second.build(tmp_path / "grown", mode="append")
    delete_rows(tmp_path / "grown", ["fact-3", "fact-100"])
    first.build(tmp_path / "grown", slices=SLICES)
    manifest = Manifest.read(tmp_path / "grown")
    assert [len(part.deleted) for part in manifest.parts] == [1, 1]
    rows = np.arange(120)
    wanted = SliceStore(sliced, Manifest.read(sliced).parts).read(rows, SLICES - 1)
    found = SliceStore(tmp_path / "grown", manifest.parts).read(rows, SLICES - 1)
    np.testing.assert_array_equal(found, wanted)


def test_a_corpus_that_supersedes_rows_brings_its_slices(workshop, tmp_path):
    first, _ = halves(workshop, tmp_path)
    first.build(tmp_path / "grown", slices=2)
    rows = [{"id": "fact-1", "text": "Another harbour of Oslo opened in 1901."}]
    fresh = replace(workshop, corpus=write_jsonl(tmp_path / "new.jsonl", rows))
    fresh.build(tmp_path / "grown", mode="supersede")
    manifest = Manifest.read(tmp_path / "grown")
    assert [part.deleted for part in manifest.parts] == [[1], []]
    assert [s.further_slices for part in manifest.parts for s in part.shards] == [1, 1, 1]


def test_indexes_of_different_slices_are_not_merged(workshop, tmp_path):
    first, second = halves(workshop, tmp_path)
    first.build(tmp_path / "one", slices=2)
    second.build(tmp_path / "two")
    with pytest.raises(IndexMismatch, match="slices is 2"):
        merge_indexes(tmp_path / "merged", [tmp_path / "one", tmp_path / "two"])


def test_a_new_index_has_sixteen_slices_and_an_old_one_keeps_what_it_has(workshop, tmp_path):
    few = replace(workshop.source, limit=16)
    workshop.build(tmp_path / "new", slices=None, source=few, dimensions=256)
    assert Manifest.read(tmp_path / "new").sketch.slices == 16
    workshop.build(tmp_path / "old", source=few, dimensions=256)
    workshop.build(tmp_path / "old", slices=None, source=few, dimensions=256)
    assert Manifest.read(tmp_path / "old").sketch.slices == 1
    workshop.build(tmp_path / "half", slices=None, source=few, dimensions=256, codes="half")
    assert Manifest.read(tmp_path / "half").sketch.slices == 1


def test_slices_that_were_drawn_otherwise_are_refused(workshop, sliced, tmp_path):
    shutil.copytree(sliced, tmp_path / "earlier")
    manifest = read_sealed(sliced / FILE_NAME, "")
    del manifest["sketch"]["further_rank"]
    write_sealed(tmp_path / "earlier" / FILE_NAME, manifest)
    with pytest.raises(IndexCorrupt, match="drawn in a way"):
        open_index(tmp_path / "earlier", workshop.loaded)
    write_sealed(tmp_path / "earlier" / "slices.json", {"slices": SLICES})
    with pytest.raises((IndexMismatch, IndexCorrupt), match=r"drawn in a way|begun by another"):
        workshop.build(tmp_path / "earlier")


# --- slices that lie elsewhere ------------------------------------------------------------------


def test_further_slices_may_lie_in_another_folder(workshop, sliced, tmp_path):
    first, second = halves(workshop, tmp_path)
    index, elsewhere = tmp_path / "index", tmp_path / "disk" / "codes"
    first.build(index, slices=SLICES, refine=elsewhere)
    second.build(index, mode="append")
    assert {path.name for path in elsewhere.iterdir()} == {"000", "001"}
    rows = np.arange(120)
    wanted = SliceStore(sliced, Manifest.read(sliced).parts).read(rows, SLICES - 1)
    found = SliceStore(index, Manifest.read(index).parts).read(rows, SLICES - 1)
    np.testing.assert_array_equal(found, wanted)
    (elsewhere / "001" / ".00000.safetensors.1.tmp").write_bytes(b"left by a killed writer")
    second.build(index, mode="append", refine=elsewhere)
    assert not list(elsewhere.rglob(".*.tmp"))
    assert open_index(index, workshop.loaded).slices is not None
    merge_indexes(tmp_path / "merged", [index])
    assert not (tmp_path / "merged" / "slices").is_symlink()


def test_a_disk_that_is_not_there_is_named(workshop, tmp_path):
    workshop.build(tmp_path / "index", slices=2, refine=tmp_path / "disk")
    (tmp_path / "disk").rename(tmp_path / "gone")
    with pytest.raises(IndexMissing, match="mount its disk"):
        open_index(tmp_path / "index", workshop.loaded)
    with pytest.raises(IndexMissing, match="mount its disk"):
        workshop.build(tmp_path / "index")


def test_slices_are_not_put_among_other_files_nor_moved(workshop, tmp_path):
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "thesis.tex").write_text("mine")
    with pytest.raises(IndexMismatch, match="no empty folder"):
        workshop.build(tmp_path / "index", slices=2, refine=taken)
    workshop.build(tmp_path / "index", slices=2)
    with pytest.raises(IndexMismatch, match="stay there"):
        workshop.build(tmp_path / "index", slices=3, refine=tmp_path / "disk")
    assert not (tmp_path / "disk").exists()
