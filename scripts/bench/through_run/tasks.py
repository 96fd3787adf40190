"""Two fine-tunings, recorded: of all weights on new facts, of an adapter on other prose."""

import json
import math
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import peft
import torch
from torch import nn
from transformers import PreTrainedModel

from estimators.run.recorded import UNCOUNTED
from scripts.bench.corpora import speech_paragraphs
from scripts.console import show_progress, stderr
from scripts.demo import train_model
from scripts.demo.corpus import corpus_rows, fact_queries, load_profiles
from scripts.demo.train_model import demo_optimizers, on_bar, progress_bars, schedule
from service.models import LoadedModel, load_model
from service.run.folder import RecordedRun
from service.run.loading import load_first_model
from service.run.recorder import record_run
from service.tracing.walk import Question

EVERY = 4
"""One of so many countries is kept for the fine-tuning; the others are what the base model read."""
EPOCHS, WARMUP, ROWS_PER_BATCH = 3, 0.1, 32
SEED = 20261130
PROMPT, ANSWER = 12, 8
"""Tokens of a question about prose, and of what goes on from there."""
BEGINNING = 32
"""Tokens of a paragraph that are read, so that the task is about as large as the other."""

Rows = Sequence[tuple[str, Sequence[int]]]
"""Ids and tokens."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """A fine-tuning that was recorded, and what is asked of it.

    Attributes:
        name: of the task.
        run: the record.
        model: the run's, in memory.
        tuned: folder of the last model.
        layers: patterns of the layers that it trained.
        questions: what is asked, in tokens.
        description: in words.
        training_seconds: processor time of the training while it was recorded.
        recorder_share: how much longer the training took for being recorded, apart from states.
    """

    name: str
    run: RecordedRun
    model: nn.Module
    tuned: Path
    layers: tuple[str, ...]
    questions: list[Question]
    description: str
    training_seconds: float
    recorder_share: float


def make_tasks(out: Path, names: Sequence[str], rows: int, questions: int) -> Iterator[Task]:
    """The tasks of these names, made in ``out`` one by one; the base model is trained there once.

    Args:
        out: where to work.
        names: "facts", "prose".
        rows: of each fine-tuning, at most.
        questions: of each.
    """
    base = base_model(out / "base")
    for name in names:
        yield MAKERS[name](out / name, base, rows, questions)


def base_model(folder: Path, epochs: int = 5) -> Path:
    """The demonstration's architecture, trained on the countries that no fine-tuning reads."""
    if not (folder / "config.json").is_file():
        profiles = load_profiles()
        kept = {profile.name for profile in profiles[::EVERY]}
        texts = [row["text"] for row in corpus_rows(profiles) if row["country"] not in kept]
        recipe = train_model.Recipe(epochs=epochs)
        torch.manual_seed(recipe.seed)
        tokenizer = train_model.train_tokenizer(texts, recipe.vocabulary)
        model = train_model.new_model(tokenizer)
        sequences = [torch.tensor(ids) for ids in train_model.encode(tokenizer, texts)]
        with progress_bars() as progress:
            on_step = on_bar(progress, "base model")
            train_model.train(model, sequences, recipe, demo_optimizers(model, recipe), on_step)
        train_model.save(model, tokenizer, folder)
    return folder


def _facts(out: Path, base: Path, rows: int, questions: int) -> Task:
    loaded = load_model(str(base))
    profiles = load_profiles()
    kept = {profile.name for profile in profiles[::EVERY]}
    tuning = [row for row in corpus_rows(profiles) if row["country"] in kept][:rows]
    read = [(row["id"], loaded.encode(row["text"])[: loaded.context]) for row in tuning]
    known = {row["id"] for row in tuning}
    facts = [query for query in fact_queries(profiles) if query["source_id"] in known]
    chosen = np.random.default_rng(SEED).permutation(len(facts))[:questions]
    asked = [
        loaded.encode_query(facts[i]["prompt"], f" {facts[i]['answer'].strip()}") for i in chosen
    ]
    return _task(
        "facts",
        out,
        loaded,
        read,
        [[(one, 1.0)] for one in asked],
        rate=1e-3,
        prepare=lambda model: model,
        layers=("*",),
        description=f"{len(read):,} rows of countries that the base model never read, all weights, "
        f"{EPOCHS} epochs of AdamW at 0.001",
    )


def _prose(out: Path, base: Path, rows: int, questions: int) -> Task:
    loaded = load_model(str(base))
    texts = speech_paragraphs(out)
    generator = np.random.default_rng(SEED)
    order = generator.permutation(len(texts))
    encoded = [loaded.encode(texts[i])[:BEGINNING] for i in order]
    encoded = [ids for ids in encoded if len(ids) == BEGINNING][: rows // 2]  # each is longer
    read = [(f"paragraph-{i}", ids) for i, ids in enumerate(encoded[:rows])]
    asked: list[Question] = []
    for i in generator.permutation(len(encoded))[:questions]:  # read in the run
        ids = encoded[i]
        words = loaded.tokenizer
        prompt, said = words.decode(ids[:PROMPT]), words.decode(ids[PROMPT : PROMPT + ANSWER])
        asked.append([(loaded.encode_query(prompt, said), 1.0)])
    settings = peft.LoraConfig(
        r=8,
        lora_alpha=16,
        target_modules=["c_attn", "c_proj", "c_fc"],
        fan_in_fan_out=True,
        task_type="CAUSAL_LM",
    )

    def prepare(model: nn.Module) -> nn.Module:
        torch.manual_seed(SEED)
        found: nn.Module = peft.get_peft_model(model, settings)
        return found

    return _task(
        "prose",
        out,
        loaded,
        read,
        asked,
        rate=3e-3,
        prepare=prepare,
        layers=("*lora_*",),
        description=f"{len(read):,} beginnings of paragraphs of speeches, adapters of rank 8 in "
        f"every linear layer of the same base model, {EPOCHS} epochs of AdamW at 0.003",
    )


MAKERS: dict[str, Callable[[Path, Path, int, int], Task]] = {"facts": _facts, "prose": _prose}


def _task(
    name: str,
    out: Path,
    loaded: LoadedModel,
    rows: Rows,
    questions: list[Question],
    *,
    rate: float,
    prepare: Callable[[nn.Module], nn.Module],
    layers: tuple[str, ...],
    description: str,
) -> Task:
    out.mkdir(parents=True, exist_ok=True)
    folder, facts = out / "run", out / "training.json"
    if not facts.is_file():
        shutil.rmtree(folder, ignore_errors=True)
        stderr.print(f"{name}: training while it is recorded ...", highlight=False)
        model = prepare(load_model(loaded.source).model)
        seconds = _train(model, loaded.source, rows, rate, folder)
        cast(PreTrainedModel, model).save_pretrained(out / "tuned")
        loaded.tokenizer.save_pretrained(out / "tuned")
        facts.write_text(json.dumps({"training_seconds": seconds}))
    share = out / "recorder.json"
    if not share.is_file():
        found = _recorder_share(out / "spare", loaded, rows, rate, prepare)
        share.write_text(json.dumps({"recorder_share": found}))
    run = RecordedRun.open(folder)
    return Task(
        name=name,
        run=run,
        model=load_first_model(run),
        tuned=out / "tuned",
        layers=layers,
        questions=questions,
        description=description,
        training_seconds=json.loads(facts.read_text())["training_seconds"],
        recorder_share=json.loads(share.read_text())["recorder_share"],
    )


def _recorder_share(
    folder: Path,
    loaded: LoadedModel,
    rows: Rows,
    rate: float,
    prepare: Callable[[nn.Module], nn.Module],
) -> float:
    """How much longer the steps between two states take if they are recorded: fastest of six."""
    fastest: dict[bool, float] = {}
    for _ in range(6):
        for recorded in (False, True):
            shutil.rmtree(folder, ignore_errors=True)
            model = prepare(load_model(loaded.source).model)
            seconds = _train(
                model, loaded.source, rows[:200], rate, folder if recorded else None, every=10**9
            )
            fastest[recorded] = min(seconds, fastest.get(recorded, math.inf))
    shutil.rmtree(folder)
    return fastest[True] / fastest[False] - 1


def _train(
    model: nn.Module,
    source: str,
    rows: Rows,
    rate: float,
    record: Path | None,
    every: int | None = None,
) -> float:
    """Fine-tune; processor time of all steps, taken without the first and the last of them.

    With these the recorder writes the first and the last state.
    """
    if not isinstance(model, peft.PeftModel):
        model.requires_grad_(True)
    model.train()
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=rate, weight_decay=0.0
    )
    generator = np.random.default_rng(SEED)
    orders = [generator.permutation(len(rows)) for _ in range(EPOCHS)]
    batches = [
        order[start : start + ROWS_PER_BATCH].tolist()
        for order in orders
        for start in range(0, len(rows), ROWS_PER_BATCH)
    ]
    names = {tuple(ids): name for name, ids in rows}

    def steps() -> float:
        start = stop = 0.0
        for number, batch in enumerate(show_progress("train", batches)):
            for group in optimizer.param_groups:
                group["lr"] = rate * schedule(number, len(batches), WARMUP)
            optimizer.zero_grad()
            model(**_batch([rows[row][1] for row in batch])).loss.backward()
            optimizer.step()
            if number == 0:
                start = time.process_time()
            if number == len(batches) - 2:
                stop = time.process_time()
        return (stop - start) / (len(batches) - 2) * len(batches)

    if record is None:
        return steps()
    with record_run(
        record,
        model,
        optimizer,
        model_source=source,
        total=len(batches),
        every=every,
        padding=0,
        ids=names,
    ):
        return steps()


def _batch(rows: Sequence[Sequence[int]]) -> dict[str, torch.Tensor]:
    width = max(map(len, rows))
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    labels = torch.full_like(ids, UNCOUNTED)
    mask = torch.zeros_like(ids)
    for place, row in enumerate(rows):
        own = torch.tensor(row)
        ids[place, : len(row)] = labels[place, : len(row)] = own
        mask[place, : len(row)] = 1
    return {"input_ids": ids, "labels": labels, "attention_mask": mask}
