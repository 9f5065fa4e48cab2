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
    n_layers: int
    d_model: int
    n_heads: int
    n_kv_heads: int
    d_head: int
    d_mlp: int
    d_vocab: int
    eps: float
    norm_offset: float
    embed_scale: float
    attn_scale: float
    attn_softcap: float
    final_softcap: float
    act: str
    post_norms: bool
    qk_norm: bool
    window: list
    rope: list  # per layer: (inv_freq float64 tensor [d_head/2], attention_factor)


def rope_table(rope, d_head, max_positions):
    """(inverse frequencies float64 [d_head/2], attention factor) by their published definitions.

    rope: rope_theta, rope_type and the keys of that type of scaling.
    """
    theta = rope["rope_theta"]
    kind = rope.get("rope_type") or rope.get("type") or "default"
    i = torch.arange(d_head // 2, dtype=torch.float64)
    freq = theta ** (-2.0 * i / d_head)
    if kind == "default":
        return freq, 1.0
    factor = float(rope["factor"])
    if kind == "linear":
        return freq / factor, 1.0
    original = rope.get("original_max_position_embeddings") or max_positions
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


def read_facts(folder):
    c = json.loads((Path(folder) / "config.json").read_text())
    kind = c["model_type"]
    gemma = kind.startswith("gemma")
    n = c["num_hidden_layers"]
    d_head = c.get("head_dim") or c["hidden_size"] // c["num_attention_heads"]

    types = c.get("layer_types")
    window = c.get("sliding_window")
    if types is not None:
        slides = [t == "sliding_attention" for t in types]
    elif kind == "mistral":
        slides = [True] * n
    elif kind == "gemma2":
        slides = [i % 2 == 0 for i in range(n)]
    elif kind == "gemma3_text":
        slides = [(i + 1) % c.get("sliding_window_pattern", 6) != 0 for i in range(n)]
    else:
        slides = [
            bool(c.get("use_sliding_window")) and i >= c["max_window_layers"] for i in range(n)
        ]
    windows = [window if s and window else 0 for s in slides]

    positions = c["max_position_embeddings"]
    stored = c.get("rope_parameters")
    if kind == "gemma3_text":
        if stored is None:
            full = dict(c.get("rope_scaling") or {}, rope_theta=c["rope_theta"])
            stored = {
                "full_attention": full,
                "sliding_attention": {"rope_theta": c["rope_local_base_freq"]},
            }
        tables = {k: rope_table(v, d_head, positions) for k, v in stored.items()}
        rope = [tables["sliding_attention" if s else "full_attention"] for s in slides]
    else:
        if stored is None:
            stored = dict(c.get("rope_scaling") or {}, rope_theta=c.get("rope_theta", 10000.0))
        rope = [rope_table(stored, d_head, positions)] * n
    return Facts(
        n_layers=n,
        d_model=c["hidden_size"],
        n_heads=c["num_attention_heads"],
        n_kv_heads=c["num_key_value_heads"],
        d_head=d_head,
        d_mlp=c["intermediate_size"],
        d_vocab=c["vocab_size"],
        eps=c["rms_norm_eps"],
        norm_offset=1.0 if gemma else 0.0,
        embed_scale=math.sqrt(c["hidden_size"]) if gemma else 1.0,
        attn_scale=(c["query_pre_attn_scalar"] if gemma else d_head) ** -0.5,
        attn_softcap=c.get("attn_logit_softcapping") or 0.0,
        final_softcap=c.get("final_logit_softcapping") or 0.0,
        act="gelu_tanh" if gemma else "silu",
        post_norms=gemma,
        qk_norm=kind in ("qwen3", "gemma3_text"),
        window=windows,
        rope=rope,
    )
