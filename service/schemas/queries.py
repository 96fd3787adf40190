"""What is asked over HTTP, and what every schema has in common."""

from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from service.search.query import (
    PATIENCE,
    Condition,
    Message,
    Messages,
    Query,
    Term,
    check_question,
)


class Schema(BaseModel):
    """A schema that refuses unknown fields."""

    model_config = ConfigDict(extra="forbid")


class ConditionSchema(Schema):
    """What a metadata column must hold; all that is given must be true."""

    any_of: list[str | int | float | bool] | None = Field(
        default=None, min_length=1, max_length=1000, description="The value is one of these."
    )
    at_least: float | str | None = Field(
        default=None, description="Numbers, or texts by code point."
    )
    at_most: float | str | None = Field(
        default=None, description="Numbers, or texts by code point."
    )

    @model_validator(mode="after")
    def _asks_something(self) -> Self:
        if self.any_of is None and self.at_least is None and self.at_most is None:
            raise ValueError("give any_of, at_least or at_most")
        return self


PROMPT = (
    "What the model was asked; empty for what it says at the beginning of a text, if it has a "
    "token for that."
)
MESSAGES = (
    "A conversation in place of the prompt, as the model's own chat template writes it. If the "
    "last message is the assistant's, that is the completion, which must then be left out."
)
COMPLETION = (
    "What it said, with the space that it begins with; in a conversation the assistant's words, "
    "without the token that ends its turn. Left out: the model's own, greedy unless samples are "
    "asked for; that of a prompt ends before the first full stop or line break."
)
AGAINST = (
    "What it did not say: asks what made the completion likelier than this, "
    "log p(completion | prompt) - log p(against | prompt). Of two completions of one token each "
    "that is the difference of their logits."
)


def _encodable(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"character {error.start + 1} is half of a pair (a lone surrogate), which is no text"
        ) from error
    return text


Text = Annotated[str, AfterValidator(_encodable)]


class MessageSchema(Schema):
    """One turn of a conversation."""

    role: Text = Field(
        min_length=1,
        max_length=64,
        description="As the model's chat template names it: user, assistant, system.",
    )
    content: Text = Field(description="What was said.")


class QuestionSchema(Schema):
    """What is asked of the model: a prompt or a conversation, and what it said."""

    prompt: Text | None = Field(default=None, description=PROMPT)
    messages: list[MessageSchema] | None = Field(
        default=None, max_length=1000, description=MESSAGES
    )
    completion: Text | None = Field(default=None, description=COMPLETION)
    against: Text | None = Field(default=None, description=AGAINST)

    @property
    def turns(self) -> Messages:
        """The messages; none for a prompt."""
        return tuple(Message(role=m.role, content=m.content) for m in self.messages or ())

    @property
    def longest(self) -> int:
        """Characters of its longest text; all messages count as one."""
        said = "".join(message.content for message in self.messages or ())
        return max(len(text or "") for text in (self.prompt, said, self.completion, self.against))

    def check(self) -> None:
        """Refuse what is neither a prompt nor a conversation.

        Raises:
            ValueError: it is neither, or both.
        """
        turns = None if self.messages is None else self.turns
        try:
            check_question(self.prompt, turns, self.completion)
        except ValueError as error:
            raise ValueError(str(error).rstrip(".")) from error  # whoever tells it adds a stop


class TermRequest(QuestionSchema):
    """One weighted part of a measurement."""

    weight: float = Field(
        default=1.0, ge=-1e6, le=1e6, description="Of this term in the sum; may be negative."
    )

    @model_validator(mode="after")
    def _asks_one_thing(self) -> Self:
        self.check()
        return self

    def to_term(self) -> Term:
        """The engine's form."""
        return Term(
            prompt=self.prompt or "",
            messages=self.turns,
            completion=self.completion,
            against=self.against,
            weight=self.weight,
        )


class QueryRequest(QuestionSchema):
    """Which training examples made the model say this?"""

    model_config = ConfigDict(extra="forbid", strict=True)

    batch: list[TermRequest] | None = Field(
        default=None,
        min_length=1,
        max_length=64,
        description="Weighted queries as one measurement, their sum; in place of prompt, messages, "
        "completion and against.",
    )
    max_new_tokens: int | None = Field(
        default=None,
        ge=1,
        le=1024,
        description="Most tokens of the model's own completion; left out: 24 of a prompt's, 64 of "
        "a conversation's.",
    )
    samples: int | None = Field(
        default=None,
        ge=1,
        le=64,
        description="Draw so many of the model's own completions at temperature 1 and measure the "
        "mean of their log p; each is a term of the answer. Left out: the greedy completion.",
    )
    sample_seed: int = Field(default=0, ge=0, lt=2**62, description="Of the samples.")
    index: str = Field(default="default", description="Name of the index.")
    estimator: str | None = Field(
        default=None,
        description="Name of the estimator that scores, see GET /v1/estimators. Left out: the one "
        "that the index was built for.",
    )
    parameters: dict[str, float] = Field(
        default_factory=dict,
        max_length=16,
        description="Of the estimator, e.g. damping; see GET /v1/estimators. Those that are left "
        "out have the index's defaults.",
    )
    proposer: str | None = Field(
        default=None,
        description="Whose order of the rows is followed: codes (the index's own) or bm25. Left "
        "out: codes; for an estimator without gradients its own order, if it has one.",
    )
    k: int = Field(default=10, ge=1, description="Training examples to return, of each direction.")
    direction: Literal["proponents", "opponents", "both"] = Field(
        default="proponents",
        description="proponents raised the measured value, opponents lowered it.",
    )
    filters: dict[str, ConditionSchema] = Field(
        default_factory=dict,
        max_length=16,
        description="Conditions on metadata columns (and id, document); rows that do not meet all "
        "of them are no part of the question, nor of the certificates.",
    )
    ranking: Literal["normalised", "score"] = Field(
        default="normalised",
        description="score: by influence; normalised: by influence over the whitened norm of the "
        "training gradient, which keeps long or odd examples from crowding the top.",
    )
    recall: float = Field(default=0.9, gt=0, le=1, description="Recall of the top k to certify.")
    confidence: float = Field(default=0.95, gt=0, lt=1, description="Of each certificate.")
    until: Literal["sketch", "calibration"] = Field(
        default="sketch",
        description="The certificate at which the search stops: sketch, about this answer; or "
        "calibration, about queries like those that the index was calibrated with (fewer rows).",
    )
    budget: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        default=1000,
        description="Most rows to rescore exactly. auto: as many as the certificate takes, within "
        "the service's limit; give a deadline with it.",
    )
    patience: int | None = Field(
        default=PATIENCE,
        ge=0,
        description="Where the budget cannot buy the certificate, the search ends once so many "
        "rows were rescored without a change of the results; null spends the budget.",
    )
    deadline: float | None = Field(
        default=None,
        gt=0,
        le=86_400,
        description="Seconds after which the answer so far is returned, marked partial.",
    )
    calibration_rows: int = Field(
        default=64, ge=0, description="Random rows that check the sketch's noise."
    )
    audit_rows: int = Field(default=64, ge=0, description="Random unscored rows to audit.")
    documents: bool = Field(
        default=False,
        description="Also score the whole documents that the examples are parts of, which needs "
        "the exact scores of all their rows.",
    )
    tokens: bool = Field(
        default=False, description="Also split each result's score over its tokens (a heat map)."
    )
    layers: bool = Field(
        default=False, description="Also split each result's score over the model's layers."
    )
    clusters: bool = Field(
        default=False, description="Also tell which results are near-duplicates of each other."
    )
    seed: int | None = Field(
        default=None, ge=0, lt=2**62, description="Of the random rows; drawn if left out."
    )

    @model_validator(mode="after")
    def _asks_one_thing(self) -> Self:
        alone = [n for n in QuestionSchema.model_fields if getattr(self, n) is not None]
        if self.batch is None and self.prompt is None and self.messages is None:
            raise ValueError("give a prompt, or a batch of them, or messages")
        if self.batch is not None and alone:
            raise ValueError(f"give either a batch or {' and '.join(alone)}, not both")
        if self.batch is None:
            self.check()
        return self

    @property
    def longest_text(self) -> int:
        """Characters of the longest text."""
        asked: list[QuestionSchema] = [self, *(self.batch or ())]
        return max(one.longest for one in asked)

    @property
    def most_terms(self) -> int:
        """Completions that are measured, one for each sample."""
        return len(self.batch or (self,)) * (self.samples or 1)

    def to_query(self, largest_budget: int) -> Query:
        """The engine's form of the request; "auto" is the largest budget."""
        fields = self.model_dump(exclude={"index", "batch", "filters", "messages"})
        fields["budget"] = largest_budget if self.budget == "auto" else self.budget
        fields["prompt"] = self.prompt or ""
        fields["messages"] = self.turns
        fields["batch"] = tuple(term.to_term() for term in self.batch or ())
        fields["filters"] = {
            column: Condition(
                any_of=None if asked.any_of is None else tuple(asked.any_of),
                at_least=asked.at_least,
                at_most=asked.at_most,
            )
            for column, asked in self.filters.items()
        }
        return Query(**fields)
