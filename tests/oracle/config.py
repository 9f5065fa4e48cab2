"""What the forward pass of the oracle needs to know of a model, read from its config.json in both
styles: sizes, windows and rotary tables. Shares no code with vksteer or transformers.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass
class Facts:
    kind: str  # model_type
    n_layers: int
    d_model: int
    n_heads: int
    n_kv_heads: int
    d_head: int
    d_mlp: int
    d_vocab: int
    eps: float
    norm: str  # "rms" or "layer"
    norm_offset: float
    embed_scale: float
    attn_scale: float
    residual_scale: float  # on what attention and MLP add to the stream
    logit_scale: float  # before a soft cap
    attn_softcap: float
    final_softcap: float
    clip_qkv: float  # 0: no clipping
    act: str
    gated: bool
    pre_norms: bool
    post_norms: bool
    parallel: bool
    qk_norm: str  # "", "head" (RMS, one gain), "wide" (RMS over all heads), "layer" (LayerNorm)
    window: list
    # per layer: (inv_freq float64 tensor [d_rot/2], attention_factor), None: not rotated
    rope: list
    rope_long: list  # the same for rows of more than rope_switch tokens; empty: no such
    rope_switch: int
    rope_interleaved: bool
    query_beta: float  # rotated queries times 1 + beta log(1 + floor(position / length)); 0: not
    query_length: int


def rope_table(rope, d_head, max_positions, long=False):
    """(inverse frequencies float64 [d_rot/2], attention factor) by their published definitions.

    rope: rope_theta, rope_type and the keys of that type of scaling. long: of longrope, the table
    of long texts.
    """
    d_head = int(d_head * rope.get("partial_rotary_factor", 1.0))
    theta = rope["rope_theta"]
    kind = rope.get("rope_type") or rope.get("type") or "default"
    i = torch.arange(d_head // 2, dtype=torch.float64)
    freq = theta ** (-2.0 * i / d_head)
    if kind == "default":
        return freq, 1.0
    original = rope.get("original_max_position_embeddings") or max_positions
    if kind == "longrope":  # Phi 3: the factor is that of the two lengths
        factors = rope["long_factor" if long else "short_factor"]
        factor = rope.get("factor") or max_positions / original
        attention = rope.get("attention_factor")
        if attention is None:
            attention = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
        return freq / torch.tensor(factors, dtype=torch.float64), attention
    factor = float(rope["factor"])
    if kind == "linear":
        return freq / factor, 1.0
    # Llama 3.1: long waves are stretched by `factor`, short ones are kept, those between blended.
    if kind == "llama3":
        turns = original * freq / (2 * math.pi)
        blend = (
            (turns - rope["low_freq_factor"]) / (rope["high_freq_factor"] - rope["low_freq_factor"])
        ).clamp(0, 1)
        return freq * ((1 - blend) / factor + blend), 1.0
    if kind == "yarn":  # Peng et al. 2023, the correction range rounded outwards
        at = lambda turns: (
            d_head * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))
        )
        low, high = at(rope.get("beta_fast") or 32), at(rope.get("beta_slow") or 1)
        if rope.get("truncate", True):
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, d_head - 1)
        ramp = ((i - low) / ((high - low) or 0.001)).clamp(0, 1)
        attention = rope.get("attention_factor")
        if attention is None:
            scale = lambda m: 0.1 * m * math.log(factor) + 1.0 if factor > 1 else 1.0
            m, m_all = rope.get("mscale"), rope.get("mscale_all_dim")
            attention = scale(m) / scale(m_all) if m and m_all else scale(1)
        return freq * (ramp / factor + (1 - ramp)), attention
    raise NotImplementedError(kind)


LAYER_NORM = ("gpt2", "gpt_neox", "gptj", "opt", "phi", "olmo", "cohere", "cohere2", "stablelm")
PLAIN_MLP = ("gpt2", "gpt_neox", "gptj", "opt", "phi", "arcee", "nemotron")
NO_PRE_NORMS = ("olmo2", "olmo3", "exaone4")
POST_NORMS = ("gemma2", "gemma3_text", "glm4", *NO_PRE_NORMS)
PARALLEL = ("gptj", "phi", "cohere", "cohere2")
PARTIAL = {"gpt_neox": 0.25, "phi": 0.5, "stablelm": 0.25, "glm4": 0.5, "nemotron": 0.5}
ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}
#: The names that the first families had for what all others call the same.
OLD_KEYS = {
    "n_layer": "num_hidden_layers",
    "n_embd": "hidden_size",
    "n_head": "num_attention_heads",
    "n_positions": "max_position_embeddings",
    "ffn_dim": "intermediate_size",
    "activation_function": "hidden_act",
}


def _eps(c, kind):
    if kind in ("opt", "olmo"):
        return 1e-5
    return next(
        c[key]
        for key in ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_eps")
        if key in c
    )


def _slides(c, kind, n):
    """Which layers have a window."""
    types = c.get("layer_types")
    if types is not None:
        return [t == "sliding_attention" for t in types]
    if kind in ("mistral", "phi3", "ministral3"):
        return [True] * n
    if kind == "gemma2":
        return [i % 2 == 0 for i in range(n)]
    if kind in ("gemma3_text", "cohere2"):
        every = c.get("sliding_window_pattern", 6 if kind == "gemma3_text" else 4)
        return [(i + 1) % every != 0 for i in range(n)]
    return [bool(c.get("use_sliding_window")) and i >= c["max_window_layers"] for i in range(n)]


def _rope_entry(c, kind):
    """Rotation as the newer files write it: one dictionary, or one for each kind of layer."""
    stored = c.get("rope_parameters")
    if kind == "gptj":
        d_head = c["hidden_size"] // c["num_attention_heads"]
        stored = {"rope_theta": 10000.0, "partial_rotary_factor": c["rotary_dim"] / d_head}
    if stored is None and kind in ("gemma3_text", "olmo3"):
        local = c.get("rope_local_base_freq", 500000.0)
        return {
            "full_attention": dict(c.get("rope_scaling") or {}, rope_theta=c["rope_theta"]),
            "sliding_attention": {"rope_theta": local},
        }
    if stored is None:
        theta = c.get("rope_theta", c.get("rotary_emb_base", 10000.0))
        stored = dict(c.get("rope_scaling") or {}, rope_theta=theta)
    if "full_attention" not in stored:
        part = c.get("partial_rotary_factor", c.get("rotary_pct", PARTIAL.get(kind, 1.0)))
        stored = {"partial_rotary_factor": part, **stored}
        if c.get("original_max_position_embeddings"):
            stored.setdefault(
                "original_max_position_embeddings", c["original_max_position_embeddings"]
            )
    return stored


def _rotations(c, kind, slides, d_head):
    """(the tables of the layers, those of long texts, the longest text that is not long)"""
    n = len(slides)
    if kind in ("gpt2", "opt"):
        return [None] * n, [], 0
    positions, stored = c["max_position_embeddings"], _rope_entry(c, kind)
    if "full_attention" in stored:
        tables = {k: rope_table(v, d_head, positions) for k, v in stored.items()}
        return [tables["sliding_attention" if s else "full_attention"] for s in slides], [], 0
    table = rope_table(stored, d_head, positions)
    rotates = [True] * n
    if kind == "smollm3":
        rotates = [bool(x) for x in c["no_rope_layers"][:n]]
    elif kind == "cohere2" or (kind == "exaone4" and c["sliding_window"] is not None):
        rotates = slides
    layers = [table if r else None for r in rotates]
    if (stored.get("rope_type") or stored.get("type")) != "longrope":
        return layers, [], 0
    long = rope_table(stored, d_head, positions, long=True)
    return layers, [long] * n, stored["original_max_position_embeddings"]


def _qk_norm(c, kind):
    if kind in ("qwen3", "gemma3_text", "exaone4"):
        return "head"
    if kind in ("olmo2", "olmo3"):
        return "wide"
    return "layer" if c.get("use_qk_norm") or c.get("qk_layernorm") else ""


def _scales(c, kind, d_head):
    """Factors on embeddings, scores, what is added to the stream, and logits."""
    embed = math.sqrt(c["hidden_size"]) if kind.startswith("gemma") else 1.0
    scores = (c["query_pre_attn_scalar"] if kind in ("gemma2", "gemma3_text") else d_head) ** -0.5
    if kind == "granite":
        return dict(
            embed_scale=c["embedding_multiplier"],
            attn_scale=c["attention_multiplier"],
            residual_scale=c["residual_multiplier"],
            logit_scale=1 / c["logits_scaling"],
        )
    logits = c["logit_scale"] if kind.startswith("cohere") else 1.0
    return dict(embed_scale=embed, attn_scale=scores, residual_scale=1.0, logit_scale=logits)


def read_facts(folder):
    c = json.loads((Path(folder) / "config.json").read_text())
    c |= {new: c[old] for old, new in OLD_KEYS.items() if old in c}
    kind, heads, n = c["model_type"], c["num_attention_heads"], c["num_hidden_layers"]
    d_head = c.get("head_dim") or c["hidden_size"] // heads
    slides = _slides(c, kind, n) if "sliding_window" in c else [False] * n
    window = c.get("sliding_window")
    rope, rope_long, switch = _rotations(c, kind, slides, d_head)
    act = c.get("hidden_activation") or c.get("hidden_act", "gelu_pytorch_tanh")
    if kind == "gemma":  # released as "gelu", meant as its approximation
        act = "gelu_tanh"
    yarn = c.get("rope_parameters") or {}
    return Facts(
        kind=kind,
        n_layers=n,
        d_model=c["hidden_size"],
        n_heads=heads,
        n_kv_heads=c.get("num_key_value_heads") or heads,
        d_head=d_head,
        d_mlp=c.get("intermediate_size") or c.get("n_inner") or 4 * c["hidden_size"],
        d_vocab=c["vocab_size"],
        eps=_eps(c, kind),
        norm="layer" if kind in (*LAYER_NORM, "nemotron") else "rms",
        norm_offset=1.0 if kind.startswith("gemma") or kind == "nemotron" else 0.0,
        **_scales(c, kind, d_head),
        attn_softcap=c.get("attn_logit_softcapping") or 0.0,
        final_softcap=c.get("final_logit_softcapping") or 0.0,
        clip_qkv=c.get("clip_qkv") or 0.0,
        act=ACTIVATIONS.get(act, act),
        gated=kind not in PLAIN_MLP,
        pre_norms=kind not in NO_PRE_NORMS,
        post_norms=kind in POST_NORMS,
        parallel=kind in PARALLEL or c.get("use_parallel_residual", kind == "gpt_neox"),
        qk_norm=_qk_norm(c, kind),
        window=[window if s and window else 0 for s in slides],
        rope=rope,
        rope_long=rope_long,
        rope_switch=switch,
        rope_interleaved=kind in ("gptj", "cohere", "cohere2", "glm4"),
        query_beta=yarn.get("llama_4_scaling_beta", 0.0),
        query_length=yarn.get("original_max_position_embeddings", 0),
    )
