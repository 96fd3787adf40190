"""A tiny run that was recorded and traced, and an index of its last model to serve it with.

As a plug-in: ``pytest_plugins = ["tests.run.served_runs"]``. PYTEST_DONT_REWRITE
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from estimators.curvature.fitting import fit_estimator
from estimators.model.tokens import Sequence1D
from estimators.storage import serialise_factors
from service.corpus.reading import read_examples
from service.corpus.source import CorpusSource
from service.indexing.building import BuildOptions, build_index
from service.models import load_model
from service.run.folder import RecordedRun
from service.run.loading import load_first_model
from service.run.recorder import record_run
from service.settings import Settings
from service.tracing.questions import AskedQuestion
from service.tracing.trace import Trace, trace_run
from tests.service_fixtures import CONTEXT, COUNTRIES, END, byte_level_tokenizer, two_blocks

PROMPT = "The capital of Peru is"
TRACED = AskedQuestion(prompt=PROMPT, completion=" Lima")
CONTRAST = AskedQuestion(prompt=PROMPT, completion=" Lima", against=" Oslo")
MISSING = "Nobody reads this twice."
TWICE = "People in Chile sell lithium."
STEPS = 6


@dataclass(frozen=True, kw_only=True)
class ServedRun:
    """Where everything is.

    Attributes:
        run: recorded; it read the facts, one of them twice, and a row that the index lacks.
        trace: of two questions.
        model: the last one.
        index: of the facts, one of them under two ids, and of two rows that the run never read.
        found: the trace, as it was computed.
    """

    run: Path
    trace: Path
    model: Path
    index: Path
    found: Trace


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> ServedRun:
    """Tests only read it."""
    return make_served_run(tmp_path_factory.mktemp("served"))


@pytest.fixture
def trace(served: ServedRun, tmp_path: Path) -> Path:
    """A copy of the trace that a test may change."""
    return Path(shutil.copytree(served.trace, tmp_path / "trace"))


def settings(served: ServedRun, **changes: Any) -> Settings:
    """Of a service of the index with the trace; ``changes`` change the usual ones."""
    usual = {"model": str(served.model), "indexes": {"default": served.index}}
    return Settings(**{**usual, "traces": {"default": served.trace}, **changes})


def facts() -> list[str]:
    """Two for each country."""
    capitals = [f"The capital of {name} is {capital}." for name, (capital, _) in COUNTRIES.items()]
    return capitals + [f"People in {name} sell {sold}." for name, (_, sold) in COUNTRIES.items()]


def make_served_run(folder: Path) -> ServedRun:
    """Record, trace, fit and build; half a minute."""
    first, last, run = folder / "first", folder / "last", folder / "run"
    _record(first, last, run)
    recorded = RecordedRun.open(run)
    tokenizer = AutoTokenizer.from_pretrained(first)
    questions = [one.encode(tokenizer, CONTEXT) for one in (TRACED, CONTRAST)]
    found = trace_run(recorded, load_first_model(recorded), questions, folder / "trace", {})
    rows = [{"id": f"fact {n}", "text": text} for n, text in enumerate(facts())]
    rows += [{"id": "again", "text": TWICE}, {"id": "other", "text": "Tea is sold in Peru."}]
    rows += [{"id": "another", "text": "Oslo is in Norway."}]
    build(folder / "index", last, rows)
    return ServedRun(
        run=run, trace=folder / "trace", model=last, index=folder / "index", found=found
    )


def build(index: Path, model: Path, rows: list[dict[str, str]]) -> None:
    """An index of some rows for a model."""
    corpus = index.with_suffix(".jsonl")
    corpus.write_text("".join(json.dumps(row) + "\n" for row in rows))
    loaded = load_model(str(model))
    source = CorpusSource(data=str(corpus), id_column="id")
    sequences = [
        Sequence1D(tokens=example.tokens, row=number)
        for number, example in enumerate(read_examples(source, loaded, CONTEXT))
    ]
    fitted = fit_estimator("ekfac", loaded.model, loaded.coverage.layers, sequences)
    known = {"model_sha256": loaded.model_sha256, "layer_patterns": '["*"]'}
    factors = index.with_suffix(".safetensors")
    factors.write_bytes(serialise_factors("ekfac", fitted, known))
    build_index(
        index, loaded, factors, source, BuildOptions(dimensions=256, rank=8, seed=1, slices=1)
    )


def _record(first: Path, last: Path, run: Path) -> None:
    texts = [*facts(), TWICE, MISSING]
    tokenizer = byte_level_tokenizer(texts)
    end = tokenizer.convert_tokens_to_ids(END)
    two_blocks(len(tokenizer), end).save_pretrained(first)
    model = AutoModelForCausalLM.from_pretrained(first).train()
    rows = [tokenizer(text)["input_ids"] for text in texts]
    width = max(map(len, rows))
    ids = torch.tensor([row + [end] * (width - len(row)) for row in rows])
    labels = torch.tensor([row + [-100] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-3)
    with record_run(run, model, optimizer, total=STEPS, every=2):
        for _ in range(STEPS):
            optimizer.zero_grad()
            model(input_ids=ids, labels=labels, attention_mask=mask).loss.backward()
            optimizer.step()
    model.save_pretrained(last)
    for folder in (first, last):
        tokenizer.save_pretrained(folder)
