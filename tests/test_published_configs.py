"""Configs of published models, written from their model cards (keys and values only), in
published_configs.json: each gives the facts that the installed transformers reads from the same
dictionary, and asks for the tensors that its model has; or it is refused, and says why.
"""

from __future__ import annotations

import json
import math
import warnings
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from vksteer.circuits.graph import graph
from vksteer.errors import ModelError
from vksteer.loading.config import Config
from vksteer.loading.layouts import stored_shape
from vksteer.loading.safetensors_files import match
from vksteer.loading.stored_tensors import Stored

PUBLISHED = json.loads(Path(__file__).with_name("published_configs.json").read_text())
LOADED = [name for name, entry in PUBLISHED.items() if "refused" not in entry]
REFUSED = [name for name, entry in PUBLISHED.items() if "refused" in entry]
#: transformers computes frequencies in float32; the largest relative difference here is 3.3e-7.
ROPE_RTOL = 1e-6
#: Activations in float64: the largest relative difference is 3.9e-11, of "gelu_fast", whose root of
#: 2/pi transformers has rounded to ten digits.
ACT_RTOL = 1e-10


def test_thirty_published_files_load():
    assert len(LOADED) >= 30 and len(REFUSED) >= 8


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_the_reason(name):
    with pytest.raises(ModelError, match=PUBLISHED[name]["refused"]):
        Config.from_hf(PUBLISHED[name]["config"])


@cache
def theirs(name):
    """(transformers' config of the text model, its causal model without values)."""
    import torch
    import transformers
    from transformers.initialization import no_init_weights

    content = json.loads(json.dumps(PUBLISHED[name]["config"]))
    config = transformers.AutoConfig.for_model(**content).get_text_config()
    with torch.device("meta"), no_init_weights():
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    return model.config, model


def ours(name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return Config.from_hf(PUBLISHED[name]["config"])


def first(model, *names):
    """The first attribute of any of these names in the model's modules; None where there is
    none.
    """
    for module in model.modules():
        for name in names:
            if name in vars(module) or name in module._modules:
                return getattr(module, name)
    return None


@pytest.mark.parametrize("name", LOADED)
def test_sizes_windows_and_ends(name):
    c, (config, _) = ours(name), theirs(name)
    assert (c.n_layers, c.d_model, c.n_heads, c.d_vocab) == (
        config.num_hidden_layers,
        config.hidden_size,
        config.num_attention_heads,
        config.vocab_size,
    )
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    assert c.n_kv_heads == heads
    content = PUBLISHED[name]["config"]
    assert c.tied == content.get("tie_word_embeddings", config.tie_word_embeddings)
    assert c.n_ctx >= config.max_position_embeddings
    window = getattr(config, "sliding_window", None)
    types = getattr(config, "layer_types", None)
    if types is None:
        slides = config.model_type in ("phi3", "mistral", "ministral3") and window is not None
        types = ["sliding_attention" if slides else "full_attention"] * c.n_layers
    assert c.window == tuple(window if t == "sliding_attention" else 0 for t in types)
    eos = content.get("eos_token_id")
    assert c.eos_ids == tuple(eos if isinstance(eos, list) else [] if eos is None else [eos])


@pytest.mark.parametrize("name", LOADED)
def test_tensors_are_those_of_the_model(name, tmp_path):
    """Names, shapes, biases, fused tensors, norms, and that no parameter is left over."""
    c, (_, model) = ours(name), theirs(name)
    stored = {
        key: Stored(0, "F32", tuple(value.shape), 0, 4 * value.numel())
        for key, value in model.named_parameters()
    }
    if c.tied:  # transformers ties them when it loads a model
        stored = {
            k: v for k, v in stored.items() if k not in ("lm_head.weight", "embed_out.weight")
        }
    matched, extra = match(c, [tmp_path / "model.safetensors"], stored)
    assert not extra, extra
    assert matched["l.0.wq"].shape == (c.n_heads * c.d_head, c.d_model)
    for key, found in matched.items():
        for tensor in found.stored:
            assert tensor.shape == stored_shape(found.part, found.shape, c), key


@pytest.mark.parametrize("name", LOADED)
def test_rotation(name):
    """The tables of transformers' own module, computed anew with values."""
    c, (config, model) = ours(name), theirs(name)
    if not c.rope:
        assert c.pos_embed and first(model, "rotary_emb") is None
        return
    if c.model_type == "gptj":  # a table of sines and cosines
        d = config.rotary_dim
        np.testing.assert_allclose(
            c.rope[0].inv_freq, 10000.0 ** -(np.arange(0, d, 2) / d), rtol=ROPE_RTOL
        )
        return
    module = first(model, "rotary_emb")
    assert module is not None
    module = type(module)(config)
    kinds = ("full_attention", "sliding_attention") if len(c.rope) == 2 else ("",)
    for kind, table in zip(kinds, c.rope, strict=True):
        prefix = kind + "_" if kind else ""
        np.testing.assert_allclose(
            table.inv_freq, getattr(module, prefix + "inv_freq").numpy(), rtol=ROPE_RTOL
        )
        assert table.attention_factor == pytest.approx(
            getattr(module, prefix + "attention_scaling"), rel=1e-12
        )
    if c.rope_long:
        factors = config.rope_parameters["long_factor"]
        d = c.d_rot
        longer = config.rope_parameters["rope_theta"] ** -(np.arange(0, d, 2) / d) / factors
        np.testing.assert_allclose(c.rope_long[0].inv_freq, longer, rtol=ROPE_RTOL)
        assert c.rope_switch == config.rope_parameters["original_max_position_embeddings"]


ACTS = {
    "silu": lambda x: x / (1 + np.exp(-x)),
    "gelu": lambda x: 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))),
    "gelu_tanh": lambda x: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "relu": lambda x: np.maximum(x, 0),
    "relu2": lambda x: np.maximum(x, 0) ** 2,
}


@pytest.mark.parametrize("name", LOADED)
def test_arithmetic(name):
    """Activation, epsilon and multipliers."""
    import torch

    c, (config, model) = ours(name), theirs(name)
    act = first(model, "act_fn", "act", "activation_fn", "activation_function", "activation")
    x = np.linspace(-4, 4, 81)
    with torch.no_grad():
        values = act(torch.tensor(x)).numpy()
    np.testing.assert_allclose(ACTS[c.act](x), values, rtol=ACT_RTOL)
    norms = [m for key, m in model.named_modules() if "norm" in key.lower() or "ln_" in key]
    eps = {getattr(m, "variance_epsilon", getattr(m, "eps", None)) for m in norms} - {None}
    assert eps == {c.norm_eps} or (c.model_type == "olmo" and c.norm_eps == 1e-5)
    assert c.norm == ("layer" if any("LayerNorm" in type(m).__name__ for m in norms) else "rms")
    scaling = first(model, "scaling")
    if scaling is not None:
        assert c.attn_scale == pytest.approx(float(scaling), rel=1e-12)
    else:
        assert c.model_type == "gptj" and c.attn_scale == c.d_head**-0.5
    gemma = c.model_type.startswith("gemma")
    embed = math.sqrt(c.d_model) if gemma else getattr(config, "embedding_multiplier", 1.0)
    logits = 1 / getattr(config, "logits_scaling", 1.0) * getattr(config, "logit_scale", 1.0)
    assert (c.embed_scale, c.logit_scale) == (embed, pytest.approx(logits, rel=1e-15))
    assert c.residual_scale == getattr(config, "residual_multiplier", 1.0)
    rope = getattr(config, "rope_parameters", None) or {}
    assert c.query_beta == rope.get("llama_4_scaling_beta", 0.0)
    if c.query_beta:
        assert c.query_length == rope["original_max_position_embeddings"]
    assert c.clip_qkv == (getattr(config, "clip_qkv", None) or 0.0)
    assert c.attn_softcap == (getattr(config, "attn_logit_softcapping", None) or 0.0)
    assert c.final_softcap == (getattr(config, "final_logit_softcapping", None) or 0.0)


@pytest.mark.parametrize(
    ("name", "layer", "counts"),
    [
        ("EleutherAI/pythia-160m", 6, (223, 561, 6732)),
        ("openai-community/gpt2", 6, (223, 561, 6804)),
        ("allenai/OLMo-2-0425-1B", 8, (393, 1380, 22208)),
    ],
)
def test_edges_by_source(name, layer, counts):
    """Edges from steering, MLPs and heads, counted by hand for these models."""
    g = graph(ours(name), layer)
    assert (g.counts["steer"], g.counts["mlp"], g.counts["head"]) == counts
    assert len(g) == sum(counts)
