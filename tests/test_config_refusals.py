"""What Config refuses, by name: unknown keys, bad values, damaged JSON."""

from __future__ import annotations

import math
import random
import warnings

import numpy as np
import pytest

from small_configs import CLASSES, base
from vksteer.errors import ModelError
from vksteer.loading import families, hf_layers, ignored_keys, rope
from vksteer.loading.config import Config

# ---- refusals ----


@pytest.mark.parametrize("model_type", CLASSES)
def test_unknown_keys_are_refused_by_name_and_neutral_ones_accepted(model_type):
    Config.from_hf(base(model_type, new_idea=None, other_idea=False))
    for value in (True, 1, 0, 0.5, "yes", [1], {"a": 1}):
        with pytest.raises(
            ModelError, match=r"'new_idea'.*would change the numbers and is not understood"
        ):
            Config.from_hf(base(model_type, new_idea=value))


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            dict(
                rope_scaling={"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}
            ),
            "'short_factor' must list 6 positive numbers",
        ),
        (dict(rope_scaling={"type": "su", "short_factor": [1.0]}), "'su'"),
        (dict(rope_scaling={"type": "mrope", "mrope_section": [1, 2]}), "mrope"),
        (dict(rope_scaling={"rope_type": "linear"}), "'factor'"),
        (dict(rope_scaling={"rope_type": "linear", "factor": 0}), "'factor'"),
        (dict(rope_scaling={"rope_type": "linear", "factor": "8"}), "'factor'"),
        (dict(rope_scaling={"rope_type": "linear", "factor": float("nan")}), "'factor'"),
        (
            dict(
                rope_scaling={
                    "rope_type": "llama3",
                    "factor": 8.0,
                    "low_freq_factor": 4.0,
                    "high_freq_factor": 1.0,
                }
            ),
            "high_freq_factor",
        ),
        (
            dict(rope_scaling={"rope_type": "yarn", "factor": 4.0, "short_factor": [1.0]}),
            "short_factor",
        ),
        (dict(rope_scaling=[1]), "rope_scaling"),
        (dict(rope_theta=-1.0), "rope_theta"),
        (dict(rope_theta=float("inf")), "rope_theta"),
        (dict(rope_parameters={"full_attention": {}}), "nested"),
        (dict(partial_rotary_factor=0.5), "partial_rotary_factor"),
        (dict(quantization_config={"quant_method": "gptq"}), "quantization_config"),
        (dict(hidden_act="tanh"), "tanh"),
        (dict(head_dim=7), "even"),
        (dict(head_dim=None, hidden_size=50), "multiple"),
        (dict(num_key_value_heads=3), "multiple"),
        (dict(num_hidden_layers=0), "num_hidden_layers"),
        (dict(num_hidden_layers=10**9), "num_hidden_layers"),
        (dict(num_hidden_layers=-3), "num_hidden_layers"),
        (dict(num_hidden_layers=2.0), "num_hidden_layers"),
        (dict(vocab_size=True), "vocab_size"),
        (dict(vocab_size=None), "vocab_size"),
        (dict(hidden_size="48"), "hidden_size"),
        (dict(hidden_size=1 << 60), "hidden_size"),
        (dict(rms_norm_eps=0), "rms_norm_eps"),
        (dict(rms_norm_eps=float("nan")), "rms_norm_eps"),
        (dict(rms_norm_eps=2.0), "norm_eps"),
        (dict(attention_bias="no"), "attention_bias"),
        (dict(eos_token_id="</s>"), "eos_token_id"),
        (dict(eos_token_id=[1, None]), "eos_token_id"),
        (dict(is_encoder_decoder=True), "is_encoder_decoder"),
        (dict(architectures=["MambaForCausalLM"]), "supported architectures: LlamaForCausalLM"),
        (dict(architectures="LlamaForCausalLM"), "architectures"),
        (dict(architectures=["MistralForCausalLM"]), "not supported"),
        (dict(architectures=None, model_type="mamba"), "mamba"),
        (dict(architectures=[], model_type=None), "not supported"),
    ],
)
def test_refusals(changes, message):
    with pytest.raises(ModelError, match=message):
        Config.from_hf({**base("llama"), **changes})


@pytest.mark.parametrize(
    "model_type, changes, message",
    [
        (
            "gemma3_text",
            dict(rope_parameters={"rope_type": "default", "rope_theta": 1e4}),
            "nested",
        ),
        ("gemma3_text", dict(attn_logit_softcapping=50.0), "attn_logit_softcapping"),
        ("gemma3_text", dict(use_bidirectional_attention=True), "use_bidirectional_attention"),
        ("gemma3_text", dict(sliding_window_pattern=0), "sliding_window_pattern"),
        ("gemma3_text", dict(sliding_window=None), "sliding_window"),
        ("gemma2", dict(layer_types=["full_attention"]), "layer_types"),
        ("gemma2", dict(layer_types=["linear_attention"] * 7), "linear_attention"),
        ("gemma2", dict(query_pre_attn_scalar=0), "query_pre_attn_scalar"),
        ("gemma2", dict(final_logit_softcapping=-1.0), "final_logit_softcapping"),
        ("qwen2", dict(layer_types=["sliding_attention"] * 7), "sliding"),
        ("qwen2", dict(max_window_layers=None, use_sliding_window=True), "max_window_layers"),
        ("qwen2", dict(sliding_window=0, use_sliding_window=True), "sliding_window"),
        ("llama", dict(sliding_window=7), "sliding_window"),
    ],
)
def test_refusals_of_other_families(model_type, changes, message):
    with pytest.raises(ModelError, match=message):
        Config.from_hf(base(model_type, **changes))


def test_dynamic_is_said_once(monkeypatch):
    monkeypatch.setattr(hf_layers, "_warned_of", set())
    with pytest.warns(UserWarning, match="512"):
        c = Config.from_hf(base("llama", rope_scaling={"type": "dynamic", "factor": 4.0}))
    assert c.n_ctx == 512
    plain = Config.from_hf(base("llama"))
    np.testing.assert_array_equal(c.rope[0].inv_freq, plain.rope[0].inv_freq)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Config.from_hf(base("llama", rope_scaling={"type": "dynamic", "factor": 4.0}))


@pytest.mark.parametrize(
    "text, message",
    [
        (b"", "JSON"),
        (b"[1]", "object"),
        (b"{", "JSON"),
        (b'{"a": 1, "a": 2}', "'a' appears twice"),
        (b"\xff{}", "UTF-8"),
        (b'{"vocab_size": ' + b"[" * 100000 + b"}", "JSON"),
        (b'{"vocab_size": ' + b"9" * 6000 + b"}", "JSON"),
        (b"{}", "not supported"),
    ],
)
def test_damaged_json(tmp_path, text, message):
    (tmp_path / "config.json").write_bytes(text)
    for source in (tmp_path, tmp_path / "config.json"):
        with pytest.raises(ModelError, match=message):
            Config.from_pretrained(source)


def test_random_values_never_escape():
    """Any JSON value under any key: a Config or a ModelError, nothing else."""
    rng = random.Random(7)
    values = [
        None,
        True,
        False,
        0,
        -1,
        1,
        3,
        10**30,
        -0.0,
        1e-300,
        1e300,
        float("nan"),
        float("inf"),
        "",
        "x",
        [],
        [1],
        ["full_attention"] * 7,
        {},
        {"a": 1},
        {"rope_type": "yarn"},
        {"rope_type": "yarn", "factor": 1e300},
        {"full_attention": 3},
        {"full_attention": {"rope_theta": []}},
    ]
    keys = sorted(
        set().union(*(f.defaults for f in families.FAMILIES))
        | families.ROPE_KEYS
        | {"architectures", "model_type", "eos_token_id", "text_config"}
    )
    accepted = 0
    for _ in range(4000):
        config = base(rng.choice(list(CLASSES)))
        for _ in range(rng.randint(1, 3)):
            config[rng.choice(keys)] = rng.choice(values)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                Config.from_hf(config)
            accepted += 1
        except ModelError:
            pass
    assert 100 < accepted < 3500


def test_a_factor_without_a_scaling_is_ignored_as_in_transformers(monkeypatch):
    plain = Config.from_hf(base("llama"))
    for values in ({"factor": 4.0}, {"rope_type": "default", "factor": 4.0}):
        monkeypatch.setattr(ignored_keys, "_said", set())
        with pytest.warns(UserWarning, match="'factor' is ignored in rope type 'default'"):
            assert Config.from_hf(base("llama", rope_scaling=values)) == plain


def test_yarn_attention_factors():
    make = lambda **k: rope.table(
        {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64, **k},
        d_rot=16,
        max_positions=512,
        default_theta=1e4,
    )
    assert make().attention_factor == 0.1 * math.log(8) + 1
    assert make(attention_factor=0.5).attention_factor == 0.5
    assert make(mscale=1.0, mscale_all_dim=1.0).attention_factor == 1.0
    assert make(factor=None).attention_factor == 0.1 * math.log(8) + 1  # 512 / 64


def test_config_is_a_value():
    a, b = Config.from_hf(base("llama")), Config.from_hf(base("llama"))
    assert a == b and hash(a) == hash(b) and a != a.replace(n_ctx=7) and a != 3
    assert not a.rope[0].inv_freq.flags.writeable
    assert set(a.facts()) >= {
        "n_layers",
        "d_model",
        "n_heads",
        "n_kv_heads",
        "d_head",
        "d_mlp",
        "d_vocab",
        "n_ctx",
        "norm_eps",
        "norm_offset",
        "act",
        "embed_scale",
        "attn_scale",
        "attn_softcap",
        "final_softcap",
        "post_norms",
        "qk_norm",
        "qkv_bias",
        "o_bias",
        "mlp_bias",
        "tied",
        "window",
        "rope_table",
        "rope",
    }
    with pytest.raises(AttributeError):
        a.n_layers = 3
