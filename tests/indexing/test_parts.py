"""An index grows and shrinks: appended, superseded, deleted, merged and shared parts."""

import itertools
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from index.editing import delete_rows, merge_indexes
from index.errors import DuplicateIds, IndexBusy, IndexCorrupt, IndexMismatch, IndexMissing
from index.examples import ExampleStore, examples_path
from index.files import exclusive
from index.ids import HashColumn, first_repeated
from index.manifest import FILE_NAME, Manifest
from index.shards import codes_path, receipt_path
from service.corpus.source import CorpusSource
from service.indexing.building import Worker, build_share
from service.indexing.plan import PLAN_NAME
from service.search.opening import open_index
from service.search.query import Query
from service.search.retrieval import Retriever
from tests.index_fixtures import sentences, write_jsonl
from tests.indexing.test_building import BUILDER, assert_same_files, contents, copy_index

pytest_plugins = ["tests.index_fixtures"]

TEXTS = sentences(60)
ROOT = Path(__file__).parents[2]


def corpus(path: Path, numbers: range, prefix: str = "n") -> CorpusSource:
    rows = [{"id": f"{prefix}{i}", "text": TEXTS[i % 60], "half": i // 30} for i in numbers]
    write_jsonl(path, rows)
    return CorpusSource(data=str(path), id_column="id")


def everything(folder, workshop, ranking="score"):
    """All rows' exact scores and proxies for one query, by id, and the answer."""
    retriever = Retriever(open_index(folder, workshop.loaded))
    rows = len(retriever.index.examples)
    query = Query(prompt="The bridge", completion=" of Porto", k=rows, budget=rows, ranking=ranking)
    answer = retriever.answer(replace(query, calibration_rows=rows))
    return {r.id: (r.score, r.proxy, r.gradient_norm) for r in answer.results}, answer


def assert_same_answers(one, other):
    """Equal but for rounding, which may decide a bit of a code: then a proxy moves, by less than it
    is off anyway, in few rows."""
    assert one.keys() == other.keys()
    scores, proxies, norms = np.array(list(one.values())).T
    other_scores, other_proxies, other_norms = np.array([other[identifier] for identifier in one]).T
    largest = np.abs(scores).max()
    np.testing.assert_allclose(other_scores, scores, rtol=1e-4, atol=1e-6 * largest)
    np.testing.assert_allclose(other_norms, norms, rtol=1e-4)
    moved = np.abs(other_proxies - proxies)
    assert (moved > 1e-4 * (np.abs(proxies) + 0.01 * largest)).mean() < 0.1
    assert moved.max() < 0.5 * np.sqrt(np.square(proxies - scores).mean())


@pytest.fixture(scope="module")
def whole(workshop, tmp_path_factory):
    """An index of rows n0 to n59 built at once, in shards of 10 rows."""
    folder = tmp_path_factory.mktemp("whole")
    workshop.build(
        folder / "index", source=corpus(folder / "a.jsonl", range(60)), rows_per_shard=10
    )
    return folder / "index"


@pytest.fixture(scope="module")
def halves(workshop, tmp_path_factory):
    """Two indexes of the same seed: rows n0 to n29, and rows n30 to n59."""
    folder = tmp_path_factory.mktemp("halves")
    for name, rows in (("a", range(30)), ("b", range(30, 60))):
        source = corpus(folder / f"{name}.jsonl", rows)
        workshop.build(folder / name, source=source, rows_per_shard=10)
    return folder


# --- appending --------------------------------------------------------------------------------


def test_an_appended_index_answers_like_one_built_at_once(workshop, whole, halves, tmp_path):
    copy_index(halves / "a", tmp_path)
    source = CorpusSource(data=str(halves / "b.jsonl"), id_column="id")
    manifest = workshop.build(tmp_path, source=source, rows_per_shard=10, mode="append")
    assert [part.data.rows for part in manifest.parts] == [30, 30]
    appended, _ = everything(tmp_path, workshop)
    at_once, _ = everything(whole, workshop)
    assert_same_answers(appended, at_once)
    # repeating the command changes nothing
    before = contents(tmp_path)
    again = workshop.build(tmp_path, source=source, rows_per_shard=10, mode="append")
    assert again == manifest
    assert contents(tmp_path) == before


def test_parts_of_low_rank_codes_answer_like_one_built_at_once(workshop, whole, halves, tmp_path):
    sources = [CorpusSource(data=str(halves / f"{n}.jsonl"), id_column="id") for n in "ab"]
    for source, mode in zip(sources, ("new", "append"), strict=True):
        workshop.build(
            tmp_path / "parts", source=source, rows_per_shard=10, mode=mode, codes="low-rank"
        )
    source = CorpusSource(data=str(whole.parent / "a.jsonl"), id_column="id")
    workshop.build(tmp_path / "whole", source=source, rows_per_shard=16, codes="low-rank")
    appended, _ = everything(tmp_path / "parts", workshop)
    at_once, _ = everything(tmp_path / "whole", workshop)
    assert_same_answers(appended, at_once)


def test_an_index_serves_its_old_rows_until_an_append_is_done(workshop, halves, tmp_path):
    copy_index(halves / "a", tmp_path)
    source = CorpusSource(data=str(halves / "b.jsonl"), id_column="id")

    class Killed(Exception):
        pass

    def stop(description, items):
        for number, item in enumerate(items):
            if description == "index" and number == 1:
                raise Killed
            yield item

    with pytest.raises(Killed):
        workshop.build(tmp_path, source=source, rows_per_shard=10, mode="append", progress=stop)
    assert len(open_index(tmp_path, workshop.loaded).examples) == 30
    other = corpus(tmp_path / "c.jsonl", range(60, 70), prefix="c")
    with pytest.raises(IndexMismatch, match=r"001 was not finished .*source_sha256"):
        workshop.build(tmp_path, source=other, rows_per_shard=10, mode="append")
    workshop.build(tmp_path, source=source, rows_per_shard=10, mode="append")
    assert len(open_index(tmp_path, workshop.loaded).examples) == 60


def test_appending_ids_that_are_there_is_refused_and_superseding_replaces(
    workshop, halves, tmp_path
):
    copy_index(halves / "a", tmp_path / "index")
    rows = [{"id": "n3", "text": TEXTS[50]}, {"id": "new", "text": TEXTS[51]}]
    source = CorpusSource(data=str(write_jsonl(tmp_path / "c.jsonl", rows)), id_column="id")
    with pytest.raises(DuplicateIds, match=r"'n3' is in the index already .*--supersede"):
        workshop.build(tmp_path / "index", source=source, rows_per_shard=10, mode="append")
    assert not (tmp_path / "index/parts/001/shards").exists()  # refused before the first gradient
    assert len(open_index(tmp_path / "index", workshop.loaded).examples) == 30
    workshop.build(tmp_path / "index", source=source, rows_per_shard=10, mode="supersede")
    opened = open_index(tmp_path / "index", workshop.loaded)
    assert len(opened.examples) == 31
    assert opened.examples[opened.examples.row_of("n3")].text == TEXTS[50]
    answers, _ = everything(tmp_path / "index", workshop)
    assert set(answers) == {f"n{i}" for i in range(30)} | {"new"}


def test_superseding_a_long_text_deletes_all_its_old_windows(workshop, tmp_path):
    long = [{"id": "doc", "text": " ".join(TEXTS[:4])}, {"id": "other", "text": TEXTS[5]}]
    source = CorpusSource(data=str(write_jsonl(tmp_path / "a.jsonl", long)), id_column="id")
    workshop.build(tmp_path / "index", source=source, max_tokens=12)
    short = [{"id": "doc", "text": TEXTS[7]}]
    source = CorpusSource(data=str(write_jsonl(tmp_path / "b.jsonl", short)), id_column="id")
    workshop.build(tmp_path / "index", source=source, mode="supersede")
    store = open_index(tmp_path / "index", workshop.loaded).examples
    assert [i for i in store.ids() if i.startswith("doc")] == ["doc"]
    assert "other" in {i.split("#")[0] for i in store.ids()}


@pytest.mark.parametrize(
    ("setting", "value"), [("dimensions", 1024), ("damping", 0.2), ("seed", 5)]
)
def test_appending_with_other_settings_of_the_index_is_refused(
    workshop, halves, tmp_path, setting, value
):
    copy_index(halves / "a", tmp_path)
    source = CorpusSource(data=str(halves / "b.jsonl"), id_column="id")
    with pytest.raises(IndexMismatch, match=rf"Cannot append .*{setting}: .* -> {value}"):
        workshop.build(tmp_path, source=source, mode="append", **{setting: value})


def test_appending_takes_the_seed_of_the_index_and_may_cut_otherwise(workshop, halves, tmp_path):
    copy_index(halves / "a", tmp_path)
    source = CorpusSource(data=str(halves / "b.jsonl"), id_column="id")
    options = {"seed": None, "rows_per_shard": 7, "token_budget": 64}
    manifest = workshop.build(tmp_path, source=source, mode="append", **options)
    assert manifest.sketch.seed == 11
    assert [shard.rows for shard in manifest.parts[1].shards] == [7, 7, 7, 7, 2]


# --- deleting ---------------------------------------------------------------------------------


def test_deleted_rows_are_in_no_answer_and_the_others_keep_theirs(workshop, whole, tmp_path):
    copy_index(whole, tmp_path)
    before, _ = everything(whole, workshop)
    gone = ["n0", "n17", "n59"]
    assert delete_rows(tmp_path, gone) == 3
    for ranking in ("score", "normalised"):
        after, answer = everything(tmp_path, workshop, ranking)
        assert answer.rows == 57
        assert answer.certificates[0].status == "exhaustive"
        if ranking == "score":
            assert_same_answers(after, {i: v for i, v in before.items() if i not in gone})
    store = open_index(tmp_path, workshop.loaded).examples
    assert len(store) == 57
    with pytest.raises(IndexMissing, match="n17"):
        store.row_of("n17")
    assert store[store.row_of("n18")].id == "n18"
    assert store.lengths().tolist() == [len(store.tokens(row)) for row in range(57)]
    assert store.texts() == [store[row].text for row in range(57)]


def test_deleting_by_document_or_text_takes_all_its_rows(workshop, tmp_path):
    rows = [{"id": f"d{i}", "text": " ".join(TEXTS[3 * i : 3 * i + 3])} for i in range(4)]
    source = CorpusSource(data=str(write_jsonl(tmp_path / "a.jsonl", rows)), id_column="id")
    workshop.build(tmp_path / "index", source=source, max_tokens=12)
    count = len(open_index(tmp_path / "index", workshop.loaded).examples.rows_of_document("d2"))
    assert count > 1
    assert delete_rows(tmp_path / "index", ["d2"], "document") == count
    assert delete_rows(tmp_path / "index", ["d1"]) > 1
    store = open_index(tmp_path / "index", workshop.loaded).examples
    assert set(store.documents()) == {"d0", "d3"}
    assert store.rows_of_document("d2") == []


def test_a_deletion_that_names_an_unknown_id_deletes_nothing(whole, tmp_path):
    copy_index(whole, tmp_path)
    before = contents(tmp_path)
    with pytest.raises(IndexMissing, match="'nowhere', nor 0 more of the 2 given; nothing"):
        delete_rows(tmp_path, ["n1", "nowhere"])
    with pytest.raises(IndexMismatch, match="every row"):
        delete_rows(tmp_path, [f"n{i}" for i in range(60)])
    assert contents(tmp_path) == before
    assert delete_rows(tmp_path, ["n1"]) == 1
    with pytest.raises(IndexMissing, match="'n1'"):
        delete_rows(tmp_path, ["n1"])


def test_a_rebuild_keeps_deletions(workshop, whole, tmp_path):
    copy_index(whole, tmp_path / "index")
    delete_rows(tmp_path / "index", ["n4"])
    source = CorpusSource(data=str(whole.parent / "a.jsonl"), id_column="id")
    workshop.build(tmp_path / "index", source=source, rows_per_shard=10)
    assert len(open_index(tmp_path / "index", workshop.loaded).examples) == 59


# --- merging ----------------------------------------------------------------------------------


def test_a_merged_index_answers_like_one_built_at_once(workshop, whole, halves, tmp_path):
    delete_rows_before, _ = everything(whole, workshop)
    merged = merge_indexes(tmp_path, [halves / "a", halves / "b"])
    assert [part.name for part in merged.parts] == ["000", "001"]
    assert merged.rows == 60
    answers, _ = everything(tmp_path, workshop)
    assert_same_answers(answers, delete_rows_before)
    noises = [Manifest.read(halves / name).sketch.noise for name in "ab"]
    assert merged.sketch.noise.measured == max(noise.measured for noise in noises)
    with pytest.raises(IndexMismatch, match="holds an index already"):
        merge_indexes(tmp_path, [halves / "a"])


def test_a_merge_keeps_deletions_and_numbers_failed_rows_through(workshop, halves, tmp_path):
    copy_index(halves / "a", tmp_path / "a")
    delete_rows(tmp_path / "a", ["n5"])
    merge_indexes(tmp_path / "out", [tmp_path / "a", halves / "b"])
    assert len(open_index(tmp_path / "out", workshop.loaded).examples) == 59


def test_indexes_of_other_seeds_or_with_common_ids_are_not_merged(workshop, halves, tmp_path):
    source = CorpusSource(data=str(halves / "b.jsonl"), id_column="id")
    workshop.build(tmp_path / "other", source=source, seed=12)
    with pytest.raises(IndexMismatch, match=r"cannot be merged: sketch is .*'seed': 11.*--seed"):
        merge_indexes(tmp_path / "out", [halves / "a", tmp_path / "other"])
    with pytest.raises(DuplicateIds, match="'n0' is in the index already"):
        merge_indexes(tmp_path / "out", [halves / "a", halves / "a"])
    assert not (tmp_path / "out" / FILE_NAME).exists()


def test_a_damaged_index_is_not_merged(halves, tmp_path):
    copy_index(halves / "a", tmp_path / "a")
    path = examples_path(tmp_path / "a" / "parts" / "000", 1)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(IndexCorrupt, match=r"00001\.arrow is truncated or was changed"):
        merge_indexes(tmp_path / "out", [tmp_path / "a", halves / "b"])


# --- shares of a build ------------------------------------------------------------------------


def share(workshop, folder, worker, source):
    options = replace(workshop.options, rows_per_shard=10, slices=1)
    return build_share(folder, workshop.loaded, workshop.factors, source, options, worker)


@pytest.mark.parametrize("order", list(itertools.permutations(range(3)))[::2])
def test_shares_built_in_any_order_end_like_one_build(workshop, whole, tmp_path, order):
    source = CorpusSource(data=str(whole.parent / "a.jsonl"), id_column="id")
    results = [share(workshop, tmp_path, Worker(number=i, count=3), source) for i in order]
    assert results[:2] == [None, None]
    assert results[2] == Manifest.read(whole)
    assert_same_files(tmp_path, whole)


def test_shares_of_several_slices_end_like_one_build(workshop, whole, tmp_path):
    source = CorpusSource(data=str(whole.parent / "a.jsonl"), id_column="id")
    workshop.build(tmp_path / "once", source=source, rows_per_shard=10, slices=3)
    options = replace(workshop.options, rows_per_shard=10, slices=3)
    for number in (1, 0):
        worker = Worker(number=number, count=2)
        build_share(tmp_path / "shared", workshop.loaded, workshop.factors, source, options, worker)
    assert_same_files(tmp_path / "shared", tmp_path / "once")


def test_a_share_is_only_its_own_shards(workshop, whole, tmp_path):
    source = CorpusSource(data=str(whole.parent / "a.jsonl"), id_column="id")
    share(workshop, tmp_path, Worker(number=1, count=3), source)
    part = tmp_path / "parts" / "000"
    assert [n for n in range(6) if receipt_path(part, n).is_file()] == [1, 4]
    with exclusive(tmp_path, ".worker-1-of-3.lock"), pytest.raises(IndexBusy):
        share(workshop, tmp_path, Worker(number=1, count=3), source)


@pytest.mark.parametrize(("number", "count"), [(3, 3), (-1, 2), (0, 0)])
def test_a_worker_beyond_the_count_is_refused(number, count):
    with pytest.raises(ValueError, match=f"got {number}"):
        Worker(number=number, count=count)


def test_two_workers_at_the_same_time_share_a_folder(workshop, whole, nursery, tmp_path):
    given = {
        "folder": str(tmp_path),
        "model": str(workshop.model_folder),
        "factors": str(workshop.factors),
        "corpus": str(whole.parent / "a.jsonl"),
        "options": {**vars(workshop.options), "rows_per_shard": 10, "slices": 1},
    }
    with nursery.start(BUILDER, "share", json.dumps(given), quiet=True) as other:
        assert other.stdout.readline() == "ready\n"
        source = CorpusSource(data=given["corpus"], id_column="id")
        share(workshop, tmp_path, Worker(number=0, count=2), source)
        assert other.wait() == 0
    assert_same_files(tmp_path, whole)


# --- damage that no test of a single part covers ------------------------------------------------


@pytest.mark.parametrize("name", [PLAN_NAME, "corpus.json"])
def test_an_edited_plan_is_refused_and_an_edited_record_written_again(
    workshop, whole, tmp_path, name
):
    copy_index(whole, tmp_path)
    path = tmp_path / "parts" / "000" / name
    path.write_text(path.read_text().replace("0.1", "0.2").replace('"rows": 60', '"rows": 61'))
    source = CorpusSource(data=str(whole.parent / "a.jsonl"), id_column="id")
    if name == PLAN_NAME:
        with pytest.raises(IndexCorrupt, match=r"plan\.json was changed after it was written"):
            workshop.build(tmp_path, source=source, rows_per_shard=10)
    else:
        workshop.build(tmp_path, source=source, rows_per_shard=10)
        assert_same_files(tmp_path, whole)


def test_codes_of_other_examples_are_built_again(workshop, whole, halves, tmp_path):
    """A shard whose receipt and codes agree with each other, but not with the corpus."""
    copy_index(whole, tmp_path)
    part, other = tmp_path / "parts" / "000", halves / "b" / "parts" / "000"
    for path in (codes_path, receipt_path):
        path(part, 0).write_bytes(path(other, 0).read_bytes())
    source = CorpusSource(data=str(whole.parent / "a.jsonl"), id_column="id")
    workshop.build(tmp_path, source=source, rows_per_shard=10)
    assert_same_files(tmp_path, whole)


def test_leftovers_of_killed_writers_are_removed(workshop, whole, tmp_path):
    copy_index(whole, tmp_path)
    leftover = tmp_path / "parts" / "000" / "shards" / ".00001.safetensors.77.tmp"
    leftover.write_bytes(b"half")
    source = CorpusSource(data=str(whole.parent / "a.jsonl"), id_column="id")
    workshop.build(tmp_path, source=source, rows_per_shard=10)
    assert not leftover.exists()


# --- hashes of ids ----------------------------------------------------------------------------


def test_repeated_contents_are_found_and_equal_hashes_looked_at_again():
    contents_ = ["a", "b", "a", "c", "b", "a"]
    column = HashColumn().extend(contents_)
    assert column.repeated_rows().tolist() == [2, 4, 5]
    assert first_repeated(column, contents_.__getitem__) == (0, 2)
    distinct = [f"{text}{row}" for row, text in enumerate(contents_)]  # as if hashes collided
    assert first_repeated(column, distinct.__getitem__) is None
    assert first_repeated(HashColumn(), contents_.__getitem__) is None


def test_a_store_with_rows_left_out_numbers_the_others_through(whole):
    path = examples_path(whole / "parts" / "000", 0)
    keep = np.array([True, False, True, True, False, *[True] * 5])
    store, full = ExampleStore([path], keep), ExampleStore([path])
    rows = np.flatnonzero(keep)
    assert [store[i] for i in range(8)] == [full[int(row)] for row in rows]
    assert store.ids() == [full.ids()[row] for row in rows]
    assert [store.row_of(i) for i in store.ids()] == list(range(8))
    with pytest.raises(IndexMissing, match="row 8"):
        store[8]
    none = ExampleStore([path], np.zeros(10, dtype=bool))
    assert len(none) == 0
    with pytest.raises(IndexMissing):
        none.row_of("n0")
