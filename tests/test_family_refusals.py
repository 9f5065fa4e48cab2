"""What the configs of the newer families refuse, with key and reason; architectures that are
refused with what they would need.
"""

from __future__ import annotations

import random
import warnings

import pytest

from small_configs import FAMILY
from vksteer.errors import ModelError
from vksteer.loading.config import Config
from vksteer.loading.families import FAMILIES, ROPE_KEYS
from vksteer.loading.unsupported import MISSING

#: A small config of each family where the class's defaults are too large or do not fit.
SMALL = dict(
    vocab_size=99,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=4,
    num_attention_heads=4,
    max_position_embeddings=512,
)


def small(model_type, **changes):
    family = FAMILY[model_type]
    names = {**family.aliases, **family.keys}
    config = {names.get(key, key): value for key, value in SMALL.items()}
    if "num_key_value_heads" in family.defaults:
        config["num_key_value_heads"] = 2
    if family.defaults.get("head_dim"):
        config["head_dim"] = 12
    if model_type == "gptj":
        config["rotary_dim"] = 4
    architecture = family.architectures[0]
    return {"model_type": model_type, "architectures": [architecture], **config, **changes}


LONG = dict(rope_type="longrope", short_factor=[1.0] * 6, long_factor=[2.0] * 6, rope_theta=10000.0)


def long(**changes):
    entry = {**LONG, **changes}
    return dict(
        rope_scaling={k: v for k, v in entry.items() if v is not ...},
        original_max_position_embeddings=64,
    )


@pytest.mark.parametrize("model_type", FAMILY)
def test_the_small_configs_are_read(model_type):
    config = Config.from_hf(small(model_type))
    assert (config.n_layers, config.d_model, config.d_mlp, config.d_vocab) == (4, 48, 80, 99)


@pytest.mark.parametrize(
    "model_type, changes, message",
    [
        # GPT-2
        (
            "gpt2",
            dict(scale_attn_by_inverse_layer_idx=True),
            "'scale_attn_by_inverse_layer_idx' = True.*divided by the layer's number",
        ),
        ("gpt2", dict(reorder_and_upcast_attn=True), "'reorder_and_upcast_attn' = True.*float32"),
        ("gpt2", dict(reorder_and_upcast_attn="no"), "'reorder_and_upcast_attn' = 'no'.*true or"),
        ("gpt2", dict(add_cross_attention=True), "'add_cross_attention' = True.*encoder"),
        ("gpt2", dict(scale_attn_weights=3), "'scale_attn_weights' = 3.*true or false"),
        ("gpt2", dict(n_embd=0), "'n_embd' = 0.*from 1 to"),
        ("gpt2", dict(n_embd=50), "'n_embd' = 50 is not a multiple of 'n_head' = 4"),
        ("gpt2", dict(n_embd="48"), "'n_embd' = '48'"),
        ("gpt2", dict(n_layer=None), "'n_layer' must be.*not null"),
        ("gpt2", dict(n_layer=1 << 20), "'n_layer' = 1048576"),
        ("gpt2", dict(n_head=True), "'n_head' = True"),
        ("gpt2", dict(n_inner=0), "'n_inner' = 0"),
        ("gpt2", dict(n_inner=[1]), "'n_inner' = "),
        ("gpt2", dict(n_positions=1 << 40), "'n_positions' = "),
        ("gpt2", dict(n_positions=-1), "'n_positions' = -1"),
        ("gpt2", dict(hidden_size=64), "'hidden_size' = 64 and 'n_embd' = 48.*two names"),
        ("gpt2", dict(intermediate_size=64), "'intermediate_size' = 64"),
        ("gpt2", dict(activation_function="tanh"), "'activation_function' = 'tanh'"),
        ("gpt2", dict(layer_norm_epsilon=0), "'layer_norm_epsilon' = 0"),
        ("gpt2", dict(rope_theta=1e4), "'rope_theta' = 10000.0"),
        ("gpt2", dict(num_key_value_heads=2), "'num_key_value_heads' = 2"),
        ("gpt2", dict(head_dim=16), "'head_dim' = 16"),
        # GPT-NeoX
        ("gpt_neox", dict(rotary_pct=0), "'rotary_pct' = 0 must be.*above 0"),
        ("gpt_neox", dict(rotary_pct=1.5), "'rotary_pct' = 1.5"),
        ("gpt_neox", dict(rotary_pct="a"), "'rotary_pct' = 'a'"),
        ("gpt_neox", dict(rotary_pct=0.01), "leaves nothing of a head of 12"),
        ("gpt_neox", dict(rotary_emb_base=-1), "'rotary_emb_base' = -1"),
        ("gpt_neox", dict(rope_theta=5e5), "'rope_theta' = 500000.0 contradicts 'rotary_emb_base'"),
        ("gpt_neox", dict(partial_rotary_factor=0.5), "contradicts 'rotary_pct' = 0.25"),
        ("gpt_neox", dict(use_parallel_residual=2), "'use_parallel_residual' = 2"),
        ("gpt_neox", dict(layer_norm_eps=None), "'layer_norm_eps' = None"),
        ("gpt_neox", dict(head_dim=16), "'head_dim' = 16"),
        # GPT-J
        ("gptj", dict(rotary_dim=0), "'rotary_dim' = 0"),
        ("gptj", dict(rotary_dim=5), "'rotary_dim' = 5 must be even"),
        ("gptj", dict(rotary_dim=14), "'rotary_dim' = 14.*at most the head size 12"),
        ("gptj", dict(rotary_dim=None), "'rotary_dim' must be.*not null"),
        ("gptj", dict(rope_scaling={"type": "linear", "factor": 2.0}), "'rope_scaling'"),
        # OPT
        ("opt", dict(do_layer_norm_before=False), "'do_layer_norm_before' = False.*not supported"),
        ("opt", dict(do_layer_norm_before=None), "'do_layer_norm_before' = None.*residual stream"),
        ("opt", dict(_remove_final_layer_norm=True), "'_remove_final_layer_norm' = True"),
        (
            "opt",
            dict(layer_norm_elementwise_affine=False),
            "'layer_norm_elementwise_affine' = False.*gains and biases",
        ),
        ("opt", dict(word_embed_proj_dim=24), "'word_embed_proj_dim' = 24.*projections"),
        ("opt", dict(ffn_dim=0), "'ffn_dim' = 0"),
        ("opt", dict(enable_bias="y"), "'enable_bias' = 'y'"),
        # Phi
        ("phi", dict(qk_layernorm="y"), "'qk_layernorm' = 'y'"),
        ("phi", dict(partial_rotary_factor=-0.5), "'partial_rotary_factor' = -0.5"),
        # Phi 3
        ("phi3", dict(rope_scaling={"type": "linear", "factor": 2.0}), "'linear'.*for phi3"),
        ("phi3", long(short_factor=...), "'short_factor' must list 6 positive numbers.*None"),
        ("phi3", long(long_factor=...), "'long_factor' must list 6 positive numbers.*None"),
        ("phi3", long(short_factor=[1.0] * 5), "'short_factor' must list 6.*a list of 5"),
        ("phi3", long(long_factor=[1.0] * 7), "'long_factor' must list 6.*a list of 7"),
        ("phi3", long(long_factor=[0.0] * 6), "'long_factor' must list 6 positive"),
        ("phi3", long(long_factor=["1"] * 6), "'long_factor' must list 6 positive"),
        ("phi3", long(long_factor=[float("nan")] * 6), "'long_factor' must list 6 positive"),
        ("phi3", long(short_factor={"a": 1}), "'short_factor' must list 6 positive"),
        ("phi3", long(attention_factor=0), "'attention_factor' = 0 must be above"),
        ("phi3", long(factor="4"), "'factor' = '4'"),
        ("phi3", long(beta_fast=[3]) | dict(partial_rotary_factor=2), "'partial_rotary_factor'"),
        (
            "phi3",
            {**long(), "original_max_position_embeddings": 0},
            "'original_max_position_embeddings' = 0",
        ),
        (
            "phi3",
            {**long(), "original_max_position_embeddings": "64"},
            "'original_max_position_embeddings' = '64'",
        ),
        # OLMo
        ("olmo", dict(clip_qkv=0), "'clip_qkv' = 0 must be a number above"),
        ("olmo", dict(clip_qkv=-8.0), "'clip_qkv' = -8.0"),
        ("olmo", dict(clip_qkv="8"), "'clip_qkv' = '8'"),
        ("olmo3", dict(rope_parameters={"rope_type": "default"}), "nested by"),
        ("olmo3", dict(rope_parameters={"full_attention": 3}), "'full_attention' = 3"),
        ("olmo3", dict(rope_scaling=LONG), "'longrope' is not supported for olmo3"),
        ("gemma3_text", dict(rope_scaling=LONG), "'longrope' is not supported for gemma3_text"),
        ("olmo3", dict(layer_types=["full_attention"]), "'layer_types' must list 4"),
        ("olmo3", dict(sliding_window=None), "no 'sliding_window'"),
        ("olmo3", dict(sliding_window=0), "'sliding_window' = 0"),
        # SmolLM3
        ("smollm3", dict(no_rope_layers=[1, 0, 1]), "'no_rope_layers' = .*each of 4 layers"),
        ("smollm3", dict(no_rope_layers=[1, 0, 1, 2]), "'no_rope_layers' = "),
        ("smollm3", dict(no_rope_layers=[1, 0, 1, "1"]), "'no_rope_layers' = "),
        ("smollm3", dict(no_rope_layers=1), "'no_rope_layers' = 1"),
        ("smollm3", dict(no_rope_layer_interval=0), "'no_rope_layer_interval' = 0"),
        ("smollm3", dict(no_rope_layer_interval=None), "'no_rope_layer_interval'.*not null"),
        ("smollm3", dict(layer_types=["sliding_attention"] * 4), "no 'sliding_window'"),
        # Granite
        ("granite", dict(embedding_multiplier=0), "'embedding_multiplier' = 0"),
        ("granite", dict(logits_scaling=0), "'logits_scaling' = 0"),
        ("granite", dict(residual_multiplier=None), "'residual_multiplier' = None"),
        ("granite", dict(attention_multiplier="1"), "'attention_multiplier' = '1'"),
        ("granite", dict(attention_multiplier=float("inf")), "'attention_multiplier' = inf"),
        # Cohere
        ("cohere", dict(logit_scale=None), "'logit_scale' = None"),
        ("cohere", dict(logit_scale=-0.1), "'logit_scale' = -0.1"),
        ("cohere", dict(use_qk_norm=4), "'use_qk_norm' = 4"),
        ("cohere2", dict(sliding_window_pattern=0), "'sliding_window_pattern' = 0"),
        ("cohere2", dict(sliding_window_pattern="LLG"), "'sliding_window_pattern' = 'LLG'"),
        ("cohere2", dict(sliding_window=None), "no 'sliding_window'"),
        ("cohere2", dict(partial_rotary_factor=0.5), "'partial_rotary_factor' = 0.5"),
        # StableLM, GLM-4
        ("stablelm", dict(use_qkv_bias="y"), "'use_qkv_bias' = 'y'"),
        ("stablelm", dict(qk_layernorm=7), "'qk_layernorm' = 7"),
        ("stablelm", dict(partial_rotary_factor=1.25), "'partial_rotary_factor' = 1.25"),
        ("glm4", dict(partial_rotary_factor=[0.5]), r"'partial_rotary_factor' = \[0.5\]"),
        ("glm4", dict(head_dim=None, hidden_size=50), "not a multiple of 'num_attention_heads'"),
        # EXAONE 4
        ("exaone4", dict(sliding_window_pattern=0), "'sliding_window_pattern' = 0"),
        ("exaone4", dict(sliding_window_pattern="LLX"), "'sliding_window_pattern' = 'LLX'"),
        ("exaone4", dict(sliding_window_pattern=""), "'sliding_window_pattern' = ''"),
        ("exaone4", dict(layer_types=["global"] * 4), "'layer_types' names 'global'"),
        # Ministral 3
        (
            "ministral3",
            dict(rope_parameters={"rope_type": "default", "llama_4_scaling_beta": 0.1}),
            "'original_max_position_embeddings' = None.*beside 'llama_4_scaling_beta'",
        ),
        (
            "ministral3",
            dict(rope_parameters={"type": "yarn", "factor": 4.0, "llama_4_scaling_beta": -1}),
            "'llama_4_scaling_beta' = -1",
        ),
        (
            "ministral3",
            dict(rope_parameters={"type": "yarn", "factor": 4.0, "llama_4_scaling_beta": "1"}),
            "'llama_4_scaling_beta' = '1'",
        ),
        (
            "ministral3",
            dict(sliding_window=9, layer_types=["sliding_attention", "full_attention"] * 2),
            "'layer_types'",
        ),
        # the others
        ("llama", dict(rope_parameters={"llama_4_scaling_beta": 0.1}), "'llama_4_scaling_beta'"),
        ("arcee", dict(hidden_act="relu3"), "'hidden_act' = 'relu3'"),
        ("arcee", dict(mlp_bias=5), "'mlp_bias' = 5"),
        ("nemotron", dict(norm_eps=0), "'norm_eps' = 0"),
        ("nemotron", dict(rms_norm_eps=1e-5), "'rms_norm_eps' = 1e-05"),
        ("seed_oss", dict(attention_out_bias="no"), "'attention_out_bias' = 'no'"),
        ("gemma", dict(use_bidirectional_attention=True), "'use_bidirectional_attention' = True"),
    ],
)
def test_refusals(model_type, changes, message):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ModelError, match=message):
            Config.from_hf(small(model_type, **changes))


def test_longrope_of_a_family_without_its_own_key():
    """The original length is that of the dictionary, else of the key outside it, else all."""
    entry = {k: v for k, v in LONG.items() if k != "rope_theta"}
    config = Config.from_hf(small("llama", rope_scaling=entry))
    assert (config.rope_switch, config.rope_long, config.n_ctx) == (0, (), 512)
    config = Config.from_hf(small("llama", rope_scaling=entry, original_max_position_embeddings=32))
    assert (config.rope_switch, config.n_ctx) == (32, 512)
    inner = {**entry, "original_max_position_embeddings": 128, "factor": 16.0}
    config = Config.from_hf(small("llama", rope_scaling=inner))
    assert (config.rope_switch, config.n_ctx) == (128, 2048)


def test_the_older_names_of_longrope():
    for kind in ("su", "yarn", "longrope"):
        entry = {k: v for k, v in LONG.items() if k not in ("rope_type", "rope_theta")}
        config = Config.from_hf(
            small(
                "phi3",
                rope_scaling={"type": kind, **entry},
                original_max_position_embeddings=64,
            )
        )
        assert config.rope_switch == 64 and config.rope_long[0].inv_freq[0] == 0.5


def test_patterns_of_exaone4_as_text():
    for pattern, slides in (("LLG", [1, 1, 0, 0]), ("L", [1, 1, 1, 0]), ("GL", [0, 1, 0, 0])):
        config = Config.from_hf(small("exaone4", sliding_window_pattern=pattern, sliding_window=9))
        assert [w // 9 for w in config.window] == slides
        assert [t + 1 for t in config.rope_table] == slides
    config = Config.from_hf(small("exaone4", sliding_window=None, sliding_window_pattern=None))
    assert config.window == (0,) * 4 and config.rope_table == (0,) * 4


def test_an_outer_config_without_its_model_type():
    text = small("ministral3")
    outer = {"architectures": ["Mistral3ForConditionalGeneration"], "text_config": text}
    config = Config.from_hf(outer)
    assert (config.model_type, config.query_beta) == ("ministral3", 0.1)
    assert config == Config.from_hf({**outer, "model_type": "mistral3"})
    outer["text_config"] = small("mistral", sliding_window=None)
    assert Config.from_hf(outer).model_type == "mistral"
    outer["text_config"] = {**small("mistral", sliding_window=None), "model_type": None}
    assert Config.from_hf(outer).model_type == "mistral"
    outer["text_config"] = {**text, "model_type": "llama"}
    with pytest.raises(ModelError, match="not supported"):
        Config.from_hf(outer)


def test_a_gpt2_by_either_name_of_a_key():
    usual = {"hidden_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4}
    config = small("gpt2")
    for key in ("n_embd", "n_layer", "n_head"):
        del config[key]
    assert Config.from_hf({**config, **usual}) == Config.from_hf(small("gpt2"))
    same = Config.from_hf(small("gpt2", hidden_size=48))
    assert same == Config.from_hf(small("gpt2"))


def test_random_values_never_escape():
    """Any JSON value under any key: a Config or a ModelError, nothing else."""
    rng = random.Random(11)
    values = [
        *(None, True, False, 0, -1, 1, 3, 10**30, 0.5, -0.0, 1e-300, 1e300, float("nan")),
        *("", "x", "LLG", [], [1], [0, 1, 1, 0], ["sliding_attention"] * 4, {}, {"a": 1}),
        *({"rope_type": "longrope"}, {"type": "su", "short_factor": 3}, LONG, {"factor": 1e300}),
        {"rope_type": "yarn", "factor": 4.0, "llama_4_scaling_beta": [1]},
        {**LONG, "long_factor": [1e29] * 6, "original_max_position_embeddings": 1e29},
        {"rope_type": "yarn", "factor": 2.0, "partial_rotary_factor": "x"},
        {"full_attention": {"rope_type": "longrope"}, "sliding_attention": {"truncate": 3}},
        {"rope_theta": 1e4, "partial_rotary_factor": 0.3},
    ]
    accepted = refused = 0
    for _ in range(6000):
        family = rng.choice(FAMILIES)
        keys = sorted({*family.defaults, *ROPE_KEYS, *family.aliases, "eos_token_id"})
        config = small(family.model_type)
        for _ in range(rng.randint(1, 3)):
            config[rng.choice(keys)] = rng.choice(values)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                Config.from_hf(config)
            accepted += 1
        except ModelError:
            refused += 1
    assert accepted > 300 and refused > 3000


# ---- architectures that no family serves ----


@pytest.mark.parametrize("model_type", MISSING)
def test_unsupported_architectures_say_what_they_need(model_type):
    with pytest.raises(ModelError) as error:
        Config.from_hf({"model_type": model_type, "hidden_size": 8})
    assert f"model_type {model_type!r} is not supported: it needs {MISSING[model_type]};" in str(
        error.value
    )


def test_unsupported_and_supported_are_two_sets():
    assert not {f.model_type for f in FAMILIES} & set(MISSING)
    assert len(MISSING) > 100


@pytest.mark.parametrize(
    "config, need",
    [
        (dict(architectures=["MixtralForCausalLM"]), "a mixture of experts;"),
        (dict(architectures=["Qwen3MoeForCausalLM"]), "a mixture of experts;"),
        (dict(architectures=["NewForCausalLM"], num_experts=8), "a mixture of experts;"),
        (
            dict(architectures=["NewForCausalLM"], n_routed_experts=8, kv_lora_rank=512),
            "a mixture of experts and attention with compressed .latent. keys and values;",
        ),
        (dict(model_type="new", mamba_d_state=16), "state-space layers;"),
        (dict(model_type="new", linear_num_key_heads=16), "linear attention;"),
        (dict(model_type="new", is_encoder_decoder=True), "an encoder beside the decoder;"),
        (
            dict(
                architectures=["Mistral3ForConditionalGeneration"],
                model_type="mistral3",
                text_config={"model_type": "mistral4"},
            ),
            "a mixture of experts and attention with compressed",
        ),
    ],
)
def test_what_an_unknown_architecture_needs(config, need):
    with pytest.raises(ModelError, match=f"is not supported: it needs {need}"):
        Config.from_hf(config)


def test_an_architecture_of_which_nothing_is_known():
    with pytest.raises(ModelError, match=r"'NewForCausalLM'.* is not supported; supported arch"):
        Config.from_hf({"architectures": ["NewForCausalLM"], "num_experts": 0})


def test_experts_of_transformers_are_called_so():
    """Every model_type with experts in the table has them in transformers' class, too."""
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    keys = {"num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"}
    checked = 0
    for model_type, need in MISSING.items():
        if "experts" not in need or model_type not in CONFIG_MAPPING:
            continue
        cls = CONFIG_MAPPING[model_type]
        text = getattr(transformers, cls.__name__.replace("Config", "TextConfig"), cls)
        fields = set(cls.__dataclass_fields__) | set(text.__dataclass_fields__)
        fields |= set(cls.attribute_map)
        assert fields & keys or "ffn_config" in fields, model_type
        checked += 1
    assert checked > 20
