"""Tiny trainings: a model on disk, rows of different lengths, a Trainer and a loop of one's own."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
)

VOCABULARY = 61
ROWS = 10
PAD = 0


def make_model(folder: Path, kind: str = "llama", **changes: Any) -> Path:
    """A model of 2 layers and width 32, in ``folder``."""
    torch.manual_seed(7)
    if kind == "gpt2":
        config = GPT2Config(
            vocab_size=VOCABULARY,
            n_positions=32,
            n_embd=32,
            n_layer=2,
            n_head=2,
            pad_token_id=PAD,
            bos_token_id=PAD,
            eos_token_id=PAD,
            **{"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, **changes},
        )
        GPT2LMHeadModel(config).save_pretrained(folder)
        return folder
    usual = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32,
        "pad_token_id": PAD,
    }
    LlamaForCausalLM(LlamaConfig(**{**usual, **changes})).save_pretrained(folder)
    return folder


def load(folder: Path) -> Any:
    """The model in ``folder``."""
    return AutoModelForCausalLM.from_pretrained(folder)


def texts() -> list[list[int]]:
    """Rows of 3 to 9 tokens."""
    generator = torch.Generator().manual_seed(5)
    lengths = [3 + (4 * i) % 7 for i in range(ROWS)]
    return [torch.randint(1, VOCABULARY, (n,), generator=generator).tolist() for n in lengths]


def collate(rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
    """Padded on the right; the first two tokens of each row, its prompt, do not count."""
    width = max(len(row["input_ids"]) for row in rows)
    ids = torch.full((len(rows), width), PAD)
    labels, mask = torch.full_like(ids, -100), torch.zeros_like(ids)
    for place, row in enumerate(rows):
        own = torch.tensor(row["input_ids"])
        ids[place, : len(own)], mask[place, : len(own)] = own, 1
        labels[place, 2 : len(own)] = own[2:]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def train(model: nn.Module, folder: Path, callbacks: Sequence[Any] = (), **changes: Any) -> Trainer:
    """Two epochs of a Trainer over the rows, in an order of its own."""
    usual = {
        "num_train_epochs": 2,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "seed": 3,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    data = [{"input_ids": row} for row in texts()]
    trainer = Trainer(
        model=model,
        args=TrainingArguments(output_dir=str(folder), **{**usual, **changes}),
        train_dataset=data,
        eval_dataset=data[:3],
        data_collator=collate,
        callbacks=list(callbacks),
    )
    trainer.train()
    return trainer


def batches(size: int = 2) -> Iterator[dict[str, torch.Tensor]]:
    """The rows in order, ``size`` at a time."""
    rows = texts()
    for start in range(0, len(rows), size):
        yield collate([{"input_ids": row} for row in rows[start : start + size]])


def loop(
    model: nn.Module, optimizer: torch.optim.Optimizer, passes: int = 1, clip: float | None = None
) -> None:
    """Five steps of one pass, or two of several, whose mean losses are averaged."""
    model.train()
    chosen = itertools.islice(itertools.cycle(batches()), max(5, 2 * passes))
    for number, batch in enumerate(chosen, start=1):
        (model(**batch).loss / passes).backward()
        if number % passes == 0:
            if clip is not None:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            optimizer.zero_grad()


def same_weights(model: nn.Module, other: nn.Module) -> bool:
    """Whether all weights are identical."""
    pairs = zip(model.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(value, another) for value, another in pairs)


def adamw(model: nn.Module, **options: Any) -> torch.optim.Optimizer:
    """AdamW over all parameters."""
    return torch.optim.AdamW(model.parameters(), lr=1e-2, **options)
