"""A GGUF header's facts: metadata is translated into the keys of a config.json, so that both kinds
of files pass the same checks.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..errors import ModelError
from . import rope as rotation
from .families import BY_MODEL_TYPE
from .family_type import Family
from .gguf_file import GGUFFile, end_tokens
from .gguf_layouts import LAYOUTS, Layout
from .gguf_metadata import Metadata
from .gguf_rope import rope_keys
from .hf_config import facts_from_hf
from .limits import LIMITS

#: Keys below "{architecture}." of all architectures that are read here.
_READ = frozenset(
    {
        "vocab_size",
        "context_length",
        "embedding_length",
        "block_count",
        "feed_forward_length",
        "attention.head_count",
        "attention.head_count_kv",
        "attention.key_length",
        "attention.value_length",
        "attention.layer_norm_epsilon",
        "attention.layer_norm_rms_epsilon",
        "attention.scale",
        "attention.sliding_window",
        "attention.sliding_window_pattern",
        "rope.dimension_count",
        "rope.freq_base",
        "rope.freq_base_swa",
        "rope.scaling.type",
        "rope.scaling.factor",
        "rope.scale_linear",
        "rope.scaling.original_context_length",
        "rope.scaling.finetuned",
        "rope.scaling.attn_factor",
        "rope.scaling.yarn_ext_factor",
        "rope.scaling.yarn_attn_factor",
        "rope.scaling.yarn_beta_fast",
        "rope.scaling.yarn_beta_slow",
        "rope.scaling.yarn_log_multiplier",
    }
)

#: Keys of Ollama's Gemma 3 files -> the usual ones. Their files hold the vision tower, too, whose
#: keys and tensors say nothing about the language model.
_OLLAMA_NAMES = {
    "rope.global.freq_base": "rope.freq_base",
    "rope.local.freq_base": "rope.freq_base_swa",
    "rope.scaling.beta_fast": "rope.scaling.yarn_beta_fast",
    "rope.scaling.beta_slow": "rope.scaling.yarn_beta_slow",
}
_OLLAMA_VISION = ("vision.", "mm.")

#: Models whose query_pre_attn_scalar is d_model / n_heads rather than the head size; GGUF files do
#: not say so, llama.cpp tells them by size.
_SCALE_BY_WIDTH = {("gemma2", 46), ("gemma3", 62)}  # the 27B ones


def facts_from_gguf(file: GGUFFile) -> dict[str, Any]:
    """The facts of an opened GGUF file, as `Config` takes them. Gains that other files store as w
    of (1 + w) are stored as 1 + w, so norm_offset is 0.
    """
    try:
        return _facts(file)
    except ModelError as error:
        if str(file.path) in str(error):
            raise
        raise ModelError(f"{file.path}: {error}") from error


def _facts(file: GGUFFile) -> dict[str, Any]:
    get, layout = _opened(file)
    family = _family(get, layout)
    facts = facts_from_hf(_as_hf(get, layout, family))
    changes: dict[str, Any] = {"norm_offset": 0.0}
    if family.o_bias is not True:
        # transformers' flag may set q, k, v and o together
        changes["o_bias"] = "blk.0.attn_output.bias" in file.tensors
    if get.number("attention.scale", 0.0):
        changes["attn_scale"] = get.number("attention.scale", 0.0)
    if facts["rope"] and "rope_freqs.weight" in file.tensors:
        factors = file.array("rope_freqs.weight", "float32")
        changes["rope"] = (rotation.divided(facts["rope"][0], factors), *facts["rope"][1:])
    return facts | changes


def _opened(file: GGUFFile) -> tuple[Metadata, Layout]:
    """The metadata of a file that holds a model of a supported architecture."""
    md = file.metadata
    arch = md.get("general.architecture")
    layout = LAYOUTS.get(arch) if isinstance(arch, str) else None
    if layout is None or not isinstance(arch, str):
        raise ModelError(
            f"{file.path}: GGUF architecture {arch!r} is not supported; supported:"
            f" {', '.join(sorted(LAYOUTS))}"
        )
    kind = md.get("general.type", "model")
    if not isinstance(kind, str) or kind != "model":
        raise ModelError(f"{file.path}: is a {repr(kind)[:80]}, not a model")
    get = Metadata(file, arch, _ollama_gemma3(file) if arch == "gemma3" else {})
    ollama = {k for k in get.own() if k in _OLLAMA_NAMES or k.startswith(_OLLAMA_VISION)}
    if get.number("rope.scaling.extrapolation_factor", 0.0) == 1.0:
        ollama.add("rope.scaling.extrapolation_factor")
    numbers = {key for key, _ in layout.numbers.values()}
    get.refuse_unknown(_READ | layout.reads | numbers | (ollama if arch == "gemma3" else set()))
    return get, layout


def _ollama_gemma3(file: GGUFFile) -> dict[str, Any]:
    """What Ollama's converter leaves out of Gemma 3 files, or names in its own way, under the usual
    keys (without "gemma3."); empty for files of other converters.
    """
    own = {k.removeprefix("gemma3."): v for k, v in file.metadata.items() if "gemma3." in k}
    if not any(k in _OLLAMA_NAMES or k.startswith(_OLLAMA_VISION) for k in own) and not any(
        name.startswith(("v.", "mm.")) for name in file.tensors
    ):
        return {}
    found = {usual: own[k] for k, usual in _OLLAMA_NAMES.items() if k in own}
    found.setdefault("attention.layer_norm_rms_epsilon", 1e-6)
    context = own.get("context_length")
    # The models with vision were stretched from 16k to 128k positions by a factor of 8.
    if isinstance(context, int) and context >= 131072 and "rope.scaling.factor" not in own:
        found |= {"rope.scaling.type": "linear", "rope.scaling.factor": 8.0}
    return {k: v for k, v in found.items() if k not in own}


def _family(get: Metadata, layout: Layout) -> Family:
    """The family whose config.json the metadata are translated into. One architecture may serve
    two: windows make a Mistral of a llama file and an OLMo 3 of an olmo2 file; a mistral3 file
    without a factor on queries holds a Mistral.
    """
    model_type = layout.model_type
    window = get.integer("attention.sliding_window", 0)
    if get.arch == "llama" and window:
        model_type = "mistral"
    elif get.arch == "olmo2" and window:
        model_type = "olmo3"
    elif get.arch == "mistral3" and not get.number("attention.temperature_scale", 0.0):
        model_type = "mistral"
    return BY_MODEL_TYPE[model_type]


def _as_hf(get: Metadata, layout: Layout, family: Family) -> dict[str, Any]:
    """The metadata under the keys of the family's config.json."""
    file = get.file
    embed = file.tensors.get("token_embd.weight")
    if embed is None or len(embed.shape) != 2:
        raise ModelError(f"{file.path}: tensor 'token_embd.weight' is missing or not a matrix")
    if layout.needs_unembed and "output.weight" not in file.tensors:
        raise ModelError(f"{file.path}: tensor 'output.weight' is missing")
    n_layers = get.integer("block_count")
    if not 1 <= n_layers <= LIMITS["n_layers"]:  # before anything is listed layer by layer
        raise get.error("block_count", f"must lie between 1 and {LIMITS['n_layers']}")
    d_head = _head_size(get, embed.shape[0])
    usual: dict[str, Any] = {
        "hidden_size": get.integer("embedding_length"),
        "intermediate_size": get.integer("feed_forward_length"),
        "num_hidden_layers": n_layers,
        "num_attention_heads": get.integer("attention.head_count"),
        "num_key_value_heads": _kv_heads(get, family),
        "head_dim": d_head if "head_dim" in family.defaults else None,
        "max_position_embeddings": get.integer("context_length"),
    }
    name = {**family.keys, **family.aliases}
    hf: dict[str, Any] = {
        "architectures": [family.architectures[0]],
        "model_type": family.model_type,
        "vocab_size": embed.shape[0],
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "bos_token_id": file.metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": end_tokens(file.metadata),
        **{name.get(key, key): value for key, value in usual.items() if value is not None},
        **_epsilon(get, family),
        **_choices(get, family),
        **_numbers(get, layout, d_head),
        **_windows(get, layout, family, n_layers),
    }
    if "query_pre_attn_scalar" in family.defaults:
        hf |= _gemma_keys(get, family, d_head)
    if family.positions == "rotary":
        hf |= rope_keys(get, family, d_head)
        if "original_max_position_embeddings" in family.defaults:
            original = get.integer("rope.scaling.original_context_length", 0)
            hf["original_max_position_embeddings"] = original or get.integer("context_length")
    return hf


def _head_size(get: Metadata, n_rows: int) -> int:
    """The head size, after ModelError where another size contradicts it or the embedding's rows."""
    n_heads, d_model = get.integer("attention.head_count"), get.integer("embedding_length")
    d_head = get.integer(
        "attention.key_length", d_model // n_heads if n_heads and d_model % n_heads == 0 else None
    )
    if get.integer("attention.value_length", d_head) != d_head:
        raise get.error("attention.value_length", f"differs from the head size {d_head}")
    if get.integer("vocab_size", n_rows) != n_rows:
        raise get.error("vocab_size", f"contradicts tensor 'token_embd.weight' with {n_rows} rows")
    return d_head


def _kv_heads(get: Metadata, family: Family) -> int | None:
    n_heads = get.integer("attention.head_count")
    kv = get.integer("attention.head_count_kv", n_heads)
    if "num_key_value_heads" in family.defaults:
        return kv
    if kv != n_heads:
        raise get.error(
            "attention.head_count_kv",
            f"differs from the {n_heads} query heads, which {get.arch} does not have",
        )
    return None


def _epsilon(get: Metadata, family: Family) -> dict[str, float]:
    rms = family.norm == "rms"
    key = "attention.layer_norm_rms_epsilon" if rms else "attention.layer_norm_epsilon"
    if get.raw(key) is None:
        raise get.error(key, "is missing")
    value = get.number(key, 0.0)
    if isinstance(family.eps, str):
        return {family.eps: value}
    if value != family.eps:
        raise get.error(key, f"must be {family.eps} for {get.arch}")
    return {}


def _choices(get: Metadata, family: Family) -> dict[str, bool]:
    """What a config.json says by a flag and a GGUF file by the tensors that it has."""
    tensors, hf = get.file.tensors, {}
    if isinstance(family.o_bias, str):
        hf[family.o_bias] = "blk.0.attn_output.bias" in tensors
    if isinstance(family.qkv_bias, str):
        hf[family.qkv_bias] = any(f"blk.0.attn_{x}.bias" in tensors for x in ("q", "qkv"))
    if isinstance(family.mlp_bias, str):
        hf[family.mlp_bias] = "blk.0.ffn_up.bias" in tensors
    if family.qk_norm_key:
        hf[family.qk_norm_key] = "blk.0.attn_q_norm.weight" in tensors
    if isinstance(family.parallel, str):
        if family.shared_norm:
            hf[family.parallel] = "blk.0.ffn_norm.weight" not in tensors
            if hf[family.parallel] and get.flag("use_parallel_residual") is False:
                raise ModelError(f"{get.file.path}: tensor 'blk.0.ffn_norm.weight' is missing")
        else:
            value = get.flag("use_parallel_residual")
            if value is None:
                raise get.error("use_parallel_residual", "is missing")
            hf[family.parallel] = value
    return hf


def _numbers(get: Metadata, layout: Layout, d_head: int) -> dict[str, float]:
    """Multipliers and clipping."""
    hf = {}
    for key, (metadata, default) in layout.numbers.items():
        if get.raw(metadata) is None and default is None:
            raise get.error(metadata, "is missing")
        hf[key] = get.number(metadata, 0.0) or default or 0.0
    if hf.get("clip_qkv") == 0.0:
        del hf["clip_qkv"]
    if layout.model_type == "granite":
        hf["attention_multiplier"] = get.number("attention.scale", 0.0) or float(d_head) ** -0.5
    return hf


def _gemma_keys(get: Metadata, family: Family, d_head: int) -> dict[str, Any]:
    """The scale of attention scores and the soft caps of Gemma 2 and 3."""
    n_heads, d_model = get.integer("attention.head_count"), get.integer("embedding_length")
    by_width = (get.arch, get.integer("block_count")) in _SCALE_BY_WIDTH
    hf: dict[str, Any] = {"query_pre_attn_scalar": d_model / n_heads if by_width else d_head}
    caps = ["final_logit_softcapping"]
    if get.arch == "gemma2":
        caps.append("attn_logit_softcapping")
    elif get.number("attn_logit_softcapping", 0.0):
        raise get.error("attn_logit_softcapping", f"is not understood for {get.arch}")
    for key in caps:
        hf[key] = family.defaults[key] if get.raw(key) is None else get.number(key, 0.0)
    return hf


def _windows(get: Metadata, layout: Layout, family: Family, n_layers: int) -> dict[str, Any]:
    """The sliding window and which layers have it: newer files list booleans, or give the
    period.
    """
    window = get.integer("attention.sliding_window", 0)
    if layout.needs_window and not window:
        raise get.error("attention.sliding_window", "is missing")
    if "sliding_window" not in family.defaults:
        if window:
            raise get.error("attention.sliding_window", f"is not understood for {get.arch}")
        return {}
    if get.arch == "phi3" and get.raw("attention.sliding_window") is None:
        window = _phi3_window(get, n_layers)
    default = family.defaults["sliding_window"] if get.arch == "gemma2" else None
    hf: dict[str, Any] = {"sliding_window": window or default}
    if "use_sliding_window" in family.defaults:
        hf["use_sliding_window"] = bool(window)
    if "max_window_layers" in family.defaults:
        hf["max_window_layers"] = 0
    return hf | _pattern(get, family, n_layers, layout.period if window else 0)


def _phi3_window(get: Metadata, n_layers: int) -> int:
    """The window of a phi3 file that does not give one, as older files of the converter do:
    that of the released 4k models (transformers' and llama.cpp's value); none else.
    """
    four_k = n_layers in (32, 40) and get.integer("context_length") == 4096
    return 2047 if four_k else 0


def _pattern(get: Metadata, family: Family, n_layers: int, period: int) -> dict[str, Any]:
    key = "attention.sliding_window_pattern"
    value = get.raw(key)
    if isinstance(value, np.ndarray):
        if len(value) < n_layers or "layer_types" not in family.defaults:
            raise get.error(key, f"must have one entry for each of {n_layers} layers")
        return _layer_types([bool(v) for v in value[:n_layers].tolist()])
    if value is None and not period:
        # an EXAONE 4 or OLMo without a window has full layers only; others have their own rule
        full = family.windows == "period" and get.arch == "exaone4"
        return _layer_types([False] * n_layers) if full else {}
    if value is not None:
        period = get.integer(key)
        if family.windows != "period" or period < 1:
            raise get.error(key, f"is not understood for {get.arch}")
    if "sliding_window_pattern" in family.defaults and get.arch == "gemma3":
        return {"sliding_window_pattern": period}
    return _layer_types([(i + 1) % period != 0 for i in range(n_layers)])


def _layer_types(slides: list[bool]) -> dict[str, Any]:
    return {"layer_types": ["sliding_attention" if s else "full_attention" for s in slides]}
