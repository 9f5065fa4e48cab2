"""From a config.json's dictionary to the facts of `Config`: every key is read, known to have no
influence, or refused by name.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import Any

from ..errors import ModelError
from . import rope as rotation
from .checkpoint_kinds import QUANTISATION_KEYS, quantised
from .families import ACTIVATIONS, FAMILIES, GEMMA3_OUTER, HARMLESS, ROPE_KEYS, Family
from .ignored_keys import IGNORED, IGNORED_IN_ALL, say_disputed

#: Upper bounds on sizes: well above any released model of these families, low enough that no
#: product of two overflows 64 bits.
LIMITS = {
    "n_layers": 1024,
    "d_model": 1 << 17,
    "n_heads": 4096,
    "n_kv_heads": 4096,
    "d_head": 4096,
    "d_mlp": 1 << 20,
    "d_vocab": 1 << 23,
    "n_ctx": 1 << 27,
}


def facts_from_hf(config: Mapping[str, Any]) -> dict[str, Any]:
    """The facts of a config.json's dictionary, as `Config` takes them. Raises ModelError
    naming the key at fault.
    """
    if not isinstance(config, Mapping):
        raise ModelError(f"a model configuration must be a dictionary, got {type(config).__name__}")
    family, architecture = find_family(config)
    config, tied_outside = _text_part(config, family)
    _refuse_unknown(config, family, allowed=frozenset(family.defaults) | ROPE_KEYS)
    get = _Reader(config, family)

    n_layers = get.integer("num_hidden_layers", LIMITS["n_layers"])
    d_model = get.integer("hidden_size", LIMITS["d_model"])
    n_heads = get.integer("num_attention_heads", LIMITS["n_heads"])
    d_head = _head_size(get, d_model, n_heads)
    max_positions = get.integer("max_position_embeddings", LIMITS["n_ctx"])
    window = _windows(get, family, n_layers)
    rope, rope_table = _rotations(get, family, window, d_head, max_positions)
    n_ctx = max_positions
    if family.local_theta is None:
        # max_position_embeddings of Gemma 3 holds its scaling already
        n_ctx = rotation.context(_rope_parameters(config, family), max_positions)
    attention_bias = get.flag("attention_bias")
    gemma = family.gemma
    score_channels = get.number("query_pre_attn_scalar", low=0.0) if gemma else d_head

    return dict(
        architecture=architecture,
        model_type=family.model_type,
        n_layers=n_layers,
        d_model=d_model,
        n_heads=n_heads,
        n_kv_heads=get.optional_integer("num_key_value_heads", LIMITS["n_kv_heads"]) or n_heads,
        d_head=d_head,
        d_mlp=get.integer("intermediate_size", LIMITS["d_mlp"]),
        d_vocab=get.integer("vocab_size", LIMITS["d_vocab"]),
        n_ctx=min(n_ctx, LIMITS["n_ctx"]),
        norm_eps=get.number("rms_norm_eps", low=0.0),
        norm_offset=1.0 if gemma else 0.0,
        act=get.activation("hidden_activation" if gemma else "hidden_act"),
        embed_scale=math.sqrt(d_model) if gemma else 1.0,
        attn_scale=score_channels**-0.5,
        attn_softcap=get.softcap("attn_logit_softcapping"),
        final_softcap=get.softcap("final_logit_softcapping"),
        post_norms=gemma,
        qk_norm="head" if family.qk_norm else "",
        qkv_bias=attention_bias or family.always_qkv_bias,
        o_bias=attention_bias,
        mlp_bias=get.flag("mlp_bias"),
        tied=get.flag("tie_word_embeddings") if tied_outside is None else tied_outside,
        window=window,
        rope_table=rope_table,
        rope=rope,
        bos_id=next(iter(token_ids(config, "bos_token_id")), None),
        eos_ids=token_ids(config, "eos_token_id"),
    )


def _text_part(config: Mapping[str, Any], family: Family) -> tuple[Mapping[str, Any], bool | None]:
    """(the config of the text model, tie_word_embeddings of the outer config): of a Gemma 3 with an
    image tower only the text part is read; any other config is its own, with None.
    """
    text = config.get("text_config")
    if not isinstance(text, Mapping):
        return config, None
    outer = {k: v for k, v in config.items() if k not in GEMMA3_OUTER}
    _refuse_unknown(outer, family, allowed=frozenset())
    ends = {k: config[k] for k in ("bos_token_id", "eos_token_id") if config.get(k) is not None}
    return {**text, **ends}, bool(config.get("tie_word_embeddings", True))


def _head_size(get: _Reader, d_model: int, n_heads: int) -> int:
    d_head = get.optional_integer("head_dim", LIMITS["d_head"])
    if d_head is None:
        if d_model % n_heads:
            raise ModelError(
                f"config key 'hidden_size' = {d_model} is not a multiple of 'num_attention_heads' ="
                f" {n_heads}, and there is no 'head_dim'"
            )
        d_head = d_model // n_heads
    if d_head % 2:
        raise ModelError(f"config key 'head_dim' = {d_head} must be even: rotation pairs channels")
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
    outer = (
        {"gemma3": "gemma3_text"}.get(model_type, model_type)
        if isinstance(model_type, str)
        else None
    )
    for family in FAMILIES:
        if named:
            if named[0] in family.architectures and (
                model_type is None or outer == family.model_type
            ):
                return family, named[0]
        elif outer == family.model_type:
            return family, (
                family.architectures[0] if model_type != "gemma3" else family.architectures[-1]
            )
    supported = ", ".join(a for f in FAMILIES for a in f.architectures)
    what = (
        f"architecture {named[0]!r} (model_type {model_type!r})"
        if named
        else f"model_type {model_type!r}"
    )
    raise ModelError(f"{what} is not supported; supported architectures: {supported}")


def token_ids(config: Mapping[str, Any], key: str) -> tuple[int, ...]:
    """A token id or list of token ids as a tuple; null and negative ids (Llama 2's
    padding is -1) mean none.
    """
    value = config.get(key)
    values = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(v, int) and not isinstance(v, bool) for v in values):
        raise ModelError(f"config key {key!r} = {value!r} must be a token id or a list of them")
    return tuple(dict.fromkeys(v for v in values if v >= 0))


class _Reader:
    """Typed reads of a config dictionary, defaults from the family's table,
    errors that name the key.
    """

    def __init__(self, config: Mapping[str, Any], family: Family) -> None:
        self.config, self.defaults = config, family.defaults

    def raw(self, key: str) -> Any:
        # a key that the family does not have is ignored, even where another family reads it
        return self.config.get(key, self.defaults[key]) if key in self.defaults else None

    def optional_integer(self, key: str, limit: int) -> int | None:
        value = self.raw(key)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= limit:
            raise ModelError(f"config key {key!r} = {value!r} must be an integer from 1 to {limit}")
        return value

    def integer(self, key: str, limit: int) -> int:
        value = self.optional_integer(key, limit)
        if value is None:
            raise ModelError(f"config key {key!r} must be an integer from 1 to {limit}, not null")
        return value

    def number(self, key: str, low: float) -> float:
        value = self.raw(key)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not low < value < 1e9:
            raise ModelError(f"config key {key!r} = {value!r} must be a number above {low}")
        return float(value)

    def softcap(self, key: str) -> float:
        return 0.0 if self.raw(key) is None else self.number(key, low=0.0)

    def flag(self, key: str) -> bool:
        value = self.raw(key)
        if value not in (None, True, False):
            raise ModelError(f"config key {key!r} = {value!r} must be true or false")
        return bool(value)

    def activation(self, key: str) -> str:
        value = self.raw(key) or self.defaults[key]
        if not isinstance(value, str) or value not in ACTIVATIONS:
            raise ModelError(
                f"config key {key!r} = {value!r} is not a supported activation; supported:"
                f" {', '.join(ACTIVATIONS)}"
            )
        return ACTIVATIONS[value]


def _refuse_unknown(config: Mapping[str, Any], family: Family, allowed: frozenset[str]) -> None:
    ignored = IGNORED_IN_ALL | IGNORED.get(family.model_type, frozenset())
    for key, value in config.items():
        neutral = value is None or value is False
        if key == "is_causal":
            neutral = value in (None, True)
        if key == "partial_rotary_factor":
            neutral = value in (None, 1)
            allowed = allowed - {key}
        if key == "use_bidirectional_attention" or (
            key == "attn_logit_softcapping" and family.local_theta is not None
        ):
            # Gemma 3 in transformers has no soft cap on scores, whatever its config says
            allowed = allowed - {key}
        if neutral or key in allowed or key in HARMLESS:
            continue
        if key in ignored:
            say_disputed(key)
            continue
        if key in QUANTISATION_KEYS:
            raise ModelError(f"config key {key!r}: {quantised(key, value)}")
        raise ModelError(
            f"config key {key!r} = {_short(value)} would change the numbers and is not understood"
            f" for {family.model_type}; if it has no influence, leave it out with"
            f" config_overrides={{{key!r}: None}}"
        )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _windows(get: _Reader, family: Family, n_layers: int) -> tuple[int, ...]:
    """The sliding window of each layer (0: full attention), by the family's rule where the config
    lists no layer_types.
    """
    window = get.optional_integer("sliding_window", LIMITS["n_ctx"])
    if "use_sliding_window" in family.defaults and not get.flag("use_sliding_window"):
        window = None
    types = get.raw("layer_types")
    if types is not None:
        if not isinstance(types, list) or len(types) != n_layers:
            raise ModelError(
                f"config key 'layer_types' must list {n_layers} layers, got {_short(types)}"
            )
        unknown = next((t for t in types if t not in ("full_attention", "sliding_attention")), None)
        if unknown is not None:
            raise ModelError(
                f"config key 'layer_types' names {unknown!r}; known: 'full_attention',"
                " 'sliding_attention'"
            )
        slides = [t == "sliding_attention" for t in types]
        if family.model_type == "mistral" and any(s != (window is not None) for s in slides):
            raise ModelError(
                f"config key 'layer_types' = {_short(types)} contradicts 'sliding_window' ="
                f" {window}: Mistral has one kind of layer"
            )
    elif family.model_type == "gemma2":
        slides = [i % 2 == 0 for i in range(n_layers)]
    elif family.local_theta is not None:
        pattern = get.optional_integer("sliding_window_pattern", LIMITS["n_layers"])
        if pattern is None:
            raise ModelError(
                "config key 'sliding_window_pattern' must be a positive integer, not null"
            )
        slides = [(i + 1) % pattern != 0 for i in range(n_layers)]
    elif "max_window_layers" in family.defaults:
        first = get.raw("max_window_layers")
        if isinstance(first, bool) or not isinstance(first, int) or first < 0:
            raise ModelError(
                f"config key 'max_window_layers' = {first!r} must be a count of layers"
            )
        slides = [window is not None and i >= first for i in range(n_layers)]
    else:
        slides = [window is not None] * n_layers
    if any(slides) and window is None:
        raise ModelError(
            "config key 'layer_types' has sliding layers, but there is no 'sliding_window'"
        )
    return tuple(window if s and window is not None else 0 for s in slides)


def _rotations(
    get: _Reader, family: Family, window: tuple[int, ...], d_head: int, max_positions: int
) -> tuple[tuple[rotation.RopeTable, ...], tuple[int, ...]]:
    """(tables, table of each layer). Gemma 3 has two: full layers use table 0, sliding layers use
    table 1.
    """
    config = get.config
    scaling, parameters = config.get("rope_scaling"), config.get("rope_parameters")
    for key, value in (("rope_scaling", scaling), ("rope_parameters", parameters)):
        if value is not None and not isinstance(value, Mapping):
            raise ModelError(f"config key {key!r} = {_short(value)} must be a dictionary or null")

    def build(values: dict[str, Any], theta: float) -> rotation.RopeTable:
        if rotation.rope_type(values) == "dynamic":
            _warn_dynamic(max_positions)
        return rotation.table(
            values, d_head=d_head, max_positions=max_positions, default_theta=theta
        )

    if family.local_theta is None:
        values = _rope_parameters(config, family)
        return (build(values, family.default_theta),), (0,) * len(window)
    full, sliding = _rope_parameters_by_type(config, family)
    tables = build(full, family.default_theta), build(sliding, family.local_theta)
    return tables, tuple(1 if w else 0 for w in window)


_LAYER_TYPES = ("full_attention", "sliding_attention")


def _rope_parameters(config: Mapping[str, Any], family: Family) -> dict[str, Any]:
    """The rope dictionary of a family whose layers share one rotation, rope_theta merged in."""
    scaling, parameters = config.get("rope_scaling"), config.get("rope_parameters")
    if any(k in (parameters or {}) for k in _LAYER_TYPES):
        raise ModelError(
            f"config key 'rope_parameters' is nested per layer type, which {family.model_type}"
            " does not have"
        )
    values = dict(scaling or parameters or {})
    if values.get("rope_theta") is None and config.get("rope_theta") is not None:
        values["rope_theta"] = config["rope_theta"]
    outside = config.get("original_max_position_embeddings")
    if outside is not None and rotation.rope_type(values) in ("llama3", "yarn"):
        # as in transformers: the outer key wins
        values["original_max_position_embeddings"] = outside
    return values


def _rope_parameters_by_type(config: Mapping[str, Any], family: Family) -> list[dict[str, Any]]:
    """The rope dictionaries of full and of sliding layers, rope_theta merged in (Gemma 3)."""
    scaling, parameters = config.get("rope_scaling"), config.get("rope_parameters")
    nested = [k for k in _LAYER_TYPES if k in (parameters or {})]
    if parameters and (not nested or set(parameters) - set(nested)):
        raise ModelError(
            f"config key 'rope_parameters' = {_short(parameters)} must be nested by"
            " 'full_attention' and 'sliding_attention'"
        )
    if config.get("original_max_position_embeddings") is not None:
        raise ModelError(
            "config key 'original_max_position_embeddings' would change the numbers and is not"
            f" understood for {family.model_type}"
        )
    found = []
    for key, outer in zip(_LAYER_TYPES, ("rope_theta", "rope_local_base_freq"), strict=True):
        inner = (parameters or {}).get(key)
        if inner is not None and not isinstance(inner, Mapping):
            raise ModelError(
                f"config key 'rope_parameters' has {key!r} = {_short(inner)}, which must be a"
                " dictionary or null"
            )
        values = dict(inner or {})
        # released Gemma 3: rope_scaling is for the full layers only
        if key == "full_attention" and scaling:
            values.pop("rope_type", None)
            values.update(scaling)
        if values.get("rope_theta") is None and config.get(outer) is not None:
            values["rope_theta"] = config[outer]
        found.append(values)
    return found


_warned_of: set[str] = set()  # rope scalings


def _warn_dynamic(max_positions: int) -> None:
    if "dynamic" not in _warned_of:
        _warned_of.add("dynamic")
        warnings.warn(
            f"rope scaling 'dynamic' changes all rotations when a text grows beyond {max_positions}"
            f" tokens; contexts are limited to {max_positions}, up to where it equals no scaling",
            stacklevel=5,
        )
