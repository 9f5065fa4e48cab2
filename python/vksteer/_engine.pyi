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
#: tokens, n_tokens, start, slot, group, edit_row (uint32); out_row, column, key_column (int32)
Rows = tuple[Words, Words, Words, Words, Words, Words, Ints, Ints, Ints]
#: kind, capped, tokens, a, b, weights, reference [n, D], other [n, D], reference_logits [n, V]
Metric = tuple[
    int,
    bool,
    Words,
    Words | None,
    Words | None,
    Floats,
    Floats | None,
    Floats | None,
    Floats | None,
]

ATTRIBUTE_TILE: int

def devices() -> list[dict[str, Any]]: ...
def sites() -> list[tuple[str, str, bool]]: ...
def kernels() -> list[tuple[str, bytes, int]]: ...
def ops() -> list[tuple[str, int, list[tuple[str, str, int]]]]: ...
def measure(
    model: Model, rows: Floats, n: int, request: tuple[Any, ...]
) -> tuple[Floats | None, Floats | None, None]: ...
def tape_bytes(model: Model, capacity: int, first_layer: int, keep_inside: bool) -> int: ...
def attribution_bytes(
    model: Model,
    capacity: int,
    step_capacity: int,
    first_layer: int,
    n_slots: int,
    n_steps: int,
    normed: bool,
    keep_inside: bool,
) -> int: ...

class Device:
    """An open device. Raises vksteer.DeviceError."""

    def __init__(self, index: int, cache_folder: str = ...) -> None: ...
    @property
    def info(self) -> dict[str, Any]: ...
    @property
    def usable(self) -> bool: ...
    @property
    def available_bytes(self) -> int: ...
    @property
    def allocated_bytes(self) -> int: ...
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
        self,
        cache: Cache,
        tokens: Words,
        n_tokens: Words,
        start: Words,
        slot: Words,
        group: Words,
        edit_row: Words,
        out_row: Ints,
        column: Ints,
        key_column: Ints,
        n_out_rows: int,
        n_columns: int,
        n_keys: int,
        captures: list[Key],
        logits: int,
        decode: int,
        edits: Edits | None = ...,
        q_row: Words | None = ...,
        v_row: Words | None = ...,
        mlp_row: Words | None = ...,
        frozen: NDArray[np.uint8] | None = ...,
        first_layer: int = ...,
        inputs: Floats | None = ...,
        stop_layer: int = ...,
    ) -> tuple[Floats | None, dict[Key, Floats]]: ...
    def measure_linear(
        self, m: int, n: int, k: int, decode: bool = ..., backward: bool = ...
    ) -> tuple[float, float]: ...
    def measure_read(self, bytes: int) -> float: ...
    def prepare(self) -> None: ...
    def close(self) -> None: ...
    kernels: str
    @property
    def families(self) -> list[str]: ...
    @property
    def dispatches(self) -> int: ...

class Cache:
    """Keys and values of n_slots tokens."""

    def __init__(self, model: Model, n_slots: int, first_layer: int = ...) -> None: ...
    def copy(self, start: int, to: Words, n: int, first_layer: int = ...) -> None: ...

class Edits:
    """Compiled edits of a batch."""

    def __init__(self, *args: Any, **keywords: Any) -> None: ...

class Bench:
    """Single ops and their float64 references."""

    def __init__(self, device: Device) -> None: ...
    def run(
        self, op: str, arguments: dict[str, Any], buffers: dict[str, NDArray[Any]]
    ) -> tuple[dict[str, Floats], dict[str, Doubles]]: ...
    def families(self) -> list[tuple[int, str]]: ...
    def self_test(self, family: int, weight_type: int = ...) -> None: ...

class Tape:
    """Memory for gradients through layers >= first_layer."""

    def __init__(
        self, model: Model, capacity: int, first_layer: int, keep_inside: bool = ...
    ) -> None: ...
    def differentiate(
        self,
        cache: Cache,
        rows: Rows,
        n_out_rows: int,
        n_columns: int,
        n_keys: int,
        gradients: list[Key],
        metric: Metric,
        edits: Edits | None = ...,
        first_layer: int = ...,
        inputs: Floats | None = ...,
        stop_layer: int = ...,
    ) -> tuple[Floats, dict[Key, Floats]]: ...

class Attribution:
    """Scores of EAP-IG over slots of tokens."""

    def __init__(
        self,
        model: Model,
        capacity: int,
        step_capacity: int,
        first_layer: int,
        n_slots: int,
        n_steps: int,
        normed: bool = ...,
        keep_inside: bool = ...,
    ) -> None: ...
    def forward(
        self,
        cache: Cache,
        rows: Rows,
        n_columns: int,
        edits: Edits | None,
        inputs: Floats | None,
        slot: int,
        pairs: Words,
        picks: Words,
        capped: bool,
        kl: bool,
    ) -> tuple[Ints, Floats, Floats, Floats]: ...
    def step(
        self,
        cache: Cache,
        rows: Rows,
        n_columns: int,
        metric: Metric,
        edits: Edits | None,
        inputs: Floats | None,
        slot: int,
        sources: Words,
        n_sources: int,
        first_step: int,
    ) -> Floats: ...
    def reset(self) -> None: ...
    def contract(
        self, tiles: Words, steer: Floats, dims_rows: int
    ) -> tuple[Doubles, Doubles, Doubles]: ...

class Circuits:
    """The model under circuits, beside the base run (csrc/analysis/circuit.h). request: (softcap,
    a, b, reference, other, targets, logits).
    """

    def __init__(self, model: Model, first_layer: int, plan: tuple[Words, ...]) -> None: ...
    def bytes(self, capacity: int, n_slots: int) -> tuple[int, int]: ...
    def reserve(self, capacity: int, n_slots: int, steer: Floats) -> None: ...
    def forward(
        self,
        cache: Cache,
        rows: Rows,
        tokens: Words,
        request: tuple[Any, ...],
        edits: Edits | None = ...,
        first_layer: int = ...,
        inputs: Floats | None = ...,
        decode: bool = ...,
        mask: NDArray[np.uint8] | None = ...,
    ) -> tuple[Floats | None, Floats | None, Floats | None]: ...
