"""Corpora as they are: empty, null, broken, repeated and very long rows."""

import json
from dataclasses import replace

import numpy as np
import pytest

from index.manifest import Manifest
from service.corpus.source import CorpusSource
from service.search.opening import open_index
from service.search.query import Query
from service.search.retrieval import Retriever
from tests.index_fixtures import CONTEXT, sentences, write_jsonl

pytest_plugins = ["tests.index_fixtures"]

TEXTS = sentences(24)
LONG = 30_000


@pytest.fixture(scope="module")
def dirty(workshop, tmp_path_factory):
    """An index of 24 good rows, among them one of every kind of bad one."""
    folder = tmp_path_factory.mktemp("dirty")
    lines = [json.dumps({"id": f"good-{i}", "text": text}).encode() for i, text in enumerate(TEXTS)]
    lines[3:3] = [b'{"id": "null", "text": null}', b'{"id": "nan", "text": NaN}']
    lines[7:7] = [b'{"id": "empty", "text": ""}', b'{"id": "blank", "text": " \\n\\t "}']
    lines[11:11] = [b'{"id": "bytes", "text": "Caf\xe9 and \xff\xfe in Porto."}']
    lines[13:13] = [json.dumps({"id": "twin", "text": TEXTS[0]}).encode()]
    lines.append(json.dumps({"id": "controls", "text": "\x00\x1b[31m\u202e end of Porto"}).encode())
    path = folder / "dirty.jsonl"
    path.write_bytes(b"\n".join(lines) + b"\n")
    manifest = workshop.build(
        folder / "index", source=CorpusSource(data=str(path), id_column="id"), rows_per_shard=8
    )
    return folder / "index", manifest


def test_every_row_is_kept_and_what_is_odd_is_counted(dirty):
    folder, manifest = dirty
    (part,) = manifest.parts
    data = part.data
    assert data.rows == len(TEXTS) + 7
    assert data.null_rows == 2
    assert data.replaced_rows == 1
    assert data.empty_rows == 3  # null, NaN and ""; white space has tokens
    assert data.duplicate_rows == 3  # the twin, and two further empty rows
    assert manifest.failed == []
    assert Manifest.read(folder) == manifest


def test_rows_of_every_kind_are_found_by_id_and_ranked(workshop, dirty):
    folder, manifest = dirty
    retriever = Retriever(open_index(folder, workshop.loaded))
    store = retriever.index.examples
    assert store[store.row_of("bytes")].text == "Caf\ufffd and \ufffd\ufffd in Porto."
    assert store[store.row_of("null")].text == store[store.row_of("nan")].text == ""
    query = Query(
        prompt="The bridge", completion=" of Porto", k=manifest.rows, budget=manifest.rows
    )
    answer = retriever.answer(replace(query, calibration_rows=8))
    by_id = {result.id: result for result in answer.results}
    assert len(by_id) == manifest.rows
    assert by_id["null"].score == by_id["nan"].score == by_id["empty"].score == 0
    assert by_id["twin"].score == pytest.approx(by_id["good-0"].score, rel=1e-4)
    # Another batch rounds otherwise, which may decide one of 2,048 bits.
    largest = max(abs(result.score) for result in answer.results)
    assert by_id["twin"].proxy == pytest.approx(by_id["good-0"].proxy, abs=0.02 * largest)
    assert all(np.isfinite(result.score) for result in answer.results)


def test_a_line_that_is_no_json_is_named(workshop, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"id": "1", "text": "a"}\n{"id": "2", "text": "b\n')
    with pytest.raises(ValueError, match=r"Cannot read the corpus .*a\.jsonl.*line 2"):
        workshop.build(tmp_path / "index", source=CorpusSource(data=str(path)))


def test_a_text_file_with_bytes_that_are_not_utf_8(workshop, tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("\n".join(TEXTS).encode() + b"\nCaf\xe9 of Porto\n")
    manifest = workshop.build(tmp_path / "index", source=CorpusSource(data=str(path)))
    assert manifest.parts[0].data.replaced_rows == 1
    assert manifest.rows == len(TEXTS) + 1


def test_ids_of_a_table_keep_their_leading_zeros(workshop, tmp_path):
    path = tmp_path / "a.csv"
    rows = [f'{i:03d},"{text}"' for i, text in enumerate(TEXTS)]
    path.write_text("\n".join(["id,text", *rows, "024,"]) + "\n")
    source = CorpusSource(data=str(path), id_column="id")
    manifest = workshop.build(tmp_path / "index", source=source)
    store = open_index(tmp_path / "index", workshop.loaded).examples
    assert store.ids() == [f"{i:03d}" for i in range(25)]
    assert manifest.parts[0].data.null_rows == 1


def with_book(workshop, folder, sentences):
    """An index of one text of so many sentences among short ones; its manifest and that text."""
    book = " ".join(np.random.default_rng(0).choice(TEXTS, sentences))
    rows = [{"id": f"s{i}", "text": text} for i, text in enumerate(TEXTS)]
    rows.insert(5, {"id": "book", "text": book})
    source = CorpusSource(data=str(write_jsonl(folder / "a.jsonl", rows)), id_column="id")
    manifest = workshop.build(folder / "index", source=source, dimensions=512, rows_per_shard=2048)
    return folder / "index", manifest, book


@pytest.fixture(scope="module")
def story(workshop, tmp_path_factory):
    """One text of some hundred windows among short ones."""
    return with_book(workshop, tmp_path_factory.mktemp("story"), 600)


def test_a_text_of_30_000_tokens_is_cut_into_windows_that_lead_back(workshop, tmp_path):
    folder, manifest, book = with_book(workshop, tmp_path, 3_000)
    store = open_index(folder, workshop.loaded).examples
    rows = store.rows_of_document("book")
    tokens = workshop.loaded.encode(book)
    assert len(tokens) > LONG
    assert len(rows) == -(-len(tokens) // CONTEXT)
    assert rows == list(range(5, 5 + len(rows)))
    assert [token for row in rows for token in store.tokens(row)] == tokens
    assert manifest.parts[0].data.documents == len(TEXTS) + 1


def test_a_documents_score_is_the_sum_over_its_windows(workshop, story):
    folder, manifest, _ = story
    retriever = Retriever(open_index(folder, workshop.loaded))
    rows = manifest.rows
    query = Query(prompt="The bridge", completion=" of Porto", k=40, ranking="score", budget=rows)
    answer = retriever.answer(replace(query, documents=True))
    exhaustive = retriever.answer(replace(query, k=rows, documents=False))
    assert exhaustive.documents == []
    scores: dict[str, list[float]] = {}
    for result in exhaustive.results:
        scores.setdefault(result.document, []).append(result.score)
    assert [d.document for d in answer.documents] == list(
        dict.fromkeys(result.document for result in answer.results)
    )
    assert sum(d.found for d in answer.documents) == 40
    for document in answer.documents:
        assert document.rows == len(scores[document.document])
        assert document.score == pytest.approx(sum(scores[document.document]), rel=1e-3, abs=1e-3)


def test_a_document_with_more_rows_than_the_budget_has_no_score(workshop, story):
    folder, _, _ = story
    retriever = Retriever(open_index(folder, workshop.loaded))
    query = Query(prompt="The bridge", completion=" of Porto", k=40, budget=100, documents=True)
    scores = {d.document: d.score for d in retriever.answer(query).documents}
    assert scores["book"] is None
    assert all(score is not None for name, score in scores.items() if name != "book")
