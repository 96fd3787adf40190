"""What the model writes itself: greedy as without a cache, sampled with the right frequencies."""

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from service import completing
from service.asking import Prompt, read_prompt
from service.completing import Writing, Written, write
from service.models import BadQuery, LoadedModel, load_model
from tests.service_fixtures import Workspace

VOCABULARY = 40
CONTEXT = 32
SIZES: dict[str, Any] = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}


def word_tokenizer() -> PreTrainedTokenizerFast:
    """Words "w3" to "w39", a full stop and two special tokens."""
    names = ["<s>", "</s>", "."] + [f"w{n}" for n in range(3, VOCABULARY)]
    words = Tokenizer(models.WordLevel({name: n for n, name in enumerate(names)}, unk_token="<s>"))
    words.pre_tokenizer = pre_tokenizers.Metaspace(replacement=" ", prepend_scheme="never")
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.decoder = decoders.WordPiece(prefix="##", cleanup=False)
    return PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", eos_token="</s>")


def model_of(family: str) -> Any:
    torch.manual_seed(3)
    common = {"vocab_size": VOCABULARY, "max_position_embeddings": CONTEXT}
    if family == "GPT-2":
        model: Any = GPT2LMHeadModel(
            GPT2Config(vocab_size=VOCABULARY, n_positions=CONTEXT, n_embd=24, n_layer=2, n_head=2)
        )
    elif family == "GPT-NeoX":
        model = GPTNeoXForCausalLM(GPTNeoXConfig(**SIZES, **common, intermediate_size=48))
    else:
        model = LlamaForCausalLM(LlamaConfig(**SIZES, **common, intermediate_size=48))
    for parameter in model.parameters():  # so that what was written before matters
        parameter.data.mul_(4)
    model.generation_config.eos_token_id = [1]
    return model.eval()


def slowly(model: Any, tokens: tuple[int, ...], most: int, ends: set[int]) -> tuple[int, ...]:
    """Greedy, everything computed anew for each token."""
    written: list[int] = []
    while len(written) < most:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([[*tokens, *written]]), use_cache=False).logits
        token = int(logits[0, -1].argmax())
        if token in ends:
            break
        written.append(token)
    return tuple(written)


def greedy(model: Any, prompt: Prompt, **asked: Any) -> Written:
    (found,) = write(model, word_tokenizer(), CONTEXT, prompt, Writing(**{"stop": (), **asked}))
    return found


@pytest.mark.parametrize("family", ["GPT-2", "GPT-NeoX", "Llama"])
def test_the_greedy_completion_is_that_of_the_slow_loop(family: str) -> None:
    model = model_of(family)
    for word in range(3, 20):
        prompt = read_prompt(word_tokenizer(), f"w{word} w{word + 1} w5")
        expected = slowly(model, prompt.tokens, 12, {1})
        if expected:
            assert greedy(model, prompt, max_new_tokens=12).tokens == expected
    assert completing._known[model]
    assert model.generation_config.eos_token_id == [1]


def test_every_stop_token_of_the_model_ends_a_completion() -> None:
    model = model_of("Llama")
    prompts = [read_prompt(word_tokenizer(), f"w{word} w4 w5") for word in range(3, 30)]
    written = [(prompt, slowly(model, prompt.tokens, 12, {1})) for prompt in prompts]
    prompt, whole = next((p, w) for p, w in written if len(set(w[:5])) == len(w[:5]) == 5)
    model.generation_config.eos_token_id = [whole[4], whole[2]]
    assert greedy(model, prompt, max_new_tokens=12).tokens == whole[:2]
    model.generation_config.eos_token_id = whole[3]
    assert greedy(model, prompt, max_new_tokens=12).tokens == whole[:3]
    model.generation_config.eos_token_id = None
    assert greedy(model, prompt, max_new_tokens=12).tokens == whole


def test_other_settings_of_the_library_change_nothing() -> None:
    model = model_of("Llama")
    prompt = read_prompt(word_tokenizer(), "w3 w4 w5")
    expected = greedy(model, prompt)
    settings = model.generation_config
    settings.repetition_penalty, settings.no_repeat_ngram_size = 5.0, 1
    settings.do_sample, settings.top_k, settings.suppress_tokens = True, 3, [*expected.tokens]
    assert greedy(model, prompt) == expected
    assert model.generation_config is settings


class Uncached(nn.Module):
    """A model that takes a cache for granted nowhere."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **_: Any) -> Any:
        return self.inner(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)


def test_a_model_without_the_librarys_loop_writes_the_same() -> None:
    model = model_of("Llama")
    prompt = read_prompt(word_tokenizer(), "w3 w4 w5")
    model.generation_config.eos_token_id = None
    bare = Uncached(model)
    assert greedy(bare, prompt) == greedy(model, prompt)
    assert not completing._known[bare]


def test_a_model_that_ignores_its_cache_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """The library hands it the last token alone, which it takes for the whole text."""
    model = model_of("GPT-2")
    prompt = read_prompt(word_tokenizer(), "w3 w4 w5")
    expected = greedy(model, prompt)
    forgetful = model_of("GPT-2")
    forward = forgetful.forward

    def forgets(*arguments: Any, **named: Any) -> Any:
        for name in ("cache", "past_key_values", "position_ids", "attention_mask", "use_cache"):
            named.pop(name, None)
        return forward(*arguments, **named, use_cache=False)

    monkeypatch.setattr(forgetful, "forward", forgets)
    assert greedy(forgetful, prompt) == expected
    assert not completing._known[forgetful]


def test_samples_come_with_the_models_own_frequencies() -> None:
    model = model_of("GPT-2")
    prompt = read_prompt(word_tokenizer(), "w3 w4 w5")
    for cached in (True, False):
        completing._known[model] = cached
        writing = Writing(samples=600, max_new_tokens=1, stop=(), seed=5)
        found = write(model, word_tokenizer(), CONTEXT, prompt, writing)
        assert found == write(model, word_tokenizer(), CONTEXT, prompt, writing)
        assert found != write(model, word_tokenizer(), CONTEXT, prompt, replace(writing, seed=6))
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt.tokens])).logits[0, -1]
        chances = logits.softmax(-1)
        counts = Counter(one.tokens[0] for one in found if one.tokens)
        for token in chances.topk(3).indices.tolist():
            spread = (float(chances[token]) * (1 - float(chances[token])) / 600) ** 0.5
            assert counts[token] / 600 == pytest.approx(float(chances[token]), abs=5 * spread)


def test_the_random_state_of_others_is_left_alone() -> None:
    prompt = read_prompt(word_tokenizer(), "w3 w4 w5")
    model = model_of("GPT-2")
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    write(model, word_tokenizer(), CONTEXT, prompt, Writing(samples=4))
    assert torch.equal(torch.rand(3), expected)


@pytest.fixture(scope="module")
def loaded(workspace: Workspace) -> LoadedModel:
    return load_model(str(workspace.model))


def test_a_prompts_completion_ends_before_a_full_stop_and_a_conversations_does_not(
    loaded: LoadedModel,
) -> None:
    prompt = loaded.read_prompt("The capital of France is")
    (short,) = loaded.write(prompt, Writing())
    assert "." not in short.text
    assert short.tokens == tuple(loaded.encode(short.text))
    (long,) = loaded.write(replace(prompt, chats=True), Writing(max_new_tokens=10))
    assert long.text.startswith(f"{short.text}.")
    assert len(long.tokens or ()) == 10
    assert loaded.complete("The capital of France is") == short.text


def test_a_text_that_is_cut_within_a_token_has_no_tokens(loaded: LoadedModel) -> None:
    prompt = loaded.read_prompt("The capital of France is")
    (whole,) = loaded.write(prompt, Writing())
    (cut,) = loaded.write(prompt, Writing(stop=(whole.text[3:],)))
    assert cut == Written(text=whole.text[:3], tokens=None)


def test_half_a_character_at_the_end_is_left_out(loaded: LoadedModel) -> None:
    prompt = loaded.read_prompt("The capital of France is")
    bytes_of = loaded.encode("Paris \U0001f600")
    assert len(bytes_of) > 4
    cut = completing._cut(loaded.tokenizer, prompt, bytes_of[:-1], ())
    assert "\ufffd" not in cut.text
    assert loaded.tokenizer.decode(cut.tokens) == cut.text


def test_a_space_before_the_first_word_stays_where_the_tokenizer_takes_it_away() -> None:
    words = Tokenizer(models.WordLevel({"<s>": 0, "▁w1": 1, "▁w2": 2}, unk_token="<s>"))
    words.pre_tokenizer = pre_tokenizers.Metaspace()
    words.decoder = decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", eos_token="<s>")
    assert tokenizer.decode([2]) == "w2"
    prompt = read_prompt(tokenizer, "w1")
    assert completing._cut(tokenizer, prompt, [2], ()) == Written(text=" w2", tokens=(2,))


def test_a_prompt_that_fills_the_context_leaves_no_room(loaded: LoadedModel) -> None:
    prompt = loaded.read_prompt("capital " * 60)
    with pytest.raises(BadQuery, match=r"leaves no room in the model's context of 48"):
        loaded.write(prompt, Writing())
