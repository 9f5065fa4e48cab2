"""Types of the C extension. Not a public interface: use it through vksteer. Shapes, checks and
orders of arguments are described beside each function in csrc/python/*.c; tests/test_stub.py holds
this file to what the module offers.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]
Words = NDArray[np.uint32]
Ints = NDArray[np.int32]
#: (site, layer)
Key = tuple[int, int]
#: kind, capped, tokens, a, b, weights, reference [n, D], other [n, D], reference_logits [n, V]; for
#: a choice also margin and faith
Metric = tuple[Any, ...]

ATTRIBUTE_TILE: int
#: name -> number, of the constants in shaders/include/params*.h and csrc/ops/ops.h, and of those
#: that csrc/python/module.c lists
constants: dict[str, int]

def devices() -> list[dict[str, Any]]: ...
def sites() -> list[tuple[str, str, bool, str]]: ...
def kernels() -> list[tuple[str, bytes, int]]: ...
def ops() -> list[tuple[str, int, list[tuple[str, str, int]]]]: ...
def row_stride(width: int) -> int: ...
def measure(
    model: Model, rows: Floats, n: int, request: tuple[Any, ...]
) -> tuple[Floats | None, Floats | None, None]: ...
def tape_bytes(model: Model, capacity: int, first_layer: int, keep_inside: bool) -> int: ...
def attribution_bytes(
    model: Model,
    capacity: int,
    step_capacity: int,
    longest: int,
    first_layer: int,
    n_sample_tokens: int,
    n_steps: int,
    normed: bool,
    keep_inside: bool,
) -> tuple[int, int]: ...

class Device:
    """An open device. Raises vksteer.DeviceError."""

    def __init__(self, index: int, cache_folder: str = ..., memory: int = ...) -> None: ...
    @property
    def info(self) -> dict[str, Any]: ...
    @property
    def usable(self) -> bool: ...
    @property
    def available_bytes(self) -> int: ...
    @property
    def allocated_bytes(self) -> int: ...
    def peak_bytes(self, reset: bool = ...) -> int: ...
    def prepare(self) -> None: ...
    def describe(self, kernel: str) -> str: ...
    def hold(self) -> None: ...

class MappedFile:
    """A file's bytes, read-only."""

    def __init__(self, path: str) -> None: ...

class Model:
    """Weights on a device."""

    def __init__(self, device: Device, facts: dict[str, Any]) -> None: ...
    def load_matrix(self, name: str, layer: int, sources: list[tuple[Any, ...]]) -> None: ...
    def load_vector(self, name: str, layer: int, sources: list[tuple[Any, ...]]) -> None: ...
    def finish(self) -> None: ...
    def plan(self) -> dict[str, int]: ...
    def apply(self, matrix: str, layer: int, x: Floats) -> Floats: ...
    def vector(self, name: str, layer: int) -> Floats: ...
    def rows(self, matrix: str, layer: int, first: int, n: int) -> Floats: ...
    def value_vectors(self, direction: Floats, first_layer: int, post: bool = ...) -> Floats: ...
    def lens(self, vectors: Floats, k: int, cosine: bool = ...) -> tuple[Floats, Floats]: ...
    def forward(
        self, cache: Cache, rows: PackedRows, captures: list[Key], logits: int
    ) -> tuple[Floats | None, dict[Key, Floats]]:
        """One batch. logits: 0 none, 1 after the last token of every row [n_out_rows, V], 2 all
        [n_out_rows, n_columns, V]. Captures [n_out_rows, n_columns, ...], those over keys
        [n_out_rows, H, n_columns, n_keys].
        """

    def decode_block(
        self, cache: Cache, rows: PackedRows, n_steps: int, share: int, empty: float, near: float
    ) -> Floats:
        """Tokens [n_steps, rows] that greedy decoding picks in n_steps steps from these rows of one
        token each on, as whole numbers. -1: a logit is not finite, or the first one is `empty`
        within +-near; what follows in that row means nothing. share: so many consecutive rows take
        the tokens that the first one picks.
        """

    def measure_linear(
        self, m: int, n: int, k: int, decode: bool = ..., backward: bool = ...
    ) -> tuple[float, float]: ...
    def measure_read(self, bytes: int) -> float: ...
    def prepare(self) -> None: ...
    def profile_start(self) -> None: ...
    def profile_stop(self) -> None: ...
    def profile_read(
        self,
    ) -> tuple[list[tuple[str, int, float, float, float, float]], int, int, int, float]: ...
    def close(self) -> None: ...
    kernels: str
    fast: bool
    @property
    def families(self) -> list[str]: ...
    @property
    def dispatches(self) -> int: ...

class Cache:
    """Keys and values of n_slots tokens."""

    def __init__(self, model: Model, n_slots: int, first_layer: int = ...) -> None: ...
    def copy(self, start: int, to: Words, n: int, first_layer: int = ...) -> None: ...
    # values float32 [m, 2 (keys, values), layers, G * dh]: values[which[i]] to slots[i], once
    def add(self, slots: Words, which: Words, values: Floats) -> None: ...
    # keys and values, float32 [2, layers, n, G * dh]
    def read(self, slots: Words) -> Floats: ...
    def edited(self, slot: int) -> bool: ...

class Edits:
    """Compiled edits of a batch."""

    def __init__(self, *args: Any, **keywords: Any) -> None: ...

class PackedRows:
    """The rows of one batch without padding: T new tokens in B rows, one row after the other.

    Row r brings tokens at positions start[r], start[r] + 1, ...; its keys and values lie in the
    cache slots from slot[r] (position 0) on. Arrays are borrowed, and checked by every call.
    """

    def __init__(
        self,
        *,
        tokens: Words,  # [T] token ids
        n_tokens: Words,  # [B] new tokens of each row
        start: Words,  # [B] position of each row's first new token
        slot: Words,  # [B] cache slot of each row's position 0
        group: Words,  # [B] consecutive rows with one number advance together (freezing)
        edit_row: Words,  # [B] the row of `edits` that each row is
        out_row: Ints,  # [B] row of the output arrays, -1 for none
        column: Ints,  # [B] output column of position 0; negative where position 0 is not returned
        key_column: Ints,  # [B] the same for keys
        q_row: Words | None = ...,  # [B] whose attention patterns a row takes in frozen layers
        v_row: Words | None = ...,  # [B] whose values
        mlp_row: Words | None = ...,  # [B] whose MLP outputs
        frozen: NDArray[np.uint8] | None = ...,  # [n_layers] 1 for a frozen layer
        inputs: Floats | None = ...,  # [T, D] residual stream entering first_layer
        n_out_rows: int = ...,
        n_columns: int = ...,
        n_keys: int = ...,
        edits: Edits | None = ...,
        first_layer: int = ...,  # layers below it are not run
        stop_layer: int = ...,  # layers from it on, final norm and logits are left out; 0: none
        decode: bool = ...,  # every row brings one token after its prompt
    ) -> None: ...

class Bench:
    """Single ops and their float64 references."""

    def __init__(self, device: Device) -> None: ...
    def run(
        self, op: str, arguments: dict[str, Any], buffers: dict[str, NDArray[Any]]
    ) -> tuple[dict[str, Floats], dict[str, Doubles]]: ...
    def families(self) -> list[tuple[int, str]]: ...
    def use(self, family: int, fast: bool = ..., large_from: int = ...) -> None: ...
    def self_test(self, family: int, weight_type: int = ...) -> None: ...

class Tape:
    """Memory for gradients through layers >= first_layer."""

    def __init__(
        self, model: Model, capacity: int, first_layer: int, keep_inside: bool = ...
    ) -> None: ...
    def differentiate(
        self,
        cache: Cache,
        rows: PackedRows,
        gradients: list[Key],
        metric: Metric,
        stop_layer: int,
        scalings: list[Key] = ...,
        sums: bool = ...,
        skip: int = ...,
    ) -> tuple[Floats, dict[Key, Floats], dict[Key, Floats]]:
        """Values of the metric, [n, 2] logits or [n]; gradients down to stop_layer, shaped as
        captures; the scaling gradients of sites of width D: for each token [n_out_rows,
        n_columns], or summed over a row's tokens, times values, without the first `skip` [B, D].
        """

class Attribution:
    """Scores of EAP-IG over sample tokens. The n sample tokens of a call begin at
    `sample_token`; pairs [n, 2] and sources [n, n_sources] are indices of packed tokens.
    """

    def __init__(
        self,
        model: Model,
        capacity: int,
        step_capacity: int,
        first_layer: int,
        n_sample_tokens: int,
        n_steps: int,
        normed: bool = ...,
        keep_inside: bool = ...,
    ) -> None: ...
    def forward(
        self,
        cache: Cache,
        rows: PackedRows,
        sample_token: int,
        pairs: Words,
        picks: Words,
        capped: bool,
        kl: bool,
    ) -> tuple[Ints, Floats, Floats, Floats]: ...
    def step(
        self,
        cache: Cache,
        rows: PackedRows,
        metric: Metric,
        sample_token: int,
        sources: Words,
        n_sources: int,
        first_step: int,
    ) -> Floats: ...
    def reset(self) -> None: ...
    def contract(
        self, tiles: Words, steer: Floats, dims_rows: int
    ) -> tuple[Doubles, Doubles, Doubles]: ...

class Encoder:
    """The encoder of a sparse autoencoder (csrc/analysis/encode.h). kind: ENCODER_* of
    `constants`; rows, columns: the largest tile.
    """

    def __init__(
        self, model: Model, n_features: int, width: int, kind: int, rows: int, columns: int
    ) -> None: ...
    def load(self, first: int, rows: Floats) -> None: ...
    def vectors(self, a: Floats | None, b: Floats | None, c: Floats | None) -> None: ...
    def sums(self, x: Floats, counts: Words) -> Floats: ...
    def top(self, x: Floats, k: int) -> tuple[Floats, Floats]: ...

class Circuits:
    """The model under circuits, beside the base run (csrc/analysis/circuit.h). request: (softcap,
    a, b, reference, other, targets, logits).
    """

    def __init__(self, model: Model, first_layer: int, plan: tuple[Words, ...]) -> None: ...
    def bytes(
        self, capacity: int, n_slots: int, longest: int, distributions: bool
    ) -> tuple[int, int]: ...
    def reserve(self, capacity: int, n_slots: int, longest: int, steer: Floats) -> None: ...
    def forward(
        self,
        cache: Cache,
        rows: PackedRows,
        tokens: Words,
        request: tuple[Any, ...],
        mask: NDArray[np.uint8] | None = ...,
        token_steer: Floats | None = ...,  # [T, D] in place of steer
    ) -> tuple[Floats | None, Floats | None, Floats | None]: ...
