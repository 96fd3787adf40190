"""Reading a checkpoint: its weights and its tokenizer, of which nothing may be made up."""

import functools
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import cached_file
from transformers.utils import logging as transformers_logging

from index.manifest import ModelRecord

ADAPTER_CONFIG = "adapter_config.json"
TOKENIZER_FILES = ("tokenizer_config.json", "tokenizer.json", "tokenizer.model", "vocab.json")
WITH_LANGUAGE_MODEL_HEAD = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
"""Endings of the architectures that predict the next token."""
NAMED = 4
"""Weights or tokens that a sentence names before it counts the rest."""


class UnusableModel(ValueError):  # noqa: N818 - named for what is wrong
    """A checkpoint that is not, or not only, the model that was trained."""


@dataclass(frozen=True, kw_only=True)
class ModelSource:
    """Where a model comes from.

    Attributes:
        name: folder, or name of a repository; of a PEFT adapter or of a whole model.
        revision: branch, tag or commit of a repository; None takes its newest state.
        tokenizer: folder or name, itself with ``@REVISION`` if one is meant; None takes the one
            beside the weights, for an adapter without one its base model's.
        base_model: of an adapter: folder or name, likewise; None takes what the adapter names.
        unused_weights: whether a checkpoint may hold weights that the model does not use.
    """

    name: str
    revision: str | None = None
    tokenizer: str | None = None
    base_model: str | None = None
    unused_weights: bool = False

    @classmethod
    def of(cls, name: str, revision: str | None = None, **others: Any) -> "ModelSource":
        """From a name that may end in ``@REVISION``, unless it is a folder with such a name.

        Raises:
            UnusableModel: two different revisions, or a folder's revision, are asked for.
        """
        bare, at, given = name.rpartition("@")
        if at and bare and not Path(name).exists():
            if revision not in (None, given):
                raise UnusableModel(
                    f"Two revisions are asked for, '{given}' in '{name}' and '{revision}'; give "
                    f"one of them."
                )
            name, revision = bare, given
        if revision is not None and Path(name).exists():
            raise UnusableModel(
                f"The revision '{revision}' is asked for, but '{name}' is a folder, which has one "
                f"state only; leave it out, or name a repository."
            )
        return cls(name=name, revision=revision, **others)

    def completed(self, record: ModelRecord) -> "ModelSource":
        """The same with the tokenizer and base model of an index where none was chosen."""
        return replace(
            self,
            tokenizer=self.tokenizer or record.tokenizer,
            base_model=self.base_model or record.base_model,
        )

    def recorded(self, model_sha256: str, tokenizer_sha256: str) -> ModelRecord:
        """What an index keeps of it, folders as absolute paths."""
        return ModelRecord(
            source=place(self.name),
            revision=self.revision,
            tokenizer=self.tokenizer and place(self.tokenizer),
            base_model=self.base_model and place(self.base_model),
            model_sha256=model_sha256,
            tokenizer_sha256=tokenizer_sha256,
        )

    @property
    def title(self) -> str:
        """As a sentence names it."""
        return self.name if self.revision is None else f"{self.name}@{self.revision}"

    def base(self) -> "ModelSource | None":
        """An adapter's base model; None if a whole model lies there.

        Raises:
            UnusableModel: a base model is chosen, but there is no adapter.
        """
        config = _adapter_config(self.name, self.revision)
        if config is None:
            if self.base_model is not None:
                raise UnusableModel(
                    f"A base model is named, '{self.base_model}', but '{self.title}' holds no "
                    f"adapter ({ADAPTER_CONFIG}); leave it out."
                )
            return None
        facts = json.loads(Path(config).read_text())
        named, revision = facts.get("base_model_name_or_path") or "", facts.get("revision")
        if self.base_model is not None or Path(named).exists():
            revision = None
        return ModelSource.of(
            self.base_model or named, revision, unused_weights=self.unused_weights
        )


def _adapter_config(name: str, revision: str | None) -> str | None:
    """Where an adapter's configuration lies, if it is one."""
    path = Path(name)
    if path.exists() or path.is_absolute():
        return str(path / ADAPTER_CONFIG) if (path / ADAPTER_CONFIG).is_file() else None
    try:
        return _repositorys_adapter_config(name, revision)
    except OSError:  # no name of a repository; what is wrong is said when the model is loaded
        return None


@functools.lru_cache(maxsize=1)
def _repositorys_adapter_config(name: str, revision: str | None) -> str | None:
    """The same of a repository, asked for once, since a hub may be far away."""
    found: str | None = cached_file(
        name,
        ADAPTER_CONFIG,
        revision=revision,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return found


def read_tokenizer(source: ModelSource, *, trust_remote_code: bool) -> Any:
    """The tokenizer that ``source`` names, or the one beside the weights.

    Raises:
        UnusableModel: there is none, or it cannot be read.
    """
    chosen = source
    if source.tokenizer is not None:
        chosen = ModelSource.of(source.tokenizer)
    elif not _has_tokenizer(source.name):
        chosen = source.base() or source
    if Path(chosen.name).is_dir() and not _has_tokenizer(chosen.name):
        parent = Path(chosen.name).resolve().parent
        there = f"; its parent folder, {parent}, has one" if _has_tokenizer(str(parent)) else ""
        raise UnusableModel(
            f"There is no tokenizer in '{chosen.title}'{there}. Name the one that the model was "
            f"trained with: --tokenizer FOLDER_OR_NAME."
        )
    try:
        return quietly(
            AutoTokenizer.from_pretrained,
            chosen.name,
            revision=chosen.revision or "main",
            trust_remote_code=trust_remote_code,
        )
    except Exception as error:  # damaged files raise whatever their readers happen to raise
        raise UnusableModel(
            f"Cannot load a tokenizer from '{chosen.title}': {one_line(error)}. Name the one that "
            f"the model was trained with: --tokenizer FOLDER_OR_NAME."
        ) from error


def check_vocabulary(model: Any, tokenizer: Any) -> None:
    """Raise UnusableModel if the tokenizer has ids that the model's embedding does not know."""
    embeddings = model.get_input_embeddings()
    rows = int(getattr(embeddings, "num_embeddings", len(embeddings.weight)))
    vocabulary = {**tokenizer.get_vocab(), **tokenizer.get_added_vocab()}
    beyond = sorted((number, token) for token, number in vocabulary.items() if number >= rows)
    if beyond:
        named = _named([f"'{token}' ({number})" for number, token in beyond])
        raise UnusableModel(
            f"The tokenizer has {_count(len(beyond), 'token')} beyond the {rows:,} rows of the "
            f"model's embedding: {named}. Give the tokenizer that the model was trained with "
            f"(--tokenizer), or resize the embedding, train it and save both."
        )


def place(name: str) -> str:
    """A folder as an absolute path, anything else as it is."""
    return str(Path(name).resolve()) if Path(name).exists() else name


def _has_tokenizer(folder: str) -> bool:
    return any((Path(folder) / name).is_file() for name in TOKENIZER_FILES)


def whole_model(source: ModelSource, *, dtype: str, trust_remote_code: bool) -> Any:
    """A causal language model with all its weights, on the CPU.

    Raises:
        UnusableModel: it cannot be read; weights are missing, have another shape, or are left
            over; or it is not a causal language model.
    """
    try:
        model, info = quietly(
            AutoModelForCausalLM.from_pretrained,
            source.name,
            revision=source.revision or "main",
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # told below, in a sentence
            dtype=dtype,
            trust_remote_code=trust_remote_code,
        )
    except Exception as error:  # damaged files raise whatever their readers happen to raise
        raise UnusableModel(_why_not(source, error)) from error
    _check_architecture(source, model, info["unexpected_keys"])
    check_weights(source, info)
    return model


def _why_not(source: ModelSource, error: Exception) -> str:
    """In words what keeps a model from being loaded."""
    text = one_line(error)
    if "Unrecognized configuration class" in text:
        kind = text.partition("<class '")[2].partition("'>")[0].rpartition(".")[2]
        return (
            f"'{source.title}' has a {kind}, and there is no causal language model of that kind. "
            f"Give the language model whose words you want to explain."
        )
    path = Path(source.name)
    if path.is_file():
        text = "it is a file; name the folder of a model"
    elif path.is_dir() and not (path / "config.json").is_file():
        inside = sorted(found.parent.name for found in path.glob("*/config.json"))
        text = "there is no config.json in it" + (
            f"; its folders {_named(inside)} have one: name one of them" if inside else ""
        )
    elif not path.exists() and (path.is_absolute() or source.name.count("/") != 1):
        text = "there is no such folder"
    elif not path.exists():
        text = f"there is no such folder, and as the name of a repository: {text}"
    return f"Cannot load a causal language model from '{source.title}': {text}."


def _check_architecture(source: ModelSource, model: Any, unexpected: Collection[str]) -> None:
    """Raise UnusableModel if the configuration says that something else was trained."""
    declared = [str(name) for name in getattr(model.config, "architectures", None) or ()]
    known = {type(model).__name__, *MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()}
    fits = [name for name in declared if name in known or name.endswith(WITH_LANGUAGE_MODEL_HEAD)]
    if not declared or fits:
        return
    heads = ", ".join(sorted({key.partition(".")[0] for key in unexpected}))
    instead = f": in place of a language-model head it has '{heads}'" if heads else ""
    raise UnusableModel(
        f"'{source.title}' holds a {' and a '.join(declared)}, not a causal language "
        f"model{instead}. Give the language model whose words you want to explain."
    )


def check_weights(source: ModelSource, info: Mapping[str, Any]) -> None:
    """Raise UnusableModel unless checkpoint and configuration have the same weights.

    Buffers that the architecture is known to have left behind are no part of ``info``.
    """
    missing, unused = sorted(info["missing_keys"]), sorted(info["unexpected_keys"])
    others = f"{_count(len(unused), 'weight')} that the model does not use: {_named(unused)}"
    if missing:
        and_others = f" It has {others}." if unused else ""
        raise UnusableModel(
            f"The checkpoint '{source.title}' lacks {_count(len(missing), 'weight')} of the model, "
            f"which would be random: {_named(missing)}.{and_others} Give the checkpoint as "
            f"training wrote it."
        )
    if info["mismatched_keys"]:
        shapes = [f"{n} is {list(a)}, not {list(b)}" for n, a, b in sorted(info["mismatched_keys"])]
        raise UnusableModel(
            f"The checkpoint '{source.title}' has {_count(len(shapes), 'weight')} of another shape "
            f"than its configuration says: {_named(shapes)}. Give the configuration that the "
            f"weights were saved with."
        )
    if info["error_msgs"]:
        raise UnusableModel(f"Cannot read '{source.title}': {' '.join(info['error_msgs'])}")
    if unused and not source.unused_weights:
        raise UnusableModel(
            f"The checkpoint '{source.title}' holds {others}. Give the model that was trained; "
            f"to go on all the same, add --unused-weights."
        )


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _named(names: Sequence[str]) -> str:
    more = f" and {len(names) - NAMED:,} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more


def one_line(error: Exception) -> str:
    """An error's kind and text without line breaks or a closing full stop."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}".rstrip(".")


def quietly(load: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """Load without the library's own tables: what they tell is checked, and refused in words."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    try:
        return load(*arguments, **options)
    finally:
        transformers_logging.set_verbosity(verbosity)
