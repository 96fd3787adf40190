"""The build: the same index however it is cut, interrupted or repaired, and clear refusals."""

import datetime
import errno
import itertools
import json
import os
import signal
import stat
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from index.errors import DiskFull, DuplicateIds, IndexCorrupt, IndexMismatch, IndexMissing
from index.examples import ExampleStore
from index.manifest import FILE_NAME, Manifest
from index.shards import codes_path, read_shard, receipt_path
from service.corpus.reading import read_examples
from service.corpus.source import CorpusSource
from service.indexing.plan import PLAN_NAME
from service.models import load_model
from service.search.opening import open_index
from service.search.query import Query
from service.search.retrieval import Retriever
from tests.index_fixtures import CONTEXT, RARE, save, sentences, write_jsonl
from tests.packed_codes import unpack

pytest_plugins = ["tests.index_fixtures"]

BUILDER = "tests.indexing.builder"
SHARDS = 4
PART = "parts/000"


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of an index by its path; the lock and leftovers of killed writers aside."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.startswith(".")
    }


def assert_same_files(folder: Path, expected: Path) -> None:
    found, wanted = contents(folder), contents(expected)
    assert sorted(found) == sorted(wanted)
    assert [name for name in wanted if found[name] != wanted[name]] == []


def read_codes(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    (part,) = Manifest.read(folder).parts
    parts = [read_shard(folder / PART, shard) for shard in part.shards]
    codes = [unpack(packed, len(norms)) for packed, norms in parts]
    return np.concatenate(codes), np.concatenate([n for _, n in parts])


def rewritten(folder: Path, before: dict[str, int]) -> set[str]:
    """Shard files that are not the same file on the disk as they were."""
    return {name for name, inode in inodes(folder).items() if before.get(name) != inode}


def inodes(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_ino for path in (folder / PART / "shards").glob("[0-9]*")}


# --- what is built ----------------------------------------------------------------------------


def test_the_manifest_says_what_was_built(workshop, built):
    manifest = Manifest.read(built)
    (part,) = manifest.parts
    assert [(s.number, s.first_row, s.rows) for s in part.shards] == [
        (0, 0, 32),
        (1, 32, 32),
        (2, 64, 32),
        (3, 96, 24),
    ]
    examples = list(read_examples(workshop.source, workshop.loaded, CONTEXT))
    assert manifest.parts[0].data.rows == manifest.parts[0].data.documents == len(examples) == 120
    assert manifest.parts[0].data.tokens == sum(len(e.tokens) for e in examples)
    assert manifest.model.model_sha256 == workshop.loaded.model_sha256
    assert manifest.estimator.name == "ekfac"
    assert manifest.sketch.seed == 11
    assert manifest.failed == []
    codes, norms = read_codes(built)
    assert codes.shape == (120, manifest.bytes_per_row - 4)
    assert np.all(norms > 0)
    store = open_index(built, workshop.loaded).examples
    assert [store[row] for row in range(len(store))] == examples
    assert store[7].metadata == {"page": 7}
    assert store.row_of("fact-7") == 7


def test_the_noise_on_record_is_that_of_the_index(workshop, built):
    """Proxies of whole queries err by the measured noise, in cosine units of the exact scores."""
    retriever = Retriever(open_index(built, workshop.loaded))
    noise = Manifest.read(built).sketch.noise
    residuals = []
    for example in list(retriever.index.examples.texts())[:12]:
        sequence = workshop.loaded.encode_query(example[:12], example[12:])
        directions, _ = retriever.directions(sequence)
        proxies = retriever.proxies(directions, "score")
        cosine = max(noise.predicted, noise.measured) / proxies.sigmas  # 1 / (|psi| |phi|)
        query = Query(
            prompt=example[:12], completion=example[12:], k=120, budget=120, ranking="score"
        )
        exact = {r.row: r.score for r in retriever.answer(query).results}
        scores = np.array([exact[row] for row in range(120)])
        residuals.append((proxies.values - scores) * cosine)
    assert np.std(residuals) == pytest.approx(noise.measured, rel=0.25)
    assert noise.pairs == 16 * (120 - 5)  # the five largest cosines of each query are apart


@pytest.mark.parametrize("options", [{"rows_per_shard": 16}, {"token_budget": 40}])
def test_sharding_and_batching_change_nothing_beyond_rounding(workshop, built, tmp_path, options):
    """Bits differ only where a sketch coordinate is within float32 rounding of zero."""
    usual, norms = read_codes(built)
    workshop.build(tmp_path, **{"rows_per_shard": 64, **options})
    codes, other_norms = read_codes(tmp_path)
    bits = slice(0, workshop.options.dimensions // 8)
    differing = np.unpackbits(usual[:, bits] ^ codes[:, bits])
    assert differing.mean() < 1e-3
    np.testing.assert_allclose(other_norms, norms, rtol=1e-4)


def test_another_seed_draws_another_sketch(workshop, built, tmp_path):
    workshop.build(tmp_path, seed=12)
    codes, _ = read_codes(tmp_path)
    usual, _ = read_codes(built)
    bits = slice(0, workshop.options.dimensions // 8)
    assert np.unpackbits(codes[:, bits] ^ usual[:, bits]).mean() == pytest.approx(0.5, abs=0.02)


def test_without_a_seed_one_is_drawn_and_kept(workshop, tmp_path):
    source = replace(workshop.source, limit=20)
    first = workshop.build(tmp_path / "a", source=source, seed=None)
    again = workshop.build(tmp_path / "a", source=source, seed=None)
    other = workshop.build(tmp_path / "b", source=source, seed=None)
    assert first == again
    assert first.sketch.seed != other.sketch.seed


# --- interruption and repair ------------------------------------------------------------------


@pytest.mark.parametrize("slices", [1, 3])
def test_a_killed_build_resumes_and_ends_identical(workshop, built, nursery, tmp_path, slices):
    folder, whole = tmp_path / "killed", built
    if slices > 1:
        whole = tmp_path / "whole"
        workshop.build(whole, slices=slices)
    given = {
        "folder": str(folder),
        "model": str(workshop.model_folder),
        "factors": str(workshop.factors),
        "corpus": str(workshop.corpus),
        "options": {**asdict(workshop.options), "slices": slices},
    }
    with nursery.start(BUILDER, "halted", json.dumps(given), quiet=True) as child:
        assert child.stdout.readline() == "one shard\n"
        child.send_signal(signal.SIGKILL)
        assert child.wait() == -signal.SIGKILL
    before = inodes(folder)
    assert sorted(before) == ["00000.json", "00000.safetensors"]
    with pytest.raises(IndexMissing, match="No complete index"):
        open_index(folder, workshop.loaded)
    # what a kill in the middle of a write leaves: a temporary file, and codes without a receipt
    (folder / PART / "shards" / ".00001.safetensors.1.tmp").write_bytes(b"half a sh")
    codes_path(folder / PART, 1).write_bytes(codes_path(whole / PART, 1).read_bytes()[:-5])
    workshop.build(folder)
    assert_same_files(folder, whole)
    assert not {"00000.json", "00000.safetensors"} & rewritten(folder, before)
    open_index(folder, workshop.loaded)


def test_a_disk_full_at_every_write_is_resumable(workshop, tmp_path, monkeypatch):
    source = replace(workshop.source, limit=16)
    options = {"rows_per_shard": 8, "source": source}
    workshop.build(tmp_path / "whole", **options)
    real = os.fsync
    room = 0

    def fsync(descriptor: int) -> None:
        nonlocal room
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            if room == 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            room -= 1
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    failures = []
    for files in itertools.count():
        folder = tmp_path / str(files)
        room = files
        try:
            workshop.build(folder, **options)
        except DiskFull as error:
            failures.append(str(error))
            assert not (folder / FILE_NAME).exists()
            room = 1000
            workshop.build(folder, **options)
            assert_same_files(folder, tmp_path / "whole")
            continue
        break
    assert len(failures) == len(contents(tmp_path / "whole"))
    names = ("corpus.json", "00001.arrow", "00000.safetensors", "00001.json", FILE_NAME)
    for name in (PLAN_NAME, *names):
        assert name in " ".join(failures)


def damage_one_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def remove(path: Path) -> None:
    path.unlink()


@pytest.mark.parametrize("damage", [damage_one_byte, truncate, remove])
def test_a_damaged_shard_is_named_and_only_it_is_replaced(workshop, built, tmp_path, damage):
    copy_index(built, tmp_path)
    path = codes_path(tmp_path / PART, 2)
    damage(path)
    before = inodes(tmp_path)
    with pytest.raises(IndexCorrupt, match=r"shards/00002\.safetensors is .*run the build again"):
        open_index(tmp_path, workshop.loaded)
    workshop.build(tmp_path)
    assert_same_files(tmp_path, built)
    assert rewritten(tmp_path, before) <= {"00002.json", "00002.safetensors"}
    assert inodes(tmp_path).keys() == inodes(built).keys()
    open_index(tmp_path, workshop.loaded)


@pytest.mark.parametrize(
    "name", ["parts/000/examples/00001.arrow", "factors/estimator.safetensors"]
)
@pytest.mark.parametrize("damage", [damage_one_byte, truncate, remove])
def test_other_damaged_files_are_named_and_mended(workshop, built, tmp_path, damage, name):
    copy_index(built, tmp_path)
    damage(tmp_path / name)
    with pytest.raises(IndexCorrupt, match=f"{name} is truncated or was changed"):
        open_index(tmp_path, workshop.loaded)
    if damage is remove:
        workshop.build(tmp_path)
        assert_same_files(tmp_path, built)


@pytest.mark.parametrize("content", ["", "{}", '{"number": 1}', "[1]"])
def test_a_damaged_receipt_rebuilds_its_shard(workshop, built, tmp_path, content):
    copy_index(built, tmp_path)
    receipt_path(tmp_path / PART, 1).write_text(content)
    workshop.build(tmp_path)
    assert_same_files(tmp_path, built)


def copy_index(source: Path, target: Path) -> None:
    for name, content in contents(source).items():
        path = target / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


# --- refusals ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "value"),
    [("dimensions", 1024), ("rank", 8), ("damping", 0.2), ("codes", "half"), ("seed", 12)],
)
def test_other_settings_in_the_same_folder_are_refused_by_name(workshop, built, setting, value):
    before = contents(built)
    usual = getattr(workshop.options, setting)
    with pytest.raises(IndexMismatch, match=rf"\({setting}: {usual} -> {value}\)"):
        workshop.build(built, **{setting: value})
    assert contents(built) == before


def test_another_corpus_in_the_same_folder_is_refused(workshop, built):
    before = contents(built)
    with pytest.raises(IndexMismatch, match="source_sha256"):
        workshop.build(built, source=replace(workshop.source, limit=100))
    assert contents(built) == before


def test_factors_of_another_model_are_refused_with_both_hashes(workshop, other_model, tmp_path):
    with pytest.raises(IndexMismatch, match="fit the estimator on this model") as caught:
        workshop.build(tmp_path / "index", loaded=other_model)
    assert workshop.loaded.model_sha256 in str(caught.value)
    assert other_model.model_sha256 in str(caught.value)
    assert not (tmp_path / "index").exists()


def test_another_model_in_the_same_folder_is_refused_with_both_hashes(workshop, other_model, built):
    before = contents(built)
    factors = workshop.fit("identity", loaded=other_model)
    with pytest.raises(IndexMismatch, match="model_sha256") as caught:
        workshop.build(built, loaded=other_model, factors=factors)
    assert workshop.loaded.model_sha256 in str(caught.value)
    assert other_model.model_sha256 in str(caught.value)
    assert contents(built) == before


def small_corpus(folder: Path, rows: list[dict[str, object]]) -> CorpusSource:
    path = write_jsonl(folder / "small.jsonl", rows)
    return CorpusSource(data=str(path), id_column="id" if "id" in rows[0] else None)


def test_duplicate_ids_are_named_and_can_be_corrected(workshop, tmp_path):
    rows = [{"id": f"n{i % 3}", "text": text} for i, text in enumerate(sentences(5))]
    with pytest.raises(DuplicateIds, match="'n0' comes twice, in rows 0 and 3"):
        workshop.build(tmp_path / "index", source=small_corpus(tmp_path, rows))
    for number, row in enumerate(rows):
        row["id"] = f"n{number}"
    manifest = workshop.build(tmp_path / "index", source=small_corpus(tmp_path, rows))
    assert manifest.parts[0].data.rows == 5


def test_a_missing_column_is_named_with_those_there_are(workshop, tmp_path):
    source = replace(workshop.source, text_column="body")
    with pytest.raises(ValueError, match="no column 'body'; it has id, page, text"):
        workshop.build(tmp_path, source=source)
    source = replace(workshop.source, metadata_columns=("author",))
    with pytest.raises(ValueError, match="no column 'author'"):
        workshop.build(tmp_path, source=source)


def test_a_text_that_is_a_number_names_its_row(workshop, tmp_path):
    rows = [{"text": 1789}, {"text": 1848}]
    with pytest.raises(
        ValueError, match="Row 0 of the corpus has a number in column 'text', expected text"
    ):
        workshop.build(tmp_path / "index", source=small_corpus(tmp_path, rows))


def test_a_corpus_without_rows_or_file_is_refused(workshop, tmp_path):
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(ValueError, match=r"empty\.txt"):
        workshop.build(tmp_path / "i", source=CorpusSource(data=str(tmp_path / "empty.txt")))
    with pytest.raises(ValueError, match=r"nowhere\.jsonl"):
        workshop.build(tmp_path / "i", source=CorpusSource(data=str(tmp_path / "nowhere.jsonl")))


@pytest.mark.parametrize("max_tokens", [1, CONTEXT + 1])
def test_windows_the_model_cannot_read_are_refused(workshop, tmp_path, max_tokens):
    with pytest.raises(ValueError, match=f"between 2 and the model's context of {CONTEXT}"):
        workshop.build(tmp_path, max_tokens=max_tokens)


# --- rows of every kind -----------------------------------------------------------------------


def test_an_empty_text_is_kept_as_a_row_without_gradient(workshop, tmp_path):
    rows = [{"text": text} for text in sentences(20)]
    rows[4] = {"text": ""}
    manifest = workshop.build(tmp_path / "index", source=small_corpus(tmp_path, rows))
    assert manifest.parts[0].data.rows == 20
    assert manifest.failed == []
    _, norms = read_codes(tmp_path / "index")
    assert (norms == 0).nonzero()[0].tolist() == [4]
    opened = open_index(tmp_path / "index", workshop.loaded)
    assert opened.examples[4].text == ""
    for ranking in ("score", "normalised"):
        query = Query(prompt="The bridge", completion=" of Porto", k=20, budget=20, ranking=ranking)
        answer = Retriever(opened).answer(replace(query, calibration_rows=20))
        (empty,) = [result for result in answer.results if result.row == 4]
        assert (empty.score, empty.normalised_score, empty.proxy) == (0, 0, 0)
        values = [r.score if ranking == "score" else r.normalised_score for r in answer.results]
        assert values == sorted(values, reverse=True)


def test_a_corpus_of_one_row_is_built(workshop, tmp_path):
    rows = [{"text": sentences(1)[0]}]
    manifest = workshop.build(tmp_path / "index", source=small_corpus(tmp_path, rows))
    assert manifest.parts[0].data.rows == 1
    opened = open_index(tmp_path / "index", workshop.loaded)
    answer = Retriever(opened).answer(Query(prompt="The", completion=" market", k=1, budget=1))
    assert [result.row for result in answer.results] == [0]
    assert answer.certificates[0].status == "exhaustive"


def test_long_documents_are_cut_into_windows_that_lead_back(workshop, tmp_path):
    texts = sentences(12)
    rows = [
        {"id": f"doc-{i}", "text": " ".join(texts[3 * i : 3 * i + 3]), "page": i} for i in range(4)
    ]
    rows.append({"id": "short", "text": "Lyon", "page": 4})
    source = small_corpus(tmp_path, rows)
    manifest = workshop.build(tmp_path / "index", source=source, max_tokens=12)
    store = open_index(tmp_path / "index", workshop.loaded).examples
    assert manifest.parts[0].data.documents == 5
    assert manifest.parts[0].data.rows == len(store) > 9
    for number, row in enumerate(rows[:4]):
        parts = [store[r] for r in range(len(store)) if store[r].document == row["id"]]
        assert [part.id for part in parts] == [f"doc-{number}#w{w}" for w in range(len(parts))]
        assert all(len(part.tokens) == 12 for part in parts[:-1])
        joined = [token for part in parts for token in part.tokens]
        assert joined == workshop.loaded.encode(str(row["text"]))
        assert all(part.text == workshop.loaded.tokenizer.decode(part.tokens) for part in parts)
        assert all(part.metadata == {"page": number} for part in parts)
    assert store[store.row_of("short")].document == "short"


def test_the_document_column_is_taken_as_it_is(workshop, tmp_path):
    rows = [{"id": f"n{i}", "text": text, "part_of": i // 2} for i, text in enumerate(sentences(4))]
    source = replace(small_corpus(tmp_path, rows), document_column="part_of")
    examples = list(read_examples(source, workshop.loaded, CONTEXT))
    assert [example.document for example in examples] == ["0", "0", "1", "1"]
    assert [example.metadata for example in examples] == [{}] * 4


def test_all_file_formats_give_the_same_examples(workshop, tmp_path):
    texts = [*sentences(6), 'Málaga, "the old one", is 1,000 km away.', "  two  spaces "]
    table = pa.table({"text": texts, "page": list(range(len(texts)))})
    pa.csv.write_csv(table, tmp_path / "a.csv")
    pa.parquet.write_table(table, tmp_path / "a.parquet")
    write_jsonl(tmp_path / "a.jsonl", table.to_pylist())
    (tmp_path / "a.json").write_text(json.dumps(table.to_pylist()))
    (tmp_path / "a.txt").write_text("\n".join(texts) + "\n")
    read = {
        path.suffix: list(
            read_examples(CorpusSource(data=str(path)), workshop.loaded, max_tokens=16)
        )
        for path in tmp_path.glob("a.*")
    }
    assert sorted(read) == [".csv", ".json", ".jsonl", ".parquet", ".txt"]
    jsonl = read[".jsonl"]
    assert any(example.id == "6#w0" for example in jsonl)
    assert {example.document for example in jsonl} == {str(i) for i in range(len(texts))}
    for suffix in (".csv", ".json", ".parquet"):
        assert read[suffix] == jsonl
    assert read[".txt"] == [replace(example, metadata={}) for example in jsonl]


def test_metadata_that_json_lacks_is_kept_as_text_or_null(workshop, tmp_path):
    day = datetime.date(2020, 1, 2)
    columns = {"text": sentences(6), "day": [day] * 6, "share": [0.5, np.nan, *[np.inf] * 4]}
    path = tmp_path / "a.parquet"
    pa.parquet.write_table(pa.table(columns), path)
    workshop.build(tmp_path / "index", source=CorpusSource(data=str(path)))
    store = open_index(tmp_path / "index", workshop.loaded).examples
    found = [store[row].metadata for row in range(3)]
    assert found[0] == {"day": "2020-01-02", "share": 0.5}
    assert [metadata["share"] for metadata in found[1:]] == [None, None]
    # the JSON reader turns dates into objects by itself
    rows = [{"text": text, "day": "2020-01-02"} for text in sentences(6)]
    workshop.build(tmp_path / "dates", source=small_corpus(tmp_path, rows))
    store = open_index(tmp_path / "dates", workshop.loaded).examples
    assert str(store[0].metadata["day"]).startswith("2020-01-02")


@pytest.fixture(scope="module")
def broken(workshop, tmp_path_factory):
    """A model whose embedding of one rare token is NaN, and an index with that token in 2 rows."""
    folder = tmp_path_factory.mktemp("broken")
    tokenizer = AutoTokenizer.from_pretrained(workshop.model_folder)
    model = AutoModelForCausalLM.from_pretrained(workshop.model_folder)
    (rare,) = tokenizer(RARE, add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        model.get_input_embeddings().weight[rare] = torch.nan
    loaded = load_model(str(save(folder / "model", model, tokenizer)))
    factors = workshop.fit("ekfac", loaded=loaded)
    texts = sentences(60)
    rows = [{"text": text} for text in texts]
    for row in (7, 33):
        rows[row] = {"text": f"{texts[row]} {RARE} {texts[0]}"[: len(texts[row]) + 9]}
    manifest = workshop.build(
        folder / "index", source=small_corpus(folder, rows), loaded=loaded, factors=factors
    )
    return folder / "index", loaded, manifest


def test_rows_whose_gradient_is_nan_are_on_record(broken):
    folder, _, manifest = broken
    assert [failed.row for failed in manifest.failed] == [7, 33]
    assert all("not finite" in failed.reason for failed in manifest.failed)
    assert np.isfinite(manifest.sketch.noise.measured)
    codes, norms = read_codes(folder)
    assert (norms == 0).nonzero()[0].tolist() == [7, 33]
    assert np.isfinite(norms).all()
    assert len(codes) == 60


@pytest.mark.parametrize("ranking", ["score", "normalised"])
def test_proxies_of_failed_rows_are_below_all_others(broken, ranking):
    folder, loaded, _ = broken
    retriever = Retriever(open_index(folder, loaded))
    directions, _ = retriever.directions(loaded.encode_query("The bridge", " of Porto"))
    proxies = retriever.proxies(directions, ranking)
    assert (proxies.values == -np.inf).nonzero()[0].tolist() == [7, 33]
    assert proxies.failed.nonzero()[0].tolist() == [7, 33]


@pytest.mark.parametrize("ranking", ["score", "normalised"])
@pytest.mark.parametrize("calibration_rows", [0, 16, 60])
@pytest.mark.parametrize("audit_rows", [0, 60])
def test_failed_rows_are_never_served_and_lower_every_bound(
    broken, ranking, calibration_rows, audit_rows
):
    folder, loaded, _ = broken
    retriever = Retriever(open_index(folder, loaded))
    query = Query(
        prompt="The bridge",
        completion=" of Porto",
        k=10,
        ranking=ranking,
        budget=60,
        calibration_rows=calibration_rows,
        audit_rows=audit_rows,
        seed=3,
    )
    answer = retriever.answer(query)
    assert len(answer.results) == 10
    assert not {7, 33} & {result.row for result in answer.results}
    assert all(np.isfinite([r.score, r.normalised_score, r.proxy]).all() for r in answer.results)
    for certificate in answer.certificates:
        assert certificate.status != "exhaustive"
        assert certificate.recall_lower_bound is None or certificate.recall_lower_bound <= 0.8
        assert "Every row was scored" not in certificate.sentence
        assert "All 60 rows" not in certificate.sentence
    if calibration_rows == 60 or audit_rows == 60:
        audit = next(c for c in answer.certificates if c.type == "audit")
        assert audit.recall_lower_bound == pytest.approx(0.8)
    everything = retriever.answer(replace(query, k=60, calibration_rows=60))
    assert sorted(result.row for result in everything.results) == [
        row for row in range(60) if row not in (7, 33)
    ]


def test_examples_of_a_broken_file_are_corrupt(tmp_path):
    (tmp_path / "00000.arrow").write_bytes(b"not arrow")
    with pytest.raises(IndexCorrupt, match=r"00000\.arrow"):
        ExampleStore([tmp_path / "00000.arrow"])
