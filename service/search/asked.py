"""What a query asks, as the model reads it: terms with their texts as tokens."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from estimators.model.tokens import Sequence1D
from service.asking import Prompt, encode_completion
from service.completing import Writing
from service.conversation import check_question
from service.errors import BadQuery
from service.models import LoadedModel
from service.search.answer import MeasuredTerm
from service.search.query import Query, Term

CERTAIN, IMPOSSIBLE = -1e-6, -200.0
"""Log-probabilities, in nats, beyond which a question is answered with a caution."""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A term with its texts as tokens.

    Attributes:
        prompt: as text; of a conversation, as the chat template writes it.
        completion: as asked, or the model's own.
        against: what it is contrasted with.
        weight: of the term in the sum.
        own: whether the completion is the model's own.
        sequence: prompt and completion.
        unsaid: prompt and what the completion is contrasted with.
        told: what to know of these tokens, a sentence each.
    """

    prompt: str
    completion: str
    against: str | None
    weight: float
    own: bool
    sequence: Sequence1D
    unsaid: Sequence1D | None
    told: tuple[str, ...] = ()


def read(loaded: LoadedModel, query: Query) -> list[Asked]:
    """The query's terms, completed by the model where they have no completion.

    Raises:
        BadQuery: one of them cannot be measured.
    """
    return [asked for term in query.terms for asked in _read(loaded, query, term)]


def _read(loaded: LoadedModel, query: Query, term: Term) -> list[Asked]:
    if term.messages:
        check_question(term.prompt or None, term.messages, term.completion)
    prompt = loaded.read_prompt(term.prompt, term.messages)
    if prompt.turn is not None and term.against is not None:
        term = replace(term, against=prompt.lead + term.against)  # another such turn
    said = prompt.turn if term.completion is None else term.completion
    if said is None:
        return _own(loaded, query, term, prompt)
    if query.samples is not None:
        raise BadQuery(
            f"The query asks for {query.samples} samples of the model's own completions and gives "
            f"a completion; leave one of them out."
        )
    return [_given(loaded, term, prompt, said)]


def _given(loaded: LoadedModel, term: Term, prompt: Prompt, said: str) -> Asked:
    _check_contrast(said, term.against)
    encoded = encode_completion(loaded.tokenizer, loaded.context, prompt, said)
    unsaid, told = _unsaid(loaded, term, prompt)
    return Asked(
        prompt=prompt.text,
        completion=said,
        against=term.against,
        weight=term.weight,
        own=False,
        sequence=encoded.sequence,
        unsaid=unsaid,
        told=tuple(dict.fromkeys(one for one in (encoded.told, told) if one)),
    )


def _own(loaded: LoadedModel, query: Query, term: Term, prompt: Prompt) -> list[Asked]:
    """One term, or one a sample; the tokens are those that the model wrote."""
    if query.samples is not None and term.against is not None:
        raise BadQuery(
            "Samples of the model's own completions are not contrasted with anything; leave out "
            "either samples or against."
        )
    writing = Writing(
        max_new_tokens=query.max_new_tokens, samples=query.samples, seed=query.sample_seed
    )
    written = loaded.write(prompt, writing)
    kept = [one for one in written if one.text.strip()]
    unsaid, told = _unsaid(loaded, term, prompt)
    cautions = [] if told is None else [told]
    if len(kept) < len(written):
        cautions.append(
            f"{len(written) - len(kept)} of the {len(written)} samples are empty and add nothing "
            f"to the mean."
        )
    found: list[Asked] = []
    for one in kept:
        _check_contrast(one.text, term.against)
        if one.tokens is None:
            sequence = encode_completion(
                loaded.tokenizer, loaded.context, prompt, one.text
            ).sequence
        else:
            tokens = (*prompt.tokens, *one.tokens)
            sequence = Sequence1D(tokens=tokens, first_target=len(prompt.tokens))
        found.append(
            Asked(
                prompt=prompt.text,
                completion=one.text,
                against=term.against,
                weight=term.weight / len(written),
                own=True,
                sequence=sequence,
                unsaid=unsaid,
                told=() if found else tuple(cautions),
            )
        )
    return found


def _unsaid(
    loaded: LoadedModel, term: Term, prompt: Prompt
) -> tuple[Sequence1D | None, str | None]:
    if term.against is None:
        return None, None
    encoded = encode_completion(loaded.tokenizer, loaded.context, prompt, term.against)
    return encoded.sequence, encoded.told


def _check_contrast(said: str, against: str | None) -> None:
    if said == against:
        raise BadQuery(
            "The completion and what it is contrasted with are the same; nothing sets them "
            "apart. Give another completion to contrast it with."
        )


def weighted(asked: Sequence[Asked]) -> list[tuple[Sequence1D, float]]:
    """The sequences of a measurement, each with its weight."""
    parts = []
    for one in asked:
        parts.append((one.sequence, one.weight))
        if one.unsaid is not None:
            parts.append((one.unsaid, -one.weight))
    return parts


def texts(asked: Sequence[Asked]) -> list[tuple[str, float]]:
    """The same as texts."""
    parts = []
    for one in asked:
        parts.append((one.prompt + one.completion, one.weight))
        if one.against is not None:
            parts.append((one.prompt + one.against, -one.weight))
    return parts


def measured(
    asked: Sequence[Asked], values: Sequence[float], vocabulary: int
) -> tuple[MeasuredTerm, ...]:
    """The terms as they were measured; ``values`` are those of ``weighted``."""
    rest = iter(values)
    terms = []
    for one in asked:
        said = next(rest)
        against = None if one.unsaid is None else next(rest)
        cautions = [caution("completion", said, one.sequence.targets, vocabulary)]
        if one.unsaid is not None:
            what = "contrasted completion"
            cautions.append(caution(what, against or 0.0, one.unsaid.targets, vocabulary))
        extreme = next((told for told in cautions if told), None)
        told = [*one.told, *([extreme] if extreme else [])]
        terms.append(
            MeasuredTerm(
                prompt=one.prompt,
                completion=one.completion,
                against=one.against,
                weight=one.weight,
                completed_by_model=one.own,
                log_probability=said,
                against_log_probability=against,
                completion_tokens=one.sequence.targets,
                caution=" ".join(told) or None,
                sequence=one.sequence,
            )
        )
    return tuple(terms)


def caution(what: str, value: float, tokens: int, vocabulary: int) -> str | None:
    """What to tell of a completion that is all but impossible or certain; ``value`` in nats."""
    if value > CERTAIN:
        return (
            f"The model is all but certain of the {what} (log p = {value:.1g}), so that nearly no "
            f"gradient is left: scores of this question say more about rounding than about "
            f"training."
        )
    if value < IMPOSSIBLE and value < -tokens * math.log(vocabulary):
        return (
            f"The model finds the {what} impossible (log p = {value:.1f}, less than a random "
            f"guess of its {tokens:,} tokens): scores of this question say more about rounding "
            f"than about training."
        )
    return None
