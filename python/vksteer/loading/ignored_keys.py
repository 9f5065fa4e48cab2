"""Keys of a config.json that transformers never reads in the supported families, although released
files carry them. tests/test_ignored_keys.py sets every one of them in a model of each family and
compares transformers' logits and cached decoding with and without it.

A key that is in no list is refused: not knowing a key is no proof that it has no influence.
"""

from __future__ import annotations

import warnings

#: Keys that no supported family reads: dropout rates, training and storage settings, sizes and
#: names of other configuration classes, and notes of other programs.
IGNORED_IN_ALL = frozenset(
    [
        "activation",
        "activation_dropout",
        "attention_probs_dropout_prob",
        "attn_dropout_prob",
        "attn_pdrop",
        "classifier_dropout",
        "dropout",
        "embd_pdrop",
        "embedding_dropout",
        "layerdrop",
        "emb_dropout_prob",
        "ffn_dropout",
        "hidden_dropout",
        "hidden_dropout_prob",
        "resid_pdrop",
        "residual_dropout",
        "summary_activation",
        "summary_first_dropout",
        "summary_proj_to_labels",
        "summary_type",
        "summary_use_proj",
        "bias",
        "ffn_dim_multiplier",
        "freeze_mm_mlp_adapter",
        "image_aspect_ratio",
        "image_grid_pinpoints",
        "mm_hidden_size",
        "mm_patch_merge_type",
        "mm_projector_lr",
        "mm_projector_type",
        "mm_resampler_type",
        "mm_use_im_patch_token",
        "mm_use_im_start_end",
        "mm_vision_select_feature",
        "mm_vision_select_layer",
        "mm_vision_tower",
        "multiple_of",
        "norm_type",
        "position_embedding_type",
        "rope_condense_ratio",
        "rope_ratio",
        "rope_scaling_factor",
        "rope_scaling_type",
        "rotary_type",
        "tune_mm_mlp_adapter",
        "unfreeze_mm_vision_tower",
        "use_mm_proj",
        "use_rms_norm",
        "bf16",
        "fp16",
        "fp32",
        "fuse_cross_entropy",
        "fuse_norm",
        "fuse_swiglu",
        "initializer_factor",
        "init_method",
        "init_std",
        "neftune_noise_alpha",
        "output_past",
        "output_router_logits",
        "predict_special_tokens",
        "router_aux_loss_coef",
        "use_fused_cross_entropy",
        "use_fused_rms_norm",
        "use_fused_rope",
        "use_fused_swiglu",
        "use_flash_attention",
        "use_flash_attention_2",
        "use_flash_attn_2",
        "use_sdpa",
        "use_triton",
        "flash_attn",
        "onnx_safe",
        "scale_attn_weights",
        "dual_chunk_attention_config",
        "sliding_window_size",
        "use_mrope",
        "finetuned",
        "head_size",
        "kv_channels",
        "max_seq_len",
        "max_seq_length",
        "model_max_len",
        "n_ctx",
        "n_embd",
        "n_head",
        "n_inner",
        "n_layer",
        "n_positions",
        "n_special",
        "seq_length",
        "_num_labels",
        "original_vocab_size",
        "pad_vocab_size_multiple",
        "padded_vocab_size",
        "real_vocab_size",
        "pad_to_multiple_of",
        "layer_norm_eps",
        "layer_norm_epsilon",
        "rotary_base",
        "rotary_emb_base",
        "use_dynamic_ntk",
        "use_logn_attn",
        "bos_token",
        "eos_token",
        "pad_token",
        "unk_token",
        "tokenizer_name",
        "image_token_id",
        "image_token_index",
        "video_token_id",
        "vision_end_token_id",
        "vision_start_token_id",
        "vision_token_id",
        "ignore_index",
        "base_model_name",
        "custom_generate",
        "custom_pipelines",
        "library_name",
        "license",
        "num_steps",
        "output_past",
        "_num_labels",
        "model_name",
        "model_id",
        "_diffusers_version",
        "rope_interleaved",
        "sparsity_config",
        "language",
        "version",
        "trainer",
        "training_args",
    ]
)

#: Keys that transformers ignores in one family although another reads them.
IGNORED = {
    "llama": frozenset({"max_window_layers", "use_sliding_window"}),
    "mistral": frozenset(
        {"attention_bias", "mlp_bias", "max_window_layers", "use_sliding_window", "pretraining_tp"}
    ),
    "gemma2": frozenset(
        {"hidden_act", "mlp_bias", "max_window_layers", "use_sliding_window", "pretraining_tp"}
    ),
    "gemma3_text": frozenset(
        {
            "hidden_act",
            "mlp_bias",
            "_sliding_window_pattern",
            "max_window_layers",
            "use_sliding_window",
        }
    ),
    "qwen2": frozenset({"attention_bias", "mlp_bias", "no_bias", "qkv_bias"}),
    "qwen3": frozenset({"mlp_bias", "no_bias", "qkv_bias", "use_qk_norm"}),
    "gptj": frozenset({"rotary"}),
    "phi3": frozenset(
        {"attention_bias", "full_attn_mod", "interpolate_factor", "lm_head_bias", "mlp_bias"}
    ),
    "smollm3": frozenset({"max_window_layers"}),
    "cohere2": frozenset(
        {
            "_sliding_window_pattern",
            "layer_switch",
            "order_of_interleaved_layers",
            "rotary_pct",
            "use_embedding_sharing",
            "use_gated_activation",
            "use_parallel_block",
            "use_parallel_embedding",
            "use_qk_norm",
        }
    ),
    "opt": frozenset({"learned_embeddings", "scale_embeddings"}),
    "stablelm": frozenset({"norm_eps", "rope_pct"}),
    "exaone4": frozenset({"max_window_layers", "reorder_qk_norm"}),
    "nemotron": frozenset({"rope_percent", "rotary_percent"}),
    "gemma": frozenset({"hidden_activation", "mlp_bias"}),
}

#: Keys of a rope dictionary that transformers reads for no rope type of the supported families.
IGNORED_IN_ROPE = frozenset(
    {
        "attn_factor",
        "extrapolation_factor",
        "finetuned",
        "max_position_embeddings",
        "mrope_interleaved",
        "mrope_section",
    }
)

#: Keys that transformers ignores and other programs read: key -> what they do with it.
DISPUTED = {
    "attn_factor": "vLLM and llama.cpp multiply yarn's attention factor by it",
    "extrapolation_factor": "vLLM scales yarn's ramp by it",
    "rope_condense_ratio": "FastChat divides positions by it",
    "rope_ratio": "ChatGLM's own code multiplies the rotation base by it",
    "rope_scaling_factor": "other programs scale the rotation by it",
    "rope_scaling_type": "other programs scale the rotation by it",
    "use_logn_attn": "Qwen's own code of the first generation scales queries by it",
    "use_dynamic_ntk": "Qwen's own code of the first generation changes the rotation base by it",
    "dual_chunk_attention_config": "vLLM computes attention by chunks with it",
}

_said: set[str] = set()  # disputed keys that a warning has named


def say_disputed(key: str) -> None:
    """Warns, once for each key in a process, that a key is ignored that other programs read."""
    if key in DISPUTED and key not in _said:
        _said.add(key)
        warnings.warn(
            f"config key {key!r} is ignored, as transformers does; {DISPUTED[key]}. To use another"
            " setting, replace what transformers reads with config_overrides={...}",
            stacklevel=2,
        )


def say_ignored(key: str, where: str) -> None:
    """Warns, once for each key and place in a process, that transformers ignores a key there."""
    if f"{key} {where}" not in _said:
        _said.add(f"{key} {where}")
        warnings.warn(f"rope key {key!r} is ignored in {where}, as transformers does", stacklevel=2)
