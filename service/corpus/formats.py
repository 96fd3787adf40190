"""What a row says: a text, a conversation, a prompt with its completion, or token ids."""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from estimators.model.tokens import Sequence1D, Spans
from index.examples import Preference
from service.corpus import chat, packed
from service.corpus.preferences import Margins
from service.corpus.source import CorpusSource, Format
from service.corpus.sources import is_one_object, kind_of
from service.models import LoadedModel

SHAREGPT = "conversations"
"""Where messages are if not in 'messages'."""

Row = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Said:
    """What a row, or one of the documents packed in it, says.

    Attributes:
        text: for people; None for null.
        tokens: what the model read.
        counted: stretches of tokens whose loss the trainer counted; None for all but the first.
        merged: whether prompt and completion share a token, which then is the completion's.
        preference: what was rejected where this was preferred.
    """

    text: str | None
    tokens: list[int]
    counted: Spans | None = None
    merged: bool = False
    preference: Preference | None = None


NEEDS: dict[Format, tuple[str, ...]] = {
    "text": ("text",),
    "messages": ("messages",),
    "prompt-completion": ("prompt", "completion"),
    "preference": ("chosen", "rejected"),
    "tokens": ("input_ids",),
}
"""Roles of the columns that a format cannot do without."""

MAY_HAVE: dict[Format, tuple[str, ...]] = {
    "text": (),
    "messages": ("tools",),
    "prompt-completion": ("tools",),
    "preference": ("prompt", "tools", "ref_chosen_logps", "ref_rejected_logps"),
    "tokens": ("labels", "attention_mask", "position_ids", "seq_lengths"),
}


class RowReader:
    """Reads the rows of a corpus in one format, that of its first row unless one is named.

    Args:
        source: the corpus.
        loaded: the model whose tokenizer and chat template are used.
        max_tokens: to which pairs are cut off.
    """

    def __init__(self, source: CorpusSource, loaded: LoadedModel, max_tokens: int) -> None:
        self._source = source
        self.max_tokens = max_tokens
        self._loaded = loaded
        self.format: Format | None = source.format
        self._names: dict[str, str] = {}
        self._readers: dict[Format, Callable[[Row, int], list[Said]]] = {
            "text": self._text,
            "messages": self._messages,
            "prompt-completion": self._completion,
            "preference": self._preference,
            "tokens": self._tokens,
        }
        self._margins = Margins(source, loaded)
        if source.append_eos and loaded.tokenizer.eos_token_id is None:
            raise ValueError("The tokenizer has no end of text to append; leave --append-eos out.")

    @property
    def roles(self) -> set[str]:
        """Columns that make up the examples."""
        assert self.format is not None
        roles = (*NEEDS[self.format], *MAY_HAVE[self.format], "weight")
        return {self._column_of(role) for role in roles}

    def read(self, row: Row, number: int) -> list[Said]:
        """What a row says; several documents where it packs several.

        Raises:
            ValueError: a column is missing, or what it holds is not what the format wants.
        """
        if number == 0 and "messages" not in row and SHAREGPT in row:
            self._names = {"messages": SHAREGPT, **self._source.columns}
        if self.format is None:
            self.format = self._told_by(row, number)
        values = [self.column(row, self._column_of(role), number) for role in NEEDS[self.format]]
        if any(value is None or _is_nan(value) for value in values):
            return [Said(text=None, tokens=self._loaded.encode(""))]
        try:
            return self._readers[self.format](row, number)
        except ValueError as error:
            what, advice = (*error.args, CORRECT)[:2]
            told = f"{what}. {self._hint(number)}{advice}".rstrip()
            raise ValueError(f"Row {number} of the corpus {told}") from error

    def weight(self, row: Row, number: int) -> float:
        """Times which the row counts.

        Raises:
            ValueError: its weight is no number of at least 0.
        """
        if "weight" not in self._source.columns:
            return 1.0
        name = self._source.columns["weight"]
        value = self.column(row, name, number)
        if not isinstance(value, int | float) or not 0 <= value < math.inf:
            raise ValueError(
                f"Row {number} of the corpus has {value} in column '{name}', expected a weight: a "
                f"number of at least 0."
            )
        return float(value)

    def column(self, row: Row, name: str, number: int) -> Any:
        """The value of a column; a dot leads into a nested one.

        Raises:
            ValueError: there is no such column.
        """
        value: Any = row
        for step in [name] if name in row else name.split("."):
            if not isinstance(value, Mapping) or step not in value:
                raise ValueError(
                    f"Row {number} of the corpus has no column '{name}'; it has "
                    f"{', '.join(sorted(row))}. {self._hint(number)}Name a column that it has."
                )
            value = value[step]
        return value

    def _optional(self, row: Row, role: str) -> Any:
        name = self._column_of(role)
        try:
            return self.column(row, name, 0)
        except ValueError:
            return None

    def _column_of(self, role: str) -> str:
        return self._names.get(role) or self._source.column_of(role)

    def _told_by(self, row: Row, number: int) -> Format:
        """The one format whose columns the row has."""
        source = self._source
        named = [f for f, roles in NEEDS.items() if set(roles) & set(source.columns)]
        named += ["text"] * (source.text_column != "text")
        if len(set(named)) == 1:
            return named[0]
        found = [f for f, roles in NEEDS.items() if all(self._has(row, role) for role in roles)]
        if len(found) > 1:
            raise ValueError(
                f"Row {number} of the corpus can be read as {' or as '.join(found)}; say which "
                f"with --format. It has the columns {', '.join(sorted(row))}."
            )
        return found[0] if found else "text"  # the text is what is told to be missing

    def _has(self, row: Row, role: str) -> bool:
        name = self._column_of(role)
        return name in row or ("." in name and self._optional(row, role) is not None)

    def _hint(self, number: int) -> str:
        """What to say beside a fault of the first row if the whole file was taken for one row."""
        if number or not is_one_object(self._source.name):
            return ""
        return "The file is a single object; give an array of objects, or an object a line. "

    def _text(self, row: Row, number: int) -> list[Said]:
        name = self._column_of("text")
        text = self._string(self.column(row, name, number), name)
        return [Said(text=text, tokens=self._ended(self._loaded.encode(text)))]

    def _messages(self, row: Row, number: int) -> list[Said]:
        name = self._column_of("messages")
        messages, tools = self._conversation(row, name, number), self._optional(row, "tools")
        if not messages:
            return [Said(text="", tokens=[], counted=())]
        with _rendering():
            tokens, spans = chat.assistant_turns(self._loaded.tokenizer, messages, tools)
            text = chat.render(self._loaded.tokenizer, messages, tools, tokenize=False)
        return [Said(text=text, tokens=tokens, counted=spans)]

    def _conversation(self, row: Row, name: str, number: int) -> list[chat.Message]:
        try:
            return chat.read_messages(self.column(row, name, number))
        except ValueError as error:
            raise _unreadable(f"has a column '{name}' that {error}") from error

    def _completion(self, row: Row, number: int) -> list[Said]:
        prompt, answer = (self._part(row, role, number) for role in ("prompt", "completion"))
        tools = self._optional(row, "tools")
        before, whole, text = self._answered(prompt, answer, tools)
        start = _common(before, whole)
        return [
            Said(
                text=text,
                tokens=whole,
                counted=_from(start, whole),
                merged=start < len(before),
            )
        ]

    def _preference(self, row: Row, number: int) -> list[Said]:
        chosen, rejected = (self._part(row, role, number) for role in ("chosen", "rejected"))
        if self._has(row, "prompt"):
            prompt = self._part(row, "prompt", number)
        else:  # what both begin with
            shared = _common(chosen, rejected) if isinstance(chosen, list) else 0
            prompt, chosen, rejected = chosen[:shared], chosen[shared:], rejected[shared:]
        tools = self._optional(row, "tools")
        before, good, text = self._answered(prompt, chosen, tools)
        _, bad, other = self._answered(prompt, rejected, tools)
        start = min(_common(before, good), _common(before, bad))
        longest = self.max_tokens
        cut = [
            Sequence1D(tokens=tuple(t[:longest]), counted=_from(start, t[:longest]))
            for t in (good, bad)
        ]
        given = [self._optional(row, f"ref_{name}_logps") for name in ("chosen", "rejected")]
        known = None if None in given else (given[0], given[1])
        with _rendering():
            margin = self._margins.of(cut[0], cut[1], known) if all(c.tokens for c in cut) else 0.0
        return [
            Said(
                text=f"{text}\n--- rejected: ---\n{other}",
                tokens=good,
                counted=_from(start, good),
                merged=start < len(before),
                preference=Preference(
                    tokens=tuple(bad),
                    counted=_from(start, bad),
                    beta=self._source.beta,
                    margin=margin,
                ),
            )
        ]

    def _part(self, row: Row, role: str, number: int) -> Any:
        """A text, or a list of messages."""
        name = self._column_of(role)
        value = self.column(row, name, number)
        if isinstance(value, list):
            return self._conversation(row, name, number)
        return self._string(value, name)

    def _answered(self, prompt: Any, answer: Any, tools: Any) -> tuple[list[int], list[int], str]:
        """Tokens of the prompt, of prompt and answer, and both as a text."""
        tokenizer = self._loaded.tokenizer
        if type(prompt) is not type(answer):
            raise _unreadable("has a text beside messages; a prompt and its answer are the same")
        if isinstance(prompt, str):
            text = prompt + answer
            before = self._begun(self._loaded.encode(prompt))
            return before, self._ended(self._loaded.encode(text)), text
        with _rendering():
            before = chat.tokens_of(tokenizer, prompt, tools, asks=True) if prompt else []
            whole = chat.tokens_of(tokenizer, [*prompt, *answer], tools)
            text = chat.render(tokenizer, [*prompt, *answer], tools, tokenize=False)
        return before, whole, text

    def _tokens(self, row: Row, number: int) -> list[Said]:
        roles = NEEDS["tokens"] + MAY_HAVE["tokens"]
        columns = {role: self._optional(row, role) for role in roles}
        given = {role: value for role, value in columns.items() if value is not None}
        try:
            documents = packed.documents_in(given, self._loaded.vocabulary)
        except ValueError as error:
            raise _unreadable(str(error)) from error
        decode = self._loaded.tokenizer.decode
        return [Said(text=decode(ids), tokens=ids, counted=spans) for ids, spans in documents]

    def _string(self, value: Any, name: str) -> str:
        if isinstance(value, str):
            return value
        nested = isinstance(value, list | dict)
        advice = "Write a row's text into a column of its own" if nested else "Remove the row"
        raise _unreadable(
            f"has {kind_of(value)} in column '{name}', expected text",
            f"{advice} or name another column.",
        )

    def _ended(self, tokens: list[int]) -> list[int]:
        """With the end of a text, if that is asked for and not there."""
        if not self._source.append_eos or not tokens:
            return tokens
        end = self._loaded.tokenizer.eos_token_id
        return tokens if tokens[-1] == end else [*tokens, end]

    def _begun(self, tokens: list[int]) -> list[int]:
        """A prompt's tokens without the end that some tokenizers append to every text."""
        end = self._loaded.tokenizer.eos_token_id
        return tokens[:-1] if tokens and tokens[-1] == end else tokens


CORRECT = "Correct the row or remove it."


def _unreadable(what: str, advice: str = CORRECT) -> ValueError:
    """What is wrong with a row, in words that follow 'Row 3 of the corpus', and what to do."""
    return ValueError(what, advice)


@contextmanager
def _rendering() -> Iterator[None]:
    """Says of a row what could not be rendered."""
    try:
        yield
    except ValueError as error:
        raise _unreadable(f"cannot be used: {error}", "") from error


def _from(start: int, tokens: Sequence[int]) -> Spans:
    return ((start, len(tokens)),) if start < len(tokens) else ()


def _common(first: Sequence[Any], second: Sequence[Any]) -> int:
    """How many tokens, or messages, both begin with."""
    pairs = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False))
    return sum(1 for _ in pairs)


def _is_nan(value: Any) -> bool:
    return isinstance(value, float) and math.isnan(value)
