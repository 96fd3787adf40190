"""The task of new facts for a model whose output head is trained apart from its embeddings."""

from pathlib import Path

from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from scripts.bench.through_run.tasks import MAKERS, Task, base_model


def untied_facts(out: Path, rows: int, questions: int) -> Task:
    """The task "facts" on the same base model with a head of its own, in a folder of its own.

    Args:
        out: where to work; the base model is shared with the other tasks there.
        rows: of the fine-tuning, at most.
        questions: how many.
    """
    base = _untied(base_model(out / "base"), out / "untied" / "base")
    return MAKERS["facts"](out / "untied" / f"facts-{rows}", base, rows, questions)


def _untied(base: Path, folder: Path) -> Path:
    """A model whose head begins as a copy of its embeddings."""
    if not (folder / "config.json").is_file():
        weights = AutoModelForCausalLM.from_pretrained(base).state_dict()
        config = AutoConfig.from_pretrained(base, tie_word_embeddings=False)
        model = AutoModelForCausalLM.from_config(config)
        model.load_state_dict(weights)
        AutoTokenizer.from_pretrained(base).save_pretrained(folder)
        model.save_pretrained(folder)
    return folder
