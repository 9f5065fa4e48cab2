"""Architectures that are refused, with what they would need."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .families import FAMILIES

_EXPERTS = "a mixture of experts"
_STATE = "state-space layers"
_LINEAR = "linear attention"
_RECURRENT = "recurrent layers"
_BOTH_WAYS = "attention to later tokens (an encoder)"
_ENCODER = "an encoder beside the decoder"
_LATENT = "attention with compressed (latent) keys and values"
_CONVOLUTIONS = "convolutions in place of attention"
_ALIBI = "position biases in place of a rotation (ALiBi)"
_SINUSOIDS = "fixed sinusoidal positions"
_IMAGES = "positions by image coordinates"
_OWN_CODE = "code of its own, which is no part of transformers"

#: What a model would need -> the model_types that do.
_BY_NEED = {
    _EXPERTS: (
        "mixtral qwen2_moe qwen3_moe olmoe flex_olmo phimoe granitemoe granitemoeshared dbrx"
        " gpt_oss ernie4_5_moe hunyuan_v1_moe dots1 glm4_moe jetmoe afmoe minimax_m2 cohere2_moe"
        " exaone_moe llama4 llama4_text arctic grok-1 solar_open mimo_v2_flash"
    ),
    f"{_EXPERTS} and {_LATENT}": (
        "deepseek_v2 deepseek_v3 deepseek_v32 kimi_k2 longcat_flash mistral4 glm4_moe_lite"
        " glm_moe_dsa"
    ),
    _LATENT: "minicpm3 youtu",
    _STATE: "mamba mamba2 falcon_mamba falcon_h1 bamba zamba zamba2 nemotron_h plamo2",
    f"{_STATE} and {_EXPERTS}": "jamba granitemoehybrid",
    _LINEAR: "rwkv rwkv5 rwkv6 rwkv7 retnet qwen3_5 qwen3_5_text olmo_hybrid",
    f"{_LINEAR} and {_EXPERTS}": "qwen3_next qwen3_5_moe minimax kimi_linear",
    _RECURRENT: "recurrent_gemma xlstm",
    _CONVOLUTIONS: "lfm2",
    f"{_CONVOLUTIONS} and {_EXPERTS}": "lfm2_moe",
    _BOTH_WAYS: (
        "bert roberta xlm-roberta distilbert albert electra deberta deberta-v2 modernbert camembert"
        " xlnet rembert big_bird roformer megatron-bert ernie xlm neobert nomic_bert"
    ),
    _ENCODER: (
        "t5 mt5 umt5 longt5 bart mbart plbart pegasus marian m2m_100 blenderbot blenderbot-small"
        " prophetnet whisper t5gemma switch_transformers"
    ),
    _ALIBI: "bloom mpt",
    _SINUSOIDS: "ctrl xglm",
    _IMAGES: "qwen2_vl qwen2_5_vl qwen3_vl qwen2_vl_text qwen2_5_vl_text qwen3_vl_text",
    _OWN_CODE: "chatglm internlm2 baichuan qwen openelm nemotron-nas phi3small deci",
    "norms on the sum of the residual stream and a block": "openai-gpt",
    "per-layer embeddings and alternating updates": "gemma3n gemma3n_text",
    "layers of different head sizes": "gemma4 gemma4_text",
    "norms inside attention and MLP": "bitnet",
    "cross attention to images": "mllama mllama_text_model",
    "differential attention": "diffllama",
    "the xIELU activation": "apertus",
    "norms of queries and keys after their rotation": "hunyuan_v1_dense",
}
#: model_type -> what a model of this type would need
MISSING = {name: need for need, names in _BY_NEED.items() for name in names.split()}

#: Keys that show what a model of an unknown type would need.
_SIGNS = (
    (("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), _EXPERTS),
    (("kv_lora_rank",), _LATENT),
    (("mamba_d_state", "ssm_cfg", "state_size", "mamba_n_heads"), _STATE),
    (("linear_num_key_heads", "linear_conv_kernel_dim"), _LINEAR),
    (("is_encoder_decoder",), _ENCODER),
)


def why_unsupported(config: Mapping[str, Any]) -> str:
    """The message for a config whose architecture no family serves."""
    named, model_type = config.get("architectures"), config.get("model_type")
    what = (
        f"architecture {named[0]!r} (model_type {model_type!r})"
        if named
        else f"model_type {model_type!r}"
    )
    missing = _missing(named[0] if named else "", model_type, config)
    reason = f": it needs {missing}" if missing else ""
    supported = ", ".join(dict.fromkeys(a for f in FAMILIES for a in f.architectures))
    return f"{what} is not supported{reason}; supported architectures: {supported}"


def _missing(architecture: str, model_type: Any, config: Mapping[str, Any]) -> str:
    """What a model would need, as far as its names and keys tell; "" where they do not."""
    text = config.get("text_config")
    if isinstance(text, Mapping) and text.get("model_type") in MISSING:
        return MISSING[text["model_type"]]
    if isinstance(model_type, str) and model_type in MISSING:
        return MISSING[model_type]
    plain = _plain(architecture.removesuffix("ForCausalLM").removesuffix("LMHeadModel"))
    for name, need in MISSING.items():
        if plain and _plain(name) == plain:
            return need
    signs = [need for keys, need in _SIGNS if any(config.get(key) for key in keys)]
    return " and ".join(dict.fromkeys(signs))


def _plain(name: str) -> str:
    return name.lower().replace("_", "").replace("-", "")
