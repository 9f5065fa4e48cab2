"""How the checkpoints of each family store the engine's tensors: under which names, and cut out of
which larger tensors.

The engine always gets matrices of shape [outputs, inputs], one each for queries, keys, values, gate
and up. A checkpoint may hold several of them in one tensor, transposed, with the rows of heads
interleaved, or as one tensor for each head; a norm may be stored once for two places, or not at
all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from ..base.types import Array
from .families import BY_MODEL_TYPE

if TYPE_CHECKING:
    from .config import Config


@dataclass(frozen=True)
class Part:
    """Where an engine tensor lies in a checkpoint."""

    name: str  # in the layer, or in the model; "{head}" for one tensor a head; "" for none stored
    # "whole"; "rows": a range of rows; "columns": a range of columns, transposed; "heads": for each
    # head one of its three blocks of rows; "flat": [heads, d_head] as one vector; "repeated": one
    # vector for all heads; "each": one tensor for each head, one after the other; "ones"
    how: str = "whole"
    # Config -> (rows before it, rows of the whole stored tensor): of "rows" and "columns"
    where: Callable[[Config], tuple[int, int]] | None = None
    block: int = 0  # of "heads": 0 queries, 1 keys, 2 values


@dataclass(frozen=True)
class Layout:
    """The names of a family's tensors."""

    parts: Mapping[str, Part]  # in a layer: the engine's name without "l.0."
    # of the text model's tensors, in order of preference
    prefixes: tuple[str, ...] = ("model.", "", "language_model.model.", "model.language_model.")
    layers: str = "layers."
    embed: str = "embed_tokens.weight"
    pos_embed: str = ""
    pos_before: int = 0  # rows of the table of positions before that of position 0
    ln_final: str = "norm.weight"  # "": without parameters
    bln_final: str = "norm.bias"
    unembed: tuple[str, ...] = ("lm_head.weight", "language_model.lm_head.weight")
    bunembed: str = "lm_head.bias"
    shared: Mapping[str, str] = field(default_factory=dict)  # part -> the part it is, if parallel

    def part(self, name: str, config: Config) -> Part:
        """Of an engine tensor of a layer."""
        if config.parallel and name in self.shared:
            name = self.shared[name]
        return self.parts[name]


def layout_of(config: Config) -> Layout:
    """The layout of a config's checkpoints."""
    return LAYOUTS[config.model_type]


def place(
    name: str, shape: tuple[int, ...], config: Config, prefix: str, unembed: str
) -> tuple[Part, tuple[str, ...]]:
    """(where an engine tensor of this shape lies, the names of the stored tensors that it is cut
    from). prefix: of the text model's tensors; unembed: the name of the unembedding's.
    """
    layout = layout_of(config)
    if name in ("unembed", "bunembed"):
        return Part(""), (unembed if name == "unembed" else layout.bunembed,)
    if name == "pos_embed":
        before = layout.pos_before
        part = Part(layout.pos_embed, "rows", lambda c: (before, before + c.n_ctx))
        return part, (prefix + layout.pos_embed,)
    if not name.startswith("l."):
        stored = getattr(layout, name)
        return (Part(stored), (prefix + stored,)) if stored else (Part("", "ones"), ())
    _, layer, short = name.split(".")
    part = layout.part(short, config)
    stored = f"{prefix}{layout.layers}{layer}.{part.name}"
    if part.how == "each":
        heads = range(shape[0] // config.d_head)
        return part, tuple(stored.replace("{head}", str(h)) for h in heads)
    return part, (stored,) if part.name else ()


def _q(c: Config) -> int:
    return c.n_heads * c.d_head


def _kv(c: Config) -> int:
    return c.n_kv_heads * c.d_head


def _fused(name: str, how: str) -> dict[str, Part]:
    """Queries, keys and values after one another in one tensor."""

    def all_rows(c: Config) -> int:
        return _q(c) + 2 * _kv(c)

    return {
        "q": Part(name, how, lambda c: (0, all_rows(c))),
        "k": Part(name, how, lambda c: (_q(c), all_rows(c))),
        "v": Part(name, how, lambda c: (_q(c) + _kv(c), all_rows(c))),
    }


def _named(prefix: str, parts: Mapping[str, Part]) -> dict[str, Part]:
    return {prefix + name: part for name, part in parts.items()}


def _linear(names: Mapping[str, str]) -> dict[str, Part]:
    """Matrices with their biases: the engine's names without w and b -> the stored module's."""
    parts = {}
    for name, stored in names.items():
        parts["w" + name] = Part(stored + ".weight")
        parts["b" + name] = Part(stored + ".bias")
    return parts


def _norm(names: Mapping[str, str]) -> dict[str, Part]:
    """Gains with their biases: the engine's names -> the stored module's."""
    parts = {}
    for name, stored in names.items():
        parts[name] = Part(stored + ".weight")
        parts["b" + name] = Part(stored + ".bias")
    return parts


_ATTENTION = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
}
_GATED = {"gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj"}
_PRE = {"ln1": "input_layernorm", "ln2": "post_attention_layernorm"}
_LLAMA = {
    **_linear(_ATTENTION),
    **_linear(_GATED),
    **_norm(_PRE),
    **_norm({"q_norm": "self_attn.q_norm", "k_norm": "self_attn.k_norm"}),
}
#: With post-norms, transformers' post_attention_layernorm is the norm on attention's *output*.
_AFTER = {
    "ln1_post": Part("post_attention_layernorm.weight"),
    "ln2_post": Part("post_feedforward_layernorm.weight"),
}
_GEMMA = {**_LLAMA, **_AFTER, "ln2": Part("pre_feedforward_layernorm.weight")}
_GATE_UP = {
    "wgate": Part("mlp.gate_up_proj.weight", "rows", lambda c: (0, 2 * c.d_mlp)),
    "wup": Part("mlp.gate_up_proj.weight", "rows", lambda c: (c.d_mlp, 2 * c.d_mlp)),
}
_PLAIN_MLP = _linear({"up": "mlp.fc1", "down": "mlp.fc2"})
_LN1_TWICE = {"ln2": "ln1", "bln2": "bln1"}


def _conv1d(module: str, name: str, rows: Callable[[Config], int]) -> dict[str, Part]:
    """A matrix stored as [inputs, outputs], with its bias."""
    return {
        "w" + name: Part(module + ".weight", "columns", lambda c: (0, rows(c))),
        "b" + name: Part(module + ".bias"),
    }


_GPT2 = Layout(
    {
        **_norm({"ln1": "ln_1", "ln2": "ln_2"}),
        **_named("w", _fused("attn.c_attn.weight", "columns")),
        **_named("b", _fused("attn.c_attn.bias", "rows")),
        **_conv1d("attn.c_proj", "o", lambda c: c.d_model),
        **_conv1d("mlp.c_fc", "up", lambda c: c.d_mlp),
        **_conv1d("mlp.c_proj", "down", lambda c: c.d_model),
    },
    prefixes=("transformer.", ""),
    layers="h.",
    embed="wte.weight",
    pos_embed="wpe.weight",
    ln_final="ln_f.weight",
    bln_final="ln_f.bias",
)
_NEOX_QKV = {
    name: [Part(f"attention.query_key_value.{name}", "heads", block=i) for i in range(3)]
    for name in ("weight", "bias")
}
_GPT_NEOX = Layout(
    {
        **_norm(_PRE),
        **{"w" + n: part for n, part in zip("qkv", _NEOX_QKV["weight"], strict=True)},
        **{"b" + n: part for n, part in zip("qkv", _NEOX_QKV["bias"], strict=True)},
        **_linear({"o": "attention.dense", "up": "mlp.dense_h_to_4h", "down": "mlp.dense_4h_to_h"}),
    },
    prefixes=("gpt_neox.", ""),
    embed="embed_in.weight",
    ln_final="final_layer_norm.weight",
    bln_final="final_layer_norm.bias",
    unembed=("embed_out.weight", "lm_head.weight"),
)
_GPTJ = Layout(
    {
        **_norm({"ln1": "ln_1"}),
        **_linear(
            {
                "q": "attn.q_proj",
                "k": "attn.k_proj",
                "v": "attn.v_proj",
                "o": "attn.out_proj",
                "up": "mlp.fc_in",
                "down": "mlp.fc_out",
            }
        ),
    },
    prefixes=("transformer.", ""),
    layers="h.",
    embed="wte.weight",
    ln_final="ln_f.weight",
    bln_final="ln_f.bias",
    shared=_LN1_TWICE,
)
_OPT = Layout(
    {
        **_norm({"ln1": "self_attn_layer_norm", "ln2": "final_layer_norm"}),
        **_linear({**_ATTENTION, "o": "self_attn.out_proj", "up": "fc1", "down": "fc2"}),
    },
    prefixes=("model.decoder.", "decoder.", ""),
    pos_embed="embed_positions.weight",
    pos_before=2,
    ln_final="final_layer_norm.weight",
    bln_final="final_layer_norm.bias",
)
_PHI = Layout(
    {
        **_norm({"ln1": "input_layernorm"}),
        **_linear({**_ATTENTION, "o": "self_attn.dense"}),
        **_PLAIN_MLP,
        "q_norm": Part("self_attn.q_layernorm.weight", "repeated"),
        "k_norm": Part("self_attn.k_layernorm.weight", "repeated"),
        "bq_norm": Part("self_attn.q_layernorm.bias", "repeated"),
        "bk_norm": Part("self_attn.k_layernorm.bias", "repeated"),
    },
    ln_final="final_layernorm.weight",
    bln_final="final_layernorm.bias",
    shared=_LN1_TWICE,
)
_STABLELM = Layout(
    {
        **_LLAMA,
        "q_norm": Part("self_attn.q_layernorm.norms.{head}.weight", "each"),
        "k_norm": Part("self_attn.k_layernorm.norms.{head}.weight", "each"),
    },
    shared=_LN1_TWICE,
)
_COHERE = Layout(
    {
        **_LLAMA,
        "q_norm": Part("self_attn.q_norm.weight", "flat"),
        "k_norm": Part("self_attn.k_norm.weight", "flat"),
    },
    shared=_LN1_TWICE,
)
_OLMO = Layout(
    {**_LLAMA, "ln1": Part("", "ones"), "ln2": Part("", "ones")},
    ln_final="",
)
_OLMO2 = Layout({**_LLAMA, **_AFTER})
_PHI3 = Layout({**_LLAMA, **_GATE_UP, **_named("w", _fused("self_attn.qkv_proj.weight", "rows"))})
_GLM4 = Layout(
    {
        **_LLAMA,
        **_GATE_UP,
        "ln1_post": Part("post_self_attn_layernorm.weight"),
        "ln2_post": Part("post_mlp_layernorm.weight"),
    }
)
_USUAL = Layout(_LLAMA)

LAYOUTS: dict[str, Layout] = dict.fromkeys(BY_MODEL_TYPE, _USUAL) | {
    "gemma2": Layout(_GEMMA),
    "gemma3_text": Layout(_GEMMA),
    "gpt2": _GPT2,
    "gpt_neox": _GPT_NEOX,
    "gptj": _GPTJ,
    "opt": _OPT,
    "phi": _PHI,
    "phi3": _PHI3,
    "olmo": _OLMO,
    "olmo2": _OLMO2,
    "olmo3": _OLMO2,
    "exaone4": _OLMO2,
    "cohere": _COHERE,
    "cohere2": _COHERE,
    "stablelm": _STABLELM,
    "glm4": _GLM4,
}


# -- cutting ---------------------------------------------------------------------------------------


def stored_shape(part: Part, shape: tuple[int, ...], config: Config) -> tuple[int, ...]:
    """The shape that a stored tensor must have for an engine tensor of `shape` to be cut from
    it.
    """
    if part.how == "rows":
        return (_whole_rows(part, config), *shape[1:])
    if part.how == "columns":
        return (shape[1], _whole_rows(part, config))
    if part.how == "heads":
        return (3 * shape[0], *shape[1:])
    if part.how in ("repeated", "each"):
        return (config.d_head,)
    if part.how == "flat":
        return (shape[0] // config.d_head, config.d_head)
    return shape


def row_ranges(part: Part, shape: tuple[int, ...], config: Config) -> list[tuple[int, int]] | None:
    """(first row, rows) of the stored tensor, one after another the engine's tensor as it is; None
    where the layout must be turned.
    """
    if part.how in ("whole", "flat"):
        return [(0, shape[0])]
    if part.how == "rows":
        assert part.where is not None
        return [(part.where(config)[0], shape[0])]
    if part.how == "heads":
        d = config.d_head
        return [((3 * head + part.block) * d, d) for head in range(config.n_heads)]
    return None


def cut(part: Part, stored: Sequence[Array], shape: tuple[int, ...], config: Config) -> Array:
    """The engine's tensor from the stored ones (several only for "each"), C-contiguous, where
    `row_ranges` has none.
    """
    first = stored[0]
    if part.how == "columns":
        assert part.where is not None
        begin = part.where(config)[0]
        return np.ascontiguousarray(first[:, begin : begin + shape[0]].T)
    if part.how == "repeated":
        return np.tile(first, shape[0] // config.d_head)
    if part.how == "each":
        return np.concatenate(stored)
    raise AssertionError(part.how)


def _whole_rows(part: Part, config: Config) -> int:
    assert part.where is not None
    return part.where(config)[1]
