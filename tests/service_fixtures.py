"""A tiny trained GPT-2 with corpus and index on disk, and its service without a network."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import httpx
import torch
from fastapi import FastAPI
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from estimators.curvature.fitting import fit_estimator
from estimators.model.tokens import Sequence1D
from estimators.storage import serialise_factors
from service.corpus.reading import read_examples
from service.corpus.source import CorpusSource
from service.indexing.building import BuildOptions, build_index
from service.models import load_model

T = TypeVar("T")

END = "<|endoftext|>"
CONTEXT = 48
COUNTRIES = {
    "France": ("Paris", "wine"),
    "Spain": ("Madrid", "olives"),
    "Japan": ("Tokyo", "cars"),
    "Peru": ("Lima", "copper"),
    "Kenya": ("Nairobi", "tea"),
    "Norway": ("Oslo", "fish"),
    "Chile": ("Santiago", "lithium"),
    "Ghana": ("Accra", "cocoa"),
}
HOSTILE_ID = "odd/[/red]#1?x=%2F&y= ü"
HOSTILE_TEXT = "The capital of [bold]France[/bold] is [/nonsense] \x1b[31mParis\u202e."
EMPTY_ID = "nothing"


@dataclass(frozen=True, kw_only=True)
class Workspace:
    """Where everything is."""

    model: Path
    corpus: Path
    factors: Path
    index: Path


def corpus_rows() -> list[dict[str, str]]:
    """Two facts a country, a row of hostile text and a row without a token."""
    rows = []
    for country, (capital, export) in COUNTRIES.items():
        document = f"facts/{country}"
        texts = {
            "capital": f"The capital of {country} is {capital}.",
            "export": f"People in {country} sell {export}.",
        }
        for name, text in texts.items():
            rows.append({"id": f"{document}#{name}", "document": document, "text": text})
    rows.append({"id": HOSTILE_ID, "document": "odd", "text": HOSTILE_TEXT})
    rows.append({"id": EMPTY_ID, "document": EMPTY_ID, "text": ""})
    return [{**row, "licence": "none"} for row in rows]


def two_blocks(vocabulary: int, end: int) -> GPT2LMHeadModel:
    """A GPT-2 of width 24 without dropout, not trained."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=vocabulary,
        n_positions=CONTEXT,
        n_embd=24,
        n_layer=2,
        n_head=2,
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=end,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    return GPT2LMHeadModel(config)


def make_model(folder: Path) -> Workspace:
    """Write the corpus and a two-block GPT-2 of width 24 that was trained on it for a second."""
    rows = corpus_rows()
    corpus = folder / "corpus.jsonl"
    corpus.write_text("".join(json.dumps(row) + "\n" for row in rows))
    texts = [row["text"] for row in rows]
    tokenizer = byte_level_tokenizer(texts)
    end = tokenizer.convert_tokens_to_ids(END)
    model = two_blocks(len(tokenizer), end)
    _train(model, [tokenizer(text)["input_ids"] for text in texts if text], end)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return Workspace(
        model=folder / "model",
        corpus=corpus,
        factors=folder / "ekfac.safetensors",
        index=folder / "index",
    )


def make_workspace(folder: Path) -> Workspace:
    """The tiny model with fitted factors and a finished index of three shards."""
    workspace = make_model(folder)
    loaded = load_model(str(workspace.model))
    source = CorpusSource(
        data=str(workspace.corpus), id_column="id", document_column="document", limit=None
    )
    examples = list(read_examples(source, loaded, CONTEXT))
    sequences = [Sequence1D(tokens=e.tokens, row=i) for i, e in enumerate(examples) if e.tokens]
    fitted = fit_estimator("ekfac", loaded.model, loaded.coverage.layers, sequences)
    facts = {"model_sha256": loaded.model_sha256, "layer_patterns": '["*"]'}
    workspace.factors.write_bytes(serialise_factors("ekfac", fitted, facts))
    options = BuildOptions(dimensions=512, rank=8, rows_per_shard=7, seed=1, slices=1)
    build_index(workspace.index, loaded, workspace.factors, source, options)
    return workspace


def byte_level_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END, eos_token=END, model_max_length=CONTEXT
    )


def _train(model: GPT2LMHeadModel, sequences: list[list[int]], end: int) -> None:
    width = max(map(len, sequences))
    ids = torch.tensor([s + [end] * (width - len(s)) for s in sequences])
    labels = torch.tensor([s + [-100] * (width - len(s)) for s in sequences])
    mask = torch.ones_like(ids)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model.train()
    for _ in range(60):
        optimiser.zero_grad()
        model(input_ids=ids, attention_mask=mask, labels=labels).loss.backward()
        optimiser.step()
    model.eval()


def rounded(value: Any) -> Any:
    """The same with numbers to five digits: what else is computed changes their last ones."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        measured = ("seconds", "seconds_to_certify")
        return {name: rounded(part) for name, part in value.items() if name not in measured}
    return [rounded(part) for part in value] if isinstance(value, list) else value


class Client:
    """Requests to an app in this process, which is started up on entry unless told otherwise."""

    def __init__(self, app: FastAPI, *, start: bool = True) -> None:
        self.app = app
        self._start = start
        self._runner = asyncio.Runner()
        self._lifespan = app.router.lifespan_context(app)
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        self.http = httpx.AsyncClient(transport=transport, base_url="http://localhost")

    def __enter__(self) -> Self:
        try:
            if self._start:
                self.run(self._lifespan.__aenter__)
        except BaseException:
            self._runner.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._start:
            self.run(lambda: self._lifespan.__aexit__(None, None, None))
        self.run(self.http.aclose)
        self._runner.close()

    def run(self, work: Callable[[], Awaitable[T]]) -> T:
        """What ``work()`` gives when awaited."""

        async def awaited() -> T:
            return await work()

        return self._runner.run(awaited())

    def request(self, method: str, url: str, **options: Any) -> httpx.Response:
        """The response to one request."""
        return self.run(lambda: self.http.request(method, url, **options))

    def get(self, url: str, **options: Any) -> httpx.Response:
        """The response to GET."""
        return self.request("GET", url, **options)

    def query(self, **fields: Any) -> httpx.Response:
        """The response to POST /v1/query with these fields."""
        return self.request("POST", "/v1/query", json=fields)
