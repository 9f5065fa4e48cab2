"""Config: every family in both styles against transformers' own classes and rope functions;
refusals by name; GGUF headers.
"""

from __future__ import annotations

import json
import math
import random
import subprocess
import sys
import warnings

import numpy as np
import pytest

from vksteer.errors import ModelError
from vksteer.loading import families, rope
from vksteer.loading import hf_config as config_module
from vksteer.loading.config import Config

CLASSES = {
    "llama": "Llama",
    "mistral": "Mistral",
    "gemma2": "Gemma2",
    "gemma3_text": "Gemma3Text",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
}
TINY = dict(
    vocab_size=99,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=7,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
)
FAMILY = {f.model_type: f for f in families.FAMILIES}

# transformers computes frequencies in float32: measured difference from float64 up to 1.3e-6 over
# 2,035 tables of random configs
ROPE_RTOL = 4e-6


def base(model_type, **changes):
    """A small config.json of the family."""
    return {
        "model_type": model_type,
        "architectures": [FAMILY[model_type].architectures[0]],
        **TINY,
        "head_dim": 12,
        **changes,
    }


# ---- the table ----


@pytest.mark.parametrize("model_type", CLASSES)
def test_defaults_are_those_of_transformers(model_type):
    import transformers

    reference = getattr(transformers, CLASSES[model_type] + "Config")
    fields = {k: v.default for k, v in reference.__dataclass_fields__.items()}
    for key, value in FAMILY[model_type].defaults.items():
        if key in ("rope_local_base_freq", "sliding_window_pattern", "layer_types") or (
            key == "head_dim" and key not in fields
        ):
            continue  # read from keyword arguments, or by getattr
        assert key in fields, f"{model_type}: transformers has no {key}"
        assert fields[key] == value, (
            f"{model_type}.{key}: ours {value!r}, transformers {fields[key]!r}"
        )


def test_generation_parameters_of_transformers_are_harmless():
    from transformers import GenerationConfig

    # transformers drops these from a config.json before it builds the model
    missing = [
        k for k in GenerationConfig._get_default_generation_params() if k not in families.HARMLESS
    ]
    assert not missing, missing


def test_table_is_printed(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "vksteer.loading.config"], capture_output=True, text=True, check=True
    )
    assert done.stdout.count("\n") == len(families.FAMILIES) + 2
    assert "Gemma3ForConditionalGeneration" in done.stdout


# ---- random configs of every family, both styles, against transformers ----


def random_rope(rng):
    kind = rng.choice(["default", "linear", "dynamic", "llama3", "yarn", "yarn"])
    values = {"rope_type": kind, "rope_theta": rng.choice([1e4, 5e5, 1e6, 12345.0])}
    if kind in ("linear", "dynamic", "yarn", "llama3"):
        values["factor"] = rng.choice([1.0, 2.0, 8.0, 32.0, 3.7])
    if kind == "llama3":
        values.update(
            low_freq_factor=1.0,
            high_freq_factor=rng.choice([4.0, 2.5]),
            original_max_position_embeddings=rng.choice([64, 128, 8192]),
        )
    if kind == "yarn":
        values["original_max_position_embeddings"] = rng.choice([64, 200, 4096])
        for key, choices in (
            ("beta_fast", [16, 64]),
            ("beta_slow", [2]),
            ("attention_factor", [0.83]),
            ("truncate", [True, False]),
        ):
            if rng.random() < 0.35:
                values[key] = rng.choice(choices)
        if rng.random() < 0.4:
            values.update(mscale=rng.choice([0.707, 1.0]), mscale_all_dim=rng.choice([0.5, 1.0]))
    return values


def random_config(model_type, rng):
    layers, heads = rng.randint(1, 14), rng.choice([2, 4, 6])
    arguments = dict(
        vocab_size=rng.randint(20, 500),
        intermediate_size=rng.randint(3, 99),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        hidden_size=heads * rng.choice([8, 10]),
        num_key_value_heads=rng.choice([1, 2]),
        max_position_embeddings=rng.choice([256, 1000, 4096]),
        rms_norm_eps=rng.choice([1e-5, 1e-6]),
        tie_word_embeddings=rng.random() < 0.5,
        bos_token_id=None,
        eos_token_id=rng.choice([None, 3, [3, 5]]),
        pad_token_id=None,
    )
    if model_type != "qwen2":
        arguments["head_dim"] = rng.choice([6, 12, 16])
    if model_type in ("llama", "gemma2", "gemma3_text", "qwen3"):
        arguments["attention_bias"] = rng.random() < 0.5
    if model_type == "llama":
        arguments["mlp_bias"] = rng.random() < 0.5
    if model_type == "mistral":
        arguments["sliding_window"] = rng.choice([None, 7])
    if model_type in ("gemma2", "gemma3_text"):
        arguments.update(
            sliding_window=rng.randint(2, 9),
            query_pre_attn_scalar=rng.choice([7, 144, 256]),
            final_logit_softcapping=rng.choice([None, 30.0]),
        )
    if model_type == "gemma2":
        arguments["attn_logit_softcapping"] = rng.choice([None, 50.0])
    if model_type in ("qwen2", "qwen3"):
        arguments.update(
            use_sliding_window=rng.random() < 0.5,
            sliding_window=rng.randint(2, 9),
            max_window_layers=rng.randint(0, layers),
        )
    if model_type == "gemma3_text":
        arguments["sliding_window_pattern"] = rng.choice([2, 6])
        full = random_rope(rng)
        full.pop("truncate", None)  # transformers looks for it outside the nested dictionary
        arguments["rope_parameters"] = {
            "full_attention": full,
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        }
    else:
        arguments["rope_parameters"] = random_rope(rng)
    return arguments


def released(config, model_type):
    """The same config as files released before transformers 5 spelled it."""
    config = json.loads(json.dumps(config))
    parameters = config.pop("rope_parameters")
    config.pop("layer_types", None)
    config["torch_dtype"] = "bfloat16"
    if model_type == "gemma3_text":
        full = parameters["full_attention"]
        config["rope_theta"] = full.pop("rope_theta")
        config["rope_local_base_freq"] = parameters["sliding_attention"]["rope_theta"]
        config["rope_scaling"] = full if full["rope_type"] != "default" else None
    else:
        config["rope_theta"] = parameters.pop("rope_theta")
        if parameters["rope_type"] != "llama3":
            parameters["type"] = parameters.pop("rope_type")
        config["rope_scaling"] = parameters if parameters.get("type") != "default" else None
    return config


@pytest.mark.parametrize("model_type", CLASSES)
def test_random_configs_equal_transformers(model_type):
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    rng = random.Random("config " + model_type)
    for round_ in range(40):
        arguments = random_config(model_type, rng)
        given = {
            "model_type": model_type,
            "architectures": list(FAMILY[model_type].architectures[:1]),
            **json.loads(json.dumps(arguments)),
        }
        hf = getattr(transformers, CLASSES[model_type] + "Config")(
            **json.loads(json.dumps(arguments))
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ours = Config.from_hf(given)
            saved = Config.from_hf({**hf.to_dict(), "architectures": given["architectures"]})
            old = Config.from_hf(released(given, model_type))
        assert ours == saved, f"round {round_}: {arguments}"
        assert ours == old, f"round {round_}: {arguments}"

        assert (
            ours.n_layers,
            ours.d_model,
            ours.n_heads,
            ours.n_kv_heads,
            ours.d_mlp,
            ours.d_vocab,
        ) == (
            hf.num_hidden_layers,
            hf.hidden_size,
            hf.num_attention_heads,
            hf.num_key_value_heads,
            hf.intermediate_size,
            hf.vocab_size,
        )
        assert ours.d_head == (
            getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads
        )
        assert (
            ours.tied == hf.tie_word_embeddings
            and ours.norm_eps == hf.rms_norm_eps
            and ours.n_ctx == hf.max_position_embeddings
        )
        types = (
            getattr(hf, "layer_types", None)
            or ["sliding_attention" if hf.__dict__.get("sliding_window") else "full_attention"]
            * hf.num_hidden_layers
        )
        assert ours.window == tuple(
            hf.sliding_window if t == "sliding_attention" else 0 for t in types
        )
        check_rope(ours, hf, type(hf), types)
    assert type(hf) in MODEL_FOR_CAUSAL_LM_MAPPING


def check_rope(ours, hf, cls, types):
    import importlib

    module = importlib.import_module(cls.__module__.replace("configuration_", "modeling_"))
    rotary = getattr(
        module, cls.__name__.replace("TextConfig", "").replace("Config", "") + "RotaryEmbedding"
    )(config=hf)
    if cls.__name__ == "Gemma3TextConfig":
        theirs = [
            (getattr(rotary, f"{t}_inv_freq"), getattr(rotary, f"{t}_attention_scaling"))
            for t in ("full_attention", "sliding_attention")
            if hasattr(rotary, f"{t}_inv_freq")
        ]
        mine = [
            ours.rope[i]
            for i, t in enumerate(("full_attention", "sliding_attention"))
            if hasattr(rotary, f"{t}_inv_freq")
        ]
        assert ours.rope_table == tuple(int(t == "sliding_attention") for t in types)
    else:
        theirs, mine = [(rotary.inv_freq, rotary.attention_scaling)], ours.rope
        assert set(ours.rope_table) <= {0}
    assert len(mine) == len(theirs)
    for table, (inv_freq, scaling) in zip(mine, theirs):
        assert table.inv_freq.dtype == np.float64 and table.inv_freq.shape == (ours.d_head // 2,)
        np.testing.assert_allclose(table.inv_freq, inv_freq.double().numpy(), rtol=ROPE_RTOL)
        assert table.attention_factor == pytest.approx(scaling, rel=1e-12)


def test_all_saved_facts_of_the_oracle_models(zoo):
    from oracle.families import FAMILIES

    for name in FAMILIES:
        new, old = (
            Config.from_pretrained(zoo.folder(name)),
            Config.from_pretrained(zoo.folder(name, "released")),
        )
        assert new == old, name
        assert Config.from_pretrained(str(zoo.folder(name) / "config.json")) == new


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


# ---- refusals ----


@pytest.mark.parametrize("model_type", CLASSES)
def test_unknown_keys_are_refused_by_name_and_neutral_ones_accepted(model_type):
    Config.from_hf(base(model_type, new_idea=None, other_idea=False))
    for value in (True, 1, 0, 0.5, "yes", [1], {"a": 1}):
        with pytest.raises(
            ModelError, match="'new_idea'.*would change the numbers and is not understood"
        ):
            Config.from_hf(base(model_type, new_idea=value))


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            dict(
                rope_scaling={"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}
            ),
            "longrope",
        ),
        (dict(rope_scaling={"type": "su", "short_factor": [1.0]}), "'su'"),
        (dict(rope_scaling={"type": "mrope", "mrope_section": [1, 2]}), "mrope"),
        (dict(rope_scaling={"rope_type": "linear"}), "'factor'"),
        (dict(rope_scaling={"rope_type": "linear", "factor": 0}), "'factor'"),
        (dict(rope_scaling={"rope_type": "linear", "factor": "8"}), "'factor'"),
        (dict(rope_scaling={"rope_type": "linear", "factor": float("nan")}), "'factor'"),
        (dict(rope_scaling={"factor": 4.0}), "'factor'"),
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
        (dict(hidden_act="relu"), "relu"),
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
    monkeypatch.setattr(config_module, "_dynamic_said", False)
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


def test_yarn_attention_factors():
    make = lambda **k: rope.table(
        {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64, **k},
        d_head=16,
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
