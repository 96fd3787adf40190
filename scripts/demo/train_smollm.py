"""Fine-tune SmolLM2-135M on facts that it does not know yet, so that their source is known.

`python -m scripts.demo.train_smollm --base DIR --out DIR` asks the pretrained model facts of the
World Factbook, keeps those that it does not complete rightly, trains it on their sentences among
background paragraphs, and writes the same files as `scripts.demo.train_model`: `corpus.jsonl`,
`model` and `queries.jsonl`. What is trained is what is attributed: the matrices of all linear
layers, in full (no adapters), by AdamW; embeddings and norms stay as they were.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging as transformers_logging

from estimators.model.layers import find_layers
from scripts import options
from scripts.console import one_sentence_errors, print_json, stderr
from scripts.demo.corpus import CorpusRow, FactQuery, corpus_rows, fact_queries, load_profiles
from scripts.demo.train_model import (
    AnsweredQuery,
    Recipe,
    ask,
    correct_share,
    encode,
    on_bar,
    progress_bars,
    save,
    train,
    write_lines,
)

CANDIDATES = 1.3
"""Facts asked beforehand for each fact wanted, since some are known."""
LONGEST = 16
"""Tokens of a completion: nearly all answers are shorter."""

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """What is trained on, and what is asked afterwards.

    Attributes:
        rows: training examples, facts and paragraphs in the order of the corpus.
        queries: of the facts among them that the pretrained model did not complete rightly.
        asked: how many facts the pretrained model was asked.
        known: how many of these it completed rightly.
    """

    rows: list[CorpusRow]
    queries: list[FactQuery]
    asked: int
    known: int


@app.command()
@one_sentence_errors
def main(
    base: Annotated[Path, typer.Option(help="Folder of the model; see scripts.demo.smollm.")],
    out: Annotated[Path, typer.Option(help="Folder for corpus, model and queries.")],
    facts: Annotated[
        int, typer.Option(min=0, help="Facts to learn; 0 takes the whole corpus.")
    ] = 240,
    paragraphs: Annotated[int, typer.Option(min=0, help="Paragraphs beside them.")] = 80,
    epochs: Annotated[int, typer.Option(min=1, help="How often each row is read.")] = 5,
    rate: Annotated[float, typer.Option(help="Peak learning rate.")] = 5e-4,
    rows: Annotated[int, typer.Option(min=1, help="Rows per batch.")] = 16,
    seed: Annotated[int, typer.Option(help="Of the choice and the order.")] = 0,
    device: options.Device = "cpu",
) -> None:
    """Choose facts, train, ask again, and report as one JSON line."""
    started = time.perf_counter()
    transformers_logging.disable_progress_bar()
    torch.manual_seed(seed)
    recipe = Recipe(epochs=epochs, seed=seed, learning_rate=rate, rows_per_batch=rows)
    model = AutoModelForCausalLM.from_pretrained(base).to(device)
    tokenizer = AutoTokenizer.from_pretrained(base)
    out.mkdir(parents=True, exist_ok=True)
    with progress_bars() as progress:

        def asked(title: str, queries: Sequence[FactQuery]) -> list[AnsweredQuery]:
            return ask(model, tokenizer, queries, on_bar(progress, title), longest=LONGEST)

        chosen = choose(lambda queries: asked("asking before", queries), facts, paragraphs, seed)
        sequences = [torch.tensor(t) for t in encode(tokenizer, [r["text"] for r in chosen.rows])]
        optimizer = only_layers(model, rate)
        training = train(model, sequences, recipe, [optimizer], on_bar(progress, "training"))
        save(model, tokenizer, out / "model")
        answered = asked("asking after", chosen.queries)
    write_lines(out / "corpus.jsonl", chosen.rows)
    write_lines(out / "queries.jsonl", answered)
    _say(chosen, answered)
    print_json(
        {
            "rows": len(chosen.rows),
            "facts": len(chosen.queries),
            "facts_asked_before": chosen.asked,
            "facts_known_before": chosen.known,
            "facts_correct_share": correct_share(answered),
            "tokens": training.tokens,
            "final_loss": round(training.final_loss, 4),
            "recipe": asdict(recipe),
            "device": device,
            "out": str(out),
            "seconds": round(time.perf_counter() - started, 1),
        }
    )


def choose(
    answer: Callable[[Sequence[FactQuery]], Sequence[AnsweredQuery]],
    facts: int,
    paragraphs: int,
    seed: int,
) -> Chosen:
    """Draw ``facts`` facts that the model does not know, and paragraphs to hide them among.

    A fact counts as known if the model's completion begins with the answer.

    Args:
        answer: the pretrained model's completions.
        facts: wanted; 0 takes the whole corpus, and asks about all facts that are not known.
        paragraphs: wanted.
        seed: of the draw.

    Raises:
        ValueError: the model knows so many facts that too few are left.
    """
    profiles = load_profiles()
    corpus, everything = list(corpus_rows(profiles)), list(fact_queries(profiles))
    order = np.random.default_rng(seed).permutation(len(everything))
    wanted = facts or len(everything)
    drawn = sorted(order[: round(CANDIDATES * wanted)].tolist())
    asked = answer([everything[i] for i in drawn])
    unknown = [everything[i] for i, q in zip(drawn, asked, strict=True) if not knows(q)]
    known = len(asked) - len(unknown)
    if facts == 0:
        return Chosen(rows=corpus, queries=unknown, asked=len(asked), known=known)
    if len(unknown) < facts:
        raise ValueError(
            f"The model knows {known} of {len(asked)} facts, which leaves {len(unknown)} of the "
            f"{facts} to learn; ask for fewer with --facts."
        )
    spread = np.linspace(0, len(unknown) - 1, facts).round().astype(int)
    queries = [unknown[i] for i in spread]
    prose = [row["id"] for row in corpus if row["kind"] == "paragraph"]
    kept = {query["source_id"] for query in queries}
    kept.update(np.random.default_rng(seed + 1).choice(prose, paragraphs, replace=False).tolist())
    rows = [row for row in corpus if row["id"] in kept]
    return Chosen(rows=rows, queries=queries, asked=len(asked), known=known)


def knows(answered: AnsweredQuery) -> bool:
    """Whether the completion begins with the answer."""
    return answered["completion"].startswith(answered["answer"])


def only_layers(model: PreTrainedModel, rate: float) -> torch.optim.Optimizer:
    """AdamW for the weights of the attributed layers; the gradients of all others are stopped."""
    model.requires_grad_(False)
    weights = [model.get_parameter(f"{layer.name}.weight") for layer in find_layers(model).layers]
    for weight in weights:
        weight.requires_grad_(True)
    return torch.optim.AdamW(weights, lr=rate, betas=Recipe.betas, weight_decay=0.0, fused=True)


def _say(chosen: Chosen, answered: Sequence[AnsweredQuery]) -> None:
    stderr.print(
        f"Before, the model completed {chosen.known} of {chosen.asked} facts rightly. Of "
        f"{len(answered)} others it now completes {correct_share(answered):.0%} in the very words "
        f"of the answer.",
        highlight=False,
        soft_wrap=True,
    )


if __name__ == "__main__":
    app()
