"""GGUF files of every architecture that the `gguf` package knows and the engine serves: facts and
tensors equal those of the folder that the file was made of.
"""

from __future__ import annotations

import numpy as np
import pytest

from gguf_models import PLUS_ONE, convert
from oracle import families
from oracle.more_families import MORE_FAMILIES
from vksteer.errors import ModelError
from vksteer.loading import dtypes
from vksteer.loading.config import Config
from vksteer.loading.families import FAMILIES
from vksteer.loading.gguf_layouts import LAYOUTS
from vksteer.loading.model_files import open_model

#: Changes of the small models that GGUF files can hold: llama.cpp refuses a GPT-NeoX without an
#: unembedding of its own, and SmolLM3's layers without rotation are each fourth.
CHANGES = {
    "gpt_neox_sequential": {"tie_word_embeddings": False, "attention_bias": True},
    "smollm3": {"no_rope_layer_interval": 4, "num_hidden_layers": 5},
}
#: OPT has no GGUF architecture, and phi2 has no norms of queries and keys.
NAMES = [n for n in MORE_FAMILIES if n not in ("opt", "phi_norm")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A function from a family's name to its folder; made once."""
    made = {}

    def get(name):
        if name not in made:
            prefix, stored, arguments = families.ALL[name]
            arguments = {**arguments, **CHANGES.get(name, {})}
            with pytest.MonkeyPatch.context() as patch:
                patch.setitem(families.ALL, name, (prefix, stored, arguments))
                made[name] = families.build(name, tmp_path_factory.mktemp(name))
        return made[name]

    return get


def assert_same_facts(found, expected):
    """The facts of a GGUF file and of a config.json. Gains of (1 + w) are stored as 1 + w, factors
    of rope_freqs.weight are float32, and so is longrope's factor.
    """
    plain = {
        k: v
        for k, v in expected.facts().items()
        if k not in ("rope", "rope_long", "norm_offset", "eos_ids")
    }
    if expected.model_type == "exaone4" and expected.window[0]:  # llama3's factor is not in a file
        plain["n_ctx"] = families.MAX_POSITIONS
    for key, value in plain.items():
        assert getattr(found, key) == value, key
    assert found.norm_offset == 0.0
    for tables, others in ((found.rope, expected.rope), (found.rope_long, expected.rope_long)):
        assert len(tables) == len(others)
        for a, b in zip(tables, others, strict=True):
            np.testing.assert_allclose(a.inv_freq, b.inv_freq, rtol=2e-7)  # 2**-23: 1.2e-7
            assert a.attention_factor == b.attention_factor


@pytest.mark.parametrize("name", NAMES)
def test_facts_and_tensors_are_the_folder_s(folder, tmp_path, name):
    source = folder(name)
    path = convert(source, tmp_path / "m.gguf")
    one = open_model(source, dtype="float32")
    other = open_model(path, dtype="float32")
    assert_same_facts(other.config, one.config)
    assert Config.from_pretrained(path) == other.config
    assert [t.name for t in other.tensors] == [t.name for t in one.tensors]
    offset = np.float32(one.config.model_type in PLUS_ONE)
    for a, b in zip(one.tensors, other.tensors, strict=True):
        gain = a.name.rpartition(".")[2] in ("ln1", "ln2", "ln_final")
        values = dtypes.to_float32(a.array(), a.dtype)  # vectors stay as stored
        expected = values + offset if gain else values
        np.testing.assert_array_equal(b.array(), expected, err_msg=a.name)
    other.close()


def test_the_table_names_what_is_read():
    assert {arch for family in FAMILIES for arch in family.gguf} == set(LAYOUTS)


# -- other layouts ---------------------------------------------------------------------------------


def joined(*parts, into, kind="weight", layers=(0, 1, 2)):
    """An edit that puts the rows of several tensors of a layer into one."""

    def edit(tensors):
        for i in layers:
            names = [f"blk.{i}.{part}.{kind}" for part in parts]
            if names[0] in tensors:
                rows = [tensors.pop(name) for name in names]
                tensors[f"blk.{i}.{into}.{kind}"] = np.concatenate(rows)

    return edit


def both(*edits):
    def edit(tensors):
        for one in edits:
            one(tensors)

    return edit


def halved(tensors):
    """Gate and up apart."""
    for name in [n for n in tensors if n.endswith("ffn_up.weight")]:
        gate, up = np.split(tensors[name], 2)
        tensors |= {name: up, name.replace("ffn_up", "ffn_gate"): gate}


QKV = ("attn_q", "attn_k", "attn_v")
LAYOUTS_OF = {
    "phi2 with one tensor for q, k and v": (
        "phi",
        both(joined(*QKV, into="attn_qkv"), joined(*QKV, into="attn_qkv", kind="bias")),
    ),
    "glm4 with one tensor for q, k and v": (
        "glm4",
        both(joined(*QKV, into="attn_qkv"), joined(*QKV, into="attn_qkv", kind="bias")),
    ),
    "phi3 with gate and up apart": ("phi3", halved),
}


@pytest.mark.parametrize("case", LAYOUTS_OF)
@pytest.mark.parametrize("dtype", ["auto", "float32", "float16"])
def test_the_same_tensors_in_another_layout(folder, tmp_path, case, dtype):
    name, edit = LAYOUTS_OF[case]
    source = folder(name)
    one = open_model(convert(source, tmp_path / "one.gguf"), dtype=dtype)
    other = open_model(convert(source, tmp_path / "other.gguf", edit=edit), dtype=dtype)
    assert other.config == one.config
    for a, b in zip(one.tensors, other.tensors, strict=True):
        assert (a.name, a.dtype, a.shape) == (b.name, b.dtype, b.shape)
        np.testing.assert_array_equal(a.array(), b.array(), err_msg=a.name)


def test_quantised_rows_of_one_tensor(tmp_path):
    """Q8_0 blocks of fused tensors are cut between rows."""
    import gguf

    kind = gguf.GGMLQuantizationType.Q8_0
    prefix, stored, arguments = families.ALL["phi3"]
    sizes = {"hidden_size": 64, "intermediate_size": 96}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(families.ALL, "phi3", (prefix, stored, {**arguments, **sizes}))
        source = families.build("phi3", tmp_path / "folder")
    plain = open_model(convert(source, tmp_path / "plain.gguf"), dtype="float32")

    def quantised(tensors):
        for name in [n for n in tensors if "attn_qkv" in n or "ffn_up" in n]:
            tensors[name] = gguf.quants.quantize(tensors[name], kind)

    files = open_model(
        convert(source, tmp_path / "q.gguf", edit=quantised, types={np.dtype(np.uint8): kind}),
        dtype="float32",
    )
    for a, b in zip(plain.tensors, files.tensors, strict=True):
        values = a.array()
        if a.name.rpartition(".")[2] in ("wq", "wk", "wv", "wgate", "wup"):
            values = gguf.quants.dequantize(gguf.quants.quantize(values, kind), kind)
        np.testing.assert_array_equal(b.array(), values, err_msg=a.name)


# -- what metadata leave out, and what they contradict ---------------------------------------------


def facts(folder, tmp_path, name, changes=None, edit=None):
    return Config.from_pretrained(convert(folder(name), tmp_path / "m.gguf", changes, edit))


def test_windows_where_no_pattern_is_listed(folder, tmp_path):
    pattern = {"attention.sliding_window_pattern": None}
    for name in ("cohere2", "olmo3", "exaone4_window"):
        c = facts(folder, tmp_path, name, pattern)
        w = c.window[0]
        assert w and c.window == (w, w, w, 0), name
    c = facts(folder, tmp_path, "cohere2", {"attention.sliding_window_pattern": 2})
    assert c.window == (7, 0, 7, 0) and c.rope_table == (0, -1, 0, -1)
    c = facts(folder, tmp_path, "exaone4_window", {**pattern, "attention.sliding_window": None})
    assert c.window == (0, 0, 0, 0) and c.rope_table == (0, 0, 0, 0)
    c = facts(folder, tmp_path, "olmo3", {**pattern, "attention.sliding_window": None})
    assert c.model_type == "olmo2" and c.window == (0, 0, 0, 0)


def test_windows_of_phi3(folder, tmp_path):
    without = {"attention.sliding_window": None}
    assert facts(folder, tmp_path, "phi3", {"attention.sliding_window": 0}).window == (0, 0, 0)
    assert facts(folder, tmp_path, "phi3", without).window == (0, 0, 0)


def test_multipliers_that_are_left_out(folder, tmp_path):
    left_out = dict.fromkeys(("attention.scale", "embedding_scale", "residual_scale"))
    c = facts(folder, tmp_path, "granite", left_out)
    assert (c.attn_scale, c.embed_scale, c.residual_scale) == (10**-0.5, 1.0, 1.0)
    assert facts(folder, tmp_path, "olmo", {"attention.clamp_kqv": None}).clip_qkv == 0.0


def test_mistral3_without_a_factor_on_queries_is_a_mistral(folder, tmp_path):
    c = facts(folder, tmp_path, "ministral3", {"attention.temperature_scale": None})
    assert (c.model_type, c.query_beta, c.query_length) == ("mistral", 0.0, 0)
    assert c.rope[0].attention_factor == 1.0  # mscale over mscale_all_dim


def test_a_stablelm_is_parallel_where_it_has_one_norm(folder, tmp_path):
    assert not facts(folder, tmp_path, "stablelm").parallel
    assert facts(folder, tmp_path, "stablelm_parallel", {"use_parallel_residual": True}).parallel


def test_longrope_s_factor_is_the_config_s_or_the_file_s(folder, tmp_path):
    stated = facts(folder, tmp_path, "phi3_long", {"rope.scaling.attn_factor": 1.5})
    assert stated.rope[0].attention_factor == stated.rope_long[0].attention_factor == 1.5
    expected = Config.from_pretrained(folder("phi3_long"))
    for changes in (None, {"rope.scaling.attn_factor": None}):
        c = facts(folder, tmp_path, "phi3_long", changes)
        assert c.rope[0].attention_factor == expected.rope[0].attention_factor


def without(*names):
    def edit(tensors):
        for name in names:
            del tensors[name]

    return edit


def with_values(name, values):
    def edit(tensors):
        tensors[name] = np.asarray(values, np.float32)

    return edit


REFUSED = {
    "no unembedding": ("gpt_neox", {}, without("output.weight"), "output.weight' is missing"),
    "parallel or not": (
        "gpt_neox",
        {"use_parallel_residual": None},
        None,
        "gptneox.use_parallel_residual' is missing",
    ),
    "fewer keys than queries": ("gpt2", {"attention.head_count_kv": 2}, None, "head_count_kv"),
    "no norm of the MLP": (
        "stablelm_parallel",
        {"use_parallel_residual": False},
        None,
        "ffn_norm.weight' is missing",
    ),
    "another epsilon": ("olmo", {"attention.layer_norm_epsilon": 1e-6}, None, "must be 1e-05"),
    "no epsilon": ("gpt2", {"attention.layer_norm_epsilon": None}, None, "is missing"),
    "the other epsilon": (
        "olmo2",
        {"attention.layer_norm_rms_epsilon": None, "attention.layer_norm_epsilon": 1e-6},
        None,
        "layer_norm_rms_epsilon' is missing",
    ),
    "no logit scale": ("cohere", {"logit_scale": None}, None, "logit_scale' is missing"),
    "no window": ("cohere2", {"attention.sliding_window": None}, None, "window' is missing"),
    "rotation off": ("granite", {"rope.scaling.finetuned": False}, None, "rope.scaling.finetuned"),
    "attention to later tokens": ("phi", {"attention.causal": False}, None, "attention.causal"),
    "a cap on logits": ("olmo2", {"final_logit_softcapping": 30.0}, None, "final_logit"),
    "a window": ("granite", {"attention.sliding_window": 9}, None, "sliding_window"),
    "a period": ("gemma", {"attention.sliding_window": 9}, None, "sliding_window"),
    "two bases": ("arcee", {"rope.freq_base_swa": 5e5}, None, "freq_base_swa"),
    "an odd rotation": ("phi", {"rope.dimension_count": 3}, None, "dimension_count"),
    "more rotation than head": ("glm4", {"rope.dimension_count": 14}, None, "dimension_count"),
    "another base": ("gptj", {"rope.freq_base": 5e5}, None, "freq_base"),
    "yarn's factor": (
        "olmo3",
        {"rope.scaling.yarn_attn_factor": 1.3},
        None,
        "yarn_attn_factor' = 1.3 differs",
    ),
    "yarn's mixture": ("olmo3", {"rope.scaling.yarn_ext_factor": 0.5}, None, "yarn_ext_factor"),
    "a factor without yarn": ("arcee", {"rope.scaling.attn_factor": 1.2}, None, "attn_factor"),
    "another length": (
        "ministral3",
        {"attention.temperature_length": 77},
        None,
        "temperature_length",
    ),
    "one list": (
        "phi3_long",
        {},
        without("rope_factors_long.weight"),
        "rope_factors_long.weight' is missing",
    ),
    "a list too short": (
        "phi3_long",
        {},
        with_values("rope_factors_long.weight", np.ones(5)),
        "rope_factors_long.weight': shape",
    ),
    "a factor of 0": (
        "phi3_long",
        {},
        with_values("rope_factors_short.weight", np.zeros(6)),
        "rope_factors_short.weight': factors must be positive",
    ),
    "longrope without lists": (
        "phi3",
        {"rope.scaling.type": "longrope"},
        None,
        "needs the tensors 'rope_factors_short.weight'",
    ),
    "lists of no use": (
        "olmo",
        {},
        with_values("rope_factors_short.weight", np.ones(3)),
        "rope_factors_short.weight' belongs to no part",
    ),
    "a bias at the end": (
        "olmo2",
        {},
        with_values("output_norm.bias", np.ones(40)),
        "output_norm.bias' belongs to no part",
    ),
    "norms of queries": (
        "phi",
        {},
        with_values("blk.0.attn_q_norm.weight", np.ones(10)),
        "attn_q_norm.weight'",
    ),
    "no positions": (
        "gpt2",
        {},
        without("position_embd.weight"),
        "position_embd.weight' is missing",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(folder, tmp_path, case):
    name, changes, edit, message = REFUSED[case]
    path = convert(folder(name), tmp_path / "m.gguf", changes, edit)
    with pytest.raises(ModelError, match=message) as refused:
        open_model(path)
    assert str(path) in str(refused.value)


def test_the_window_of_the_phi3_files_without_one(tmp_path):
    """Older files of the 4k models give none."""
    prefix, stored, arguments = families.ALL["phi3"]
    arguments = {**arguments, "num_hidden_layers": 32, "original_max_position_embeddings": 4096}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(families.ALL, "phi3", (prefix, stored, arguments))
        source = families.build("phi3", tmp_path / "folder")
    changes = {"context_length": 4096, "attention.sliding_window": None}
    c = Config.from_pretrained(convert(source, tmp_path / "m.gguf", changes))
    assert c.window == (2047,) * 32
