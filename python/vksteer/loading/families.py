"""The table of supported model families: which keys of a config.json each understands, and
what they default to.

The defaults are those of transformers' configuration classes (tests/test_config.py compares them
with the installed ones), because a released config.json leaves out what equals its class's default.
"""

from __future__ import annotations

import textwrap

from . import family_rows_layernorm as layer
from . import family_rows_rms as rms
from .family_type import Family
from .rope import UNDERSTOOD

FAMILIES = (
    rms.LLAMA,
    rms.MISTRAL,
    rms.GEMMA2,
    rms.GEMMA3,
    rms.QWEN2,
    rms.QWEN3,
    layer.GPT2,
    layer.GPT_NEOX,
    layer.GPTJ,
    layer.OPT,
    layer.PHI,
    rms.PHI3,
    layer.OLMO,
    rms.OLMO2,
    rms.OLMO3,
    rms.SMOLLM3,
    rms.GRANITE,
    layer.COHERE,
    layer.COHERE2,
    layer.STABLELM,
    rms.GLM4,
    rms.EXAONE4,
    rms.MINISTRAL3,
    rms.ARCEE,
    layer.NEMOTRON,
    rms.SEED_OSS,
    rms.GEMMA,
)
BY_MODEL_TYPE: dict[str, Family] = {family.model_type: family for family in FAMILIES}

#: Keys that say how the rotation is scaled; rope.py reads them.
ROPE_KEYS = frozenset(
    {
        "rope_theta",
        "rope_scaling",
        "rope_parameters",
        "original_max_position_embeddings",
        "partial_rotary_factor",
    }
)

#: Keys of the outer config of a model that also sees images, by its model_type; its text_config is
#: what is read.
OUTER = {
    "gemma3": frozenset(
        {
            "text_config",
            "vision_config",
            "mm_tokens_per_image",
            "boi_token_index",
            "eoi_token_index",
            "image_token_index",
            "boi_token_id",
            "eoi_token_id",
            "image_token_id",
            "tie_word_embeddings",
        }
    ),
    "mistral3": frozenset(
        {
            "text_config",
            "vision_config",
            "image_token_index",
            "image_token_id",
            "projector_hidden_act",
            "vision_feature_layer",
            "multimodal_projector_bias",
            "spatial_merge_size",
            "tie_word_embeddings",
        }
    ),
}
#: The text model's model_type where an outer config's text_config does not say it.
OUTER_TEXT = {"gemma3": "gemma3_text", "mistral3": "mistral"}

#: Activation names of transformers -> the engine's.
ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu": "gelu",
    "relu": "relu",
    "relu2": "relu2",
}


def markdown() -> str:
    """The README's table of supported families, and what holds for all of them."""
    lines = [
        "| family | architecture | GGUF | layers | MLP | positions | windows | scalings |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for family in FAMILIES:
        cells = (
            family.title,
            ", ".join(f"`{a}`" for a in family.architectures),
            ", ".join(f"`{a}`" for a in family.gguf) or "none",
            _layers(family),
            ("gated " if family.gated else "plain ") + ACTIVATIONS[family.defaults[family.act]],
            _positions(family),
            family.window_note,
            _scalings(family),
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join((*lines, "", *textwrap.wrap(_FOR_ALL, 100)))


_FOR_ALL = (
    f"Rope scalings: all are {', '.join(UNDERSTOOD)}. Every family loads from safetensors in"
    " float32, bfloat16 or float16, and, where the table has a name for it, from GGUF files of any"
    " type that the `gguf` package knows."
)


def _layers(family: Family) -> str:
    """Kind and place of norms, and the order of attention and MLP."""
    norm = {"rms": "RMS norm", "layer": "LayerNorm"}[family.norm]
    if not family.norm_parameters:
        norm += " without parameters"
    elif family.norm == "layer" and not family.norm_bias:
        norm += " without bias"
    if family.norm_offset:
        norm += " (1 + w)"
    place = {
        (True, False): "before",
        (False, True): "after",
        (True, True): "before and after",
    }[family.pre_norms, family.post_norms]
    if family.parallel:
        order = "parallel, one norm" if family.shared_norm else "parallel, two norms"
        key = family.parallel
        if isinstance(key, str):
            usual, other = order, "sequential"
            if not family.defaults[key]:
                usual, other = other, usual
            order = f"{usual} (or {other}: `{key}`)"
    else:
        order = f"sequential, norms {place}"
    heads = {
        "": "",
        "head": "; norm of each query and key",
        "wide": "; norm of queries and keys over all heads",
        "layer": "; LayerNorm of each query and key",
    }[family.qk_norm]
    heads += f" if `{family.qk_norm_key}`" if family.qk_norm_key else ""
    return f"{norm}; {order}{heads}{_factors(family)}"


def _factors(family: Family) -> str:
    """Multipliers, clipping and soft caps."""
    said = {
        "residual_multiplier": "multipliers of embeddings, scores, residual stream and logits",
        "logit_scale": "scaled logits",
        "clip_qkv": "clipped queries, keys and values",
    }
    found = [text for key, text in said.items() if key in family.defaults]
    if family.scaled_embeddings:
        found.append("scaled embeddings")
    if family.defaults.get("attn_logit_softcapping") is not None:
        found.append("soft caps on scores and logits")
    return "".join("; " + text for text in found)


def _positions(family: Family) -> str:
    if family.positions == "learned":
        return "learned"
    text = "rotary"
    if "rotary_dim" in family.defaults:
        text += ", first `rotary_dim` channels"
    elif family.partial is not None:
        text += f", first `{family.partial_key}` of a head (default {family.partial:g})"
    if family.rope_interleaved:
        text += ", interleaved pairs"
    none = {
        "": "",
        "full": "; none in layers with full attention",
        "listed": "; none where `no_rope_layers` says so",
    }[family.unrotated]
    if family.model_type == "ministral3":
        none = "; queries scaled by position"
    return text + none


def _scalings(family: Family) -> str:
    if family.positions == "learned" or family.rope_types == ("default",):
        return "none"
    return ", ".join(family.rope_types) or "all"
