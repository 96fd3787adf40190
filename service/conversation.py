"""Conversations, as a model's own chat template writes them."""

from dataclasses import dataclass
from typing import Any

from service.errors import BadQuery

ASSISTANT = "assistant"


@dataclass(frozen=True, kw_only=True)
class Message:
    """One turn of a conversation.

    Attributes:
        role: whose it is, by the names of the chat template: "user", "assistant", "system".
        content: what was said.
    """

    role: str
    content: str


Messages = tuple[Message, ...]


@dataclass(frozen=True, kw_only=True)
class Rendered:
    """A conversation as text.

    Attributes:
        text: up to where the assistant's turn begins, special tokens written out.
        turn: what the assistant said then, if the conversation has it.
        lead: white space that the template writes before it, and that ``turn`` begins with.
    """

    text: str
    turn: str | None = None
    lead: str = ""


def check_question(prompt: str | None, messages: Messages | None, completion: str | None) -> None:
    """Refuse what is not either a prompt or a conversation; None: not given.

    Raises:
        BadQuery: it is neither, or both, or has two completions.
    """
    if messages is None:
        if prompt is None:
            raise BadQuery("Neither prompt nor messages are given; give one of them.")
        return
    if prompt is not None:
        raise BadQuery(
            "Both prompt and messages are given; a conversation takes the prompt's place, so leave "
            "one of them out."
        )
    if not messages:
        raise BadQuery(
            "The list of messages is empty; give the turns of the conversation, as "
            '[{"role": "user", "content": "..."}].'
        )
    if messages[-1].role == ASSISTANT and completion is not None:
        raise BadQuery(
            "The last message is the assistant's and a completion is given too; leave one of them "
            "out."
        )


def read_messages(value: Any, where: str) -> Messages:
    """Messages as JSON has them.

    Args:
        value: that was read.
        where: that a refusal names.

    Raises:
        BadQuery: these are none.
    """
    wanted = 'a list of turns, as [{"role": "user", "content": "..."}]'
    if not isinstance(value, list) or not value:
        has = "an empty list" if value == [] else type(value).__name__
        raise BadQuery(f"The messages of {where} are to be {wanted}; got {has}.")
    for number, turn in enumerate(value, start=1):
        texts = isinstance(turn, dict) and all(isinstance(one, str) for one in turn.values())
        if not texts or set(turn) != {"role", "content"}:
            has = ", ".join(sorted(turn)) if isinstance(turn, dict) else type(turn).__name__
            raise BadQuery(
                f"Message {number} of {where} is no turn: the messages are to be {wanted}, of two "
                f"texts each; got {has}."
            )
    return tuple(Message(role=turn["role"], content=turn["content"]) for turn in value)


def render(tokenizer: Any, messages: Messages) -> Rendered:
    """The conversation as the model's chat template writes it.

    Args:
        tokenizer: of the model.
        messages: at least one; the last may be the assistant's, which is then what it said.

    Raises:
        BadQuery: there is no template, it refuses the conversation, or nothing stands before the
            assistant's turn.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise BadQuery(
            "This model's tokenizer has no chat template, so that messages cannot be written as "
            "the model reads them; give a prompt instead."
        )
    last = messages[-1]
    before = messages[:-1] if last.role == ASSISTANT else messages
    if not before:
        raise BadQuery(
            "The conversation holds nothing but an assistant's turn; give what it answered, too."
        )
    text = _written(tokenizer, before, begins_turn=True)
    if last.role != ASSISTANT:
        return Rendered(text=text)
    lead = _lead(tokenizer, messages, text)
    return Rendered(text=text, turn=lead + last.content, lead=lead)


def _written(tokenizer: Any, messages: Messages, *, begins_turn: bool) -> str:
    turns = [vars(message) for message in messages]
    try:
        return str(
            tokenizer.apply_chat_template(turns, add_generation_prompt=begins_turn, tokenize=False)
        )
    except Exception as error:  # a template raises whatever its author happened to write
        said = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        raise BadQuery(
            f"The model's chat template refuses this conversation: {said}; give turns as it wants "
            f"them."
        ) from error


def _lead(tokenizer: Any, messages: Messages, text: str) -> str:
    """The white space that the template writes between ``text`` and the assistant's own words."""
    try:
        whole = _written(tokenizer, messages, begins_turn=False)
    except BadQuery:  # one that is made for asking alone
        return ""
    rest = whole[len(text) :] if whole.startswith(text) else ""
    lead = rest[: max(rest.find(messages[-1].content), 0)]
    return lead if lead.isspace() else ""
