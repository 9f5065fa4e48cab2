"""A problem for one operation of the engine, its outcome, and the parts that
problems are made of.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .. import _engine
from ..runtime import kernels

_C = _engine.constants


def flags(prefix: str, *names: str) -> dict[str, int]:
    """Each name's number: that of the constant PREFIX_NAME of shaders/include/params.h."""
    return {name: _C[f"{prefix}_{name.upper()}"] for name in names}


def numbered(names: dict[str, int]) -> tuple[str, ...]:
    """Names whose numbers are 0, 1, ... as a tuple."""
    assert sorted(names.values()) == list(range(len(names)))
    return tuple(sorted(names, key=lambda name: names[name]))


WEIGHT_TYPES = numbered(kernels.WEIGHT_TYPES)
ACTIVATIONS = numbered(flags("ACT", "silu", "gelu_tanh", "gelu", "relu", "relu2"))
EDITS = numbered(flags("EDIT", "set", "add", "scale", "ablate", "add_scaled"))
NORM_FLAGS = flags(
    "NORM",
    "write_normalized",
    "write_scale",
    "add",
    "read_scale",
    "read_normalized",
    "rows",
    "no_out",
    "layer",
    "bias",
)
ROPE_FLAGS = flags("ROPE", "qk_norm", "rotate", "store", "interleaved")
NORM_BWD_FLAGS = flags(
    "NORM_BWD", "add", "normalized", "write_normalized", "write_scale", "no_out", "rows", "layer"
)
COPY_FLAGS = flags("COPY", "rows", "add")
TOPK_FLAGS = flags("TOPK", "begin", "scaled")
HEAD_FLAGS = flags("HEAD", "inputs_normed", "inputs_layer", "gradients_layer")
HEADS_FLAGS = flags("HEADS", "difference", "scaled", "column", "zero", "offset")
PAIRS = flags("PAIRS", "gate", "rotate")
PLACES = flags("PLACE", "q", "k", "v", "base")
PLACE_FLAGS = flags("PLACE", "qk_norm", "interleaved")
NORM_KINDS = flags("NORM_KIND", "rms", "layer", "none")
SCALARS = numbered(flags("LOGIT_GRAD", "log_prob", "kl", "directional_kl"))
EDIT_KEYS, INPUTS_BIAS, OUTPUTS_NORM = _C["EDIT_KEYS"], _C["INPUTS_BIAS"], _C["OUTPUTS_NORM"]
EPS = 1e-5
TILE = _C["OP_TILE"]
PANEL = _C["OP_PANEL"]
TOKEN_WORDS = 9  # of struct token_meta
NO_SOURCE, NO_DIFFERENCE = _C["NO_SOURCE"], _C["NO_DIFFERENCE"]
row_stride = _engine.row_stride


@dataclass
class Problem:
    """`units`: for a buffer, what an error in it is measured in, for all or element by element:
    what a sum would be without cancellation. Other buffers are measured in their own largest
    value, before or after.
    """

    op: str
    label: str
    arguments: dict[str, Any]
    buffers: dict[str, np.ndarray]
    units: dict[str, Any] = field(default_factory=dict)


@dataclass
class Outcome:
    """error: the largest, in the problem's units; inf where NaN is where it should not be or
    the other way round.
    """

    problem: Problem
    error: float
    where: str
    device: dict[str, np.ndarray]
    reference: dict[str, np.ndarray]


def numbers(rng: np.random.Generator, *shape: int, scale: float = 1.0) -> np.ndarray:
    return (rng.standard_normal(shape) * scale).astype(np.float32)


def nothing(*shape: int) -> np.ndarray:
    return np.full(shape, np.nan, np.float32)


def beside(units: np.ndarray, like: np.ndarray) -> np.ndarray:
    """Units of the leading columns of `like`; 1 elsewhere."""
    out = np.ones(like.shape)
    out[..., : units.shape[-1]] = units
    return out


def inverse_rms(x: np.ndarray) -> np.ndarray:
    """1 / sqrt(mean x^2 + EPS) of each row, float64."""
    inverse: np.ndarray = 1 / np.sqrt((x.astype(np.float64) ** 2).mean(-1, keepdims=True) + EPS)
    return inverse


def rotation_angles(n_positions: int, d_rot: int) -> np.ndarray:
    """[n_positions, d_rot / 2, 2]: cos and sin."""
    angle = (
        np.arange(n_positions)[:, None]
        * 10000.0 ** (-np.arange(d_rot // 2) / max(d_rot / 2, 1))[None]
    )
    return np.stack([np.cos(angle), np.sin(angle)], -1).astype(np.float32)


def padded(values: np.ndarray, stride: int, pad=np.nan) -> np.ndarray:
    """[T, width] -> [T, stride]."""
    out = np.full((len(values), stride), pad, np.float32)
    out[:, : values.shape[1]] = values
    return out


def panels(weights: np.ndarray, weight_type: int) -> tuple[np.ndarray, np.ndarray]:
    """W [N, K] -> (words as they lie on the device, W as stored, float64)."""
    n, k = weights.shape
    whole = np.zeros((-(-n // PANEL) * PANEL, -(-k // 16) * 16), np.float32)
    whole[:n, :k] = weights
    if weight_type == _C["WEIGHT_BF16"]:  # cut to bfloat16
        whole = (whole.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)
        items = (whole.view(np.uint32) >> 16).astype(np.uint16)
    elif weight_type == _C["WEIGHT_F16"]:
        items = whole.astype(np.float16)
        whole = items.astype(np.float32)
    else:
        items = whole
    inputs = 16 // items.itemsize  # a cell holds 16 bytes of one row
    items = np.ascontiguousarray(
        items.reshape(len(whole) // PANEL, PANEL, whole.shape[1] // inputs, inputs).transpose(
            0, 2, 1, 3
        )
    )
    return items.reshape(-1).view(np.uint32), whole[:n, :k].astype(np.float64)


def logit_biases(rng: np.random.Generator, n: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """A bias of an unembedding with 50 rows, and the ids of two of them for each of n tokens;
    the sizes [n, 2] of these biases.
    """
    ids = np.zeros((2 * n, TOKEN_WORDS), np.uint32)
    ids[:, 0] = rng.integers(0, 50, 2 * n)
    bias = numbers(rng, 50)
    return {"bias": bias, "ids": ids}, np.abs(bias[ids[:, 0]]).reshape(n, 2)


def matrix_arguments(
    n: int,
    k: int,
    weight_type: int,
    segment_rows: int = 0,
    family: int | None = None,
    scale: float = 0.0,
) -> dict[str, Any]:
    """Of W [n, k] in the buffer "weights". family: of matrix kernels; None: the device's choice.
    scale: a factor on products; 0: none.
    """
    arguments: dict[str, Any] = {
        "weights": "weights",
        "weight_type": weight_type,
        "n": n,
        "k": k,
        "segment_rows": segment_rows,
        "matrix_scale": scale,
    }
    return arguments if family is None else arguments | {"family_plus_1": family + 1}


def suffix(*extras: tuple[str, Any]) -> str:
    """The end of a label: each name whose value is not zero, with a space before it."""
    return "".join(f" {name}" for name, value in extras if value)


@dataclass
class Packed:
    """Rows of a batch as the kernels see them. rows: (keys already in the cache, tokens now)."""

    # [T, TOKEN_WORDS]: id, pos, slot, q_token, k_slot, v_slot, row, row_end, angle
    tokens: np.ndarray
    tiles: np.ndarray  # [n, 2]: first token, count
    n_slots: int
    n_keys: int

    def __init__(self, rows, frozen=False):
        tokens: list[tuple[int, ...]] = []
        tiles: list[tuple[int, int]] = []
        slot, n_keys = 2, 0  # a few cache slots belong to nobody
        for r, (cached, n) in enumerate(rows):
            first = len(tokens)
            # an odd row uses queries, keys and values of the row before it
            source = tokens[first - n] if frozen and r % 2 else None
            for i in range(n):
                k_slot = slot if source is None else source[4]
                tokens.append(
                    (
                        0,
                        cached + i,
                        slot + cached + i,
                        first + i - (0 if source is None else n),
                        k_slot,
                        k_slot,
                        r,
                        first + n,
                        cached + i,
                    )
                )
            tiles += [(first + i, min(TILE, n - i)) for i in range(0, n, TILE)]
            slot += cached + n + 1
            n_keys = max(n_keys, cached + n)
        self.tokens = np.array(tokens, np.uint32).reshape(-1, TOKEN_WORDS)
        self.tiles = np.array(tiles, np.uint32).reshape(-1, 2)
        self.n_slots, self.n_keys = slot, n_keys

    @property
    def pos(self):
        return self.tokens[:, 1].astype(int)

    def from_tile(self, tile):
        """(first token, tiles from there): a pass that works on a part of the chunk."""
        return (int(self.tiles[tile, 0]) if len(self.tiles) else 0), np.ascontiguousarray(
            self.tiles[tile:]
        )


def label_of(rows, n_heads, n_kv_heads, d_head):
    return (
        f"{'+'.join(f'{n}' if not cached else f'{cached}|{n}' for cached, n in rows)} tokens,"
        f" {n_heads}/{n_kv_heads} heads of {d_head}"
    )
