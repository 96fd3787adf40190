"""A tiny model with a tokenizer of its own, a corpus, fitted factors and indexes built from them.

Shared as a plug-in, so that each is made once however many test files ask for it:
``pytest_plugins = ["tests.index_fixtures"]``. PYTEST_DONT_REWRITE (there is nothing to rewrite)
"""

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from estimators.curvature.fitting import fit_estimator
from estimators.model.progress import Progress, no_progress
from estimators.model.tokens import Sequence1D
from estimators.storage import serialise_factors
from index.files import write_whole
from index.manifest import Manifest
from service.corpus.reading import read_examples
from service.corpus.source import CorpusSource
from service.indexing.building import BuildOptions, Mode, build_index
from service.models import LoadedModel, load_model

CONTEXT = 32
RARE = "~"
"""A character with a token of its own that no text of the corpus holds."""

CITIES = ["Porto", "Lyon", "Turin", "Bergen", "Cusco", "Kyoto", "Tunis", "Leeds", "Oslo", "Dakar"]
THINGS = ["market", "bridge", "museum", "harbour", "library", "station", "garden", "theatre"]
PATTERNS = [
    "The {thing} of {city} opened in {year}.",
    "Every spring the {thing} in {city} is full of people.",
    "In {year} a fire destroyed the old {thing}; {city} rebuilt it.",
    "{city} is known for its {thing}.",
]


def sentences(count: int = 120) -> list[str]:
    """Short sentences, all different."""
    facts = itertools.product(CITIES, THINGS, PATTERNS)
    shuffled = np.random.default_rng(0).permutation(np.array(list(facts), dtype=object))
    return [
        pattern.format(thing=thing, city=city, year=1800 + 7 * (number % 30))
        for number, (city, thing, pattern) in enumerate(shuffled[:count].tolist())
    ]


def write_jsonl(path: Path, rows: Sequence[dict[str, object]]) -> Path:
    """One JSON object a line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def train_tokenizer(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE of about 200 tokens that puts ``<s>`` before every text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=200, special_tokens=["<s>"], show_progress=False)
    tokenizer.train_from_iterator([*texts, RARE], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="<s>", model_max_length=CONTEXT
    )


def save_model(folder: Path, tokenizer: PreTrainedTokenizerFast, seed: int) -> Path:
    """Two blocks of width 32 with an output head of their own and random weights of order 1."""
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=CONTEXT,
        n_embd=32,
        n_layer=2,
        n_head=2,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=0,
    )
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        model = GPT2LMHeadModel(config)
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn(parameter.shape))
    return save(folder, model, tokenizer)


def save(folder: Path, model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast) -> Path:
    """Both in one folder, as ``load_model`` reads them."""
    transformers_logging.disable_progress_bar()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@dataclass(frozen=True, kw_only=True)
class Workshop:
    """Everything that an index is built from."""

    folder: Path
    model_folder: Path
    loaded: LoadedModel
    corpus: Path
    factors: Path
    options: BuildOptions

    @property
    def source(self) -> CorpusSource:
        return CorpusSource(data=str(self.corpus), id_column="id")

    def fit(self, name: str, *, loaded: LoadedModel | None = None) -> Path:
        """The factors' file of an estimator, fitted on the corpus."""
        loaded = loaded or self.loaded
        path = self.folder / f"{name}-{loaded.model_sha256[:8]}.safetensors"
        if not path.is_file():
            examples = read_examples(self.source, loaded, CONTEXT)
            sequences = [Sequence1D(tokens=e.tokens, row=i) for i, e in enumerate(examples)]
            fitted = fit_estimator(name, loaded.model, loaded.coverage.layers, sequences)
            facts = {"model_sha256": loaded.model_sha256, "layer_patterns": '["*"]'}
            write_whole(path, serialise_factors(name, fitted, facts))
        return path

    def build(
        self,
        folder: Path,
        *,
        source: CorpusSource | None = None,
        factors: Path | None = None,
        loaded: LoadedModel | None = None,
        mode: Mode = "new",
        progress: Progress = no_progress,
        refine: Path | None = None,
        **options: object,
    ) -> Manifest:
        """Build an index in ``folder``, of one slice if it is new; ``options`` change the usual."""
        begun = any((folder / name).is_file() for name in ("manifest.json", "slices.json"))
        options = {"slices": None if begun else 1, **options}
        return build_index(
            folder,
            loaded or self.loaded,
            factors or self.factors,
            source or self.source,
            replace(self.options, **options),
            progress,
            mode,
            refine,
        )


@pytest.fixture(scope="session")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    """Model, corpus of 120 rows, EK-FAC factors and options of 4 shards."""
    folder = tmp_path_factory.mktemp("workshop")
    texts = sentences()
    rows = [{"id": f"fact-{i}", "text": text, "page": i} for i, text in enumerate(texts)]
    model_folder = save_model(folder / "model", train_tokenizer(texts), seed=1)
    empty = Workshop(
        folder=folder,
        model_folder=model_folder,
        loaded=load_model(str(model_folder)),
        corpus=write_jsonl(folder / "corpus.jsonl", rows),
        factors=folder,
        options=BuildOptions(dimensions=2048, rank=16, rows_per_shard=32, seed=11),
    )
    return replace(empty, factors=empty.fit("ekfac"))


@pytest.fixture(scope="session")
def other_model(workshop: Workshop) -> LoadedModel:
    """A model of the same form and tokenizer with other weights."""
    texts = sentences()
    folder = save_model(workshop.folder / "other", train_tokenizer(texts), seed=2)
    return load_model(str(folder))


@pytest.fixture(scope="session")
def built(workshop: Workshop) -> Path:
    """A finished index; tests only read it."""
    folder = workshop.folder / "index"
    workshop.build(folder)
    return folder
