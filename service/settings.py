"""The service's settings: the one place that reads the environment (ETYMON_...)."""

import json
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import Field, SecretStr, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict


class Settings(BaseSettings):
    """Settings of one service process; each can be set as ETYMON_NAME in the environment."""

    model_config = SettingsConfigDict(env_prefix="ETYMON_", extra="forbid", frozen=True)

    model: str = Field(
        description="Folder or name of the causal language model, also as NAME@REVISION."
    )
    revision: str | None = Field(
        default=None, description="Branch, tag or commit of the model's repository."
    )
    tokenizer: str | None = Field(
        default=None,
        description="Folder or name of the tokenizer; the first index's, if it remembers one.",
    )
    base_model: str | None = Field(
        default=None,
        description="Folder or name of an adapter's base model; the first index's, likewise.",
    )
    unused_weights: bool = Field(
        default=False,
        description="Go on although the checkpoint holds weights that the model does not use.",
    )
    indexes: dict[str, Path] = Field(
        description='Indexes by name, as JSON in the environment: {"default": "runs/demo/index"}.',
        min_length=1,
    )
    traces: dict[str, Path] = Field(
        default_factory=dict,
        description="Folders that etymon trace wrote, by the name of the index whose model the run "
        'trained, as JSON in the environment: {"default": "runs/mine/trace"}.',
    )
    runs: dict[str, Path] = Field(
        default_factory=dict,
        description="Folders of recorded runs by the name of the index, likewise; where a traced "
        "run no longer lies where it was traced.",
    )
    device: str = Field(default="cpu", description="Where to compute, e.g. cpu or cuda.")
    search_device: str = Field(
        default="cpu", description="Where to scan codes; cuda copies them to the GPU's memory."
    )
    dtype: str = Field(default="auto", description="auto, float32, bfloat16 or float16.")
    token_budget: int = Field(default=1024, ge=1, description="Padded tokens in a batch.")
    max_in_flight: int = Field(
        default=8, ge=1, description="Queries accepted at once; more are refused with 429."
    )
    max_together: int = Field(
        default=8,
        ge=1,
        description="Queries computed at a time; each takes memory for a gradient of the model.",
    )
    max_batch: int = Field(default=64, ge=1, description="Most weighted queries in one.")
    reload_seconds: float = Field(
        default=2.0, gt=0, description="How often to look for indexes that were changed."
    )
    jobs_path: Path | None = Field(
        default=None,
        description="SQLite file of the jobs, made if there is none; without: no jobs.",
    )
    max_jobs: int = Field(default=1000, ge=1, description="Jobs kept at a time.")
    jobs_together: int = Field(
        default=4, ge=1, description="Queries of jobs under way at a time, beside others."
    )
    max_prompt_characters: int = Field(
        default=20_000, ge=1, description="Longest prompt or completion, in characters."
    )
    max_k: int = Field(default=1000, ge=1, description="Largest k of a query.")
    max_budget: int = Field(
        default=100_000, ge=1, description="Largest rescoring budget of a query, in rows."
    )
    max_sampled_rows: int = Field(
        default=10_000, ge=0, description="Largest calibration or audit sample, in rows."
    )
    trust_remote_code: bool = Field(
        default=False, description="Run code that comes with the model."
    )
    api_keys: Annotated[tuple[SecretStr, ...], NoDecode] = Field(
        default=(),
        description="Keys, one of which every request must show; a JSON list or separated by "
        "commas. Without any, only this machine may ask.",
    )
    api_keys_file: Path | None = Field(
        default=None, description="File with further keys, one a line; # begins a comment."
    )
    allowed_hosts: Annotated[tuple[str, ...], NoDecode] = Field(
        default=(),
        description="Without keys: names beside localhost that a request may give as its Host; a "
        "JSON list or separated by commas.",
    )
    max_body_bytes: int = Field(default=2**20, ge=1, description="Largest body of a request.")
    max_job_body_bytes: int = Field(
        default=2**24, ge=1, description="Largest body of a request for a job."
    )
    body_seconds: float = Field(
        default=20, gt=0, le=3600, description="A body that takes longer to arrive is refused."
    )
    log_prompts: bool = Field(
        default=False,
        description="Log prompts, completions and the messages of unexpected errors.",
    )

    @model_validator(mode="after")
    def _traces_indexes(self) -> Self:
        for what, named in (("trace", self.traces), ("run", self.runs)):
            strange = sorted(set(named) - set(self.indexes))
            if strange:
                raise ValueError(
                    f"a {what} is given for '{strange[0]}', which is no index; the indexes are "
                    f"{', '.join(self.indexes)}"
                )
        return self

    @field_validator("api_keys", "allowed_hosts", mode="before")
    @classmethod
    def _listed(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        if value.lstrip().startswith("["):
            try:
                return json.loads(value)
            except ValueError:  # whose text may hold a key
                raise ValueError("it begins as a JSON list but is none") from None
        return [part.strip() for part in value.split(",") if part.strip()]
