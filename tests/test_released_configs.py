"""Config of released models, by the numbers of their config.json."""

from __future__ import annotations

import math

import pytest

from vksteer.errors import ModelError
from vksteer.loading.config import Config

# ---- released files (the numbers of their config.json) ----


def test_llama_3_2():
    c = Config.from_hf(
        {
            "architectures": ["LlamaForCausalLM"],
            "attention_bias": False,
            "attention_dropout": 0.0,
            "bos_token_id": 128000,
            "eos_token_id": [128001, 128008, 128009],
            "head_dim": 128,
            "hidden_act": "silu",
            "hidden_size": 3072,
            "initializer_range": 0.02,
            "intermediate_size": 8192,
            "max_position_embeddings": 131072,
            "mlp_bias": False,
            "model_type": "llama",
            "num_attention_heads": 24,
            "num_hidden_layers": 28,
            "num_key_value_heads": 8,
            "pretraining_tp": 1,
            "rms_norm_eps": 1e-05,
            "rope_scaling": {
                "factor": 32.0,
                "high_freq_factor": 4.0,
                "low_freq_factor": 1.0,
                "original_max_position_embeddings": 8192,
                "rope_type": "llama3",
            },
            "rope_theta": 500000.0,
            "tie_word_embeddings": True,
            "torch_dtype": "bfloat16",
            "transformers_version": "4.45.0.dev0",
            "use_cache": True,
            "vocab_size": 128256,
        }
    )
    assert (c.n_layers, c.d_head, c.n_kv_heads, c.tied, c.eos_ids, c.bos_id) == (
        28,
        128,
        8,
        True,
        (128001, 128008, 128009),
        128000,
    )
    assert c.rope[0].inv_freq[0] == 1.0 and c.rope[0].inv_freq[-1] == pytest.approx(
        500000.0 ** (-126 / 128) / 32
    )
    assert (
        c.window == (0,) * 28 and c.attn_scale == 128**-0.5 and c.act == "silu" and not c.qkv_bias
    )


def test_mistral_windows():
    v1 = {
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "hidden_size": 4096,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "intermediate_size": 14336,
        "max_position_embeddings": 32768,
        "rope_theta": 10000.0,
        "vocab_size": 32000,
    }
    assert Config.from_hf({**v1, "sliding_window": 4096}).window == (4096,) * 32
    assert Config.from_hf({**v1, "sliding_window": None}).window == (0,) * 32
    assert Config.from_hf(v1).window == (4096,) * 32  # the class's default
    with pytest.raises(ModelError, match="layer_types"):
        Config.from_hf({**v1, "layer_types": ["sliding_attention", "full_attention"] * 16})


def test_gemma_3_with_image_tower():
    c = Config.from_hf(
        {
            "architectures": ["Gemma3ForConditionalGeneration"],
            "model_type": "gemma3",
            "boi_token_index": 255999,
            "eoi_token_index": 256000,
            "eos_token_id": [1, 106],
            "image_token_index": 262144,
            "initializer_range": 0.02,
            "mm_tokens_per_image": 256,
            "torch_dtype": "bfloat16",
            "transformers_version": "4.50.0.dev0",
            "vision_config": {"hidden_size": 1152, "model_type": "siglip_vision_model"},
            "text_config": {
                "hidden_size": 2560,
                "intermediate_size": 10240,
                "model_type": "gemma3_text",
                "num_hidden_layers": 34,
                "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
                "sliding_window": 1024,
            },
        }
    )
    assert (c.architecture, c.d_model, c.n_heads, c.d_head, c.d_vocab, c.tied) == (
        "Gemma3ForConditionalGeneration",
        2560,
        8,
        256,
        262208,
        True,
    )
    assert c.window[:6] == (1024,) * 5 + (0,) and c.rope_table[:6] == (1,) * 5 + (0,)
    assert c.rope[0].inv_freq[0] == 1 / 8 and c.rope[1].inv_freq[0] == 1.0
    assert (
        c.eos_ids == (1, 106)
        and c.norm_offset == 1.0
        and c.post_norms
        and c.qk_norm
        and c.embed_scale == math.sqrt(2560)
    )


def test_gemma_2_qwen():
    c = Config.from_hf(
        {
            "architectures": ["Gemma2ForCausalLM"],
            "model_type": "gemma2",
            "hidden_act": "gelu_pytorch_tanh",
            "cache_implementation": "hybrid",
            "hidden_activation": "gelu_pytorch_tanh",
            "query_pre_attn_scalar": 144,
            "num_hidden_layers": 46,
            "hidden_size": 4608,
            "num_attention_heads": 32,
            "num_key_value_heads": 16,
            "head_dim": 128,
        }
    )
    assert (c.attn_softcap, c.final_softcap, c.attn_scale, c.window[:3]) == (
        50.0,
        30.0,
        1 / 12,
        (4096, 0, 4096),
    )
    q = {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_size": 896,
        "intermediate_size": 4864,
        "max_position_embeddings": 32768,
        "max_window_layers": 21,
        "num_attention_heads": 14,
        "num_hidden_layers": 24,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "sliding_window": 32768,
        "tie_word_embeddings": True,
        "use_sliding_window": False,
        "vocab_size": 151936,
        "use_mrope": False,
    }
    c = Config.from_hf(q)
    assert c.qkv_bias and not c.o_bias and c.d_head == 64 and c.window == (0,) * 24
    assert Config.from_hf({**q, "use_sliding_window": True}).window == (0,) * 21 + (32768,) * 3
