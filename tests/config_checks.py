"""What a Config says against the configuration class and the rotary module of transformers."""

from __future__ import annotations

import importlib

import numpy as np
import pytest

#: transformers computes frequencies in float32; the largest relative difference from float64 over
#: the tables of test_family_configs.py is 3.3e-7.
ROPE_RTOL = 1e-6

#: model_type -> prefix of transformers' classes
NEW = {
    "gpt2": "GPT2",
    "gpt_neox": "GPTNeoX",
    "gptj": "GPTJ",
    "opt": "OPT",
    "phi": "Phi",
    "phi3": "Phi3",
    "olmo": "Olmo",
    "olmo2": "Olmo2",
    "olmo3": "Olmo3",
    "smollm3": "SmolLM3",
    "granite": "Granite",
    "cohere": "Cohere",
    "cohere2": "Cohere2",
    "stablelm": "StableLm",
    "glm4": "Glm4",
    "exaone4": "Exaone4",
    "ministral3": "Ministral3",
    "arcee": "Arcee",
    "nemotron": "Nemotron",
    "seed_oss": "SeedOss",
    "gemma": "Gemma",
}
PARTIAL = ("gpt_neox", "phi", "phi3", "stablelm", "glm4", "nemotron")
WINDOWS = ("phi3", "olmo3", "cohere2", "exaone4", "ministral3")


def check_sizes(ours, hf, tied=None):
    """tied: what an outer config says, if there is one."""
    kv = getattr(hf, "num_key_value_heads", None) or hf.num_attention_heads
    for fact, value in (
        ("n_layers", hf.num_hidden_layers),
        ("d_model", hf.hidden_size),
        ("n_heads", hf.num_attention_heads),
        ("n_kv_heads", kv),
        ("d_head", getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads),
        ("d_vocab", hf.vocab_size),
        ("tied", hf.tie_word_embeddings if tied is None else tied),
    ):
        assert getattr(ours, fact) == value, fact
    assert ours.d_mlp in [getattr(hf, k, None) for k in ("intermediate_size", "n_inner", "ffn_dim")]
    eps = [getattr(hf, k, None) for k in ("rms_norm_eps", "layer_norm_eps", "norm_eps")]
    eps += [getattr(hf, "layer_norm_epsilon", None)]
    assert ours.norm_eps == next((e for e in eps if e is not None), 1e-5)
    assert ours.attn_scale == pytest.approx(
        getattr(hf, "attention_multiplier", ours.d_head**-0.5)
        if getattr(hf, "scale_attn_weights", True)
        else 1.0
    )


def check_layers(ours, hf, model_type):
    types = getattr(hf, "layer_types", None)
    if types is None:
        slides = bool(getattr(hf, "sliding_window", None)) and model_type in WINDOWS
        types = ["sliding_attention" if slides else "full_attention"] * hf.num_hidden_layers
    assert ours.window == tuple(hf.sliding_window if t == "sliding_attention" else 0 for t in types)
    rotated = [True] * hf.num_hidden_layers
    if model_type in ("gpt2", "opt"):
        rotated = [False] * hf.num_hidden_layers
    if model_type == "smollm3":
        rotated = [bool(r) for r in hf.no_rope_layers]
    if model_type in ("cohere2", "exaone4"):
        # without windows, EXAONE 4 rotates everywhere
        rotated = [t == "sliding_attention" or hf.sliding_window is None for t in types]
    assert [t >= 0 for t in ours.rope_table] == rotated


def rotary_module(hf, model_type):
    module = importlib.import_module(type(hf).__module__.replace("configuration_", "modeling_"))
    return getattr(module, NEW[model_type] + "RotaryEmbedding")(config=hf)


def check_rotation(ours, hf, model_type):
    if model_type in ("gpt2", "opt"):
        assert ours.rope == () and ours.pos_embed and ours.d_rot == 0
        return
    if not ours.rope:
        assert set(ours.rope_table) == {-1}
        return
    rotary = rotary_module(hf, model_type)
    if model_type == "gptj":
        # a table of the angles at every position: those at position 1 are the frequencies
        sin = rotary.embed_positions[1, : hf.rotary_dim // 2].double().numpy()
        np.testing.assert_allclose(np.sin(ours.rope[0].inv_freq), sin, rtol=ROPE_RTOL)
        assert ours.d_rot == hf.rotary_dim
        return
    if model_type == "olmo3":
        for i, kind in enumerate(("full_attention", "sliding_attention")):
            if hasattr(rotary, f"{kind}_inv_freq"):
                check_table(ours.rope[i], rotary, kind + "_")
        return
    check_table(ours.rope[0], rotary, "")
    check_long(ours, rotary, hf)
    if model_type == "ministral3":
        beta = hf.rope_parameters.get("llama_4_scaling_beta")
        assert ours.query_beta == (beta or 0.0)
        if beta:
            assert ours.query_length == hf.rope_parameters["original_max_position_embeddings"]


def check_table(table, rotary, prefix):
    inv_freq = getattr(rotary, prefix + "inv_freq")
    assert table.inv_freq.shape == tuple(inv_freq.shape)
    np.testing.assert_allclose(table.inv_freq, inv_freq.double().numpy(), rtol=ROPE_RTOL)
    scaling = getattr(rotary, prefix + "attention_scaling")
    assert table.attention_factor == pytest.approx(scaling, rel=1e-12)


def check_long(ours, rotary, hf):
    """The table that transformers' module has after a text beyond the original length."""
    import torch

    if rotary.rope_type != "longrope":
        assert ours.rope_long == () and ours.rope_switch == 0
        return
    original = hf.rope_parameters["original_max_position_embeddings"]
    assert ours.rope_switch == original and len(ours.rope_long) == 1
    rotary(torch.zeros(1), torch.arange(original)[None])
    check_table(ours.rope[0], rotary, "")
    rotary(torch.zeros(1), torch.arange(original + 1)[None])
    check_table(ours.rope_long[0], rotary, "")
