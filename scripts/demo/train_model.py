"""Train the demonstration's language model on facts whose source sentences are known.

`python -m scripts.demo.train_model --out DIR` writes `DIR/corpus.jsonl`, `DIR/model` (a GPT-2 of
4 layers and its tokenizer) and `DIR/queries.jsonl`, where every fact of the corpus is asked in the
words it was read in and the model's own completion stands beside the answer. Each row is read the
same number of times, so leaving one out has the same plain meaning for all of them.
"""

import json
import math
import os
import shutil
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, cast

import torch
import typer
from jaxtyping import Float, Int
from rich.progress import (
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from torch.nn import functional
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging as transformers_logging

from scripts.console import one_sentence_errors, print_json, print_progress, stderr
from scripts.demo.corpus import FactQuery, corpus_rows, fact_queries, load_profiles
from scripts.demo.wide_muon import WideMuon

BOUNDARY = "<|endoftext|>"
CONTEXT = 128
IGNORED = -100

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How the model is trained; the defaults were tuned for five minutes on two CPU cores.

    Attributes:
        epochs: how often every row is read.
        seed: of the initial weights and of the order of the batches.
        learning_rate: at its peak, after the warm-up; it falls to zero along a cosine.
        rows_per_batch: training sequences per step.
        vocabulary: tokens of the byte-level BPE tokenizer.
        warmup: share of all steps over which the learning rate rises.
        betas: of AdamW.
    """

    epochs: int = 10
    seed: int = 0
    learning_rate: float = 6e-3
    rows_per_batch: int = 32
    vocabulary: int = 4096
    warmup: float = 0.05
    betas: tuple[float, float] = (0.9, 0.98)


@dataclass(frozen=True, kw_only=True)
class Training:
    """What one training run did: tokens predicted over all epochs, mean loss of the last one."""

    tokens: int
    final_loss: float


class AnsweredQuery(FactQuery):
    """A query and what the model says to it."""

    completion: str
    correct: bool


@app.command()
@one_sentence_errors
def main(
    out: Annotated[Path, typer.Option(help="Folder for corpus, model and queries.")],
    epochs: Annotated[int, typer.Option(min=1, help="How often each row is read.")] = Recipe.epochs,
    seed: Annotated[int, typer.Option(help="Of the weights and the order.")] = Recipe.seed,
    rate: Annotated[float, typer.Option(help="Peak learning rate.")] = Recipe.learning_rate,
    rows: Annotated[int, typer.Option(min=1, help="Rows per batch.")] = Recipe.rows_per_batch,
) -> None:
    """Build the corpus, train the model, ask it every fact, and report as one JSON line."""
    recipe = Recipe(epochs=epochs, seed=seed, learning_rate=rate, rows_per_batch=rows)
    print_json(run(out, recipe))


def run(out: Path, recipe: Recipe) -> dict[str, Any]:
    """Write corpus, model and answered queries under `out`; returns the figures to report.

    `tokens` counts predictions over all epochs, `final_loss` is the last epoch's mean in nats.
    """
    started = time.perf_counter()
    transformers_logging.disable_progress_bar()
    profiles = load_profiles()
    corpus, queries = list(corpus_rows(profiles)), list(fact_queries(profiles))
    texts = [row["text"] for row in corpus]
    out.mkdir(parents=True, exist_ok=True)
    write_lines(out / "corpus.jsonl", corpus)

    torch.manual_seed(recipe.seed)
    tokenizer = train_tokenizer(texts, recipe.vocabulary)
    model = new_model(tokenizer)
    sequences = [torch.tensor(ids) for ids in encode(tokenizer, texts)]
    with progress_bars() as progress:
        training = train(
            model, sequences, recipe, demo_optimizers(model, recipe), on_bar(progress, "training")
        )
        save(model, tokenizer, out / "model")
        answered = ask(model, tokenizer, queries, on_bar(progress, "asking"))
    write_lines(out / "queries.jsonl", answered)
    return {
        "rows": len(corpus),
        "facts": len(queries),
        "tokens": training.tokens,
        "epochs": recipe.epochs,
        "seconds": round(time.perf_counter() - started, 1),
        "final_loss": round(training.final_loss, 4),
        "facts_correct_share": correct_share(answered),
        "by_relation": {
            relation: correct_share([q for q in answered if q["relation"] == relation])
            for relation in sorted({q["relation"] for q in answered})
        },
        "recipe": asdict(recipe),
        "out": str(out),
    }


def train_tokenizer(texts: Sequence[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of `texts` that puts `BOUNDARY` before every text, none after.

    Padding takes the same token, which is safe on the right of a causal model.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[BOUNDARY],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOUNDARY} $A",
        pair=f"{BOUNDARY} $A $B",
        special_tokens=[(BOUNDARY, tokenizer.token_to_id(BOUNDARY))],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOUNDARY,
        eos_token=BOUNDARY,
        pad_token=BOUNDARY,
        padding_side="right",
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def new_model(tokenizer: PreTrainedTokenizerFast) -> GPT2LMHeadModel:
    """An untrained GPT-2 of 4 layers, width 128, 4 heads, tied embeddings and no dropout."""
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=CONTEXT,
        n_embd=128,
        n_layer=4,
        n_head=4,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        activation_function="gelu_pytorch_tanh",  # GPT-2's gelu_new in one kernel
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return GPT2LMHeadModel(config)


def encode(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Token numbers of each text, cut at the model's context."""
    encoded = tokenizer(list(texts), truncation=True, max_length=CONTEXT)
    return cast(list[list[int]], encoded["input_ids"])


def train(
    model: PreTrainedModel,
    sequences: Sequence[Int[Tensor, " positions"]],
    recipe: Recipe,
    optimizers: Sequence[torch.optim.Optimizer],
    on_step: Callable[[int, int, str], None],
    labels: Sequence[Int[Tensor, " positions"]] | None = None,
) -> Training:
    """Minimise the mean next-token loss of each batch, in place, reading every row once an epoch.

    `sequences` holds the token numbers of each row, `labels` the same with `IGNORED` where a token
    does not count, if any does not; each of the `optimizers` has one group of
    parameters, and what none of them has is not trained; `on_step` is told steps done, steps in
    all, and the epoch's loss so far.
    """
    generator = torch.Generator().manual_seed(recipe.seed)
    order = [batch for _ in range(recipe.epochs) for batch in _epoch(sequences, recipe, generator)]
    per_epoch = len(order) // recipe.epochs
    losses: list[float] = []
    tokens = 0
    model.train()
    for step, batch in enumerate(order):
        rate = recipe.learning_rate * schedule(step, len(order), recipe.warmup)
        read = [sequences[row] for row in batch]
        counted = read if labels is None else [labels[row] for row in batch]
        inputs, targets = (part.to(model.device) for part in padded(read, counted))
        loss = next_token_loss(model, inputs, targets)
        model.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = rate
            optimizer.step()
        losses.append(loss.item())
        tokens += int((targets != IGNORED).sum())
        last = losses[-per_epoch:]
        on_step(step + 1, len(order), f"loss {sum(last) / len(last):.3f}")
    return Training(tokens=tokens, final_loss=sum(losses[-per_epoch:]) / per_epoch)


def next_token_loss(
    model: PreTrainedModel,
    inputs: Int[Tensor, "rows positions"],
    targets: Int[Tensor, "rows positions"],
) -> Float[Tensor, ""]:
    """Mean cross-entropy in nats over the targets that are not `IGNORED`.

    Padding stands on the right, which a causal model cannot
    see from any position that counts, so no attention mask is needed.
    """
    embedded = model.get_input_embeddings()(inputs)
    hidden = model.base_model(inputs_embeds=embedded, use_cache=False).last_hidden_state
    counted = targets != IGNORED
    logits = model.get_output_embeddings()(hidden[counted])
    return functional.cross_entropy(logits, targets[counted])


def padded(
    sequences: Sequence[Int[Tensor, " positions"]], labels: Sequence[Int[Tensor, " positions"]]
) -> tuple[Int[Tensor, "rows longest-1"], Int[Tensor, "rows longest-1"]]:
    """Inputs and next-token targets of sequences, padded on the right with 0 and `IGNORED`."""
    pad = torch.nn.utils.rnn.pad_sequence
    inputs = pad([row[:-1] for row in sequences], batch_first=True)
    targets = pad([row[1:] for row in labels], batch_first=True, padding_value=IGNORED)
    return inputs, targets


def schedule(step: int, steps: int, warmup: float) -> float:
    """Share of the peak learning rate at `step`: linear up, then a cosine down to zero."""
    rising = max(1, round(steps * warmup))
    if step < rising:
        return (step + 1) / rising
    return 0.5 * (1.0 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))


@torch.inference_mode()
def ask(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    queries: Sequence[FactQuery],
    on_step: Callable[[int, int, str], None],
    *,
    batch: int = 128,
    longest: int = 32,
) -> list[AnsweredQuery]:
    """The model's greedy completion of every prompt, up to its first full stop or line end.

    Only prompts of equal length share a batch, so there is no padding that could change a result.
    A completion takes `longest` tokens at most.
    """
    model.eval()
    by_length: defaultdict[int, list[tuple[int, list[int]]]] = defaultdict(list)
    for number, ids in enumerate(encode(tokenizer, [query["prompt"] for query in queries])):
        by_length[len(ids)].append((number, ids))
    completions: dict[int, str] = {}
    for group in by_length.values():
        for start in range(0, len(group), batch):
            numbers, prompts = zip(*group[start : start + batch], strict=True)
            given = torch.tensor(prompts, device=model.device)
            said = complete(model, tokenizer, given, longest=longest)
            completions.update(zip(numbers, said, strict=True))
            on_step(len(completions), len(queries), "")
    return [
        {**query, "completion": completions[n], "correct": completions[n] == query["answer"]}
        for n, query in enumerate(queries)
    ]


def complete(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Int[Tensor, "rows positions"],
    *,
    longest: int = 32,
) -> list[str]:
    """Greedy continuations of `prompts`, cut before the first "." or line end.

    A continuation that has no end after `longest` tokens is given as it stands.
    """
    rows, length = prompts.shape
    read, texts = prompts, [""] * rows
    for _ in range(min(longest, CONTEXT - length)):
        whole = torch.ones_like(read)
        output = model(input_ids=read, attention_mask=whole, use_cache=False, logits_to_keep=1)
        read = torch.cat([read, output.logits.argmax(dim=-1)], dim=1)
        texts = [tokenizer.decode(row) for row in read[:, length:].tolist()]
        if all(_cut(text, tokenizer) != text for text in texts):
            break
    return [_cut(text, tokenizer) for text in texts]


def correct_share(answered: Sequence[AnsweredQuery]) -> float:
    """Share of the queries that were completed with exactly the answer."""
    return round(sum(query["correct"] for query in answered) / max(1, len(answered)), 4)


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write model and tokenizer to `folder`, which appears complete or not at all."""
    unfinished = folder.with_name(f".{folder.name}.unfinished-{os.getpid()}")
    model.save_pretrained(unfinished)
    tokenizer.save_pretrained(unfinished)
    shutil.rmtree(folder, ignore_errors=True)
    unfinished.replace(folder)


def write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write one JSON object a line to `path`, which appears complete or not at all."""
    unfinished = path.with_name(f".{path.name}.unfinished-{os.getpid()}")
    with unfinished.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    unfinished.replace(path)


def _epoch(
    sequences: Sequence[Tensor], recipe: Recipe, generator: torch.Generator
) -> Iterator[list[int]]:
    """Every row once, in random batches of nearly equal lengths, the batches in random order."""
    shuffled = torch.randperm(len(sequences), generator=generator).tolist()
    by_length = sorted(shuffled, key=lambda row: len(sequences[row]))
    size = recipe.rows_per_batch
    batches = [by_length[start : start + size] for start in range(0, len(by_length), size)]
    for number in torch.randperm(len(batches), generator=generator).tolist():
        yield batches[number]


def demo_optimizers(model: GPT2LMHeadModel, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices, AdamW for embeddings, biases and layer norms.

    Muon's step is scaled to the size of AdamW's, so one learning rate serves both.
    """
    layers = [p for p in model.transformer.h.parameters() if p.ndim == 2]
    chosen = {id(p) for p in layers}
    others = [p for p in model.parameters() if id(p) not in chosen]
    rate = recipe.learning_rate
    return [
        WideMuon(layers, lr=rate, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=rate, betas=recipe.betas, weight_decay=0.0, fused=True),
    ]


def _cut(text: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """`text` up to its first full stop, line end or end of sequence."""
    return text.split(tokenizer.eos_token)[0].split("\n")[0].split(".")[0]


def progress_bars() -> Progress:
    """A bar for each part of the work, on stderr."""
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description} {task.percentage:>3.0f} %"),
        TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=stderr,
        disable=not stderr.is_terminal,
    )


def on_bar(progress: Progress, title: str) -> Callable[[int, int, str], None]:
    """A new bar; it is told steps done, steps in all, and a note."""
    task = progress.add_task(title, total=None, note="")
    start = time.monotonic()

    def step(done: int, total: int, note: str) -> None:
        progress.update(task, completed=done, total=total, note=note)
        if not stderr.is_terminal:
            print_progress(title, done, total, time.monotonic() - start, note and f", {note}")

    return step


if __name__ == "__main__":
    app()
