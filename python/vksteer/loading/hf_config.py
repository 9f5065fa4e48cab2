"""From a config.json's dictionary to the facts of `Config`: every key is read, known to have no
influence, or refused by name.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ..errors import ModelError
from .config_reader import Reader, refuse_unknown
from .families import FAMILIES, OUTER, OUTER_TEXT
from .family_type import Family
from .hf_layers import n_ctx_and_rotations, windows
from .limits import LIMITS
from .unsupported import why_unsupported


def facts_from_hf(config: Mapping[str, Any]) -> dict[str, Any]:
    """The facts of a config.json's dictionary, as `Config` takes them. Raises ModelError
    naming the key at fault.
    """
    if not isinstance(config, Mapping):
        raise ModelError(f"a model configuration must be a dictionary, got {type(config).__name__}")
    family, architecture = find_family(config)
    config, tied_outside = _text_part(config, family)
    get = Reader(config, family)
    get.refuse_unknown()
    n_layers = get.integer("num_hidden_layers", LIMITS["n_layers"])
    d_model = get.integer("hidden_size", LIMITS["d_model"])
    n_heads = get.integer("num_attention_heads", LIMITS["n_heads"])
    d_head = _head_size(get, d_model, n_heads)
    window = windows(get, n_layers)
    tied = get.flag("tie_word_embeddings") if tied_outside is None else tied_outside
    return dict(
        architecture=architecture,
        model_type=family.model_type,
        n_layers=n_layers,
        d_model=d_model,
        n_heads=n_heads,
        n_kv_heads=get.optional_integer("num_key_value_heads", LIMITS["n_kv_heads"]) or n_heads,
        d_head=d_head,
        d_mlp=_mlp_size(get, d_model),
        d_vocab=get.integer("vocab_size", LIMITS["d_vocab"]),
        post_norms=family.post_norms,
        pre_norms=family.pre_norms,
        parallel=get.fact(family.parallel),
        gated=family.gated,
        act=get.activation(family.act),
        tied=tied,
        window=window,
        bos_id=next(iter(token_ids(config, "bos_token_id")), None),
        eos_ids=token_ids(config, "eos_token_id"),
        **_norms(get),
        **_biases(get),
        **_scales(get, d_model, d_head),
        **n_ctx_and_rotations(get, window, d_head),
    )


def _norms(get: Reader) -> dict[str, Any]:
    family = get.family
    qk_norm = family.qk_norm
    if family.qk_norm_key and not get.flag(family.qk_norm_key):
        qk_norm = ""
    return dict(
        norm=family.norm,
        norm_bias=family.norm_bias,
        norm_offset=family.norm_offset,
        norm_eps=get.number(family.eps, low=0.0) if isinstance(family.eps, str) else family.eps,
        qk_norm=qk_norm,
        qk_norm_bias=bool(qk_norm) and family.qk_norm_bias,
    )


def _biases(get: Reader) -> dict[str, Any]:
    family = get.family
    return dict(
        qkv_bias=get.fact(family.qkv_bias),
        o_bias=get.fact(family.o_bias),
        mlp_bias=get.fact(family.mlp_bias),
        unembed_bias=family.unembed_bias,
    )


def _scales(get: Reader, d_model: int, d_head: int) -> dict[str, Any]:
    """Factors, soft caps and clipping; of most families each is none."""
    defaults = get.defaults
    attn_scale = float(d_head) ** -0.5
    if "query_pre_attn_scalar" in defaults:
        attn_scale = get.number("query_pre_attn_scalar", low=0.0) ** -0.5
    if "attention_multiplier" in defaults:
        attn_scale = get.number("attention_multiplier", low=0.0)
    if "scale_attn_weights" in defaults and not get.flag("scale_attn_weights"):
        attn_scale = 1.0
    embed_scale = 1.0
    if get.family.scaled_embeddings:
        embed_scale = math.sqrt(d_model)
    if "embedding_multiplier" in defaults:
        embed_scale = get.number("embedding_multiplier", low=0.0)
    logit_scale = 1.0
    if "logit_scale" in defaults:
        logit_scale = get.number("logit_scale", low=0.0)
    if "logits_scaling" in defaults:
        logit_scale = 1.0 / get.number("logits_scaling", low=0.0)
    residual = "residual_multiplier"
    return dict(
        embed_scale=embed_scale,
        attn_scale=attn_scale,
        residual_scale=get.number(residual, low=0.0) if residual in defaults else 1.0,
        logit_scale=logit_scale,
        attn_softcap=get.optional_number("attn_logit_softcapping", 0.0),
        final_softcap=get.optional_number("final_logit_softcapping", 0.0),
        clip_qkv=get.optional_number("clip_qkv", 0.0),
    )


def _mlp_size(get: Reader, d_model: int) -> int:
    size = get.optional_integer("intermediate_size", LIMITS["d_mlp"])
    if size is None and get.name("intermediate_size") == "n_inner":
        return 4 * d_model
    return get.integer("intermediate_size", LIMITS["d_mlp"])


def _text_part(config: Mapping[str, Any], family: Family) -> tuple[Mapping[str, Any], bool | None]:
    """(the config of the text model, tie_word_embeddings of the outer config): of a model that also
    sees images only the text part is read; any other config is its own, with None.
    """
    text = config.get("text_config")
    if not isinstance(text, Mapping) or not family.outer:
        return config, None
    outer = {k: v for k, v in config.items() if k not in OUTER[family.outer]}
    refuse_unknown(outer, family, allowed=frozenset())
    ends = {k: config[k] for k in ("bos_token_id", "eos_token_id") if config.get(k) is not None}
    return {**text, **ends}, bool(config.get("tie_word_embeddings", True))


def _head_size(get: Reader, d_model: int, n_heads: int) -> int:
    d_head = get.optional_integer("head_dim", LIMITS["d_head"])
    if d_head is None:
        if d_model % n_heads:
            raise ModelError(
                f"config key {get.name('hidden_size')!r} = {d_model} is not a multiple of"
                f" {get.name('num_attention_heads')!r} = {n_heads}, and there is no 'head_dim'"
            )
        d_head = d_model // n_heads
    if d_head % 2:
        raise ModelError(f"config key 'head_dim' = {d_head} must be even: rotation pairs channels")
    width = get.raw("word_embed_proj_dim")
    if width not in (None, d_model):
        raise ModelError(
            f"config key 'word_embed_proj_dim' = {width!r} differs from 'hidden_size' = {d_model}:"
            " projections of the embeddings are not supported"
        )
    return d_head


def find_family(config: Mapping[str, Any]) -> tuple[Family, str]:
    """The family that a config names, and the architecture's name; ModelError listing the
    supported ones otherwise.
    """
    named = config.get("architectures")
    if named is not None and (
        not isinstance(named, list) or not all(isinstance(a, str) for a in named)
    ):
        raise ModelError(f"config key 'architectures' = {named!r} must be a list of names")
    model_type = config.get("model_type")
    outer = model_type if isinstance(model_type, str) and model_type in OUTER else ""
    if model_type is None and named and isinstance(config.get("text_config"), Mapping):
        outer = next((f.outer for f in FAMILIES if f.outer and named[0] in f.architectures), "")
    text = _text_model_type(config, outer) if outer else model_type
    for family in FAMILIES:
        if outer and family.outer != outer:
            continue
        if named:
            if named[0] in family.architectures and (text is None or text == family.model_type):
                return family, named[0]
        elif text == family.model_type:
            return family, family.architectures[-1 if outer else 0]
    raise ModelError(why_unsupported(config))


def _text_model_type(config: Mapping[str, Any], outer: str) -> Any:
    text = config.get("text_config")
    inner = text.get("model_type") if isinstance(text, Mapping) else None
    return OUTER_TEXT[outer] if inner is None else inner


def token_ids(config: Mapping[str, Any], key: str) -> tuple[int, ...]:
    """A token id or list of token ids as a tuple; null and negative ids (Llama 2's
    padding is -1) mean none.
    """
    value = config.get(key)
    values = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(v, int) and not isinstance(v, bool) for v in values):
        raise ModelError(f"config key {key!r} = {value!r} must be a token id or a list of them")
    return tuple(dict.fromkeys(v for v in values if v >= 0))
