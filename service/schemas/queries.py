"""What is asked over HTTP, and what every schema has in common."""

from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from service.search.query import PATIENCE, Condition, Query, Term


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
COMPLETION = (
    "What it said; tokenised by itself, so begin it with its space. "
    "Left out: the model completes the prompt greedily, up to the first full stop."
)
AGAINST = (
    "What it did not say: asks what made the completion likelier than this, "
    "log p(completion | prompt) - log p(against | prompt)."
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


class TermRequest(Schema):
    """One weighted part of a measurement."""

    prompt: Text = Field(description=PROMPT)
    completion: Text | None = Field(default=None, description=COMPLETION)
    against: Text | None = Field(default=None, description=AGAINST)
    weight: float = Field(
        default=1.0, ge=-1e6, le=1e6, description="Of this term in the sum; may be negative."
    )


class QueryRequest(Schema):
    """Which training examples made the model say this?"""

    model_config = ConfigDict(extra="forbid", strict=True)

    prompt: Text | None = Field(default=None, description=PROMPT)
    completion: Text | None = Field(default=None, description=COMPLETION)
    against: Text | None = Field(default=None, description=AGAINST)
    batch: list[TermRequest] | None = Field(
        default=None,
        min_length=1,
        max_length=64,
        description="Weighted queries as one measurement, their sum; in place of prompt, "
        "completion and against.",
    )
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
        alone = [n for n in ("prompt", "completion", "against") if getattr(self, n) is not None]
        if self.batch is None and self.prompt is None:
            raise ValueError("give a prompt, or a batch of them")
        if self.batch is not None and alone:
            raise ValueError(f"give either a batch or {' and '.join(alone)}, not both")
        return self

    def to_query(self, largest_budget: int) -> Query:
        """The engine's form of the request; "auto" is the largest budget."""
        fields = self.model_dump(exclude={"index", "batch", "filters"})
        fields["budget"] = largest_budget if self.budget == "auto" else self.budget
        fields["prompt"] = self.prompt or ""
        fields["batch"] = tuple(Term(**term.model_dump()) for term in self.batch or ())
        fields["filters"] = {
            column: Condition(
                any_of=None if asked.any_of is None else tuple(asked.any_of),
                at_least=asked.at_least,
                at_most=asked.at_most,
            )
            for column, asked in self.filters.items()
        }
        return Query(**fields)
