"""Examples as a trainer saw them: the tokens that count, and their gradients, beside TRL's own."""

import json
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerFast

from estimators.grounds import training_sequence
from estimators.model.capture import visit_gradients
from estimators.model.gradients import sum_over_tokens
from estimators.model.tokens import Sequence1D, collate
from index.examples import ExampleStore
from index.manifest import Manifest
from index.parts import example_files
from service.corpus.reading import Dirt, read_examples
from service.corpus.source import CorpusSource
from service.indexing.plausibility import TextSample
from service.models import LoadedModel, load_model
from service.search.opening import open_index
from service.search.query import Query
from service.search.retrieval import Retriever
from tests.dense_reference import loss, trainable, weight_gradients, worst_error
from tests.index_fixtures import CONTEXT, save, sentences, write_jsonl

pytest_plugins = ["tests.index_fixtures"]

PLAIN = (
    "{% for m in messages %}{{ '<s>' + m['role'][0] + ':' + m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<s>a:{% endif %}"
)
MARKED = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}<s>a:"
    "{% generation %}{{ m['content'] }}{% endgeneration %}"
    "{% else %}{{ '<s>' + m['role'][0] + ':' + m['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<s>a:{% endif %}"
)
FORGETFUL = (
    "{% for m in messages %}{% if m['role'] != 'assistant' or loop.last %}"
    "{{ m['role'][0] + ':' + m['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)
TALKS = [
    [
        {"role": "user", "content": "Where?"},
        {"role": "assistant", "content": "In Porto."},
        {"role": "user", "content": "Who?"},
        {"role": "assistant", "content": "Leeds."},
    ],
    [{"role": "user", "content": "The bridge"}, {"role": "assistant", "content": " of Lyon."}],
]


def talker(loaded: LoadedModel, folder: Any, template: str | None) -> LoadedModel:
    """The tiny model with a chat template."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(loaded.source)
    tokenizer.chat_template = template
    return load_model(str(save(folder, loaded.model, tokenizer)))


@pytest.fixture(scope="module")
def chat(workshop, tmp_path_factory) -> dict[str, LoadedModel]:
    made = {"plain": PLAIN, "marked": MARKED, "forgetful": FORGETFUL, "none": None}
    return {
        name: talker(workshop.loaded, tmp_path_factory.mktemp(name), template)
        for name, template in made.items()
    }


def read(loaded: LoadedModel, tmp_path: Any, rows: Sequence[dict[str, Any]], **options: Any) -> Any:
    source = CorpusSource(data=str(write_jsonl(tmp_path / "rows.jsonl", rows)), **options)
    return list(read_examples(source, loaded, options.pop("max_tokens", CONTEXT)))


def shown(loaded: LoadedModel, example: Any) -> list[str]:
    """The texts that count."""
    spans = ((1, len(example.tokens)),) if example.counted is None else example.counted
    return [loaded.tokenizer.decode(example.tokens[a:b]) for a, b in spans]


@pytest.mark.parametrize("template", ["plain", "marked"])
def test_the_assistants_turns_count(chat, tmp_path, template):
    loaded = chat[template]
    first, second = read(loaded, tmp_path, [{"messages": talk} for talk in TALKS])
    assert shown(loaded, first) == ["In Porto.", "Leeds."]
    assert shown(loaded, second) == [" of Lyon."]
    assert first.text == "<s>u:Where?<s>a:In Porto.<s>u:Who?<s>a:Leeds."
    assert first.metadata == {}
    assert list(first.tokens).count(0) == 4  # no beginning of a text but the template's own


def test_conversations_as_sharegpt_writes_them(chat, tmp_path):
    names = {"user": "human", "assistant": "gpt"}
    talks = [[{"from": names[m["role"]], "value": m["content"]} for m in talk] for talk in TALKS]
    rows = [{"conversations": talk, "topic": i} for i, talk in enumerate(talks)]
    found = read(chat["plain"], tmp_path, rows, columns={"messages": "conversations"})
    expected = read(chat["plain"], tmp_path, [{"messages": talk} for talk in TALKS])
    assert [(e.tokens, e.counted) for e in found] == [(e.tokens, e.counted) for e in expected]
    assert found[1].metadata == {"topic": 1}


def test_a_nested_column_is_found_by_its_dotted_name(chat, tmp_path):
    rows = [{"data": {"talk": talk, "n": 1}} for talk in TALKS]
    found = read(
        chat["plain"],
        tmp_path,
        rows,
        columns={"messages": "data.talk"},
        metadata_columns=("data.n",),
    )
    assert shown(chat["plain"], found[0]) == ["In Porto.", "Leeds."]
    assert found[0].metadata == {"data.n": 1}


def test_what_the_assistant_said_must_be_certain(chat, tmp_path):
    with pytest.raises(ValueError, match=r"Row 0 .* renders a conversation's beginning otherwise"):
        read(chat["forgetful"], tmp_path, [{"messages": TALKS[0]}])
    with pytest.raises(ValueError, match="has no chat template"):
        read(chat["none"], tmp_path, [{"messages": TALKS[0]}])
    with pytest.raises(ValueError, match=r"Row 1 .*chat template refuses it \(int .*\)\.$"):
        read(chat["plain"], tmp_path, [{"messages": TALKS[0]}, {"messages": [{"role": 3}]}])


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("hello", "holds a text, expected a list of messages"),
        ([3, 4], "has a number as message 0"),
        ([{"speaker": "user", "said": "x"}], "message 0 with said, speaker, expected 'role'"),
    ],
)
def test_what_is_no_conversation_is_refused(chat, tmp_path, value, said):
    source = tmp_path / "rows.json"
    source.write_text(json.dumps([{"messages": value}]))
    with pytest.raises(
        ValueError, match="Row 0 of the corpus has a column 'messages' that"
    ) as told:
        list(read_examples(CorpusSource(data=str(source)), chat["plain"], CONTEXT))
    assert said in str(told.value)


def test_the_completion_of_a_prompt_counts(chat, tmp_path):
    loaded = chat["plain"]
    rows = [
        {"prompt": "The bridge", "completion": " of Porto."},
        {"prompt": TALKS[1][:1], "completion": TALKS[1][1:]},
        {"prompt": "The brid", "completion": "ge of Porto."},
    ]
    plain, said, merged = (read(loaded, tmp_path, [row])[0] for row in rows)
    assert shown(loaded, plain) == [" of Porto."]
    assert shown(loaded, said) == [" of Lyon."]
    apart = loaded.encode("The brid")
    assert merged.tokens == tuple(loaded.encode("The bridge of Porto."))
    assert merged.counted[0][0] < len(apart)  # both share a token, which counts
    dirt = Dirt()
    source = CorpusSource(data=str(write_jsonl(tmp_path / "a.jsonl", [rows[0], rows[2]])))
    list(read_examples(source, loaded, CONTEXT, dirt))
    assert (dirt.merged_rows, dirt.format) == (1, "prompt-completion")


def test_tokens_are_taken_as_they_are(workshop, tmp_path):
    loaded = workshop.loaded
    rows = [
        {"input_ids": [0, 5, 6, 7], "labels": [-100, -100, 6, 7], "id": "a"},
        {"input_ids": [0, 5, 6, 7], "labels": [0, 5, 6, 7], "id": "b"},
        {"input_ids": [9, 9, 0, 5, 6], "attention_mask": [0, 0, 1, 1, 1], "id": "c"},
        {"input_ids": [0, 5, 0, 6, 7], "position_ids": [0, 1, 0, 1, 2], "id": "d"},
        {"input_ids": [0, 5, 0, 6, 7], "seq_lengths": [2, 3], "id": "e"},
        {
            "input_ids": [9, 9, 0, 5],
            "attention_mask": [0, 0, 1, 1],
            "position_ids": [0, 0, 0, 1],
            "id": "f",
        },
        {"input_ids": [], "id": "g"},
    ]
    found = read(loaded, tmp_path, rows, id_column="id")
    assert [(e.id, e.tokens, e.counted) for e in found] == [
        ("a", (0, 5, 6, 7), ((2, 4),)),
        ("b", (0, 5, 6, 7), None),
        ("c", (0, 5, 6), None),
        ("d#p0", (0, 5), None),
        ("d#p1", (0, 6, 7), None),
        ("e#p0", (0, 5), None),
        ("e#p1", (0, 6, 7), None),
        ("f", (0, 5), None),
        ("g", (), ()),
    ]
    assert found[0].text == loaded.tokenizer.decode([0, 5, 6, 7])


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"input_ids": [1, 2, 99999]}, "has the token 99999"),
        ({"input_ids": [1, 2], "labels": [1, 3]}, "the label 3 beside the token 2"),
        ({"input_ids": [1, 2], "labels": [1]}, "2 tokens and 1 labels"),
        ({"input_ids": [1, 2, 3], "attention_mask": [1, 0, 1]}, "a gap"),
        ({"input_ids": [1, 2, 3], "seq_lengths": [1, 1]}, "seq_lengths sum to 2"),
        ({"input_ids": "1 2 3"}, "has a text as input_ids"),
        ({"text": "a b", "messages": TALKS[0]}, "can be read as text or as messages"),
        ({"prompt": "a", "answer": "b"}, "has no column 'text'; it has answer, prompt"),
    ],
)
def test_rows_that_are_not_what_they_seem_are_refused(chat, tmp_path, row, said):
    with pytest.raises(ValueError, match="Row 0 of the corpus") as told:
        read(chat["plain"], tmp_path, [row])
    assert said in str(told.value)


def test_what_names_no_column_or_format_is_refused():
    with pytest.raises(ValueError, match="No column can be named for 'talk'"):
        CorpusSource(data="a.jsonl", columns={"talk": "x"})
    with pytest.raises(ValueError, match="format is one of text, messages"):
        CorpusSource(data="a.jsonl", format="chatml")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no windows to overlap"):
        CorpusSource(data="a.jsonl", truncate=True, overlap=3)


def test_a_corpus_in_which_nobody_answers_is_refused(chat, tmp_path):
    with pytest.raises(ValueError, match="no token counts \\(1 of which no token counts\\)"):
        read(chat["plain"], tmp_path, [{"messages": TALKS[0][:1]}])


@pytest.mark.parametrize("overlap", [0, 1, 5])
def test_windows_count_every_token_once(workshop, tmp_path, overlap):
    loaded, text = workshop.loaded, " ".join(sentences(8))
    found = read(loaded, tmp_path, [{"text": text}], overlap=overlap)
    tokens = loaded.encode(text)
    step, counted = CONTEXT - overlap, []
    for window, example in enumerate(found):
        start = window * step
        assert list(example.tokens) == tokens[start : start + CONTEXT]
        sequence = Sequence1D(tokens=example.tokens, counted=example.counted)
        counted += [start + i for a, b in sequence.target_spans for i in range(a, b)]
    lost = range(CONTEXT, len(tokens), CONTEXT) if overlap == 0 else ()  # nothing precedes them
    assert counted == [i for i in range(1, len(tokens)) if i not in lost]


def test_what_counts_is_cut_with_the_windows(chat, tmp_path):
    loaded = chat["plain"]
    talk = TALKS[0] * 3
    (whole,) = read(loaded, tmp_path, [{"messages": talk[:4]}])
    cut = read(loaded, tmp_path, [{"messages": talk}], overlap=4)
    texts = [text for example in cut for text in shown(loaded, example)]
    assert "".join(texts) == "In Porto.Leeds." * 3
    (first,) = read(loaded, tmp_path, [{"messages": talk}], truncate=True)
    assert (first.tokens, first.id) == (cut[0].tokens, "0")
    assert whole.tokens == first.tokens[: len(whole.tokens)]


def test_a_text_may_end_with_the_end_of_a_text(workshop, tmp_path):
    plain, ended = (
        read(workshop.loaded, tmp_path, [{"text": "The bridge of Porto"}], append_eos=choice)[0]
        for choice in (False, True)
    )
    assert ended.tokens == (*plain.tokens, workshop.loaded.tokenizer.eos_token_id)


def prepared(rows: list[dict[str, Any]], loaded: LoadedModel, folder: Any, **options: Any) -> Any:
    """TRL's trainer of these rows."""
    from trl import SFTConfig, SFTTrainer

    arguments = SFTConfig(
        output_dir=str(folder),
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        per_device_train_batch_size=1,
        max_length=CONTEXT,
        padding_free=False,
        bf16=False,
        **options,
    )
    model = trainable(loaded.model)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(loaded.source)
    return SFTTrainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")  # the library's own
@pytest.mark.parametrize(
    ("rows", "theirs", "ours"),
    [
        ([{"messages": talk} for talk in TALKS], {"assistant_only_loss": True}, {}),
        (
            [
                {"prompt": "The bridge", "completion": " of Porto."},
                {"prompt": "Every sp", "completion": "ring in Lyon."},
            ],
            {},
            {"append_eos": True},
        ),
        ([{"text": text} for text in sentences(3)], {}, {"append_eos": True}),
        (
            [
                {"input_ids": [0, 5, 6, 7, 8], "labels": [-100, -100, 6, -100, 8]},
                {"input_ids": [0, 9, 6], "labels": [0, 9, 6]},
            ],
            {},
            {},
        ),
    ],
    ids=["messages", "completion", "text", "tokens"],
)
def test_gradients_are_those_of_the_trainers_own_loss(chat, tmp_path, rows, theirs, ours):
    loaded = chat["marked"]
    trainer = prepared(rows, loaded, tmp_path, **theirs)
    mine = read(loaded, tmp_path, rows, **ours)
    layers = loaded.coverage.layers
    for row, example in zip(trainer.train_dataset, mine, strict=True):
        batch = trainer.data_collator([row])
        assert batch["input_ids"][0].tolist() == list(example.tokens)
        sequence = Sequence1D(tokens=example.tokens, counted=example.counted)
        mean = trainer.compute_loss(trainer.model, batch)
        expected = weight_gradients(trainer.model, layers, mean * sequence.targets)
        assert worst_error(summed_gradients(loaded.model, layers, sequence), expected) < 1e-5


def summed_gradients(model: Any, layers: Any, sequence: Sequence1D) -> dict[str, torch.Tensor]:
    """Of the sequence's loss, as the index and the exact scores have them."""
    found: dict[str, torch.Tensor] = {}

    def visit(layer: Any, a: torch.Tensor, d: torch.Tensor) -> None:
        found[layer.name] = sum_over_tokens(a, d)[0]

    visit_gradients(model, layers, collate([sequence]), visit)
    return found


def test_an_index_of_conversations_scores_what_counts(chat, workshop, tmp_path):
    loaded = chat["plain"]
    talks = [
        [{"role": "user", "content": text[:9]}, {"role": "assistant", "content": text[9:28]}]
        for text in sentences(24)
    ]
    path = write_jsonl(tmp_path / "a.jsonl", [{"messages": talk} for talk in talks])
    manifest = workshop.build(
        tmp_path / "index",
        source=CorpusSource(data=str(path)),
        factors=workshop.fit("ekfac", loaded=loaded),
        loaded=loaded,
    )
    reading = manifest.parts[0].data.reading
    assert reading.format == "messages"
    assert 0 < reading.counted_tokens < manifest.parts[0].data.tokens
    assert Manifest.read(tmp_path / "index") == manifest
    index = open_index(tmp_path / "index", loaded)
    store = ExampleStore(example_files(tmp_path / "index", manifest.parts))
    assert store[3].counted == index.examples.counted(3)
    assert store[3].counted is not None
    query = Query(prompt="The bridge", completion=" of Porto", k=5, budget=24)
    retriever = Retriever(index)
    answer = retriever.answer(query)
    sequence = loaded.encode_query("The bridge", " of Porto")
    directions, _ = retriever.directions(sequence, index.estimators.own)
    model = trainable(loaded.model)
    for result in answer.results:
        example = training_sequence(index.examples, result.row)
        gradient = weight_gradients(model, loaded.coverage.layers, loss(model, example))
        expected = sum(float((directions[n].double() * g).sum()) for n, g in gradient.items())
        assert result.score == pytest.approx(expected, rel=1e-3, abs=1e-6)


def test_what_counts_in_a_sample_of_texts():
    sample = TextSample()
    sample.add(Sequence1D(tokens=(0, 1, 2, 3), counted=((2, 4),)))
    sample.add(Sequence1D(tokens=tuple(range(200)), counted=((150, 160),)))
    assert [text.target_spans for text in sample.texts] == [((2, 4),), ((1, 128),)]
