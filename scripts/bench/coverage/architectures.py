"""Tiny random models of every causal architecture that transformers can build from a config."""

import copy
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM, PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from estimators.model.capture import freeze

VOCABULARY = 64
WIDTH = 16
HEADS = 2

SIZES = (
    (r"vocab_size|vocab_size_per_layer_input|audio_vocab_size|src_vocab_size|tgt_vocab_size", 64),
    (r"(num_|n_)?(hidden_|decoder_|encoder_|text_)?(hidden_)?layers?", 2),
    (r"num_hidden_layers|n_layers?|num_layers|num_blocks|encoder_layers|decoder_layers", 2),
    (
        r"(encoder_|decoder_)?(ffn|ff|mlp|intermediate).*_(size|dim)|n_inner|ffn_dim|d_ff|d_inner",
        24,
    ),
    (r"(moe|shared|expert).*intermediate_size|shared_expert_intermediate_size", 8),
    (r"hidden_size|d_model|n_embd|dim|embed_dim|model_dim|word_embed_proj_dim|dim_model", WIDTH),
    (r"embedding_size|embedding_dim|lru_width|attention_hidden_size|d_embed", WIDTH),
    (r"num_key_value_heads|num_kv_heads|n_kv_heads|swa_num_key_value_heads", HEADS),
    (
        r"(num_|n_)(attention_|linear_)?heads?|n_head|num_heads|(encoder|decoder)_attention_heads",
        HEADS,
    ),
    (r"head_dim|d_kv|attention_head_dim|kv_channels|v_head_dim|global_head_dim|dim_head", 8),
    (r"max_position_embeddings|n_positions|max_seq_len|seq_length|n_ctx|max_sequence_length", 64),
    (r"num_(local_|routed_)?experts|n_routed_experts|moe_num_experts", 4),
    (r"num_experts_per_tok|num_experts_per_token|moe_topk|moe_top_k|moe_k|top_k_experts", 2),
    (r"n_group|topk_group|n_shared_experts|num_shared_experts|moe_num_shared_experts", 1),
    (r"first_k_dense_replace|num_dense_layers|moe_layer_start_index", 1),
    (r"(q|kv|o)_lora_rank", 8),
    (r"qk_rope_head_dim|qk_nope_head_dim|index_head_dim", 4),
    (r"index_n_heads|linear_num_(key|value)_heads|index_num_heads", HEADS),
    (r"linear_(key|value)_head_dim|image_size", 8),
    (r"mamba_d_state|state_size|ssm_state_size|mamba_d_ssm", 8),
    (r"(mamba_)?(n_|num_)heads", 4),
    (r"rotary_dim", 4),
    (r"sliding_window|attention_window|attention_chunk_size|index_topk", 64),
)
"""What attributes of a config, by whole names, are set to if they are larger: the first fits."""

Settings = Mapping[str, Any]

UNSET = {
    "head_dim": 8,
    "num_key_value_heads": HEADS,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
}
"""Attributes that are None by default in configs whose models need a number."""

DECODERS = (
    "bert",
    "bert-generation",
    "big_bird",
    "camembert",
    "data2vec-text",
    "electra",
    "ernie",
    "megatron-bert",
    "reformer",
    "rembert",
    "roberta",
    "roberta-prelayernorm",
    "roc_bert",
    "roformer",
    "xlm-roberta",
    "xlm-roberta-xl",
    "xmod",
)
"""Encoders by default, and decoders if they are told to be."""

_FULL: Settings = {"rope_type": "default", "rope_theta": 10000.0}
_MIXED = ["linear_attention", "full_attention"]
_ZAMBA: Settings = {
    "num_hidden_layers": 4,
    "layers_block_type": ["linear_attention", "hybrid"] * 2,
    "attention_hidden_size": 2 * WIDTH,
    "attention_head_dim": WIDTH,
}

EXCEPTIONS: dict[str, Settings] = {
    **{kind: {"is_decoder": True} for kind in DECODERS},
    "axk1": {"qk_head_dim": 8},
    "beam": {"mlp_layer_types": ["dense", "sparse"]},
    "bailing_hybrid": {"num_expert_group": 2, "topk_group": 1, "layer_group_size": 2},
    "cohere_compass_text": {"rope_parameters": {"full_attention": _FULL}},
    "dbrx": {
        "attn_config": {"kv_n_heads": HEADS, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {
            "hidden_size": WIDTH,
            "ffn_hidden_size": 24,
            "moe_num_experts": 4,
            "moe_top_k": 2,
        },
    },
    "dots3_note": {"text_config": {"num_hidden_layers": 2}},
    "flint": {"mlp_only_layers": [0]},
    "gemma3n_text": {"num_hidden_layers": 5, "num_kv_shared_layers": 0},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "num_layers": 2},
    "hunyuan_v1_moe": {"num_experts": 4, "moe_topk": 2, "head_dim": 8},
    "dots1": {"n_shared_experts": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "lfm3": {"layer_types": ["conv", "full_attention"]},
    "longcat_flash": {"zero_expert_num": 2, "expert_ffn_hidden_size": 8},
    "mamba2": {"num_heads": 4, "head_dim": 8, "n_groups": 2},
    "mimo_v2_flash": {
        "layer_types": ["full_attention", "sliding_attention"],
        "mlp_layer_types": ["dense", "sparse"],
        "num_key_value_heads": HEADS,
        "swa_num_key_value_heads": HEADS,
    },
    "nemotron_h": {"mamba_num_heads": 4, "mamba_head_dim": 8, "n_groups": 2},
    "roc_bert": {
        "is_decoder": True,
        "pronunciation_vocab_size": VOCABULARY,
        "shape_vocab_size": VOCABULARY,
        "pronunciation_embed_dim": WIDTH,
        "shape_embed_dim": WIDTH,
    },
    **{
        kind: {"layer_types": _MIXED} for kind in ("qwen3_5_text", "qwen3_5_moe_text", "qwen3_next")
    },
    **{kind: {"text_config": {"layer_types": _MIXED}} for kind in ("qwen3_5", "qwen3_5_moe")},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {
        "is_decoder": True,
        "axial_pos_shape": (8, 8),
        "axial_pos_embds_dim": (8, 8),
        "attn_layers": ["local", "local"],
        "local_attn_chunk_length": 4,
    },
    "xlm": {"causal": True, "n_words": VOCABULARY, "max_position_embeddings": 64, "emb_dim": WIDTH},
    "xmod": {"is_decoder": True, "default_language": "en_XX"},
    "zamba": _ZAMBA,
    "zamba2": {**_ZAMBA, "num_mem_blocks": 1},
}
"""Where sizes have to fit together in another way."""

PADDING = ("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id", "sep_token_id")


def architectures() -> list[str]:
    """Model types that ``AutoModelForCausalLM`` knows, in order."""
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def tiny_config(kind: str) -> PretrainedConfig:
    """A config of an architecture with small sizes."""
    plain = CONFIG_MAPPING[kind]()
    return CONFIG_MAPPING[kind](**_merged(_shrunk(plain), EXCEPTIONS.get(kind, {})))


def tiny_model(kind: str, seed: int = 0) -> nn.Module:
    """A model of an architecture with small random weights, frozen, in float32."""
    config = tiny_config(kind)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.is_floating_point():
                    parameter.add_(0.1 * torch.randn(parameter.shape))
    return freeze(model)


@cache
def full_sizes(kind: str) -> Mapping[str, int]:
    """Entries of each parameter of a model of default sizes, by name; empty if there is none."""
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind]())
    except Exception:  # noqa: BLE001 - whatever transformers raises
        return {}
    return {name: parameter.numel() for name, parameter in model.named_parameters()}


def _shrunk(config: PretrainedConfig) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in vars(config).items():
        if isinstance(value, PretrainedConfig):
            found[name] = _shrunk(value)
        elif value is None and name in UNSET:
            found[name] = UNSET[name]
        elif name in PADDING:
            found[name] = 0 if name != "eos_token_id" else 1
        elif isinstance(value, int) and not isinstance(value, bool):
            for pattern, size in SIZES:
                if re.fullmatch(pattern, name):
                    found[name] = min(size, value) if value > 0 else value
                    break
    if "qk_rope_head_dim" in found and "head_dim" in found:
        found["head_dim"] = found["qk_rope_head_dim"]
    return found


def _merged(settings: Settings, others: Settings) -> dict[str, Any]:
    """The settings with others in their place, those of inner configs one by one."""
    found = dict(settings)
    for name, value in others.items():
        inner = found.get(name)
        both = isinstance(inner, dict) and isinstance(value, Mapping)
        found[name] = _merged(inner, value) if both else value  # type: ignore[arg-type]
    return found


class _Widened(TorchFunctionMode):
    """Whatever asks for float32 gets float64."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is Tensor.float:
            return args[0].double()
        args = tuple(_wide(value) for value in args)
        named = {key: _wide(value) for key, value in (kwargs or {}).items()}
        return func(*args, **named)


def _wide(value: Any) -> Any:
    return torch.float64 if value is torch.float32 else value


@contextmanager
def in_float64() -> Iterator[None]:
    """Let models compute in float64 where their code rounds to float32."""
    usual = torch.get_default_dtype()
    try:
        with _Widened():
            yield
    finally:
        torch.set_default_dtype(usual)


def widened(model: nn.Module) -> nn.Module:
    """A copy in float64."""
    return copy.deepcopy(model).double()
