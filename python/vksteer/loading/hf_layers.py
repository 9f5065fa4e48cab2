"""What differs from layer to layer in a config.json: sliding windows, and the rotation."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from ..errors import ModelError
from . import rope as rotation
from .config_reader import Reader, short
from .ignored_keys import say_ignored
from .limits import LIMITS

_LAYER_TYPES = ("full_attention", "sliding_attention")

# -- windows ---------------------------------------------------------------------------------------


def windows(get: Reader, n_layers: int) -> tuple[int, ...]:
    """The sliding window of each layer (0: full attention), by the family's rule where the config
    lists no layer_types.
    """
    window = get.optional_integer("sliding_window", LIMITS["n_ctx"])
    if "use_sliding_window" in get.defaults and not get.flag("use_sliding_window"):
        window = None
    types = get.raw("layer_types")
    if types is not None:
        slides = _listed(get, types, n_layers, window)
    else:
        slides = _by_rule(get, n_layers, window)
    if any(slides) and window is None:
        raise ModelError(
            "config key 'layer_types' has sliding layers, but there is no 'sliding_window'"
        )
    return tuple(window if s and window is not None else 0 for s in slides)


def _listed(get: Reader, types: Any, n_layers: int, window: int | None) -> list[bool]:
    if not isinstance(types, list) or len(types) != n_layers:
        raise ModelError(
            f"config key 'layer_types' must list {n_layers} layers, got {short(types)}"
        )
    unknown = next((t for t in types if t not in _LAYER_TYPES), None)
    if unknown is not None:
        raise ModelError(
            f"config key 'layer_types' names {unknown!r}; known: 'full_attention',"
            " 'sliding_attention'"
        )
    slides = [t == "sliding_attention" for t in types]
    if get.family.windows == "all" and any(s != (window is not None) for s in slides):
        raise ModelError(
            f"config key 'layer_types' = {short(types)} contradicts 'sliding_window' ="
            f" {window}: {get.family.title} has one kind of layer"
        )
    return slides


def _by_rule(get: Reader, n_layers: int, window: int | None) -> list[bool]:
    rule = get.family.windows
    if rule == "even":
        return [i % 2 == 0 for i in range(n_layers)]
    if rule == "period":
        return _periodic(get, n_layers, window)
    if rule == "from":
        first = get.raw("max_window_layers")
        if isinstance(first, bool) or not isinstance(first, int) or first < 0:
            raise ModelError(
                f"config key 'max_window_layers' = {first!r} must be a count of layers"
            )
        return [window is not None and i >= first for i in range(n_layers)]
    if rule == "unrotated":
        return [window is not None and not r for r in _listed_rotations(get, n_layers)]
    return [window is not None] * n_layers


def _periodic(get: Reader, n_layers: int, window: int | None) -> list[bool]:
    """All layers but each sliding_window_pattern-th slide. EXAONE 4 also has patterns as text,
    repeated ("LLLG": L slides), whose last layer is always full, and no window at all.
    """
    key = "sliding_window_pattern"
    period = get.raw(key) if key in get.defaults else get.family.period
    if get.family.unrotated == "full" and get.family.post_norms:
        if window is None:
            return [False] * n_layers
        if isinstance(period, str) and period and not set(period) - {"L", "G"}:
            slides = [period[i % len(period)] == "L" for i in range(n_layers)]
            return [*slides[:-1], False]
    if isinstance(period, bool) or not isinstance(period, int) or period < 1:
        raise ModelError(
            f"config key {key!r} = {short(period)} must be a positive integer, not null"
        )
    return [(i + 1) % period != 0 for i in range(n_layers)]


# -- rotation --------------------------------------------------------------------------------------


def n_ctx_and_rotations(get: Reader, window: tuple[int, ...], d_head: int) -> dict[str, Any]:
    """n_ctx and the facts of positions: rotation tables, which layer uses which, and the factor on
    queries.
    """
    family = get.family
    max_positions = get.integer("max_position_embeddings", LIMITS["n_ctx"])
    if family.positions == "learned":
        return dict(n_ctx=max_positions, pos_embed=True, rope=(), rope_table=(-1,) * len(window))
    facts: dict[str, Any] = dict(n_ctx=max_positions, rope_interleaved=family.rope_interleaved)
    if "rotary_dim" in get.defaults:
        return facts | _rotations_by_size(get, len(window), d_head)
    for key in ("rope_scaling", "rope_parameters"):
        value = get.config.get(key)
        if value is not None and not isinstance(value, Mapping):
            raise ModelError(f"config key {key!r} = {short(value)} must be a dictionary or null")
    if family.local_theta is not None:
        # max_position_embeddings of these families holds their scaling already
        full, sliding = _parameters_by_type(get)
        tables = [
            _table(get, values, theta, d_head, max_positions)
            for values, theta in ((full, family.default_theta), (sliding, family.local_theta))
        ]
        return facts | dict(rope=tuple(tables), rope_table=tuple(1 if w else 0 for w in window))
    values = _parameters(get, max_positions)
    facts["n_ctx"] = min(rotation.context(values, max_positions), LIMITS["n_ctx"])
    facts |= _query_factor(get, values)
    table = _table(get, values, family.default_theta, d_head, max_positions)
    turned = _rotated_layers(get, window)
    facts |= dict(
        rope=(table,) if any(turned) else (), rope_table=tuple(0 if t else -1 for t in turned)
    )
    if rotation.rope_type(values) == "longrope" and any(turned):
        longer, switch = rotation.long_table(
            _without_partial(values),
            d_rot=_rotated_channels(get, values, d_head),
            max_positions=max_positions,
            default_theta=family.default_theta,
        )
        if switch < facts["n_ctx"]:
            facts |= dict(rope_long=(longer,), rope_switch=switch)
    return facts


def _rotations_by_size(get: Reader, n_layers: int, d_head: int) -> dict[str, Any]:
    """GPT-J: rotary_dim channels of each head, always with the base 10000."""
    d_rot = get.integer("rotary_dim", LIMITS["d_head"])
    if d_rot > d_head or d_rot % 2:
        raise ModelError(
            f"config key 'rotary_dim' = {d_rot} must be even and at most the head size {d_head}"
        )
    table = rotation.table({}, d_rot=d_rot, max_positions=1, default_theta=get.family.default_theta)
    return dict(rope=(table,), rope_table=(0,) * n_layers)


def _rotated_layers(get: Reader, window: tuple[int, ...]) -> list[bool]:
    """Whether each layer rotates."""
    if get.family.unrotated == "listed":
        return _listed_rotations(get, len(window))
    if get.family.unrotated == "full":
        # EXAONE 4 without windows rotates everywhere
        none = get.family.post_norms and get.raw("sliding_window") is None
        return [none or w > 0 for w in window]
    return [True] * len(window)


def _listed_rotations(get: Reader, n_layers: int) -> list[bool]:
    """SmolLM3: no_rope_layers has a 1 for each layer that does rotate."""
    listed = get.raw("no_rope_layers")
    if listed is None:
        interval = get.integer("no_rope_layer_interval", 1 << 30)
        return [(i + 1) % interval != 0 for i in range(n_layers)]
    if (
        not isinstance(listed, list)
        or len(listed) < n_layers
        or any(v not in (0, 1) or isinstance(v, float) for v in listed)
    ):
        raise ModelError(
            f"config key 'no_rope_layers' = {short(listed)} must list 0 or 1 for each of"
            f" {n_layers} layers"
        )
    return [bool(v) for v in listed[:n_layers]]


def _query_factor(get: Reader, values: dict[str, Any]) -> dict[str, Any]:
    """Ministral 3: the facts of the factor on queries, whose keys stand among the rope's."""
    if get.family.model_type != "ministral3":
        return {}
    beta = values.pop("llama_4_scaling_beta", None)
    if beta is None:
        return {}
    if isinstance(beta, bool) or not isinstance(beta, (int, float)) or not 0 <= beta < 1e6:
        raise ModelError(
            f"rope key 'llama_4_scaling_beta' = {short(beta)} must be a number from 0 to 1e6"
        )
    length = values.get("original_max_position_embeddings")
    if isinstance(length, bool) or not isinstance(length, int) or not 1 <= length < 1 << 27:
        raise ModelError(
            f"rope key 'original_max_position_embeddings' = {short(length)} must be a positive"
            " integer beside 'llama_4_scaling_beta'"
        )
    return dict(query_beta=float(beta), query_length=length) if beta else {}


# -- dictionaries of rope parameters ---------------------------------------------------------------


def _table(
    get: Reader, values: dict[str, Any], theta: float, d_head: int, max_positions: int
) -> rotation.RopeTable:
    """The rotation table that a rope dictionary describes, for the part of a head that it says."""
    kind, types = rotation.rope_type(values), get.family.rope_types
    if types and kind not in types:
        raise ModelError(
            f"rope type {kind!r} is not supported for {get.family.model_type}; supported:"
            f" {', '.join(types)}"
        )
    if kind == "dynamic":
        _warn_dynamic(max_positions)
    d_rot = _rotated_channels(get, values, d_head)
    return rotation.table(
        _without_partial(values), d_rot=d_rot, max_positions=max_positions, default_theta=theta
    )


def _without_partial(values: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in values.items() if k != "partial_rotary_factor"}


def _rotated_channels(get: Reader, values: dict[str, Any], d_head: int) -> int:
    """How many channels of a head are rotated. An odd count is rounded up by the table."""
    part = values.get("partial_rotary_factor")
    if get.family.partial is None:
        if part not in (None, 1):
            raise ModelError(
                f"rope key 'partial_rotary_factor' = {short(part)} would change the numbers and is"
                f" not understood for {get.family.model_type}"
            )
        return d_head
    if part is None:
        part = get.family.partial
    own = get.family.partial_key  # GPT-NeoX: rotary_pct
    key = own if get.config.get(own) == part else "partial_rotary_factor"
    if isinstance(part, bool) or not isinstance(part, (int, float)) or not 0 < part <= 1:
        raise ModelError(f"rope key {key!r} = {short(part)} must be a number above 0 and at most 1")
    d_rot = int(d_head * part)
    if d_rot < 1:
        raise ModelError(
            f"rope key {key!r} = {part} leaves nothing of a head of {d_head} channels to rotate"
        )
    return d_rot


def _parameters(get: Reader, max_positions: int) -> dict[str, Any]:
    """The rope dictionary of a family whose layers share one rotation, with everything merged in
    that the config says outside of it, as transformers does.
    """
    config, family = get.config, get.family
    scaling, parameters = config.get("rope_scaling"), config.get("rope_parameters")
    if any(k in (parameters or {}) for k in _LAYER_TYPES):
        raise ModelError(
            f"config key 'rope_parameters' is nested per layer type, which {family.model_type}"
            " does not have"
        )
    values = dict(scaling or parameters or {})
    if family.model_type == "ministral3" and scaling is None and parameters is None:
        values = _ministral3_defaults()
    if rotation.rope_type(values) in ("su", "yarn") and "longrope" in family.rope_types:
        values["rope_type"] = "longrope"  # older names of it in Phi 3
    if family.theta_key in get.defaults:  # GPT-NeoX: rotary_emb_base
        get.number(family.theta_key, low=1.0)
    for inner, key in (
        ("rope_theta", family.theta_key),
        ("partial_rotary_factor", family.partial_key),
    ):
        outside = config.get(key)
        if values.get(inner) is None and outside is not None:
            values[inner] = outside
        _refuse_second(get, key, inner, values)
    outside = config.get("original_max_position_embeddings")
    if outside is None:
        outside = get.raw("original_max_position_embeddings")
    if rotation.rope_type(values) in ("llama3", "yarn", "longrope"):
        if outside is not None:  # as in transformers: the outer key wins
            values["original_max_position_embeddings"] = outside
        elif values.get("original_max_position_embeddings") is None:
            values["original_max_position_embeddings"] = max_positions
    return values


def _refuse_second(get: Reader, key: str, inner: str, values: dict[str, Any]) -> None:
    """GPT-NeoX: transformers ignores rope_theta and partial_rotary_factor outside the rope
    dictionary, which newer files write beside the family's own keys.
    """
    if key == inner or get.config.get(inner) is None:
        return
    default = get.family.default_theta if inner == "rope_theta" else get.family.partial
    read = default if values.get(inner) is None else values[inner]
    if get.config[inner] != read:
        raise ModelError(
            f"config key {inner!r} = {short(get.config[inner])} contradicts {key!r} ="
            f" {short(read)}, which is what {get.family.model_type} reads"
        )


def _ministral3_defaults() -> dict[str, Any]:
    """What transformers takes for a Ministral 3 without a rope dictionary."""
    return {
        "rope_type": "yarn",
        "rope_theta": 1000000.0,
        "factor": 16.0,
        "original_max_position_embeddings": 16384,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "mscale_all_dim": 1.0,
        "mscale": 1.0,
        "llama_4_scaling_beta": 0.1,
    }


def _parameters_by_type(get: Reader) -> list[dict[str, Any]]:
    """The rope dictionaries of full and of sliding layers, rope_theta merged in."""
    config, family = get.config, get.family
    scaling, parameters = config.get("rope_scaling"), config.get("rope_parameters")
    nested = [k for k in _LAYER_TYPES if k in (parameters or {})]
    if parameters and (not nested or set(parameters) - set(nested)):
        raise ModelError(
            f"config key 'rope_parameters' = {short(parameters)} must be nested by"
            " 'full_attention' and 'sliding_attention'"
        )
    if config.get("original_max_position_embeddings") is not None:
        raise ModelError(
            "config key 'original_max_position_embeddings' would change the numbers and is not"
            f" understood for {family.model_type}"
        )
    found = []
    for key, outer in zip(_LAYER_TYPES, ("rope_theta", family.local_theta_key), strict=True):
        inner = (parameters or {}).get(key)
        if inner is not None and not isinstance(inner, Mapping):
            raise ModelError(
                f"config key 'rope_parameters' has {key!r} = {short(inner)}, which must be a"
                " dictionary or null"
            )
        values = dict(inner or {})
        # released files: rope_scaling is for the full layers only
        if key == "full_attention" and scaling:
            values.pop("rope_type", None)
            values.update(scaling)
        if values.get("rope_theta") is None and outer and config.get(outer) is not None:
            values["rope_theta"] = config[outer]
        if values.pop("truncate", None) is not None:
            say_ignored("truncate", "a rope dictionary that is nested by layer type")
        found.append(values)
    return found


_warned_of: set[str] = set()  # rope scalings


def _warn_dynamic(max_positions: int) -> None:
    if "dynamic" not in _warned_of:
        _warned_of.add("dynamic")
        warnings.warn(
            f"rope scaling 'dynamic' changes all rotations when a text grows beyond {max_positions}"
            f" tokens; contexts are limited to {max_positions}, up to where it equals no scaling",
            stacklevel=7,
        )
