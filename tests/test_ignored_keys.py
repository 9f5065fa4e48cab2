"""Keys of a config.json that transformers never reads: each is set in a model of every family, and
neither transformers' results nor ours may change. Then overrides of keys, and the context's length.
"""

from __future__ import annotations

import json
import warnings

import numpy as np
import pytest

import folders
import vksteer as vs
from small_configs import FAMILY, base
from vksteer.errors import ModelError
from vksteer.loading import ignored_keys, rope
from vksteer.loading.config import Config

#: A family of the zoo for every model_type.
FOLDERS = {"llama": "llama2", "gemma3_text": "gemma3"}
#: A value of an ignored key that would matter to a program that reads it.
VALUES = {
    "sliding_window_size": 2,
    "dual_chunk_attention_config": {"chunk_size": 4, "local_size": 2},
    "sparsity_config": {"targets": ["Linear"]},
    "training_args": {"steps": 3},
    "hidden_act": "relu",
    "language": "en",
    "summary_type": "mean",
    "summary_activation": "tanh",
    "init_std": 3.0,
    "_sliding_window_pattern": 3,
}


def ignored(model_type):
    """Keys of the list; those that this family reads are not ignored here."""
    keys = ignored_keys.IGNORED_IN_ALL | ignored_keys.IGNORED.get(model_type, frozenset())
    family = FAMILY[model_type]
    read = {*family.defaults, *family.aliases}
    return {key: VALUES.get(key, 0.5 if "drop" in key else True) for key in sorted(keys - read)}


@pytest.fixture(autouse=True)
def nothing_said(monkeypatch):
    monkeypatch.setattr(ignored_keys, "_said", set())


@pytest.mark.parametrize("model_type", FAMILY)
def test_transformers_ignores_every_listed_key(zoo, tmp_path, model_type):
    plain = zoo.variant(FOLDERS.get(model_type, model_type), "ending", eos_token_id=3)
    vocab = json.loads((plain / "config.json").read_text())["vocab_size"]
    with_keys = folders.copy(plain, tmp_path / "keys", **ignored(model_type))
    ids = folders.tokens(40, vocab)
    one, other = folders.hf_model(plain), folders.hf_model(with_keys)
    import torch

    with torch.no_grad():
        a, b = (m(torch.tensor([ids])).logits.numpy() for m in (one, other))
    np.testing.assert_array_equal(a, b)
    assert folders.hf_greedy(one, ids, 8) == folders.hf_greedy(other, ids, 8)
    config = json.loads((with_keys / "config.json").read_text())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert Config.from_hf(config) == Config.from_pretrained(plain)


def rope_entry(kind):
    entries = {
        "default": {},
        "linear": {"factor": 4.0},
        "dynamic": {"factor": 4.0},
        "llama3": {
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
        "yarn": {"factor": 4.0, "original_max_position_embeddings": 64},
        "longrope": {
            "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5],
            "long_factor": [2.0, 2.5, 3.0, 4.0, 6.0, 9.0],
            "original_max_position_embeddings": 64,
        },
    }
    return {"rope_type": kind, **entries[kind]}


@pytest.mark.parametrize("kind", rope.UNDERSTOOD)
def test_transformers_ignores_every_listed_key_of_a_rope_entry(kind):
    import transformers
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    entry = rope_entry(kind)
    keys = (ignored_keys.IGNORED_IN_ROPE | rope.UNREAD_FACTORS) - {*rope.UNDERSTOOD[kind]}
    for key in sorted(keys):
        value = [2, 2, 2] if key == "mrope_section" else 3.0
        entries = [entry, {**entry, key: value}]
        theirs = []
        for e in entries:
            config = transformers.LlamaConfig(
                hidden_size=48,
                num_attention_heads=4,
                head_dim=12,
                max_position_embeddings=512,
                rope_parameters={"rope_theta": 10000.0, **e},
            )
            module = LlamaRotaryEmbedding(config)
            theirs.append((module.inv_freq.numpy(), module.attention_scaling))
        np.testing.assert_array_equal(theirs[0][0], theirs[1][0], err_msg=key)
        assert theirs[0][1] == theirs[1][1], key
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ours = [Config.from_hf(base("llama", rope_scaling=e)).rope[0] for e in entries]
        np.testing.assert_array_equal(ours[0].inv_freq, ours[1].inv_freq)
        assert ours[0].attention_factor == ours[1].attention_factor


@pytest.mark.parametrize("key", sorted(ignored_keys.DISPUTED))
def test_a_key_that_other_programs_read_is_said_once(key):
    config = base("qwen3", rope_scaling=rope_entry("yarn"))
    if key in ignored_keys.IGNORED_IN_ROPE:
        config["rope_scaling"][key] = 0.9
    else:
        config[key] = {"chunk_size": 8} if key.endswith("config") else True
    with pytest.warns(UserWarning, match=f"{key}.*ignored, as transformers does"):
        Config.from_hf(config)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Config.from_hf(config)


def test_overrides_replace_keys(zoo, tmp_path):
    plain = zoo.folder("qwen3")
    entry = {**rope_entry("yarn"), "rope_theta": 1e4}
    changed = folders.copy(plain, tmp_path / "changed", rope_parameters=entry)
    ids = folders.tokens(50, json.loads((plain / "config.json").read_text())["vocab_size"])
    ours = folders.logits(plain, ids, config_overrides={"rope_parameters": entry})
    folders.assert_close(ours, folders.hf_logits(changed, ids))
    assert np.abs(ours - folders.hf_logits(plain, ids)).max() > 1e-3
    unknown = folders.copy(plain, tmp_path / "unknown", new_idea=3)
    with pytest.raises(ModelError, match=r"config_overrides=\{'new_idea': None\}"):
        Config.from_pretrained(unknown)
    same = Config.from_pretrained(unknown, config_overrides={"new_idea": None})
    assert same == Config.from_pretrained(plain)


def test_overrides_of_a_model_that_also_sees_images(tmp_path):
    text = base("gemma3_text")
    outer = {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "model_type": "gemma3",
        "text_config": text,
        "vision_config": {"hidden_size": 3},
    }
    (tmp_path / "config.json").write_text(json.dumps(outer))
    got = Config.from_pretrained(
        tmp_path, config_overrides={"sliding_window": 17, "vision_config": None}
    )
    assert set(got.window) == {0, 17}


def test_overrides_are_checked(zoo, tmp_path):
    folder = zoo.folder("llama2")
    for wrong in ([("a", 1)], "a", {1: 2}):
        with pytest.raises(TypeError, match="config_overrides"):
            vs.Model.from_pretrained(folder, config_overrides=wrong, progress=False)
    with pytest.raises(ValueError, match="config_overrides"):
        vs.Model.from_pretrained(folder, config_overrides={"a": object()}, progress=False)
    with pytest.raises(ModelError, match="num_hidden_layers"):
        vs.Model.from_pretrained(folder, config_overrides={"num_hidden_layers": 0}, progress=False)
    file = tmp_path / "m.gguf"
    from model_writers import gguf_model

    gguf_model(file)
    with pytest.raises(ValueError, match="GGUF file"):
        vs.Model.from_pretrained(file, config_overrides={"rope_theta": 1e4}, progress=False)


def test_overrides_are_in_provenance(zoo):
    from vksteer.base.provenance import provenance

    folder = zoo.folder("llama2")
    with vs.Model.from_pretrained(
        folder, config_overrides={"rms_norm_eps": 1e-3}, progress=False
    ) as model:
        assert provenance(model)["config_overrides"] == {"rms_norm_eps": 1e-3}
        changed = model.fingerprint
    assert "config_overrides" not in provenance(zoo.engine("llama2"))
    assert changed != zoo.engine("llama2").fingerprint


# ---- the context's length ----


@pytest.mark.parametrize(
    "entry, positions, context",
    [
        (None, 512, 512),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}, 512, 2048),
        ({"type": "yarn", "factor": 4.0}, 512, 2048),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}, 512, 512),
        ({"rope_type": "yarn", "factor": 2.5, "original_max_position_embeddings": 301}, 512, 752),
        ({"type": "linear", "factor": 4.0}, 512, 2048),
        ({"type": "linear", "factor": 4, "original_max_position_embeddings": 128}, 512, 512),
        ({**rope_entry("llama3")}, 512, 512),
        ({**rope_entry("llama3"), "original_max_position_embeddings": 512}, 512, 4096),
        (
            {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1, "high_freq_factor": 4},
            9,
            72,
        ),
    ],
)
def test_context(entry, positions, context):
    config = base("llama", max_position_embeddings=positions, rope_scaling=entry)
    assert Config.from_hf(config).n_ctx == context


def test_context_of_gemma_3_holds_its_factor_already():
    config = base("gemma3_text", rope_scaling={"rope_type": "linear", "factor": 8.0})
    assert Config.from_hf(config).n_ctx == 512


@pytest.mark.parametrize("kind", ["yarn", "linear", "llama3"])
def test_prompts_beyond_the_original_length(zoo, tmp_path, kind):
    name = "qwen2" if kind == "yarn" else "llama2"
    entry = {**rope_entry(kind), "original_max_position_embeddings": 48}
    folder = folders.copy(
        zoo.folder(name),
        tmp_path / "m",
        drop=["rope_parameters"],
        rope_theta=1e4,
        rope_scaling=entry,
        max_position_embeddings=48,
    )
    ids = folders.tokens(130, 90)
    folders.assert_close(folders.logits(folder, ids), folders.hf_logits(folder, ids))
