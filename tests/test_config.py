"""Config: every family in both styles against transformers' own classes and rope functions;
refusals by name; GGUF headers.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import warnings

import numpy as np
import pytest

from small_configs import CLASSES, FAMILY
from vksteer.loading import families
from vksteer.loading.config import Config
from vksteer.loading.harmless_keys import HARMLESS

#: transformers computes frequencies in float32. Its largest relative difference from float64 over
#: 2,035 tables of random configs is 1.3e-6.
ROPE_RTOL = 4e-6


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
    missing = [k for k in GenerationConfig._get_default_generation_params() if k not in HARMLESS]
    assert not missing, missing


def test_table_is_printed(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "vksteer.loading.config"], capture_output=True, text=True, check=True
    )
    rows = [line for line in done.stdout.splitlines() if line.startswith("|")]
    assert len(rows) == len(families.FAMILIES) + 2 and len({r.count("|") for r in rows}) == 1
    assert done.stdout.strip() == families.markdown()
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
    """The same config with the keys that files had before transformers 5."""
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


def context(hf):
    """max_position_embeddings, or the scaling's factor times the original length."""
    rope = hf.rope_parameters
    if rope.get("rope_type") not in ("linear", "yarn", "llama3"):  # Gemma 3's is nested
        return hf.max_position_embeddings
    original = rope.get("original_max_position_embeddings") or hf.max_position_embeddings
    factor = rope.get("factor") or hf.max_position_embeddings / original
    return max(hf.max_position_embeddings, int(factor * original))


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
            and ours.n_ctx == context(hf)
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
