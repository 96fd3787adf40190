"""Questions as the model reads them: the boundary of a completion, and conversations."""

from typing import Any

import pytest
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from service.asking import Prompt, encode_completion, read_prompt
from service.conversation import Message, read_messages, render
from service.errors import BadQuery

TEXTS = [
    "The capital of Nepal is Kathmandu.",
    "The capital of France is Paris.",
    "Question:\n\nWhat is the capital of Peru?\n\nAnswer:\n\nLima.",
    "Lima.\n\n",
    "User: What is the capital of Peru? Assistant: Lima",
] * 8
CONTEXT = 200
BEGIN, END = "<s>", "</s>"


def wrapped(tokenizer: Tokenizer, **more: Any) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BEGIN, eos_token=END, unk_token="<unk>", **more
    )


def trained(tokenizer: Tokenizer, trainer: Any) -> Tokenizer:
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer


SPECIAL: dict[str, Any] = {"special_tokens": ["<unk>", BEGIN, END], "show_progress": False}


def byte_level(*, begins: bool = False) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trained(tokenizer, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, **SPECIAL))
    if begins:
        _add_begin(tokenizer)
    return wrapped(tokenizer)


def trimming() -> PreTrainedTokenizerFast:
    """Byte-level, with offsets that leave out the space of a word."""
    found = byte_level()
    found.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    return found


def metaspace(scheme: str) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme=scheme)
    trained(tokenizer, trainers.BpeTrainer(vocab_size=300, **SPECIAL))
    _add_begin(tokenizer)
    return wrapped(tokenizer)


def llama_2() -> PreTrainedTokenizerFast:
    """A normaliser writes the spaces, and nothing parts words."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trained(tokenizer, trainers.BpeTrainer(vocab_size=300, **SPECIAL))
    tokenizer.pre_tokenizer = None
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(content=" ", left=1)]
    )
    _add_begin(tokenizer)
    return wrapped(tokenizer)


def unigram() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trained(tokenizer, trainers.UnigramTrainer(vocab_size=120, unk_token="<unk>", **SPECIAL))
    return wrapped(tokenizer)


def word_piece() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece()
    return wrapped(trained(tokenizer, trainers.WordPieceTrainer(vocab_size=200, **SPECIAL)))


def _add_begin(tokenizer: Tokenizer) -> None:
    begin = tokenizer.token_to_id(BEGIN)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A", special_tokens=[(BEGIN, begin)]
    )


KINDS = {
    "byte level": byte_level,
    "byte level, begins": lambda: byte_level(begins=True),
    "byte level, trimmed": trimming,
    "metaspace first": lambda: metaspace("first"),
    "metaspace always": lambda: metaspace("always"),
    "Llama 2": llama_2,
    "Unigram": unigram,
    "WordPiece": word_piece,
}


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    return KINDS[request.param]()


def apart(tokenizer: Any, prompt: str, completion: str) -> tuple[list[str], list[str]]:
    before = tokenizer(prompt)["input_ids"]
    after = tokenizer(completion, add_special_tokens=False)["input_ids"]
    return tuple(tokenizer.convert_ids_to_tokens(ids) for ids in (before, after))


def asked(
    tokenizer: Any, prompt: str | Prompt, completion: str
) -> tuple[list[str], list[str], str | None]:
    """Tokens before and of the completion, and what is told of them."""
    read = read_prompt(tokenizer, prompt) if isinstance(prompt, str) else prompt
    found = encode_completion(tokenizer, CONTEXT, read, completion)
    words = tokenizer.convert_ids_to_tokens(list(found.sequence.tokens))
    return words[: found.sequence.first_target], words[found.sequence.first_target :], found.told


@pytest.mark.parametrize("completion", [" Kathmandu.", " Paris", " is Lima, Peru"])
def test_a_word_after_a_word_is_read_as_in_one_text(tokenizer: Any, completion: str) -> None:
    prompt = "The capital of Nepal is"
    before, after, told = asked(tokenizer, prompt, completion)
    assert before + after == tokenizer.convert_ids_to_tokens(
        tokenizer(prompt + completion)["input_ids"]
    )
    assert told is None
    assert before == apart(tokenizer, prompt, completion)[0]


@pytest.mark.parametrize("kind", ["byte level", "byte level, begins", "byte level, trimmed"])
def test_where_both_ways_agree_nothing_changed(kind: str) -> None:
    tokenizer = KINDS[kind]()
    for prompt, completion in (
        ("The capital of Nepal is", " Kathmandu."),
        ("The capital of Nepal is", " Zürich, 東京"),
        ("The capital", "."),
        ("", "The capital"),
        (f"{BEGIN}The", " capital"),
    ):
        before, after, told = asked(tokenizer, prompt, completion)
        assert (before or [BEGIN], after) == (
            apart(tokenizer, prompt, completion)[0] or [BEGIN],
            apart(tokenizer, prompt, completion)[1],
        )
        assert told is None


def test_a_completion_in_the_middle_of_a_word_gets_no_space_of_its_own() -> None:
    for kind in ("metaspace first", "metaspace always", "Llama 2", "Unigram"):
        tokenizer = KINDS[kind]()
        before, after, told = asked(tokenizer, "The capital is Lima", "? Paris")
        assert told is None, kind
        assert not after[0].startswith("▁"), kind
        assert apart(tokenizer, "The capital is Lima", "? Paris")[1][0].startswith("▁"), kind
        assert tokenizer.convert_tokens_to_string([*before, *after]).endswith("is Lima? Paris"), (
            kind
        )


def test_a_space_before_a_completion_is_one_space() -> None:
    """Alone, Llama 2's normaliser puts a second one before it."""
    tokenizer = llama_2()
    after = asked(tokenizer, "The capital of France is", " Paris")[1]
    assert after[0].startswith("▁P")
    assert apart(tokenizer, "The capital of France is", " Paris")[1][0] in ("▁", "▁▁")


@pytest.mark.parametrize(
    ("kind", "prompt", "completion", "read"),
    [
        ("byte level", "The capital of France is ", "Paris", "' Paris' as one token"),
        ("byte level", "The capital of Fra", "nce", "' France' as one token"),
        ("byte level, trimmed", "The capital of France is ", "Paris", "other tokens there"),
        ("metaspace always", "The capital of Fra", "nce", "' France' as one token"),
        ("WordPiece", "The cap", "ital", "'capital' as one token"),
    ],
)
def test_a_token_across_the_boundary_is_told(
    kind: str, prompt: str, completion: str, read: str
) -> None:
    tokenizer = KINDS[kind]()
    before, after, told = asked(tokenizer, prompt, completion)
    assert (before, after) == apart(tokenizer, prompt, completion)
    assert told is not None
    assert f"the model would have read {read}" in told


def test_white_space_that_is_no_token_is_not_told() -> None:
    before, after, told = asked(word_piece(), "The capital is ", "Paris")
    assert told is None
    assert (before[-1], after[0]) == ("is", "paris")


def test_tokens_of_the_prompt_are_those_of_the_whole_text() -> None:
    """A run of line breaks is one token at the end of a text, and two before a word."""
    tokenizer = byte_level()
    prompt, completion = "Question:\n\n", "Lima"
    assert apart(tokenizer, prompt, completion)[0][-1] == "ĊĊ"
    before, after, told = asked(tokenizer, prompt, completion)
    assert before[-2:] == ["Ċ", "Ċ"]
    assert told is None
    assert before + after == tokenizer.tokenize(prompt + completion)


def test_half_a_character_at_the_boundary_is_no_token() -> None:
    before, _, told = asked(byte_level(), "Caf", "\u0065\u0301")
    assert told is None
    assert before == byte_level().tokenize("Caf")


def test_tokenizers_without_offsets_read_both_apart() -> None:
    class Slow:
        """As a tokenizer that is all Python."""

        is_fast = False

        def __init__(self, fast: Any) -> None:
            self._fast = fast

        def __call__(self, text: str, **options: Any) -> Any:
            assert "return_offsets_mapping" not in options
            return self._fast(text, **options)

        def __getattr__(self, name: str) -> Any:
            return getattr(self._fast, name)

    tokenizer = Slow(byte_level())
    before, after, told = asked(tokenizer, "The capital of France is ", "Paris")
    assert (before, after) == apart(tokenizer, "The capital of France is ", "Paris")
    assert told is None


TEMPLATE = (
    "{% if not messages or messages[0].role == 'assistant' %}"
    "{{ raise_exception('Conversations must begin with the user.') }}{% endif %}"
    "<s>{% for m in messages %}"
    "{% if m.role not in ['user', 'assistant'] %}"
    "{{ raise_exception('Unknown role ' + m.role) }}{% endif %}"
    "{{ m.role|capitalize }}: {{ m.content }}{% if m.role == 'assistant' %}</s>{% endif %}"
    "{{ '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)
USER = Message(role="user", content="What is the capital of Peru?")
SAID = Message(role="assistant", content="Lima")


def chat(kind: str = "byte level, begins", template: str | None = TEMPLATE) -> Any:
    tokenizer = KINDS[kind]()
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize("kind", KINDS)
def test_a_conversation_is_read_as_its_template_writes_it_with_one_beginning(kind: str) -> None:
    tokenizer = chat(kind)
    prompt = read_prompt(tokenizer, "", (USER,))
    assert prompt.text == f"<s>User: {USER.content}\nAssistant:"
    direct = tokenizer.apply_chat_template(
        [vars(USER)], add_generation_prompt=True, tokenize=True, return_dict=False
    )
    assert list(prompt.tokens) == direct
    begin = tokenizer.bos_token_id
    assert prompt.tokens.count(begin) == 1
    before, after, told = asked(tokenizer, prompt, " Lima")
    assert told is None
    assert before == tokenizer.convert_ids_to_tokens(direct)
    assert END not in after


def test_the_last_turn_of_the_assistant_is_the_completion_with_the_templates_space() -> None:
    tokenizer = chat()
    prompt = read_prompt(tokenizer, "", (USER, SAID, USER, SAID))
    assert (prompt.turn, prompt.lead) == (" Lima", " ")
    assert prompt.text.endswith("\nAssistant:")
    spaced = chat(template="{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} "
                  "[/INST]{% else %} {{ m.content }}</s>{% endif %}{% endfor %}")  # fmt: skip
    prompt = read_prompt(spaced, "", (USER, SAID))
    assert (prompt.turn, prompt.lead) == (" Lima", " ")
    assert prompt.text.endswith("[/INST]")


@pytest.mark.parametrize(
    ("template", "messages", "told"),
    [
        (None, (USER,), "has no chat template, so that messages cannot be written"),
        (TEMPLATE, (SAID, USER), "refuses this conversation: Conversations must begin with the "),
        (TEMPLATE, (Message(role="tool", content="x"),), "conversation: Unknown role tool; give"),
        (TEMPLATE, (SAID,), "holds nothing but an assistant's turn"),
        ("{{ messages[7].role.x }}", (USER,), "refuses this conversation: "),
        ("{{ nonsense(", (USER,), "refuses this conversation: "),
        ("", (USER,), "has no chat template"),
        ("{# nothing #}", (USER,), "writes nothing for this conversation"),
    ],
)
def test_conversations_that_cannot_be_written_are_refused(
    template: str | None, messages: tuple[Message, ...], told: str
) -> None:
    with pytest.raises(BadQuery) as refused:
        read_prompt(chat(template=template), "", messages)
    assert told in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_template_that_cannot_write_answers_still_asks() -> None:
    template = (
        "{% for m in messages %}{% if m.role == 'assistant' %}{{ raise_exception('no') }}"
        "{% endif %}{{ m.content }}{% endfor %}"
    )
    assert render(chat(template=template), (USER, SAID)).turn == "Lima"


@pytest.mark.parametrize(
    ("value", "told"),
    [
        ([], "got an empty list"),
        ({"role": "user"}, "got dict"),
        (["hello"], "Message 1 of line 3 is no turn: .* got str"),
        ([{"role": "user"}], "got role"),
        ([{"role": "user", "content": None}], "got content, role"),
        ([{"role": "user", "content": "a", "name": "b"}], "got content, name, role"),
    ],
)
def test_messages_of_another_form_are_refused(value: Any, told: str) -> None:
    with pytest.raises(BadQuery, match=told):
        read_messages(value, "line 3")
