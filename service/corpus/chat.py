"""Conversations as a model reads them: its own chat template, and the assistant's turns in it."""

import re
from collections.abc import Sequence
from typing import Any

from estimators.model.tokens import Spans, spans_of
from service.corpus.sources import kind_of

MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")
"""How a template marks what the assistant says."""

SPEAKERS = {"human": "user", "gpt": "assistant"}
"""Roles as ShareGPT's files name them."""

Message = dict[str, Any]


def read_messages(value: Any) -> list[Message]:
    """A row's messages, each with 'role' and 'content'; ShareGPT's 'from' and 'value' are such too.

    Raises:
        ValueError: says what is no message.
    """
    if not isinstance(value, list):
        raise ValueError(f"holds {kind_of(value)}, expected a list of messages")
    found = []
    for number, message in enumerate(value):
        if not isinstance(message, dict):
            raise ValueError(f"has {kind_of(message)} as message {number}, expected an object")
        if {"from", "value"} <= set(message):
            speaker = message["from"]
            found.append({"role": SPEAKERS.get(speaker, speaker), "content": message["value"]})
        elif "role" in message:
            found.append({key: part for key, part in message.items() if part is not None})
        else:
            raise ValueError(
                f"has a message {number} with {', '.join(sorted(message)) or 'nothing'}, expected "
                f"'role' and 'content' (or 'from' and 'value')"
            )
    return found


def render(
    tokenizer: Any,
    messages: Sequence[Message],
    tools: Any = None,
    *,
    asks: bool = False,
    **options: Any,
) -> Any:
    """What the model's chat template makes of messages: a text, or with ``tokenize`` tokens.

    Args:
        tokenizer: with a chat template.
        messages: in order.
        tools: that the template is told of.
        asks: end with what stands before an answer of the assistant.
        options: further ones of ``apply_chat_template``.

    Raises:
        ValueError: there is no template, or it refuses these messages.
    """
    if not tokenizer.chat_template:
        raise ValueError(
            "The model's tokenizer has no chat template, so that it is not known how the model "
            "read conversations; give a tokenizer that has one (--tokenizer), or the tokens "
            "themselves as input_ids and labels"
        )
    try:
        return tokenizer.apply_chat_template(
            list(messages), tools=tools, add_generation_prompt=asks, **options
        )
    except Exception as error:  # a template raises whatever its author happened to write
        said = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        raise ValueError(f"The model's chat template refuses it ({said})") from error


def tokens_of(
    tokenizer: Any, messages: Sequence[Message], tools: Any = None, *, asks: bool = False
) -> list[int]:
    """What the model reads of messages."""
    rendered = render(tokenizer, messages, tools, asks=asks, tokenize=True, return_dict=True)
    return list(rendered["input_ids"])


def assistant_turns(
    tokenizer: Any, messages: Sequence[Message], tools: Any = None
) -> tuple[list[int], Spans]:
    """What the model reads of a conversation, and which tokens are the assistant's.

    The template's own marks decide. Without marks a turn is what is there once it was said and was
    not while it was asked for, its end included.

    Raises:
        ValueError: without marks, the template renders earlier turns otherwise once others follow.
    """
    if MARKED.search(tokenizer.chat_template or ""):
        rendered = render(
            tokenizer,
            messages,
            tools,
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        return list(rendered["input_ids"]), spans_of(rendered["assistant_masks"])
    whole = tokens_of(tokenizer, messages, tools)
    spans = []
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = tokens_of(tokenizer, messages[:number], tools, asks=True)
        after = tokens_of(tokenizer, messages[: number + 1], tools)
        if whole[: len(before)] != before or whole[: len(after)] != after:
            raise ValueError(
                f"The chat template renders a conversation's beginning otherwise once more of it "
                f"follows (message {number}), so that the assistant's tokens cannot be told; mark "
                f"them in the template with {{% generation %}}, or give input_ids and labels"
            )
        spans.append((len(before), len(after)))
    return whole, tuple(span for span in spans if span[0] < span[1])
