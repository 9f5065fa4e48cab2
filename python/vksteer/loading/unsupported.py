"""Architectures that are refused, with what they would need."""

from __future__ import annotations

from typing import Any

from .families import FAMILIES

_EXPERTS = "a mixture of experts"
_STATE = "state-space layers"
_LINEAR = "linear attention"
_ENCODER = "an encoder that sees later tokens"
_BOTH = "an encoder beside the decoder"
_LATENT = "attention with compressed (latent) keys and values"

#: model_type -> what a model of this type would need
MISSING = {
    **dict.fromkeys(
        (
            "mixtral",
            "qwen2_moe",
            "qwen3_moe",
            "olmoe",
            "phimoe",
            "granitemoe",
            "granitemoeshared",
            "dbrx",
            "grok-1",
            "gpt_oss",
            "ernie4_5_moe",
            "hunyuan_v1_moe",
            "dots1",
            "flex_olmo",
            "glm4_moe",
            "arctic",
            "jetmoe",
            "switch_transformers",
            "afmoe",
            "minimax_m2",
            "cohere2_moe",
            "exaone_moe",
            "llama4",
            "llama4_text",
        ),
        _EXPERTS,
    ),
    **dict.fromkeys(
        ("deepseek_v2", "deepseek_v3", "deepseek_v32", "kimi_k2", "longcat_flash", "mistral4"),
        f"{_EXPERTS} and {_LATENT}",
    ),
    "minicpm3": _LATENT,
    "youtu": _LATENT,
    **dict.fromkeys(
        (
            "mamba",
            "mamba2",
            "falcon_mamba",
            "falcon_h1",
            "bamba",
            "zamba",
            "zamba2",
            "nemotron_h",
            "plamo2",
            "recurrent_gemma",
        ),
        _STATE,
    ),
    "jamba": f"{_STATE} and {_EXPERTS}",
    "granitemoehybrid": f"{_STATE} and {_EXPERTS}",
    **dict.fromkeys(("rwkv", "rwkv5", "rwkv6", "rwkv7", "xlstm", "retnet"), _LINEAR),
    **dict.fromkeys(("qwen3_next", "minimax", "kimi_linear"), f"{_LINEAR} and {_EXPERTS}"),
    **dict.fromkeys(("qwen3_5", "qwen3_5_text", "olmo_hybrid"), _LINEAR),
    **dict.fromkeys(("lfm2", "lfm2_moe"), "convolutions between attention layers"),
    **dict.fromkeys(
        (
            "bert",
            "roberta",
            "xlm-roberta",
            "distilbert",
            "albert",
            "electra",
            "deberta",
            "deberta-v2",
            "modernbert",
            "camembert",
            "xlnet",
            "neobert",
            "nomic_bert",
        ),
        _ENCODER,
    ),
    **dict.fromkeys(
        ("t5", "mt5", "umt5", "bart", "mbart", "pegasus", "m2m_100", "whisper", "t5gemma"), _BOTH
    ),
    **dict.fromkeys(
        ("bloom", "mpt", "falcon"), "position biases (ALiBi) or fused multi-query heads"
    ),
    "gpt_neo": "local attention without scaled scores",
    "gpt_bigcode": "multi-query attention with learned positions",
    "starcoder2": "LayerNorm with biased projections and windows",
    "codegen": "GPT-J's layers with keys and values in blocks",
    "openai-gpt": "norms on the sum of the residual stream and a block",
    "ctrl": "fixed sinusoidal positions",
    "biogpt": "scaled embeddings with learned positions",
    "xglm": "fixed sinusoidal positions",
    "gemma3n": "per-layer embeddings and alternating updates",
    "gemma3n_text": "per-layer embeddings and alternating updates",
    "gemma4": "layers of different head sizes",
    "gemma4_text": "layers of different head sizes",
    "openelm": "layers of different sizes",
    "deci": "layers of different sizes",
    "bitnet": "weights of 1.58 bits and norms inside the blocks",
    "chatglm": "the older GLM layout; use the transformers conversion",
    "glm": "GLM's layout without norms after attention and MLP",
    "exaone": "EXAONE 3's own code; the transformers library does not have it",
    "internlm2": "its own code; the transformers library does not have it",
    "baichuan": "its own code; the transformers library does not have it",
    "qwen": "the first Qwen's own code; the transformers library does not have it",
    "phi3small": "blocksparse attention",
    "mllama": "cross attention to images",
    "mllama_text_model": "cross attention to images",
    "ministral": "Mistral with layers of two kinds",
    "diffllama": "differential attention",
    "apertus": "the xIELU activation",
    "persimmon": "fused heads with norms of keys and queries",
    "helium": "Helium's rotation of interleaved pairs",
    "hunyuan_v1_dense": "norms of keys and queries after rotation",
    "ernie4_5": "ERNIE's rotation of interleaved pairs",
    "doge": f"dynamic masks and {_EXPERTS}",
    "moshi": "several streams of audio tokens",
    "qwen2_vl": "rotation by image coordinates",
    "qwen2_5_vl": "rotation by image coordinates",
    "qwen3_vl": "rotation by image coordinates",
}


def why_unsupported(architecture: str | None, model_type: Any) -> str:
    """The message for a config whose architecture no family serves."""
    what = (
        f"architecture {architecture!r} (model_type {model_type!r})"
        if architecture
        else f"model_type {model_type!r}"
    )
    missing = MISSING.get(model_type) if isinstance(model_type, str) else None
    reason = f": it has {missing}" if missing else ""
    supported = ", ".join(dict.fromkeys(a for f in FAMILIES for a in f.architectures))
    return f"{what} is not supported{reason}; supported architectures: {supported}"
