"""Checkpoints as users have them, right and wrong, each in a folder of its own."""

import json
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import peft
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    BertForMaskedLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlamaModel,
    T5Config,
    T5ForConditionalGeneration,
)

from tests.service_fixtures import byte_level_tokenizer, corpus_rows

Weights = Mapping[str, torch.Tensor]
DOWN = "model.layers.1.mlp.down_proj.weight"
VALUE_HEAD = {"v_head.summary.weight": torch.zeros(1, 32)}


def config(**changes: Any) -> LlamaConfig:
    """A Llama of 2 layers and width 32 for 400 tokens."""
    usual = {
        "vocab_size": 400,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
    }
    return LlamaConfig(**{**usual, **changes})


class Bench:
    """Makes the folders; the weights are random, but the same in all of them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.tokenizer = byte_level_tokenizer([row["text"] for row in corpus_rows()])
        torch.manual_seed(0)
        self.model = LlamaForCausalLM(config())

    def save(
        self,
        name: str,
        model: Any = None,
        *,
        tokenizer: Any = True,
        edit: Callable[[Weights], Weights] | None = None,
        configuration: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> Path:
        """A folder with the model and, unless False, a tokenizer; its weights and config edited."""
        folder = self.root / name
        (self.model if model is None else model).save_pretrained(folder, **options)
        if tokenizer:
            (self.tokenizer if tokenizer is True else tokenizer).save_pretrained(folder)
        if edit is not None:
            path = folder / "model.safetensors"
            weights = {key: value.clone() for key, value in load_file(path).items()}
            save_file(dict(edit(weights)), path, metadata={"format": "pt"})
        if configuration is not None:
            change_json(folder / "config.json", **configuration)
        return folder

    def adapter(self, name: str, base: Path, *, tokenizer: bool = False) -> Path:
        """The folder of a LoRA adapter of the model in ``base``."""
        model = LlamaForCausalLM.from_pretrained(base)
        settings = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            adapted = peft.get_peft_model(model, settings)
            for weights_name, weights in adapted.named_parameters():
                if "lora_B" in weights_name:
                    weights.data.normal_(std=0.1)
            adapted.save_pretrained(self.root / name)
        if tokenizer:
            self.tokenizer.save_pretrained(self.root / name)
        return self.root / name

    def classifier(self) -> Path:
        """Of the same architecture, as a reward model is."""
        return self.save("classifier", LlamaForSequenceClassification(config()))

    def embedder(self) -> Path:
        """No head at all; with tied embeddings not a weight is missing."""
        return self.save("embedder", LlamaModel(config(tie_word_embeddings=True)))

    def masked(self) -> Path:
        """A model that reads in both directions."""
        sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        return self.save("masked", BertForMaskedLM(BertConfig(vocab_size=400, **sizes)))

    def translator(self) -> Path:
        """An encoder and a decoder."""
        sizes = {"d_model": 32, "d_kv": 16, "d_ff": 32, "num_layers": 1, "num_heads": 2}
        return self.save(
            "translator", T5ForConditionalGeneration(T5Config(vocab_size=400, **sizes))
        )

    def longer_tokenizer(self) -> Any:
        """Two tokens were added, and the embedding was never resized."""
        tokenizer = byte_level_tokenizer([row["text"] for row in corpus_rows()])
        tokenizer.add_tokens(["<|user|>", "<|model|>"])
        return tokenizer


def without(*names: str) -> Callable[[Weights], Weights]:
    """Leaves weights out."""
    return lambda weights: {key: value for key, value in weights.items() if key not in names}


def renamed(old: str, new: str) -> Callable[[Weights], Weights]:
    """Changes the beginning of every name."""
    return lambda weights: {key.replace(old, new, 1): value for key, value in weights.items()}


def change_json(path: Path, **changes: Any) -> None:
    """Change entries of a JSON object in a file."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
