"""The table of supported model families: which keys of a config.json each understands, and
what they default to.

The defaults are those of transformers' configuration classes (tests/test_config.py compares them
with the installed ones), because a released config.json leaves out what equals its class's default.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Family:
    """One configuration class of transformers, as data. Architecture facts that no key
    controls are fields.
    """

    title: str
    architectures: tuple[str, ...]  # values of `architectures` that it serves
    model_type: str
    defaults: Mapping[str, Any]  # every key that is read, with transformers' default
    gguf: tuple[str, ...] = ()  # `general.architecture` in GGUF files
    default_theta: float = 10000.0
    local_theta: float | None = None  # a second rotation table for sliding layers (Gemma 3)
    # gains stored as w of (1 + w), embeddings times sqrt(d_model), scores by
    # query_pre_attn_scalar, post-norms
    gemma: bool = False
    qk_norm: bool = False
    always_qkv_bias: bool = False
    window_note: str = "full attention"


_SIZES = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "head_dim": None,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}
_GEMMA = {
    **{k: v for k, v in _SIZES.items() if k != "hidden_act"},
    "vocab_size": 256000,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "layer_types": None,
    "final_logit_softcapping": 30.0,
    "attn_logit_softcapping": 50.0,
    "use_bidirectional_attention": None,
}
_QWEN = {
    **_SIZES,
    "vocab_size": 151936,
    "intermediate_size": 22016,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "layer_types": None,
}

FAMILIES = (
    Family(
        "Llama 2, 3, 3.1, 3.2, 3.3 (and SmolLM2)",
        ("LlamaForCausalLM",),
        "llama",
        {**_SIZES, "attention_bias": False, "mlp_bias": False},
        gguf=("llama",),
    ),
    Family(
        "Mistral",
        ("MistralForCausalLM",),
        "mistral",
        {
            **_SIZES,
            "intermediate_size": 14336,
            "num_key_value_heads": 8,
            "max_position_embeddings": 131072,
            "sliding_window": 4096,
            "layer_types": None,
        },
        gguf=("llama",),
        window_note="sliding_window in all layers, null: full attention",
    ),
    Family(
        "Gemma 2",
        ("Gemma2ForCausalLM",),
        "gemma2",
        _GEMMA,
        gguf=("gemma2",),
        gemma=True,
        window_note="even layers slide",
    ),
    Family(
        "Gemma 3 (text)",
        ("Gemma3ForCausalLM", "Gemma3ForConditionalGeneration"),
        "gemma3_text",
        {
            **_GEMMA,
            "vocab_size": 262208,
            "max_position_embeddings": 131072,
            "final_logit_softcapping": None,
            "attn_logit_softcapping": None,
            "use_bidirectional_attention": False,
            "sliding_window_pattern": 6,
            "rope_local_base_freq": None,
        },
        gguf=("gemma3",),
        default_theta=1e6,
        local_theta=1e4,
        gemma=True,
        qk_norm=True,
        window_note="five of six layers slide, with their own rotation base",
    ),
    Family(
        "Qwen 2, 2.5",
        ("Qwen2ForCausalLM",),
        "qwen2",
        _QWEN,
        gguf=("qwen2",),
        always_qkv_bias=True,
        window_note="from layer max_window_layers on, if use_sliding_window",
    ),
    Family(
        "Qwen 3",
        ("Qwen3ForCausalLM",),
        "qwen3",
        {**_QWEN, "head_dim": 128, "attention_bias": False},
        gguf=("qwen3",),
        qk_norm=True,
        window_note="from layer max_window_layers on, if use_sliding_window",
    ),
)

#: Keys that say how the rotation is scaled; rope.py reads them.
ROPE_KEYS = frozenset(
    {
        "rope_theta",
        "rope_scaling",
        "rope_parameters",
        "original_max_position_embeddings",
        "partial_rotary_factor",
    }
)

#: Keys that cannot change a forward pass without dropout: bookkeeping, training, storage, and
#: defaults of transformers' own generation loop.
HARMLESS = frozenset(
    [
        "architectures",
        "model_type",
        "transformers_version",
        "torch_dtype",
        "dtype",
        "use_cache",
        "initializer_range",
        "name_or_path",
        "_name_or_path",
        "_commit_hash",
        "auto_map",
        "_model_name_or_path",
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
        "sep_token_id",
        "unk_token_id",
        "tokenizer_class",
        "attention_dropout",
        "attn_implementation",
        "_attn_implementation",
        "_attn_implementation_autoset",
        "attn_implementation_internal",
        "cache_implementation",
        "cache_config",
        "gradient_checkpointing",
        "output_attentions",
        "output_hidden_states",
        "return_dict",
        "chunk_size_feed_forward",
        "id2label",
        "label2id",
        "num_labels",
        "problem_type",
        "finetuning_task",
        "task_specific_params",
        "tf_legacy_loss",
        "torchscript",
        "use_bfloat16",
        "pruned_heads",
        "prefix",
        "pretraining_tp",
        "is_llama_config",
        "transformers.js_config",
        "max_sequence_length",
        "model_max_length",
        "tokenizer_model_max_length",
        "tokenizer_padding_side",
        "_flash_attn_2_enabled",
        "use_flash_attn",
        "unsloth_version",
        "unsloth_fixed",
        "unsloth_tags",
        "max_length",
        "max_new_tokens",
        "min_length",
        "min_new_tokens",
        "early_stopping",
        "max_time",
        "stop_strings",
        "do_sample",
        "num_beams",
        "num_beam_groups",
        "penalty_alpha",
        "temperature",
        "top_k",
        "top_p",
        "min_p",
        "typical_p",
        "epsilon_cutoff",
        "eta_cutoff",
        "diversity_penalty",
        "repetition_penalty",
        "encoder_repetition_penalty",
        "length_penalty",
        "no_repeat_ngram_size",
        "encoder_no_repeat_ngram_size",
        "bad_words_ids",
        "force_words_ids",
        "renormalize_logits",
        "constraints",
        "forced_bos_token_id",
        "forced_eos_token_id",
        "remove_invalid_values",
        "exponential_decay_length_penalty",
        "suppress_tokens",
        "begin_suppress_tokens",
        "forced_decoder_ids",
        "num_return_sequences",
        "output_scores",
        "output_logits",
        "return_dict_in_generate",
        "decoder_start_token_id",
        "is_decoder",
        "num_assistant_tokens",
        "num_assistant_tokens_schedule",
        "assistant_confidence_threshold",
        "assistant_lookbehind",
        "target_lookbehind",
    ]
)

#: Keys of the outer config of a Gemma 3 that also sees images; its text_config is what is read.
GEMMA3_OUTER = frozenset(
    {
        "text_config",
        "vision_config",
        "mm_tokens_per_image",
        "boi_token_index",
        "eoi_token_index",
        "image_token_index",
        "boi_token_id",
        "eoi_token_id",
        "image_token_id",
        "tie_word_embeddings",
    }
)

#: Activation names of transformers -> the engine's.
ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu": "gelu",
}


def markdown() -> str:
    """The README's table of supported families."""
    lines = [
        "| family | architecture | GGUF | attention windows | rope scalings | dtypes |",
        "|---|---|---|---|---|---|",
    ]
    for family in FAMILIES:
        architectures = ", ".join(f"`{a}`" for a in family.architectures)
        gguf = ", ".join(f"`{a}`" for a in family.gguf)
        lines.append(
            f"| {family.title} | {architectures} | {gguf} | {family.window_note} | default, linear,"
            " dynamic, llama3, yarn | float32, bfloat16, float16; GGUF of any type the `gguf`"
            " package knows |"
        )
    return "\n".join(lines)
