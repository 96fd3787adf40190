"""The demonstration's pretrained model: read from GGUF, facts chosen, only matrices trained."""

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from scripts.demo import smollm
from scripts.demo.smollm_demo import WRITTEN, _empty
from scripts.demo.steps import Steps, choose_queries
from scripts.demo.train_model import Recipe, train
from scripts.demo.train_smollm import choose, knows, only_layers

HEADS, KEY_HEADS = 4, 2
WORDS = ["<unk>", "<s>", "</s>", *"abcdefghijklmnopqrstuvwxyz", "Ġ", "ab"]


def tiny_llama() -> LlamaForCausalLM:
    """Grouped-query attention and tied embeddings, as SmolLM2 has them."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        num_key_value_heads=KEY_HEADS,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        rms_norm_eps=1e-5,
    )
    return LlamaForCausalLM(config).eval()


def rotary_order_of_llama_cpp(weight: np.ndarray, heads: int) -> np.ndarray:
    """Row by row: llama.cpp puts the two halves of each head's rotary pairs beside each other."""
    width = len(weight) // heads
    permuted = np.empty_like(weight)
    for head in range(heads):
        for pair in range(width // 2):
            for half in range(2):
                target = head * width + 2 * pair + half
                permuted[target] = weight[head * width + half * (width // 2) + pair]
    return permuted


def write_gguf(model: LlamaForCausalLM, path: Path) -> None:
    """What llama.cpp's converter writes for ``model``, in float32."""
    config = model.config
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KEY_HEADS)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(WORDS)
    writer.add_token_types([gguf.TokenType.NORMAL] * len(WORDS))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight":
            continue  # tied
        weight = tensor.numpy()
        if "q_proj" in name:
            weight = rotary_order_of_llama_cpp(weight, HEADS)
        if "k_proj" in name:
            weight = rotary_order_of_llama_cpp(weight, KEY_HEADS)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """A tiny Llama and the folder that its GGUF file was converted to."""
    folder = tmp_path_factory.mktemp("gguf")
    model = tiny_llama()
    write_gguf(model, folder / "tiny.gguf")
    smollm.convert(folder / "tiny.gguf", folder / "base")
    return model, folder / "base"


def test_a_converted_model_computes_what_the_original_does(converted):
    model, folder = converted
    found = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokens = torch.randint(len(WORDS), (3, 17), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected, logits = model(input_ids=tokens).logits, found(input_ids=tokens).logits
    assert torch.equal(logits, expected)
    for name, weight in model.state_dict().items():
        assert torch.equal(found.state_dict()[name], weight), name


def test_the_test_sees_a_wrong_order_of_the_rotary_pairs(converted):
    model, _ = converted
    wrong = tiny_llama()
    weight = wrong.model.layers[0].self_attn.k_proj.weight
    permuted = rotary_order_of_llama_cpp(weight.detach().numpy(), KEY_HEADS)
    weight.data = torch.from_numpy(permuted)
    tokens = torch.arange(9)[None]
    with torch.no_grad():
        assert not torch.allclose(wrong(input_ids=tokens).logits, model(input_ids=tokens).logits)


def test_a_converted_model_can_be_saved_again(converted, tmp_path):
    _, folder = converted
    found = AutoModelForCausalLM.from_pretrained(folder)
    assert getattr(found.config, "quantization_config", None) is None
    found.save_pretrained(tmp_path / "again")
    assert AutoTokenizer.from_pretrained(folder)("ab")["input_ids"]
    assert not list(folder.parent.glob(".base.unfinished*"))


def test_a_missing_package_is_told_in_one_sentence(monkeypatch):
    monkeypatch.setattr(smollm, "PACKAGE", "no_such_package_of_a_model")
    with pytest.raises(ValueError, match="run 'make demo-smollm'"):
        smollm.find_gguf()


def answer_where(known):
    """A model that knows the facts for which ``known`` holds, and remarks on them."""

    def answer(queries):
        return [
            {**q, "completion": q["answer"] + ", I think" if known(q) else " nothing", "correct": 0}
            for q in queries
        ]

    return answer


def test_facts_that_the_model_knows_are_not_chosen():
    def easy(query):
        return query["relation"] == "internet_code"

    chosen = choose(answer_where(easy), facts=50, paragraphs=20, seed=3)
    assert len(chosen.queries) == 50
    assert not any(easy(query) for query in chosen.queries)
    assert 0 < chosen.known < chosen.asked
    kinds = [row["kind"] for row in chosen.rows]
    assert (kinds.count("fact"), kinds.count("paragraph")) == (50, 20)
    texts = {row["id"]: row["text"] for row in chosen.rows}
    for query in chosen.queries:
        assert texts[query["source_id"]] == f"{query['prompt']}{query['answer']}."
    assert choose(answer_where(easy), facts=50, paragraphs=20, seed=3) == chosen


def test_a_model_that_knows_too_much_is_told():
    with pytest.raises(ValueError, match="leaves 0 of the 10 to learn"):
        choose(answer_where(lambda query: True), facts=10, paragraphs=0, seed=0)


def test_the_whole_corpus_is_taken_on_request():
    chosen = choose(answer_where(lambda q: q["relation"] == "capital"), 0, 0, seed=0)
    assert len(chosen.rows) > 8000
    assert len(chosen.queries) == chosen.asked - chosen.known
    assert knows({"completion": " Paris, France", "answer": " Paris"})  # type: ignore[typeddict-item]


def test_training_changes_the_attributed_matrices_and_nothing_else():
    model = tiny_llama()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    rows = [torch.randint(3, len(WORDS), (6,)) for _ in range(8)]
    recipe = Recipe(epochs=2, learning_rate=1e-2, rows_per_batch=4)
    losses = []
    train(model, rows, recipe, [only_layers(model, 1e-2)], lambda *step: losses.append(step))
    changed = {n for n, w in model.state_dict().items() if not torch.equal(w, before[n])}
    assert changed == {name for name in before if "proj" in name}
    assert len(losses) == 4


def test_a_new_run_keeps_what_is_not_its_own(tmp_path):
    for name in ("base", "model", "index"):
        (tmp_path / name).mkdir()
    for name in ("corpus.jsonl", "notes.txt"):
        (tmp_path / name).write_text("x")
    _empty(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "notes.txt"]
    assert "base" not in WRITTEN


def test_queries_of_the_wanted_kinds_are_asked():
    pool = [
        {"relation": relation, "correct": correct, "prompt": f"{relation}{number}"}
        for relation in ("capital", "anthem")
        for correct in (True, False)
        for number in range(3)
    ]
    kinds = [("capital", True), ("currency", True), ("anthem", False)]
    assert [q["prompt"] for q in choose_queries(pool, kinds)] == ["capital1", "anthem1"]
    assert choose_queries(pool, [("currency", True)]) == pool[:1]


def test_a_command_that_fails_ends_a_demonstration():
    steps = Steps()
    with pytest.raises(RuntimeError, match="etymon query ended with status 1"):
        steps.run("ask", "Ask", "query", "What?", "--url", "http://127.0.0.1:9")
    assert not steps.costs
