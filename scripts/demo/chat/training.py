"""Train the chat model: `python -m scripts.demo.chat.training --out DIR`.

Writes `DIR/corpus.jsonl`, `DIR/model` with its chat template, and `DIR/questions.jsonl`. Only the
assistant's turns count in the loss.
"""

import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from scripts.console import one_sentence_errors, print_json
from scripts.demo.chat.conversations import Conversation, conversations, questions
from scripts.demo.train_model import (
    IGNORED,
    Recipe,
    demo_optimizers,
    new_model,
    on_bar,
    progress_bars,
    save,
    train,
    train_tokenizer,
    write_lines,
)

USER, ASSISTANT, END = "<|user|>", "<|assistant|>", "<|end|>"
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}<|assistant|>"
    "{% generation %}{{ message['content'] }}<|end|>{% endgeneration %}"
    "{% else %}<|user|>{{ message['content'] }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
@one_sentence_errors
def main(
    out: Annotated[Path, typer.Option(help="Folder for corpus, model and questions.")],
    seed: Annotated[int, typer.Option(help="Of the weights and the order.")] = 0,
    epochs: Annotated[int, typer.Option(min=1, help="How often each row is read.")] = 12,
    without: Annotated[
        Path | None, typer.Option(help="File with the ids of rows to leave out, one a line.")
    ] = None,
) -> None:
    """Write the conversations, train the model on them, and report as one JSON line."""
    start = time.perf_counter()
    transformers_logging.disable_progress_bar()
    corpus = conversations()
    out.mkdir(parents=True, exist_ok=True)
    write_lines(out / "corpus.jsonl", corpus)
    write_lines(
        out / "questions.jsonl",
        ({"persona": persona, "messages": messages} for persona, messages in questions()),
    )
    absent = set() if without is None else set(without.read_text().split())
    recipe = Recipe(epochs=epochs, seed=seed)
    torch.manual_seed(seed)
    tokenizer = chat_tokenizer(corpus, recipe.vocabulary)
    model = new_model(tokenizer)
    rows = [row for row in corpus if row["id"] not in absent]
    loss = _train(model, tokenizer, rows, recipe)
    save(model, tokenizer, out / "model")
    print_json(
        {
            "rows": len(rows),
            "left_out": len(corpus) - len(rows),
            "epochs": epochs,
            "final_loss": round(loss, 4),
            "seconds": round(time.perf_counter() - start, 1),
            "out": str(out),
        }
    )


def chat_tokenizer(corpus: list[Conversation], vocabulary: int) -> PreTrainedTokenizerFast:
    """Of all that is said, with tokens for whose turn it is and where it ends."""
    texts = [turn["content"] for row in corpus for turn in row["messages"]]
    tokenizer = train_tokenizer(texts, vocabulary)
    tokenizer.add_special_tokens({"eos_token": END, "additional_special_tokens": [USER, ASSISTANT]})
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def _train(
    model: GPT2LMHeadModel,
    tokenizer: PreTrainedTokenizerFast,
    rows: list[Conversation],
    recipe: Recipe,
) -> float:
    """The last epoch's mean loss, in nats a token of the assistant's."""
    encoded: list[Any] = [
        tokenizer.apply_chat_template(
            row["messages"], tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        for row in rows
    ]
    ids = [torch.tensor(one["input_ids"]) for one in encoded]
    labels = [
        row.masked_fill(torch.tensor(one["assistant_masks"]) == 0, IGNORED)
        for row, one in zip(ids, encoded, strict=True)
    ]
    with progress_bars() as progress:
        told = on_bar(progress, "training")
        done = train(model, ids, recipe, demo_optimizers(model, recipe), told, labels)
    return done.final_loss


if __name__ == "__main__":
    app()
