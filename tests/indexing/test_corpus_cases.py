"""Corpora as people have them on their disks: what is read, and what is refused in which words.

``pytest tests/indexing/test_corpus_cases.py -k cases -s`` prints the sentences below each other.
"""

import bz2
import gc
import gzip
import json
import lzma
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from datasets import Dataset, DatasetDict, disable_progress_bars
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from estimators.model.progress import no_progress
from index.examples import Example
from service.corpus import rows
from service.corpus.reading import Dirt, read_examples
from service.corpus.source import CorpusSource, fingerprint_source
from service.indexing.fitting import FitOptions, draw_sequences
from service.indexing.reading import read_corpus

PAGE = Path(__file__).parents[2] / "docs" / "troubleshooting.md"
CONTEXT = 64
GOOD = '{"text": "one two"}\n'

# The library leaves a file open whose reading fails: it is closed here, not in another test.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")


@pytest.fixture(scope="module", autouse=True)
def nothing_left_open() -> Iterator[None]:
    yield
    gc.collect()


@dataclass(frozen=True)
class Reader:
    """What reading a corpus needs of a model."""

    tokenizer: PreTrainedTokenizerFast
    context: int = CONTEXT

    def encode(self, text: str) -> list[int]:
        return list(self.tokenizer(text)["input_ids"])


@pytest.fixture(scope="module")
def loaded() -> Reader:
    """A token a byte, and no other before them."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return Reader(PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>"))


Content = str | bytes | pa.Table


def write(folder: Path, files: dict[str, Content]) -> None:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, pa.Table):
            pq.write_table(content, path)
        else:
            path.write_bytes(content.encode() if isinstance(content, str) else content)


def lines(*rows: object) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


@dataclass(frozen=True, kw_only=True)
class Refused:
    """A corpus that is refused.

    Attributes:
        files: what is on the disk.
        given: what is named as the corpus, within the folder; None takes the first file.
        says: what the sentence says after it has named the corpus.
        told: the part of ``says`` that stands in the page about troubles.
        name: given as it is, instead of ``given``.
        id_column: named as such.
    """

    files: dict[str, Content] = field(default_factory=dict)
    given: str | None = None
    says: str
    told: str
    name: str | None = None
    id_column: str | None = None


EMPTY = "there are no examples in it"
KINDS = (
    "Give a file ending in .jsonl, .json, .parquet, .arrow, .csv, .txt, or the name of a data set."
)
NO_TEXT_COLUMN = "Row 0 of the corpus has no column 'text'; it has "
NAMED = "Name a column that it has."
NOTHING = "there is nothing to learn from in it, because no row has two tokens"
HALF = "half of a surrogate pair, which is no character"
MODEL = "it holds no examples; this looks like a model"
NO_FILE = "there is no file or folder"
NO_DATA_SET = "there is no such file or folder, and no data set of this name was found"
ENDING = "the ending of a file's name tells its kind, and"
UTF_16 = "its text is in UTF-16 or UTF-32"
NO_ID = "of the corpus has no id in column 'id'. Give it one, or leave the column's option out."
ROUNDED = "holds the whole number {}, which would be changed because it does not fit into 64 bits"
CUT_OFF = "compressed file ended before the end-of-stream marker was reached"
BROKEN_PARQUET = "it is no Parquet file, or not all of one"


def empty(name: str, content: Content = "") -> Refused:
    return Refused(files={name: content}, says=f"{EMPTY}.", told=EMPTY)


def without_text(columns: str, name: str, content: str, hint: str = "") -> Refused:
    says = f"{NO_TEXT_COLUMN}{columns}. {hint}{NAMED}"
    return Refused(files={name: content}, says=says, told="has no column 'text'; it has")


def nothing(name: str, content: Content, listing: str) -> Refused:
    says = f"{NOTHING} ({listing}). Is 'text' the column of the texts?"
    return Refused(files={name: content}, says=says, told=NOTHING)


def broken(name: str, content: Content, fault: str) -> Refused:
    return Refused(
        files={name: content},
        says=f"{fault}. Correct the line or remove it.",
        told="is not JSON",
    )


def half(name: str, content: str, where: str) -> Refused:
    return Refused(files={name: content}, says=f"{where} holds \\ud800, {HALF}.", told=HALF)


def model(name: str, content: Content) -> Refused:
    says = f"{MODEL}. Give the texts that it was trained on."
    return Refused(
        files={f"m/{name}": content, "m/vocab.json": "{}"}, given="m", says=says, told=MODEL
    )


def ending(name: str, told: str) -> Refused:
    return Refused(files={name: GOOD}, says=f"{ENDING} {told}. {KINDS}", told=ENDING)


SINGLE = "The file is a single object; give an array of objects, or an object a line. "
OWN = "Write a row's text into a column of its own"

REFUSED = {
    "empty jsonl": empty("a.jsonl"),
    "empty json": empty("a.json"),
    "empty array": empty("a.json", "[]"),
    "empty csv": empty("a.csv"),
    "csv with a header only": empty("a.csv", "id,text\n"),
    "empty text": empty("a.txt"),
    "blank lines": empty("a.jsonl", "\n \n\n"),
    "empty parquet": empty("a.parquet"),
    "parquet without rows": empty("a.parquet", pa.table({"text": pa.array([], pa.string())})),
    "nulls only": nothing("a.jsonl", lines({"text": None}, {"text": None}), "2 without text"),
    "empty texts only": nothing("a.jsonl", lines({"text": ""}, {"text": ""}), "2 of an empty text"),
    "single letters": nothing("a.txt", "a\nb\n", "2 of a single token"),
    "a bit of each": nothing(
        "a.jsonl",
        lines({"text": None}, {"text": ""}, {"text": "a"}, {"text": "b"}),
        "1 without text, 1 of an empty text, 2 of a single token",
    ),
    "half a pair": half("a.jsonl", GOOD + lines({"text": "\ud800"}), "row 1 (line 2)"),
    "half a pair after a blank line": half(
        "a.jsonl", GOOD + "\n" + lines({"text": "\ud800 a"}), "row 1 (line 3)"
    ),
    "half a pair in an id": half(
        "a.jsonl", lines({"text": "one", "id": "\ud800"}), "row 0 (line 1)"
    ),
    "half a pair in an array": half(
        "a.json", json.dumps([{"text": "one"}, {"text": "two \ud800"}]), "row 1"
    ),
    "line 3 ends early": broken(
        "a.jsonl",
        2 * GOOD + '{"text": "b\n' + GOOD,
        "line 3 is not JSON (Unterminated string starting at character 10)",
    ),
    "line 3 without a colon": broken(
        "a.jsonl",
        2 * GOOD + '{"text" "b"}\n' + GOOD,
        "line 3 is not JSON (Expecting ':' delimiter at character 9)",
    ),
    "no json at all": broken(
        "a.jsonl", "Once upon a time\n", "line 1 is not JSON (Expecting value at character 1)"
    ),
    "an array that ends early": broken(
        "a.json",
        '[{"text": "a"},\n{"text": "b"}\n',
        "line 3 is not JSON (Expecting ',' delimiter at character 1)",
    ),
    "lines of strings": Refused(
        files={"a.jsonl": '"a"\n"b"\n'},
        says="line 1 is a text, expected an object with columns.",
        told="expected an object with columns",
    ),
    "csv with too many fields": Refused(
        files={"a.csv": "id,text\n1,a\n2,b,c,d\n"},
        says="Expected 2 fields in line 3, saw 4.",
        told="Expected 2 fields in line 3, saw 4",
    ),
    "csv with semicolons": without_text("id;text", "a.csv", "id;text\n1;a\n"),
    "dialogue": without_text(
        "dialogue, id", "a.jsonl", lines({"id": 1, "dialogue": [{"role": "user", "content": "x"}]})
    ),
    "tokens": without_text("tokens", "a.jsonl", lines({"tokens": [1, 2, 3]})),
    "an object instead of an array": without_text(
        "data, version", "a.json", json.dumps({"data": [{"text": "a"}], "version": 1}), SINGLE
    ),
    "an object of lists": Refused(
        files={"a.json": json.dumps({"text": ["a", "b"]})},
        says=(
            f"Row 0 of the corpus has a list in column 'text', expected text. {SINGLE}{OWN} or "
            f"name another column."
        ),
        told="in column 'text', expected text",
    ),
    "a number": Refused(
        files={"a.jsonl": GOOD + lines({"text": 3})},
        says=(
            "Row 1 of the corpus has a number in column 'text', expected text. Remove the row or "
            "name another column."
        ),
        told="in column 'text', expected text",
    ),
    "a csv of numbers": Refused(
        files={"a.csv": "id,text\n1,2\n"},
        says=(
            "Row 0 of the corpus has a number in column 'text', expected text. Remove the row or "
            "name another column."
        ),
        told="in column 'text', expected text",
    ),
    "a model": model("config.json", '{"model_type": "gpt2"}'),
    "a model without a configuration": model("model-00001-of-2.safetensors", b"123"),
    "an adapter": model("adapter_config.json", "{}"),
    "an index": Refused(
        files={"i/manifest.json": "{}", "i/parts/000/plan.json": "{}"},
        given="i",
        says="it holds no examples; this looks like an index of Etymon.",
        told="it holds no examples; this looks like an index of Etymon",
    ),
    "a pattern of nothing": Refused(
        given="shard-*.jsonl",
        says="no file matches this pattern.",
        told="no file matches this pattern",
    ),
    "an id that is null": Refused(
        files={"a.jsonl": lines({"text": "a b", "id": "x"}, {"text": "c d", "id": None})},
        says=f"Row 1 {NO_ID}",
        told="has no id in column",
        id_column="id",
    ),
    "an empty id": Refused(
        files={"a.csv": "id,text\n,a b\n"},
        says=f"Row 0 {NO_ID}",
        told="has no id in column",
        id_column="id",
    ),
    "an id that is a float": Refused(
        files={"a.jsonl": lines({"text": "a b", "id": 1000.0})},
        says=(
            "Row 0 of the corpus has a number (1000.0) in column 'id', expected a text or a whole "
            "number as its id. Write ids as texts."
        ),
        told="expected a text or a whole number as its id",
        id_column="id",
    ),
    "an id of more than 64 bits": Refused(
        files={"a.jsonl": lines({"text": "a b", "id": 2**70}, {"text": "c d", "id": 1})},
        says=f"row 0 {ROUNDED.format(2**70)}. Write it as a text.",
        told="because it does not fit into 64 bits",
        id_column="id",
    ),
    "a number of more than 64 bits": Refused(
        files={"a.json": json.dumps([{"text": "a b", "deep": {"n": [-(2**64)]}}])},
        says=f"row 0 {ROUNDED.format(-(2**64))}. Write it as a text.",
        told="because it does not fit into 64 bits",
    ),
    "a folder of other files": Refused(
        files={"d/a.docx": b"x"},
        given="d",
        says="the folder holds no file ending in .jsonl, .json, .parquet, .arrow, .csv, .txt.",
        told="the folder holds no file ending in",
    ),
    "packed": Refused(
        files={"a.jsonl.zip": b"PK"},
        says="the file is packed. Unpack it first.",
        told="the file is packed",
    ),
    "half a compressed file": Refused(
        files={"a.jsonl.gz": gzip.compress(100 * GOOD.encode())[:-20]},
        says=f"{CUT_OFF}.",
        told=CUT_OFF,
    ),
    "broken and compressed": broken(
        "a.jsonl.gz",
        gzip.compress((GOOD + '{"text": "b\n').encode()),
        "line 2 is not JSON (Unterminated string starting at character 10)",
    ),
    "not compressed at all": Refused(
        files={"a.jsonl.gz": GOOD},
        says="not a gzipped file (b'{\"').",
        told="not a gzipped file",
    ),
    "tabs": ending("a.tsv", "'.tsv' is none that is read"),
    "no ending": ending("corpus", "this name has none"),
    "a model's file": ending("model.safetensors", "'.safetensors' is none that is read"),
    "utf-16": Refused(
        files={"a.jsonl": GOOD.encode("utf-16")},
        says=f"{UTF_16}. Save it as UTF-8.",
        told=UTF_16,
    ),
    "half a parquet": Refused(
        files={"a.parquet": b"PAR1 and no more"},
        says=f"{BROKEN_PARQUET}. Write or download it again.",
        told=BROKEN_PARQUET,
    ),
    "a mistyped file": Refused(
        given="corpsu.jsonl", says=f"{NO_FILE} FOLDER/corpsu.jsonl.", told=NO_FILE
    ),
    "a mistyped folder": Refused(given="corpsu", says=f"{NO_FILE} FOLDER/corpsu.", told=NO_FILE),
    "a mistyped name": Refused(
        name="my/corpsu",
        says=f"{NO_DATA_SET} (no connection to the hub). {KINDS}",
        told=NO_DATA_SET,
    ),
    "no name": Refused(name="", says=f"no corpus is named. {KINDS}", told="no corpus is named"),
}


def unreachable(*_: object, **__: object) -> None:
    """What the library does without a network."""
    raise ConnectionError("no connection to the hub.")


def source_of(case: Refused, folder: Path) -> CorpusSource:
    write(folder, case.files)
    given = case.given or next(iter(case.files), "")
    data = str(folder / given) if case.name is None else case.name
    return CorpusSource(data=data, id_column=case.id_column)


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED)
def test_cases_of_corpora_are_refused_in_one_sentence(
    case: Refused, loaded: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if case.name:
        monkeypatch.setattr(rows, "load_dataset", unreachable)
    source = source_of(case, tmp_path)
    with pytest.raises(ValueError) as error:
        list(read_examples(source, loaded, CONTEXT))
    sentence = str(error.value).replace(str(tmp_path), "FOLDER")
    print("\n" + sentence)
    named = "" if case.says.startswith("Row ") else "Cannot read the corpus "
    given = f"'{source.data}': ".replace(str(tmp_path), "FOLDER") if named else ""
    assert sentence == named + given + case.says
    assert case.told in sentence


@pytest.mark.parametrize("told", sorted({case.told for case in REFUSED.values()}))
def test_each_sentence_stands_in_the_page_about_troubles(told: str) -> None:
    assert told in " ".join(PAGE.read_text().split())


def read(folder: Path, source: CorpusSource, loaded: Any) -> Any:
    return read_corpus(folder, source, loaded, CONTEXT, 8, no_progress, lambda _: None)


def fit(_: Path, source: CorpusSource, loaded: Any) -> Any:
    return draw_sequences(loaded, source, FitOptions())


@pytest.mark.parametrize("step", [read, fit], ids=["build", "fit"])
@pytest.mark.parametrize("name", ["empty jsonl", "a bit of each", "a model", "dialogue"])
def test_cases_are_refused_before_fit_and_build_begin(
    step: Callable[..., Any], name: str, loaded: Any, tmp_path: Path
) -> None:
    source = source_of(REFUSED[name], tmp_path / "corpus")
    with pytest.raises(ValueError, match=re.escape(REFUSED[name].told)):
        step(tmp_path / "part", source, loaded)
    assert not (tmp_path / "part" / "corpus.json").exists()


def test_a_draw_of_nothing_is_refused(loaded: Any, tmp_path: Path) -> None:
    write(tmp_path, {"a.jsonl": GOOD + 50 * lines({"text": ""})})
    source = CorpusSource(data=str(tmp_path / "a.jsonl"))
    assert len(draw_sequences(loaded, source, FitOptions())) == 51
    with pytest.raises(ValueError, match="of 51 examples 1 were drawn, none of which has two"):
        draw_sequences(loaded, source, FitOptions(examples=1))


def test_the_name_of_a_data_set_is_no_file_to_hash(tmp_path: Path) -> None:
    assert fingerprint_source(CorpusSource(data="my/corpus"))
    with pytest.raises(ValueError, match=NO_FILE):
        fingerprint_source(CorpusSource(data=str(tmp_path / "a.jsonl")))


# What is read


@pytest.fixture
def examples(loaded: Any, tmp_path: Path) -> Callable[..., list[Example]]:
    def read(files: dict[str, Content], given: str | None = None, **options: Any) -> list[Example]:
        write(tmp_path, files)
        data = str(tmp_path / (given or next(iter(files))))
        return list(read_examples(CorpusSource(data=data, **options), loaded, CONTEXT))

    return read


@pytest.mark.parametrize(
    ("files", "given"),
    [
        ({"A.JSONL": lines({"text": "a b"}, {"text": "c d"})}, None),
        ({"a.json": json.dumps([{"text": "a b"}, {"text": "c d"}])}, None),
        ({"a.json": '[\n  {"text": "a b"},\n  {"text": "c d"}\n]\n'}, None),
        ({"a.json": lines({"text": "a b"}, {"text": "c d"})}, None),
        ({"a.jsonl": b"\xef\xbb\xbf" + lines({"text": "a b"}, {"text": "c d"}).encode()}, None),
        ({"a.jsonl": lines({"text": "a b"}, {"text": "c d"}).replace("\n", "\r\n")}, None),
        ({"a.txt": "a b\nc d"}, None),
        ({"d/1.txt": "a b\n", "d/2.txt": "c d\n"}, "d"),
        ({"d/1.jsonl": lines({"text": "a b"}), "d/2.jsonl": lines({"text": "c d"})}, "d"),
        ({"ä ö/ü.csv": "text\na b\nc d\n"}, None),
    ],
    ids=str,
)
def test_the_same_texts_in_other_files(
    examples: Callable[..., list[Example]], files: dict[str, Content], given: str | None
) -> None:
    assert [example.text for example in examples(files, given)] == ["a b", "c d"]


@pytest.mark.parametrize(
    "column",
    [
        pa.array(["a b", "c d", None], pa.large_string()),
        pa.array(["a b", "c d", None], pa.string()).dictionary_encode(),
    ],
    ids=["large_string", "dictionary"],
)
def test_columns_of_parquet(examples: Callable[..., list[Example]], column: pa.Array) -> None:
    table = pa.table({"text": column, "n": pa.array([1, 2, 3], pa.int8())})
    found = examples({"a.parquet": table})
    assert [(example.text, example.metadata["n"]) for example in found] == [
        ("a b", 1),
        ("c d", 2),
        ("", 3),
    ]


def test_csv_with_line_breaks_and_quotes_in_a_text(
    examples: Callable[..., list[Example]],
) -> None:
    found = examples({"a.csv": 'text,n\n"one\ntwo, ""three""\n",1\nfour,2\n'})
    assert [example.text for example in found] == ['one\ntwo, "three"\n', "four"]


ODD_TEXTS = [
    "a\x00b",
    "a\u2028b\u2029c\x85d\x0be\x0cf",
    "<s> is a token </s>",
    "\u202eright to left \U0001f469\u200d\U0001f4bb",
]
ODD_IDS = ["a/b/../c", "<b>&amp;</b>", "one\ntwo\tthree", "'; DROP TABLE"]


def test_odd_texts_and_ids_are_kept_as_they_are(
    examples: Callable[..., list[Example]],
) -> None:
    rows = [{"id": i, "text": text} for i, text in zip(ODD_IDS, ODD_TEXTS, strict=True)]
    found = examples({"a.jsonl": lines(*rows)}, id_column="id")
    assert [(example.id, example.text) for example in found] == list(
        zip(ODD_IDS, ODD_TEXTS, strict=True)
    )


def test_a_line_of_a_text_file_ends_at_a_line_feed_only(
    examples: Callable[..., list[Example]],
) -> None:
    found = examples({"a.txt": "one\u2028two\x85three\x0bfour\nfive six\n"})
    assert [example.text for example in found] == ["one\u2028two\x85three\x0bfour", "five six"]


def test_metadata_keep_their_types_and_their_depth(
    examples: Callable[..., list[Example]],
) -> None:
    metadata = {"n": 3, "x": 0.5, "yes": True, "list": [1, 2], "deep": {"a": {"b": ["c"]}}}
    (found,) = examples({"a.jsonl": lines({"text": "a b", **metadata})})
    assert found.metadata == metadata


def test_some_rows_without_anything_to_learn_are_kept_and_counted(
    loaded: Any, tmp_path: Path
) -> None:
    texts = [None, "", "a", "a b", "caf\ufffd"]
    write(tmp_path, {"a.jsonl": lines(*({"text": text} for text in texts))})
    dirt = Dirt()
    found = list(read_examples(CorpusSource(data=str(tmp_path / "a.jsonl")), loaded, CONTEXT, dirt))
    assert [len(example.tokens) for example in found] == [0, 0, 1, 3, 6]
    assert dirt == Dirt(
        rows=5,
        null_rows=1,
        replaced_rows=1,
        empty_rows=1,
        short_rows=1,
        learnable_rows=2,
        format="text",
    )


ROWS = [{"id": f"r{i}", "text": f"row {i}"} for i in range(6)]
AS_LINES, AS_TABLE = lines(*ROWS).encode(), pa.Table.from_pylist(ROWS)
FIRST, LAST = lines(*ROWS[:4]).encode(), lines(*ROWS[4:]).encode()
MARK = b"\xef\xbb\xbf"
AS_VALUES = "id,text\n" + "".join(f"{row['id']},{row['text']}\n" for row in ROWS)

HELD: dict[str, tuple[dict[str, Content], list[str]]] = {
    "gzip": ({"a.jsonl.gz": gzip.compress(AS_LINES)}, ["a.jsonl.gz"]),
    "bzip2": ({"a.json.bz2": bz2.compress(AS_LINES)}, ["a.json.bz2"]),
    "xz": ({"a.csv.xz": lzma.compress(AS_VALUES.encode())}, ["a.csv.xz"]),
    "zstandard": ({"a.jsonl.zst": zstandard.compress(AS_LINES)}, ["a.jsonl.zst"]),
    "a mark of byte order": ({"a.jsonl": MARK + AS_LINES}, ["a.jsonl"]),
    "lines that end as on Windows": ({"a.jsonl": AS_LINES.replace(b"\n", b"\r\n")}, ["a.jsonl"]),
    "a table that begins with a mark": ({"a.csv": MARK + AS_VALUES.encode()}, ["a.csv"]),
    "an array": ({"a.json": json.dumps(ROWS)}, ["a.json"]),
    "parquet": ({"a.parquet": AS_TABLE}, ["a.parquet"]),
    "shards": ({"s-0.jsonl": FIRST, "s-1.jsonl": LAST, "other.txt": "x"}, ["s-*.jsonl"]),
    "shards of a folder": ({"a/a/s-0.jsonl": FIRST, "a/b/s-1.jsonl": LAST}, ["a/**/*.jsonl"]),
    "files of several kinds": (
        {"a.jsonl.gz": gzip.compress(FIRST), "b.parquet": AS_TABLE.slice(4)},
        ["a.jsonl.gz", "b.parquet"],
    ),
    "a folder": ({"d/s-0.jsonl": FIRST, "d/s-1.jsonl": LAST}, ["d"]),
}


@pytest.mark.parametrize(("files", "given"), HELD.values(), ids=HELD)
def test_the_same_rows_from_wherever_they_are(
    files: dict[str, Content], given: list[str], loaded: Any, tmp_path: Path
) -> None:
    write(tmp_path, files)
    named = tuple(str(tmp_path / one) for one in given)
    source = CorpusSource(data=named if len(named) > 1 else named[0], id_column="id")
    found = list(read_examples(source, loaded, CONTEXT))
    assert [{"id": example.id, "text": example.text} for example in found] == ROWS
    cut = list(read_examples(replace(source, limit=5), loaded, CONTEXT))
    assert [example.id for example in cut] == [row["id"] for row in ROWS[:5]]
    before = fingerprint_source(source)
    assert before == fingerprint_source(source)
    assert before != fingerprint_source(replace(source, append_eos=True))


@pytest.mark.parametrize("split", [None, "train", "test"])
def test_a_data_set_that_was_saved_is_read(split: str | None, loaded: Any, tmp_path: Path) -> None:
    disable_progress_bars()
    saved: Any = Dataset.from_list(ROWS)
    if split is not None:
        saved = DatasetDict({split: saved, "rest": Dataset.from_list(ROWS[:1])})
    saved.save_to_disk(tmp_path / "d")
    source = CorpusSource(data=str(tmp_path / "d"), id_column="id", split=split or "train")
    found = list(read_examples(source, loaded, CONTEXT))
    assert [example.id for example in found] == [row["id"] for row in ROWS]
    before = fingerprint_source(source)
    if split is None:
        (shard,) = (tmp_path / "d").glob("*.arrow")
        moved = CorpusSource(data=str(shard), id_column="id")
        assert [e.text for e in read_examples(moved, loaded, CONTEXT)] == [r["text"] for r in ROWS]
        return
    with pytest.raises(ValueError, match=f"it has no split 'dev' but {split}, rest"):
        list(read_examples(replace(source, split="dev"), loaded, CONTEXT))
    (tmp_path / "d" / "rest" / "more.arrow").write_bytes(b"x")
    assert fingerprint_source(source) != before


def test_what_is_wrong_in_one_of_several_files_names_that_file(loaded: Any, tmp_path: Path) -> None:
    write(tmp_path, {"s-0.jsonl": GOOD, "s-1.jsonl": GOOD + '{"text": 1'})
    source = CorpusSource(data=str(tmp_path / "s-*.jsonl"))
    with pytest.raises(ValueError, match=r"corpus '.*s-1\.jsonl': line 2 is not JSON"):
        list(read_examples(source, loaded, CONTEXT))


def test_sources_may_count_more_than_once(loaded: Any, tmp_path: Path) -> None:
    write(tmp_path, {"a-0.jsonl": FIRST, "a-1.jsonl": LAST, "b.jsonl": lines({"text": "z z"})})
    data = (str(tmp_path / "a-*.jsonl"), str(tmp_path / "b.jsonl"))
    source = CorpusSource(data=data, weights=(3.0, 0.5))
    found = list(read_examples(source, loaded, CONTEXT))
    assert [example.weight for example in found] == [3.0] * 6 + [0.5]
    plain = CorpusSource(data=data)
    assert fingerprint_source(source) != fingerprint_source(plain)
    assert [e.weight for e in read_examples(plain, loaded, CONTEXT)] == [1.0] * 7
    with pytest.raises(ValueError, match="Of 2 sources 1 have a weight"):
        CorpusSource(data=data, weights=(1.0,))
    with pytest.raises(ValueError, match=r"at least 0, got -1\.0"):
        CorpusSource(data=data, weights=(1.0, -1.0))


def test_large_fractions_are_kept_and_a_rounded_number_after_them_is_found(
    loaded: Any, tmp_path: Path
) -> None:
    rows = [{"text": "a b", "x": 1e300}, {"text": "a b", "x": 0.5}, {"text": "a b", "x": 2e300}]
    write(tmp_path, {"a.jsonl": lines(*rows), "b.jsonl": lines(*rows, {"text": "c", "x": 2**90})})
    found = list(read_examples(CorpusSource(data=str(tmp_path / "a.jsonl")), loaded, CONTEXT))
    assert [example.metadata["x"] for example in found] == [row["x"] for row in rows]
    with pytest.raises(ValueError, match=f"row 3 holds the whole number {2**90}"):
        list(read_examples(CorpusSource(data=str(tmp_path / "b.jsonl")), loaded, CONTEXT))
