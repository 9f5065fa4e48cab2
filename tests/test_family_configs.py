"""Configs of the families beside Llama's relatives, in both styles, against transformers' classes:
which keys each class has, their defaults, random configs, rotation tables.
"""

from __future__ import annotations

import json
import random
import warnings

import pytest

from config_checks import NEW, PARTIAL, WINDOWS, check_layers, check_rotation, check_sizes
from small_configs import CLASSES, FAMILY
from vksteer.loading import families
from vksteer.loading.config import Config
from vksteer.loading.harmless_keys import HARMLESS
from vksteer.loading.ignored_keys import IGNORED, IGNORED_IN_ALL

#: Members of every configuration class that are no keys.
NO_KEYS = {
    "base_config_key",
    "sub_configs_defaults",
    "attribute_map",
    "base_model_tp_plan",
    "base_model_fsdp_plan",
    "base_model_pp_plan",
    "base_model_ep_plan",
    "_auto_class",
    "extra_files",
    "extra_config_files",
    "is_encoder_decoder",  # true is refused
}
#: Keys that a family reads from what transformers' class takes as keyword arguments.
ARGUMENTS = {
    "gpt_neox": {"rotary_pct", "rotary_emb_base"},
    "cohere2": {"sliding_window_pattern"},
}


def class_of(model_type):
    import transformers

    return getattr(transformers, {**CLASSES, **NEW}[model_type] + "Config")


def test_the_table_has_27_families():
    assert list(FAMILY) == list(dict.fromkeys([*CLASSES, *NEW])) and len(FAMILY) == 27


@pytest.mark.parametrize("model_type", FAMILY)
def test_every_key_of_the_class_is_known(model_type):
    family, fields = FAMILY[model_type], set(class_of(model_type).__dataclass_fields__)
    known = set(family.defaults) | HARMLESS | IGNORED_IN_ALL | IGNORED.get(model_type, set())
    rotates = family.positions == "rotary" and model_type != "gptj"
    unknown = fields - known - NO_KEYS - (families.ROPE_KEYS if rotates else set())
    assert not unknown


@pytest.mark.parametrize("model_type", NEW)
def test_defaults_are_those_of_transformers(model_type):
    family = FAMILY[model_type]
    fields = {k: v.default for k, v in class_of(model_type).__dataclass_fields__.items()}
    for key, value in family.defaults.items():
        if key in fields:
            assert fields[key] == value, f"{key}: ours {value!r}, transformers {fields[key]!r}"
        else:
            assert key == "head_dim" or key in ARGUMENTS[model_type], key
    assert family.default_theta == class_of(model_type).default_theta
    assert dict(class_of(model_type).attribute_map) == dict(family.aliases)


@pytest.mark.parametrize("model_type", FAMILY)
def test_an_empty_config_is_that_of_the_class(model_type):
    saved = class_of(model_type)().to_dict()
    if model_type == "glm4":
        saved["eos_token_id"] = None  # the class fills in its own
    for key in ("bos_token_id", "eos_token_id"):
        saved.pop(key)
    architecture = FAMILY[model_type].architectures[0]
    empty = {"model_type": model_type, "architectures": [architecture]}
    assert Config.from_hf(empty) == Config.from_hf({**saved, "architectures": [architecture]})


# ---- random configs ----


def random_rope(rng, model_type, d_head):
    kinds = ["default", "linear", "dynamic", "llama3", "yarn", "longrope"]
    if model_type == "phi3":
        kinds = ["default", "longrope", "longrope"]
    kind = rng.choice(kinds)
    values = {"rope_type": kind, "rope_theta": rng.choice([1e4, 5e5, 12345.0])}
    part = 1.0
    if model_type in PARTIAL:
        part = values["partial_rotary_factor"] = rng.choice([0.25, 0.5, 0.75, 1.0])
    if kind == "dynamic" and d_head * part == 2:
        values.update(rope_type="linear")  # transformers divides by zero
    if kind in ("linear", "dynamic", "yarn", "llama3"):
        values["factor"] = rng.choice([1.0, 2.0, 8.0, 3.7])
    if kind in ("llama3", "yarn", "longrope"):
        values["original_max_position_embeddings"] = rng.choice([64, 128, 200])
    if kind == "llama3":
        values.update(low_freq_factor=1.0, high_freq_factor=rng.choice([4.0, 2.5]))
    if kind == "yarn":
        values.update(rng.choice([{}, {"attention_factor": 0.83}, {"beta_fast": 16}]))
    if kind == "longrope":
        pairs = int(d_head * part) // 2
        for key in ("short_factor", "long_factor"):
            values[key] = [round(rng.uniform(1.0, 9.0), 3) for _ in range(pairs)]
        if rng.random() < 0.5:
            values["factor"] = rng.choice([1.0, 4.0, 32.0])
        if rng.random() < 0.3:
            values["attention_factor"] = 1.19
    return values


def random_extras(family, d_head, rng):
    """Keys that only one or a few families have."""
    found = {}
    if family.defaults.get("head_dim"):
        found["head_dim"] = d_head
    if family.model_type == "granite":
        found["residual_multiplier"] = 0.22
    if family.model_type == "olmo":
        found["clip_qkv"] = rng.choice([None, 8.0])
    if family.model_type == "gptj":
        found["rotary_dim"] = rng.choice([2, 4, 8])
    if family.model_type in WINDOWS:
        found["sliding_window"] = rng.randint(2, 9)
    if family.model_type in ("phi3", "ministral3"):
        found["sliding_window"] = rng.choice([None, 7])
    if family.model_type in ("cohere2", "exaone4"):
        found["sliding_window_pattern"] = rng.choice([2, 3, 4])
    if family.model_type == "smollm3":
        found.update(
            use_sliding_window=rng.random() < 0.5,
            sliding_window=5,
            no_rope_layer_interval=rng.choice([2, 3]),
        )
    return found


def random_config(model_type, rng):
    layers, heads, d_head = rng.randint(1, 9), rng.choice([2, 4, 6]), rng.choice([8, 16])
    sizes = dict(
        vocab_size=rng.randint(20, 500),
        intermediate_size=rng.randint(3, 99),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        hidden_size=heads * d_head,
        max_position_embeddings=rng.choice([256, 1000]),
    )
    family = FAMILY[model_type]
    names = {**family.aliases, **family.keys}
    arguments = {names.get(key, key): value for key, value in sizes.items()}
    arguments.update(
        tie_word_embeddings=rng.random() < 0.5,
        bos_token_id=None,
        eos_token_id=rng.choice([3, [3, 5]]),
        pad_token_id=None,
    )
    flags = [k for k, v in family.defaults.items() if isinstance(v, bool) and k not in family.only]
    for key in flags:
        if key != "use_sliding_window":
            arguments[key] = rng.random() < 0.5
    for key in ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_eps"):
        if key in family.defaults:
            arguments[key] = rng.choice([1e-5, 1e-6])
    if "num_key_value_heads" in family.defaults:
        arguments["num_key_value_heads"] = rng.choice([1, 2])
    for key in ("embedding_multiplier", "logits_scaling", "logit_scale", "attention_multiplier"):
        if key in family.defaults:
            arguments[key] = rng.choice([0.25, 3.0, 8.0])
    arguments.update(random_extras(family, d_head, rng))
    if family.positions == "rotary" and model_type != "gptj":
        arguments["rope_parameters"] = random_rope(rng, model_type, d_head)
    if model_type == "olmo3":
        full = arguments["rope_parameters"]
        while full["rope_type"] == "longrope":
            full = random_rope(rng, model_type, d_head)
        arguments["rope_parameters"] = {
            "full_attention": full,
            "sliding_attention": {"rope_type": "default", "rope_theta": 5e5},
        }
    if model_type == "phi3":
        arguments["original_max_position_embeddings"] = 128
    if model_type == "ministral3" and rng.random() < 0.5:
        arguments["rope_parameters"].update(
            llama_4_scaling_beta=rng.choice([0.1, 0.3]), original_max_position_embeddings=64
        )
    return arguments


def released(config, model_type):
    """The same config with the keys that files had before transformers 5."""
    config = json.loads(json.dumps(config))
    rope = config.pop("rope_parameters", None)
    if rope is None:
        return config
    if model_type == "olmo3":
        full = rope["full_attention"]
        config.update(rope_theta=full.pop("rope_theta"), rope_scaling=full)
        return config
    part = rope.pop("partial_rotary_factor", None)
    if model_type == "gpt_neox":
        config.update(rotary_emb_base=rope.pop("rope_theta"), rotary_pct=part)
    else:
        config["rope_theta"] = rope.pop("rope_theta")
        if part is not None:
            config["partial_rotary_factor"] = part
    if rope["rope_type"] != "llama3":
        rope["type"] = rope.pop("rope_type")
    # no dictionary at all means another one to Ministral 3
    plain = rope == {"type": "default"} and model_type != "ministral3"
    config["rope_scaling"] = None if plain else rope
    return config


@pytest.mark.parametrize("model_type", NEW)
def test_random_configs_equal_transformers(model_type):
    rng = random.Random("config " + model_type)
    for round_ in range(30):
        arguments = random_config(model_type, rng)
        given = {
            "model_type": model_type,
            "architectures": list(FAMILY[model_type].architectures[:1]),
            **json.loads(json.dumps(arguments)),
        }
        hf = class_of(model_type)(**json.loads(json.dumps(arguments)))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ours = Config.from_hf(given)
            saved = Config.from_hf({**hf.to_dict(), "architectures": given["architectures"]})
            old = Config.from_hf(released(given, model_type))
        assert ours == saved, f"round {round_}: {arguments}"
        assert ours == old, f"round {round_}: {arguments}"
        check_sizes(ours, hf)
        check_layers(ours, hf, model_type)
        check_rotation(ours, hf, model_type)
