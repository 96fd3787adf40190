"""Models that are not what was trained: each is refused in a sentence (`pytest -k cases -s`)."""

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BloomConfig, BloomForCausalLM, GPT2LMHeadModel, LlamaForCausalLM
from typer.testing import CliRunner

from estimators.model.tokens import Sequence1D
from scripts import build_index, fit_estimator
from service.checkpoints import ModelSource, UnusableModel
from service.http.engine import Engine
from service.http.telemetry import Telemetry
from service.indexing.plausibility import TextSample, measure_loss, tell_loss
from service.models import load_model
from service.settings import Settings
from tests.model_cases import DOWN, VALUE_HEAD, Bench, change_json, config, renamed, without
from tests.service_fixtures import Workspace, byte_level_tokenizer, corpus_rows, make_model

TROUBLES = Path(__file__).parents[2] / "docs" / "troubleshooting.md"
Sources = dict[str, Any]
Case = Callable[[Bench], tuple[Path | str, Sources]]


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    bench = Bench(tmp_path_factory.mktemp("models"))
    bench.save("good")
    return bench


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return make_model(tmp_path_factory.mktemp("trained"))


def load(name: Path | str, **others: Any) -> Any:
    return load_model(ModelSource.of(str(name), others.pop("revision", None), **others))


def moved_base(bench: Bench) -> Path:
    base = bench.save("base to move")
    adapter = bench.adapter("adapter of a moved base", base)
    shutil.rmtree(base)
    return adapter


def broken_base(bench: Bench) -> Path:
    base = bench.save("base to break")
    adapter = bench.adapter("adapter of a broken base", base)
    bench.save("base to break", edit=without(DOWN))
    return adapter


def edited_adapter(bench: Bench, name: str, change: Callable[[dict], dict]) -> Path:
    path = bench.adapter(name, bench.root / "good") / "adapter_model.safetensors"
    save_file(change(load_file(path)), path, metadata={"format": "pt"})
    return path.parent


def first_gone(weights: dict) -> dict:
    return dict(sorted(weights.items())[1:])


def third_layer(weights: dict) -> dict:
    extra = {name.replace("layers.0", "layers.2"): value for name, value in weights.items()}
    return {**weights, **{name: value.clone() for name, value in extra.items()}}


def cut(path: Path) -> Path:
    path.write_bytes(path.read_bytes()[:-1000])
    return path.parent


def drop_head(folder: Path) -> Path:
    path = folder / "adapter_model.safetensors"
    kept = {name: value for name, value in load_file(path).items() if "lm_head" not in name}
    save_file(kept, path, metadata={"format": "pt"})
    return folder


def below_a_tokenizer(bench: Bench) -> Path:
    return bench.save("good/checkpoint-8", tokenizer=False)


CASES: dict[str, tuple[Case, list[str]]] = {
    "a missing weight": (
        lambda b: (b.save("missing", edit=without(DOWN)), {}),
        ["lacks 1 weight of the model", "which would be random", DOWN, "as training wrote it"],
    ),
    "a missing output head": (
        lambda b: (b.save("headless", edit=without("lm_head.weight")), {}),
        ["lacks 1 weight", "which would be random", "random: lm_head.weight"],
    ),
    "a prefix that was not taken off": (
        lambda b: (b.save("prefixed", edit=renamed("model.", "module.")), {}),
        [
            "lacks 20 weights",
            "which would be random",
            "and 16 more",
            "does not use: module.embed_tokens.weight",
        ],
    ),
    "a classifier": (
        lambda b: (b.classifier(), {}),
        ["LlamaForSequenceClassification", "not a causal language model", "it has 'score'"],
    ),
    "an embedding model": (
        lambda b: (b.embedder(), {}),
        ["a LlamaModel,", "not a causal language model"],
    ),
    "a model that reads in both directions": (
        lambda b: (b.masked(), {}),
        ["a BertForMaskedLM,", "not a causal language model"],
    ),
    "an encoder and decoder": (
        lambda b: (b.translator(), {}),
        ["has a T5Config", "there is no causal language model of that kind"],
    ),
    "a value head left over": (
        lambda b: (b.save("valued", edit=lambda w: {**w, **VALUE_HEAD}), {}),
        ["holds 1 weight", "that the model does not use", "use: v_head.summary.weight"],
    ),
    "a configuration with fewer layers": (
        lambda b: (b.save("shallow", configuration={"num_hidden_layers": 1}), {}),
        ["holds 9 weights", "that the model does not use", "use: model.layers.1."],
    ),
    "a weight of another shape": (
        lambda b: (b.save("shaped", edit=lambda w: {**w, DOWN: torch.zeros(32, 60)}), {}),
        ["has 1 weight", "of another shape", f"{DOWN} is [32, 60], not [32, 64]"],
    ),
    "tokens that the embedding lacks": (
        lambda b: (b.save("longer", tokenizer=b.longer_tokenizer()), {}),
        [
            "2 tokens beyond the 400",
            "rows of the model's embedding",
            "'<|user|>' (400), '<|model|>' (401)",
            "--tokenizer",
        ],
    ),
    "no tokenizer": (
        lambda b: (b.save("mute", tokenizer=False), {}),
        ["There is no tokenizer in", "--tokenizer FOLDER_OR_NAME"],
    ),
    "no tokenizer but in the folder above": (
        lambda b: (below_a_tokenizer(b), {}),
        ["There is no tokenizer in", "its parent folder,", "good, has one"],
    ),
    "weights that were cut off": (
        lambda b: (cut(b.save("cut") / "model.safetensors"), {}),
        ["Cannot load a causal language model from", "SafetensorError"],
    ),
    "a folder of checkpoints": (
        lambda b: (b.root, {}),
        ["Cannot load a causal language model from", "no config.json in it; its folders", "good"],
    ),
    "a folder that is not there": (
        lambda b: (b.root / "god", {}),
        ["Cannot load a causal language model from", "there is no such folder"],
    ),
    "a relative folder that is not there": (
        lambda b: ("runs/somewhere/model", {}),
        ["Cannot load a causal language model from", "there is no such folder"],
    ),
    "a file": (
        lambda b: (b.root / "good" / "model.safetensors", {}),
        ["Cannot load a causal language model from", "it is a file; name the folder of a model"],
    ),
    "a folder's revision": (
        lambda b: (b.root / "good", {"revision": "step1000"}),
        ["The revision 'step1000' is asked for", "is a folder, which has one state only"],
    ),
    "two revisions": (
        lambda b: ("someone/model@step1000", {"revision": "step2000"}),
        ["Two revisions are asked for", "'step1000' in", "and 'step2000'"],
    ),
    "an adapter whose base model moved": (
        lambda b: (moved_base(b), {}),
        ["belongs to the base model", "there is no such folder", "--base-model FOLDER_OR_NAME"],
    ),
    "an adapter whose base model lacks a weight": (
        lambda b: (broken_base(b), {}),
        ["belongs to the base model", "base to break", "lacks 1 weight", DOWN],
    ),
    "an adapter that lacks a weight": (
        lambda b: (edited_adapter(b, "gap", first_gone), {}),
        ["lacks 1 weight of the model", "which would be random", "lora_A"],
    ),
    "an adapter of a deeper model": (
        lambda b: (edited_adapter(b, "deep", third_layer), {}),
        ["holds 2 weights", "that the model does not use", "layers.2."],
    ),
    "an adapter that lost its new rows of the head": (
        lambda b: (drop_head(resized(b, "no head", ["embed_tokens"])), {}),
        ["trained with a vocabulary of 402, its base", "saved no output head", "would be random"],
    ),
    "a base model without an adapter": (
        lambda b: (b.root / "good", {"base_model": "elsewhere"}),
        ["A base model is named, 'elsewhere', but", "holds no adapter"],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_cases_of_models_are_refused_in_a_sentence(bench: Bench, name: str) -> None:
    make, expected = CASES[name]
    source, others = make(bench)
    with pytest.raises(UnusableModel) as caught:
        load(source, **others)
    sentence = str(caught.value)
    print(f"\n{name}:\n  {sentence.replace(str(bench.root), '...')}")
    for part in expected:
        assert part in sentence
    assert sentence.endswith(".")
    assert "\n" not in sentence


def test_cases_of_models_stand_in_the_page_on_troubles() -> None:
    page = TROUBLES.read_text().partition("## Models")[2].partition("\n## ")[0]
    for name, (_, expected) in CASES.items():
        told = [part for part in expected if part.strip(" ,.:") in page]
        assert told, name


def test_cases_that_are_allowed_give_the_weights_of_the_good_model(bench: Bench) -> None:
    good = load(bench.root / "good")
    extra = bench.save("valued too", edit=lambda w: {**w, **VALUE_HEAD})
    assert load(extra, unused_weights=True).model_sha256 == good.model_sha256
    old = bench.save("old", edit=lambda w: {**w, "model.rotary_emb.inv_freq": torch.zeros(8)})
    mute = bench.save("mute again", tokenizer=False)
    found = [load(old), load(mute, tokenizer=str(bench.root / "good"))]
    for loaded in found:
        assert loaded.model_sha256 == good.model_sha256
        assert loaded.tokenizer_sha256 == good.tokenizer_sha256
    record = found[1].record
    assert record.tokenizer == str(bench.root / "good")
    assert ModelSource.of("elsewhere").completed(record).tokenizer == record.tokenizer
    assert ModelSource.of("x", tokenizer="mine").completed(record).tokenizer == "mine"


def test_an_adapter_says_how_many_weights_arrived_on_which_base(bench: Bench) -> None:
    adapter = moved_base(bench)
    base = bench.save("new place of the base")
    loaded = load(adapter, base_model=str(base))
    assert loaded.notes == (
        f"adapter: all of its 4 weights (256 numbers) are in place on the base model '{base}'",
    )
    assert loaded.record.base_model == str(base)
    kept = load_file(adapter / "adapter_model.safetensors")
    state = loaded.model.state_dict()
    for name, value in kept.items():
        full = name.removeprefix("base_model.model.").replace(".weight", ".default.weight")
        assert torch.equal(state[full], value)


def resized(bench: Bench, name: str, saved: list[str]) -> Path:
    """An adapter that was trained with two more tokens, with some modules saved whole."""
    tokenizer = bench.longer_tokenizer()
    model = LlamaForCausalLM.from_pretrained(bench.root / "good")
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    settings = peft.LoraConfig(
        r=2, target_modules=["q_proj"], modules_to_save=saved, task_type="CAUSAL_LM"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft.get_peft_model(model, settings).save_pretrained(bench.root / name)
    tokenizer.save_pretrained(bench.root / name)
    return bench.root / name


def test_an_adapter_that_brings_a_larger_vocabulary_resizes_its_base(bench: Bench) -> None:
    folder = resized(bench, "larger", ["embed_tokens", "lm_head"])
    loaded = load(folder)
    kept = load_file(folder / "adapter_model.safetensors")
    embedding = kept["base_model.model.model.embed_tokens.weight"]
    assert len(embedding) == 402
    assert torch.equal(loaded.model.get_input_embeddings().weight, embedding)
    assert torch.equal(
        loaded.model.get_output_embeddings().weight, kept["base_model.model.lm_head.weight"]
    )


def test_an_adapter_may_save_its_output_head_whole(bench: Bench) -> None:
    model = LlamaForCausalLM.from_pretrained(bench.root / "good")
    settings = peft.LoraConfig(
        r=2, target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = peft.get_peft_model(model, settings)
        next(p for n, p in adapted.named_parameters() if "lm_head.modules" in n).data += 1
        adapted.save_pretrained(bench.root / "headed")
    loaded = load(bench.root / "headed")
    head = load(bench.root / "good").model.lm_head.weight
    assert torch.equal(loaded.model.get_output_embeddings().weight, head + 1)
    assert "all of its 5 weights" in loaded.notes[0]


def test_a_name_may_end_in_a_revision_unless_a_folder_is_called_so(tmp_path: Path) -> None:
    assert ModelSource.of("someone/model@step8") == ModelSource(
        name="someone/model", revision="step8"
    )
    assert ModelSource.of("someone/model@step8", "step8").title == "someone/model@step8"
    folder = tmp_path / "model@home"
    folder.mkdir()
    assert ModelSource.of(str(folder)) == ModelSource(name=str(folder))


def test_a_revision_of_a_repository_is_another_model(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository = tmp_path / "models--someone--tiny"
    (repository / "refs").mkdir(parents=True)
    other = bench.save("later", LlamaForCausalLM(config()))
    states = (("main", bench.root / "good"), ("step1000", other))
    for letter, (revision, folder) in zip("ab", states, strict=True):
        ignore = shutil.ignore_patterns("checkpoint-*")
        shutil.copytree(folder, repository / "snapshots" / (letter * 40), ignore=ignore)
        (repository / "refs" / revision).write_text(letter * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    first, second = load("someone/tiny"), load("someone/tiny@step1000")
    assert first.model_sha256 == load(bench.root / "good").model_sha256
    assert second.model_sha256 == load(other).model_sha256
    assert load("someone/tiny", revision="step1000").model_sha256 == second.model_sha256
    assert (second.record.source, second.record.revision) == ("someone/tiny", "step1000")
    with pytest.raises(UnusableModel, match=r"language model from 'someone/tiny@step2000'"):
        load("someone/tiny@step2000")


KINDS = ["sharded", "padded", "pickled", "bfloat16", "linked", "ü and space"]


@pytest.mark.parametrize("kind", KINDS)
def test_cases_that_were_right_stay_right(bench: Bench, tmp_path: Path, kind: str) -> None:
    if kind == "sharded":
        folder = bench.save(kind, max_shard_size="20KB")
        assert len(list(folder.glob("*.safetensors"))) > 1
    elif kind == "padded":
        folder = bench.save(kind, LlamaForCausalLM(config(vocab_size=448)))
    elif kind == "pickled":
        folder = bench.save(kind)
        weights = load_file(folder / "model.safetensors")
        torch.save(weights, folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
    elif kind == "linked":
        folder = tmp_path / "snapshot"
        folder.mkdir()
        for path in (bench.root / "good").iterdir():
            if path.is_file():
                (folder / path.name).symlink_to(path)
    else:
        folder = bench.save(kind)
    loaded = load_model(str(folder), dtype="bfloat16" if kind == "bfloat16" else "auto")
    assert len(loaded.coverage.layers) == 14
    good = load(bench.root / "good")
    assert (loaded.model_sha256 == good.model_sha256) is (kind not in ("padded", "bfloat16"))


def test_an_adapters_own_tokenizer_comes_before_its_bases(bench: Bench) -> None:
    base = bench.save("base with a tokenizer")
    without_one, with_one = (
        load(bench.adapter(f"adapter, {own}", base, tokenizer=own)) for own in (False, True)
    )
    assert without_one.tokenizer_sha256 == with_one.tokenizer_sha256
    (base / "tokenizer.json").unlink()
    (base / "tokenizer_config.json").unlink()
    assert load(with_one.source).tokenizer_sha256 == with_one.tokenizer_sha256
    with pytest.raises(UnusableModel, match=r"There is no tokenizer in .*base with a tokenizer"):
        load(without_one.source)


def sample_of(loaded: Any) -> TextSample:
    sample = TextSample()
    for row in corpus_rows():
        sample.add(Sequence1D(tokens=tuple(loaded.encode(row["text"]))))
    return sample


def test_an_infinite_head_is_named(bench: Bench) -> None:
    def scaled(factor: float) -> Callable[[Any], Any]:
        return lambda w: {**w, "lm_head.weight": w["lm_head.weight"] * factor}

    saturated = load(bench.save("saturated", edit=scaled(1e38)))
    with pytest.raises(ValueError, match=r"e\+37 nats a token, which no trained .* output head"):
        measure_loss(saturated, sample_of(saturated))
    infinite = load(bench.save("infinite", edit=scaled(float("inf"))))
    with pytest.raises(ValueError, match=r"not finite on any .* NaN or infinite is 'lm_head'"):
        measure_loss(infinite, sample_of(infinite))
    rotten = load(bench.save("rotten", edit=lambda w: {**w, DOWN: w[DOWN] * float("nan")}))
    with pytest.raises(ValueError, match=r"infinite is 'model.layers.1.mlp.down_proj'"):
        measure_loss(rotten, sample_of(rotten))


def test_the_mean_loss_is_that_of_the_library(trained: Workspace) -> None:
    loaded = load(trained.model)
    sample = TextSample()
    text = corpus_rows()[0]["text"]
    sample.add(Sequence1D(tokens=tuple(loaded.encode(text))))
    found = measure_loss(loaded, sample)
    assert found is not None
    ids = torch.tensor([loaded.encode(text)])
    model = GPT2LMHeadModel.from_pretrained(trained.model).eval()
    with torch.no_grad():
        expected = float(model(input_ids=ids, labels=ids).loss)
    assert found.mean == pytest.approx(expected, rel=1e-4)
    assert (found.texts, found.tokens) == (1, ids.shape[1] - 1)
    assert found.uniform == pytest.approx(torch.tensor(float(len(loaded.tokenizer))).log().item())


def test_a_tokenizer_of_another_model_is_warned_of(
    trained: Workspace, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def warnings_of(source: ModelSource) -> int:
        caplog.clear()
        loaded = load_model(source)
        with caplog.at_level("INFO", logger="service"):
            tell_loss(measure_loss(loaded, sample_of(loaded)))
        assert "mean loss is" in caplog.records[0].getMessage()
        return sum(record.levelname == "WARNING" for record in caplog.records)

    assert warnings_of(ModelSource(name=str(trained.model))) == 0
    other = tmp_path / "other tokenizer"
    other.mkdir()
    for path in trained.model.glob("*token*"):
        shutil.copy(path, other)
    vocabulary = load_model(str(trained.model)).tokenizer.get_vocab()
    turned = {token: (number + 7) % len(vocabulary) for token, number in vocabulary.items()}
    path = other / "tokenizer.json"
    change_json(path, added_tokens=[], model={**_model_of(path), "vocab": turned})
    wrong = ModelSource.of(str(trained.model), tokenizer=str(other))
    assert warnings_of(wrong) == 1


def test_a_tokenizer_that_does_not_know_the_texts_is_warned_of(
    trained: Workspace, caplog: pytest.LogCaptureFixture
) -> None:
    loaded = load(trained.model)
    loaded.tokenizer.unk_token = "a"
    sample = TextSample()
    unknown = loaded.tokenizer.unk_token_id
    sample.add(Sequence1D(tokens=(5, unknown, 6, unknown, 7, 8)))
    found = measure_loss(loaded, sample)
    assert (found.tokens, found.unknown) == (5, 2)
    with caplog.at_level("INFO", logger="service"):
        tell_loss(found)
    assert "Of 5 tokens 2 are the one for what the tokenizer does not know" in caplog.text


def _model_of(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text())["model"]
    return found


def test_the_sample_is_uniform_and_repeats_itself() -> None:
    counts = torch.zeros(100)
    for start in range(300):
        sample = TextSample()
        for number in range(100):
            sample.add(Sequence1D(tokens=(1, (number + start) % 100)))
        sample.add(Sequence1D(tokens=(5,)))
        assert len(sample.texts) == 32
        counts += torch.bincount(
            torch.tensor([text.tokens[1] for text in sample.texts]), minlength=100
        )
    assert counts.sum() == 300 * 32
    assert float(counts.min()) > 0.8 * 96  # each text's turn comes at every place of the stream
    assert float(counts.max()) < 1.2 * 96


def test_commands_take_a_tokenizer_and_the_index_remembers_it(
    trained: Workspace, tmp_path: Path
) -> None:
    mute = tmp_path / "checkpoint-8"
    shutil.copytree(trained.model, mute, ignore=shutil.ignore_patterns("*token*"))
    named = ["--model", str(mute), "--data", str(trained.corpus)]
    fit = [*named, "--out", str(tmp_path / "ekfac.safetensors")]
    refused = CliRunner().invoke(fit_estimator.app, fit)
    assert refused.exit_code == 1
    assert "There is no tokenizer in" in refused.stderr
    tokenizer = ["--tokenizer", str(trained.model)]
    fitted = CliRunner().invoke(fit_estimator.app, [*fit, *tokenizer])
    assert fitted.exit_code == 0, fitted.stderr
    assert "The model's mean loss is" in fitted.stderr
    index = tmp_path / "index"
    build = [*named, *tokenizer, "--factors", fit[-1], "--out", str(index)]
    small = ["--id-column", "id", "--dimensions", "512", "--rank", "8"]
    built = CliRunner().invoke(build_index.app, [*build, *small])
    assert built.exit_code == 0, built.stderr
    loss = json.loads(built.stdout.splitlines()[-1])["corpora"][0]["loss"]
    assert loss["mean"] < 0.5 * loss["uniform"]
    settings = Settings(model=str(mute), indexes={"default": index})
    engine = Engine(settings, Telemetry(settings))
    engine.load()
    assert engine.retriever("default").loaded.origin.tokenizer == str(trained.model)


def test_a_model_that_states_no_context_gets_a_window_and_says_so(tmp_path):
    tokenizer = byte_level_tokenizer([row["text"] for row in corpus_rows()])
    tokenizer.model_max_length = int(1e30)  # what a tokenizer says that knows of no limit
    torch.manual_seed(0)
    sizes = BloomConfig(vocab_size=400, hidden_size=16, n_layer=1, n_head=2)
    BloomForCausalLM(sizes).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path))
    assert loaded.context == 2048
    assert "does not say how many tokens it reads at once; it is given 2048" in loaded.notes[-1]
