"""The model's own completions: greedy or sampled, with a cache where the model has one."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Int
from torch import Tensor

from service.asking import Prompt
from service.checkpoints import quietly
from service.errors import BadQuery

PROMPT_TOKENS, CHAT_TOKENS = 24, 64
"""Most tokens of the completion of a prompt, and of a conversation, if left out."""

SENTENCE: tuple[str, ...] = (".", "\n")
"""Where the completion of a prompt is cut; that of a conversation ends where the model ends it."""

CACHE_ERROR = 0.1
"""Relative difference of logits with and without a cache; rounding makes a hundredth at most."""

HALF = "\ufffd"
"""What the first bytes of a character are decoded to."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Writing:
    """How the model is to complete a prompt.

    Attributes:
        max_new_tokens: most tokens of a completion; None takes what is usual.
        stop: texts before the first of which a completion is cut; None takes what is usual.
        samples: completions drawn at temperature 1; None writes the greedy one.
        seed: of the samples.
    """

    max_new_tokens: int | None = None
    stop: Sequence[str] | None = None
    samples: int | None = None
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Written:
    """A completion of the model's own.

    Attributes:
        text: without what ended it; empty for a sample that ends at once.
        tokens: as the model wrote them; None where the text was cut within one.
    """

    text: str
    tokens: tuple[int, ...] | None


def write(
    model: Any, tokenizer: Any, context: int, prompt: Prompt, writing: Writing
) -> list[Written]:
    """The greedy completion, or samples; each ends at the model's own stop tokens or a stop text.

    Raises:
        BadQuery: a prompt that fills the context, or nothing was written.
    """
    usual = CHAT_TOKENS if prompt.chats else PROMPT_TOKENS
    length = usual if writing.max_new_tokens is None else writing.max_new_tokens
    room = min(length, context - len(prompt.tokens))
    if room < 1:
        raise BadQuery(
            f"The prompt has {len(prompt.tokens)} tokens and leaves no room in the model's context "
            f"of {context}; shorten it."
        )
    marks = writing.stop
    if marks is None:
        marks = () if prompt.chats else SENTENCE
    ends = _ends(model, tokenizer)

    def is_over(tokens: Sequence[int]) -> bool:
        return tokens[-1] in ends or any(mark in tokenizer.decode(tokens) for mark in marks)

    rows = _rows(model, prompt.tokens, room, sorted(ends), is_over, writing)
    found = [_cut(tokenizer, prompt, _until(row, ends), marks) for row in rows]
    if not any(one.text.strip() for one in found):
        what = "conversation" if prompt.chats else "prompt"
        raise BadQuery(f"The model completes this {what} with nothing; give a completion.")
    return found


def _ends(model: Any, tokenizer: Any) -> frozenset[int]:
    """Tokens with which the model ends a text or a turn."""
    declared = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    own = declared if isinstance(declared, (list, tuple)) else [declared]
    return frozenset(end for end in (*own, tokenizer.eos_token_id) if end is not None)


def _until(tokens: Sequence[int], ends: frozenset[int]) -> list[int]:
    place = next((i for i, token in enumerate(tokens) if token in ends), len(tokens))
    return list(tokens[:place])


def _cut(tokenizer: Any, prompt: Prompt, tokens: list[int], marks: Sequence[str]) -> Written:
    """The text of a row, before the first mark and without half a character at its end."""

    def spelt(count: int) -> str:
        return _spelt(tokenizer, prompt.tokens, tokens[:count])

    text, count = spelt(len(tokens)), len(tokens)
    cuts = [text.find(mark) for mark in marks if mark in text]
    if not cuts:
        while count and text.endswith(HALF) and len(tokens) - count < 3:
            count -= 1
            text = spelt(count)
        return Written(text=text, tokens=tuple(tokens[:count]))
    text = text[: min(cuts)]
    whole = next((n for n in range(count + 1) if spelt(n) == text), None)
    return Written(text=text, tokens=None if whole is None else tuple(tokens[:whole]))


def _spelt(tokenizer: Any, before: Sequence[int], tokens: Sequence[int]) -> str:
    """The text of tokens after others: alone, some tokenizers take the first one's space away."""
    whole: str = tokenizer.decode([*before, *tokens], clean_up_tokenization_spaces=False)
    start: str = tokenizer.decode([*before], clean_up_tokenization_spaces=False)
    if whole.startswith(start):
        return whole[len(start) :]
    alone: str = tokenizer.decode([*tokens], clean_up_tokenization_spaces=False)
    return alone


@torch.no_grad()
def _rows(
    model: Any,
    before: Sequence[int],
    room: int,
    ends: Sequence[int],
    is_over: Callable[[Sequence[int]], bool],
    writing: Writing,
) -> list[list[int]]:
    """Tokens of each completion, until it is over or longer."""
    device = next(model.parameters()).device
    ids = torch.tensor([[*before]] * (writing.samples or 1), device=device)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(writing.seed)
        if not _keeps_cache(model, ids[:1]):
            return [_slowly(model, row[None], room, is_over, writing) for row in ids]
        width = ids.shape[1]
        asked: dict[str, Any] = {"max_new_tokens": room, "stopping_criteria": _over(is_over, width)}
        if ends:
            asked |= {"eos_token_id": list(ends), "pad_token_id": ends[0]}
        if writing.samples:
            asked |= {"do_sample": True, "top_k": 0, "top_p": 1.0, "temperature": 1.0}
        rows: list[list[int]] = _generated(model, ids, **asked)[:, width:].tolist()
        return rows


def _over(is_over: Callable[[Sequence[int]], bool], width: int) -> list[Any]:
    from transformers import StoppingCriteria, StoppingCriteriaList

    class Over(StoppingCriteria):  # type: ignore[misc]
        def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
            over = [is_over(row[width:].tolist()) for row in input_ids]
            return torch.tensor(over, device=input_ids.device)

    criteria: list[Any] = StoppingCriteriaList([Over()])
    return criteria


def _generated(model: Any, ids: Int[Tensor, "row token"], **asked: Any) -> Any:
    """By the library, of whose settings for this model (penalties, say) none counts."""
    from transformers import GenerationConfig

    own = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        return quietly(
            model.generate,
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            **{"do_sample": False, "use_cache": True, **asked},
        )
    finally:
        model.generation_config = own


_known: "WeakKeyDictionary[Any, bool]" = WeakKeyDictionary()


def _keeps_cache(model: Any, ids: Int[Tensor, "1 token"]) -> bool:
    """Whether the model goes on from its cache as it does without; tried once.

    The library hands the next token alone to any model that it asks for a cache.
    """
    if model not in _known:
        try:
            two = _generated(
                model, ids, max_new_tokens=2, return_dict_in_generate=True, output_logits=True
            )
            mask = torch.ones_like(two.sequences[:, :-1])
            whole = model(input_ids=two.sequences[:, :-1], attention_mask=mask, use_cache=False)
            logits = whole.logits[0, -1].float()
            error = (two.logits[1][0].float() - logits).norm()
            _known[model] = bool(error <= CACHE_ERROR * (logits - logits.mean()).norm())
        except Exception as error:  # noqa: BLE001 - strangers' code fails in any way
            log.info("the model writes without a cache: %s", error)
            _known[model] = False
    return _known[model]


def _slowly(
    model: Any,
    ids: Int[Tensor, "1 token"],
    room: int,
    is_over: Callable[[Sequence[int]], bool],
    writing: Writing,
) -> list[int]:
    """Everything anew for each token: for models that keep no cache."""
    written: list[int] = []
    while len(written) < room and not (written and is_over(written)):
        mask = torch.ones_like(ids)
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[0, -1].float()
        if writing.samples:
            token = int(torch.multinomial(logits.softmax(-1), 1))
        else:
            token = int(logits.argmax())
        written.append(token)
        ids = torch.cat([ids, ids.new_tensor([[token]])], dim=1)
    return written
