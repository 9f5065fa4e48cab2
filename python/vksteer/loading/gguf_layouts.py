"""What GGUF files of each architecture hold beside the usual: metadata keys, tensors in one piece,
rows in another order. The facts are those of llama.cpp's converter and loader; the names of tensors
are those of the `gguf` package's tables.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Layout:
    """One `general.architecture`."""

    model_type: str  # the family whose config.json the metadata are translated into
    # the rows of each head of q and k are stored interleaved, (0, d/2, 1, d/2 + 1, ...), for
    # llama.cpp's rotation of neighbouring channels
    permuted: bool = False
    reads: frozenset[str] = frozenset()  # metadata keys that only this architecture has
    # key of config.json -> (metadata key, value where the file has none; None: it must be there)
    numbers: Mapping[str, tuple[str, float | None]] = field(default_factory=dict)
    fused_qkv: bool = False  # "attn_qkv" may hold the rows of q, k and v, in this order
    fused_gate: bool = False  # "ffn_up" may hold the rows of gate and up, in this order
    # part of a layer -> its name, where it is not the usual one
    names: Mapping[str, str] = field(default_factory=dict)
    shared_norm: bool = False  # attention and MLP of a parallel layer have one norm, "attn_norm"
    needs_unembed: bool = False  # llama.cpp refuses a file without "output.weight"
    # the period of sliding layers, the last of which is full, where the file lists none; 0: no rule
    period: int = 0
    needs_window: bool = False  # without "attention.sliding_window" the file is incomplete


_SOFTCAPS = frozenset({"attn_logit_softcapping", "final_logit_softcapping"})
_RESIDUAL = frozenset({"use_parallel_residual"})

LAYOUTS = {
    "llama": Layout("llama", permuted=True),
    "gemma": Layout("gemma"),
    "gemma2": Layout("gemma2", reads=_SOFTCAPS),
    "gemma3": Layout("gemma3_text", reads=_SOFTCAPS, needs_window=True),
    "qwen2": Layout("qwen2"),
    "qwen3": Layout("qwen3"),
    "gpt2": Layout("gpt2", fused_qkv=True),
    "gptneox": Layout("gpt_neox", fused_qkv=True, reads=_RESIDUAL, needs_unembed=True),
    # no converter is known to write it: names as in the package's table, rows as transformers has
    # them
    "gptj": Layout("gptj", shared_norm=True, needs_unembed=True),
    "phi2": Layout("phi", shared_norm=True, fused_qkv=True, needs_unembed=True),
    "phi3": Layout("phi3", fused_qkv=True, fused_gate=True),
    "olmo": Layout("olmo", permuted=True, numbers={"clip_qkv": ("attention.clamp_kqv", 0.0)}),
    "olmo2": Layout("olmo2", needs_unembed=True, period=4),  # and OLMo 3, which has windows
    "smollm3": Layout("smollm3", permuted=True),
    "granite": Layout(
        "granite",
        permuted=True,
        numbers={
            "embedding_multiplier": ("embedding_scale", 1.0),
            "residual_multiplier": ("residual_scale", 1.0),
            "logits_scaling": ("logit_scale", None),
        },
    ),
    "command-r": Layout("cohere", shared_norm=True, numbers={"logit_scale": ("logit_scale", None)}),
    "cohere2": Layout(
        "cohere2",
        shared_norm=True,
        numbers={"logit_scale": ("logit_scale", None)},
        period=4,
        needs_window=True,
    ),
    # the converter writes use_parallel_residual true where the config does not say it; the layers
    # are parallel where they have one norm
    "stablelm": Layout("stablelm", shared_norm=True, reads=_RESIDUAL, needs_unembed=True),
    "glm4": Layout("glm4", fused_qkv=True, fused_gate=True),
    "exaone4": Layout("exaone4", period=4),
    "mistral3": Layout(
        "ministral3",
        permuted=True,
        reads=frozenset({"attention.temperature_scale", "attention.temperature_length"}),
    ),
    "arcee": Layout("arcee", permuted=True),
    "nemotron": Layout("nemotron", needs_unembed=True),
    "seed_oss": Layout("seed_oss", names={"ln2": "post_attention_norm.weight"}),
}

_LAYER = {
    "ln1": "attn_norm.weight",
    "bln1": "attn_norm.bias",
    "ln2": "ffn_norm.weight",
    "bln2": "ffn_norm.bias",
    "ln1_post": "post_attention_norm.weight",
    "ln2_post": "post_ffw_norm.weight",
    "wq": "attn_q.weight",
    "wk": "attn_k.weight",
    "wv": "attn_v.weight",
    "wo": "attn_output.weight",
    "bq": "attn_q.bias",
    "bk": "attn_k.bias",
    "bv": "attn_v.bias",
    "bo": "attn_output.bias",
    "q_norm": "attn_q_norm.weight",
    "k_norm": "attn_k_norm.weight",
    "wgate": "ffn_gate.weight",
    "wup": "ffn_up.weight",
    "wdown": "ffn_down.weight",
    "bgate": "ffn_gate.bias",
    "bup": "ffn_up.bias",
    "bdown": "ffn_down.bias",
}
_TOP = {
    "embed": "token_embd.weight",
    "pos_embed": "position_embd.weight",
    "unembed": "output.weight",
    "bunembed": "output.bias",
    "ln_final": "output_norm.weight",
    "bln_final": "output_norm.bias",
}


def gguf_name(name: str, arch: str = "llama") -> str | None:
    """What a GGUF file of an architecture calls the engine's tensor; None where GGUF has no name
    for it.
    """
    if name in _TOP:
        return _TOP[name]
    _, layer, part = name.split(".")
    found = LAYOUTS[arch].names.get(part) or _LAYER.get(part)
    return None if found is None else f"blk.{layer}.{found}"
