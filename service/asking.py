"""Questions as the model reads them: a prompt or a conversation, and what was said after it."""

from dataclasses import dataclass
from typing import Any

from estimators.model.tokens import Sequence1D
from service.conversation import Messages, render
from service.errors import BadQuery


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """What stands before a completion.

    Attributes:
        text: as asked; of a conversation, as the chat template writes it.
        tokens: at least one.
        plain: those of ``tokens`` that are text, without what the tokenizer adds to any text.
        chats: whether it is a conversation.
        turn: what the assistant said, where the conversation ends with that.
        lead: white space that the template puts before what the assistant says.
    """

    text: str
    tokens: tuple[int, ...]
    plain: tuple[int, ...]
    chats: bool = False
    turn: str | None = None
    lead: str = ""


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """Prompt and completion as tokens.

    Attributes:
        sequence: whose completion tokens count.
        told: that these are not the tokens which the model reads in such a text, in two sentences;
            None where they are.
    """

    sequence: Sequence1D
    told: str | None = None


def read_prompt(tokenizer: Any, prompt: str, messages: Messages = ()) -> Prompt:
    """A prompt, or a conversation in its place, as tokens.

    Templates write the special tokens of a conversation themselves, so none is added to it.

    Raises:
        BadQuery: an empty prompt for a model without a token to begin a text with, or a
            conversation that cannot be written.
    """
    if not messages:
        plain = _tokens(tokenizer, prompt)
        return Prompt(text=prompt, tokens=tuple(encode_prompt(tokenizer, prompt)), plain=plain)
    rendered = render(tokenizer, messages)
    tokens = _tokens(tokenizer, rendered.text)
    if not tokens:
        raise BadQuery(
            "The model's chat template writes nothing for this conversation; give a prompt instead."
        )
    return Prompt(tokens=tokens, plain=tokens, chats=True, **vars(rendered))


def encode_query(
    tokenizer: Any, context: int, prompt: str, completion: str, messages: Messages = ()
) -> Sequence1D:
    """Prompt (or conversation) and completion as one sequence whose completion tokens count.

    Raises:
        BadQuery: as ``read_prompt`` and ``encode_completion``.
    """
    read = read_prompt(tokenizer, prompt, messages)
    return encode_completion(tokenizer, context, read, completion).sequence


def encode_completion(tokenizer: Any, context: int, prompt: Prompt, completion: str) -> Encoded:
    """What was said after a prompt, as tokens after the prompt's.

    Both are tokenised as one text, which is what the model reads in training, and parted where the
    completion begins. Where a token reaches across, and for tokenizers that do not tell where their
    tokens lie, they are tokenised apart.

    Raises:
        BadQuery: a completion of nothing but white space, or more tokens than the context.
    """
    before, after, told = prompt.tokens, _tokens(tokenizer, completion), None
    if completion.strip() and getattr(tokenizer, "is_fast", False):
        parted = _together(tokenizer, prompt, completion)
        if isinstance(parted, str):
            told = parted
        else:
            before, after = parted
    if not after or not completion.strip():
        raise BadQuery("The completion is empty; give the text whose cause you look for.")
    if len(before) + len(after) > context:
        raise BadQuery(
            f"Prompt and completion have {len(before)} + {len(after)} tokens, the model reads "
            f"{context} at most; shorten the prompt or the completion."
        )
    sequence = Sequence1D(tokens=(*before, *after), first_target=len(before))
    return Encoded(sequence=sequence, told=told)


def _together(
    tokenizer: Any, prompt: Prompt, completion: str
) -> tuple[tuple[int, ...], tuple[int, ...]] | str:
    """The tokens before and in the completion, of both as one text; why they cannot be parted."""
    text, boundary = prompt.text + completion, len(prompt.text)
    read = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    tokens, places = tuple(read["input_ids"]), read["offset_mapping"]
    count = sum(end <= boundary and start < boundary for start, end in places)
    if tokens[: len(prompt.plain)] == prompt.plain:  # offsets may leave out the space of a word
        count = len(prompt.plain)
    end = max((end for _, end in places[:count]), default=0)
    start = min((start for start, _ in places[count:]), default=len(text))
    added = prompt.tokens[: len(prompt.tokens) - len(prompt.plain)]
    if tokens[:count] == prompt.plain and end <= boundary <= start:
        return prompt.tokens, tokens[count:]
    if end == boundary == start and prompt.tokens == (*added, *prompt.plain):
        return (*added, *tokens[:count]), tokens[count:]
    return _apart(text, [place for place in places if place[0] < boundary < place[1]])


def _apart(text: str, across: list[tuple[int, int]]) -> str:
    read = "other tokens there"
    if across:
        start, end = across[0]
        read = f"'{text[start:end]}' as one token"
    return (
        f"Prompt and completion do not meet between two tokens: in one text, the model would have "
        f"read {read}. They were tokenised apart; to ask about what it reads, end the prompt "
        f"before a word, and begin the completion with that word's space."
    )


def _tokens(tokenizer: Any, text: str) -> tuple[int, ...]:
    return tuple(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def encode_prompt(tokenizer: Any, prompt: str) -> list[int]:
    """The prompt's tokens; of an empty one the token that the model begins a text with.

    Raises:
        BadQuery: there is none.
    """
    tokens: list[int] = tokenizer(prompt, verbose=False)["input_ids"]
    end, begin = tokenizer.eos_token_id, tokenizer.bos_token_id
    if end is not None:
        while len(tokens) > 1 and tokens[-1] == end:
            tokens = tokens[:-1]
    if tokens == [end] and begin is not None:  # an end that was appended to nothing
        tokens = [begin]
    tokens = tokens or [begin] * (begin is not None)
    if not tokens:
        raise BadQuery(
            "The prompt is empty, and this model's tokenizer has no token for the beginning of "
            "a text, so that nothing stands before the completion; give the text that the "
            "model was asked with."
        )
    return tokens
