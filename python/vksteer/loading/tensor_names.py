"""Which tensors a model of a given Config has: the engine's names and shapes, and what Hugging Face
and GGUF files call them.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from .config import Config
from .layouts import place

#: Buffers that old checkpoints have inside layers; the config says everything that they hold.
HARMLESS_LAYER_TENSOR = re.compile(
    r"\.(rotary_emb\.inv_freq|(self_attn|attn|attention)\.masked_bias|(attn|attention)\.bias)$"
)


class EngineTensor(NamedTuple):
    """A tensor that the engine needs."""

    name: str  # docs/architecture.md: "embed", "l.0.wq", ...
    shape: tuple[int, ...]


def engine_tensors(config: Config) -> list[EngineTensor]:
    """Every tensor of a model with this config, in the forward pass's order."""
    c = config
    q, kv = c.n_heads * c.d_head, c.n_kv_heads * c.d_head
    layer: dict[str, tuple[int, ...]] = {}
    if c.pre_norms:
        layer["ln1"] = (c.d_model,)
        if c.norm_bias:
            layer["bln1"] = (c.d_model,)
    layer.update(wq=(q, c.d_model), wk=(kv, c.d_model), wv=(kv, c.d_model))
    if c.qkv_bias:
        layer.update(bq=(q,), bk=(kv,), bv=(kv,))
    if c.qk_norm:
        one = c.qk_norm == "head"
        layer.update(q_norm=(c.d_head if one else q,), k_norm=(c.d_head if one else kv,))
    if c.qk_norm_bias:
        layer.update(bq_norm=(q,), bk_norm=(kv,))
    layer["wo"] = (c.d_model, q)
    if c.o_bias:
        layer["bo"] = (c.d_model,)
    if c.post_norms:
        layer["ln1_post"] = (c.d_model,)
    if c.pre_norms:
        layer["ln2"] = (c.d_model,)
        if c.norm_bias:
            layer["bln2"] = (c.d_model,)
    if c.gated:
        layer["wgate"] = (c.d_mlp, c.d_model)
    layer["wup"] = (c.d_mlp, c.d_model)
    if c.mlp_bias and c.gated:
        layer["bgate"] = (c.d_mlp,)
    if c.mlp_bias:
        layer["bup"] = (c.d_mlp,)
    layer["wdown"] = (c.d_model, c.d_mlp)
    if c.mlp_bias:
        layer["bdown"] = (c.d_model,)
    if c.post_norms:
        layer["ln2_post"] = (c.d_model,)
    result = [EngineTensor("embed", (c.d_vocab, c.d_model))]
    if c.pos_embed:
        result.append(EngineTensor("pos_embed", (c.n_ctx, c.d_model)))
    result += [
        EngineTensor(f"l.{i}.{name}", shape)
        for i in range(c.n_layers)
        for name, shape in layer.items()
    ]
    result.append(EngineTensor("ln_final", (c.d_model,)))
    if c.norm_bias:
        result.append(EngineTensor("bln_final", (c.d_model,)))
    if not c.tied:
        result.append(EngineTensor("unembed", (c.d_vocab, c.d_model)))
    if c.unembed_bias:
        result.append(EngineTensor("bunembed", (c.d_vocab,)))
    return result


def hf_name(name: str, config: Config, prefix: str, unembed: str) -> str:
    """What a Hugging Face checkpoint calls the tensor that holds the engine's."""
    return place(name, (config.d_head,), config, prefix, unembed)[1][0]
