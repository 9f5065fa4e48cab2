"""What passes of a model take of a device's memory, from a configuration alone and before any
device is opened (`vs.plan_run`).

The functions compute what csrc/run/memory.c and csrc/model compute; tests/test_memory_plans.py
compares both, and the plans with the most bytes that the engine's buffers took at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from html import escape
from typing import TYPE_CHECKING, Any

from .. import _engine
from ..base.bytes import memory_bytes, size_text
from ..base.checks import is_number, require_int

if TYPE_CHECKING:
    from ..loading.config import Config
    from .model import Model

#: Bytes of an activation or a gradient (float32).
FLOAT = 4
#: Queries that the attention kernels compute together.
QUERIES = _engine.constants["OP_TILE"]
UPLOAD = _engine.constants["WORK_UPLOAD_BYTES"]
MIB = 1 << 20
#: row_stride(width): floats from one row of the device's arrays to the next.
row_stride = _engine.row_stride
#: Bytes of a token in the lists of a chunk: struct token_meta and struct query_tile.
TOKEN = 36 + 8
#: Rows of `generate` that run together at most.
ROWS = 64


@dataclass(frozen=True)
class Sizes:
    """How much goes through a device at once (struct run_sizes of csrc/run/run.h).

    chunk: tokens of a forward pass. scratch: bytes of attention scores. readback: bytes of readback
    memory.
    """

    chunk: int
    scratch: int
    readback: int


#: On a CPU with memory enough; the upper limits on GPUs; the lower limits.
ON_CPUS = Sizes(512, 32 * MIB, 64 * MIB)
ON_GPUS = Sizes(2048, 128 * MIB, 64 * MIB)
LEAST = Sizes(64, 4 * MIB, 16 * MIB)


def sizes_for(c: Config, memory: int | None, most: Sizes = ON_GPUS) -> Sizes:
    """The sizes on a device of which `memory` bytes are free before the model is loaded (None:
    those of a CPU with memory enough): the buffers of a chunk take at most a 16th of it, scores a
    64th and readback memory a 32nd.
    """
    if memory is None:
        return ON_CPUS
    chunk = most.chunk
    while chunk > LEAST.chunk and chunk_bytes(c, chunk) > memory // 16:
        chunk //= 2
    return Sizes(
        chunk,
        min(most.scratch, max(LEAST.scratch, memory // 64)),
        min(most.readback, max(LEAST.readback, memory // 32)),
    )


def sizes_of(config: Config | Model, memory: int | None) -> Sizes:
    """Those of a loaded model, else `sizes_for`."""
    engine = getattr(config, "_engine", None)
    if engine is None:
        c: Any = getattr(config, "config", config)
        return sizes_for(c, memory)
    found = engine.plan()
    return Sizes(found["chunk"], found["scratch"], found["readback"])


def on_matrix_units(config: Config | Model, kernels: str | None) -> bool:
    """Whether products split their rows: with the kernels of this name, or (None) a loaded model's
    own. Raises ValueError for an unknown name.
    """
    if kernels is None:
        return "matrix" in getattr(config, "kernels", ())
    names = ("broadcast", "texels", "tiled", "matrix")
    if kernels not in names:
        raise ValueError(f"kernels={kernels!r}: use one of {', '.join(names)}")
    return kernels == "matrix"


# -- the engine's sums -----------------------------------------------------------------------------


def layer_weights(c: Config) -> int:
    """Number of weights in the matrices of one layer."""
    mlp = (3 if c.gated else 2) * c.d_model * c.d_mlp
    return c.d_model * c.d_head * (2 * c.n_heads + 2 * c.n_kv_heads) + mlp


def matrix_weights(c: Config) -> int:
    """Number of weights in all matrices: those of the layers, the tables of tokens and positions
    and the unembedding.
    """
    rows = c.d_vocab * (1 if c.tied else 2) + (c.n_ctx if c.pos_embed else 0)
    return rows * c.d_model + c.n_layers * layer_weights(c)


def chunk_bytes(c: Config, capacity: int) -> int:
    """The buffers of a pass of `capacity` tokens."""
    heads, gates = c.n_heads * c.d_head, 2 if c.gated else 1
    widths = (heads + 2 * c.n_kv_heads * c.d_head, heads, gates * c.d_mlp, c.d_mlp)
    streams = (5 if c.parallel else 4) * row_stride(c.d_model)
    return FLOAT * capacity * (streams + sum(map(row_stride, widths)) + 1)


def scratch_bytes(c: Config, scratch: int, tokens: int, keys: int) -> int:
    """Attention scores of a chunk of `tokens` tokens whose rows have up to `keys` keys."""
    row = FLOAT * c.n_heads * row_stride(keys)
    return row * max(QUERIES, min(scratch // row, tokens))


def upload_bytes(c: Config, tokens: int, resumed: bool) -> int:
    """Token lists and, where passes begin above the first layer, the residual stream."""
    rows = FLOAT * tokens * c.d_model
    return rows + 2 * UPLOAD if resumed and tokens * TOKEN + rows > UPLOAD else UPLOAD


def cache_bytes(c: Config, slots: int, first_layer: int = 0) -> int:
    """Keys and values of `slots` tokens in the layers from first_layer on."""
    return 2 * (c.n_layers - first_layer) * slots * c.n_kv_heads * c.d_head * FLOAT


def rotation_bytes(c: Config, longest: int, prompt: int) -> int:
    """Rotation tables for texts of up to `longest` tokens, with the memory that fills one. Where
    they grow beyond those of the prompt, an old one is held until its successor is filled.
    """
    rows, before = -(-longest // 256) * 256, -(-prompt // 256) * 256
    width = c.d_rot * FLOAT * (2 if c.rope_switch else 1)
    n = len(c.rope) * (2 if c.query_beta else 1)
    grown = rows - 256 if rows > before else 0
    return width * (rows * (n + 1) + grown) if n else 0


def split_rows_bytes(rows: int, width: int) -> int:
    """`rows` rows of `width` values in two float16 parts (op_split_bytes)."""
    row = -(-width // 32) * 32 * 2 * 2 + 4
    most = max(128, (64 * MIB // row) // 128 * 128)
    n = min(rows, most, 65535 // 128 * 128)
    return 256 + -(-4 * n // 256) * 256 + n * (row - 4)


def split_bytes(c: Config, rows: int, backward: bool = False) -> int:
    """What products of `rows` rows on matrix units split them in."""
    heads, gates = c.n_heads * c.d_head, 2 if c.gated else 1
    widths = [c.d_model, heads, c.d_mlp]
    if backward:
        widths += [heads + 2 * c.n_kv_heads * c.d_head, gates * c.d_mlp]
    return max(split_rows_bytes(rows, w) for w in widths)


# -- plain runs ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RunPlan:
    """Predicted device memory of `run` or `generate`, in bytes."""

    rows: int
    longest: int  # tokens of the longest row, with those that are generated
    chunk: int  # tokens of a forward pass
    weights: int
    work: int  # buffers of a forward pass, uploads and readback memory
    scores: int  # attention scores
    cache: int  # keys and values
    rotation: int  # rotation tables
    picks: int  # logits from which the device picks tokens
    split: int  # split rows of products on matrix units
    device_memory: int | None
    row_fits: bool = True  # whether the longest row's cache fits half of what is free

    @property
    def beside_weights(self) -> int:
        """All but the weights."""
        parts = (self.work, self.scores, self.cache, self.rotation, self.picks, self.split)
        return sum(parts)

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.beside_weights

    @property
    def fits(self) -> bool:
        """Whether it fits into device_memory."""
        return self.device_memory is None or (self.row_fits and self.total <= self.device_memory)

    def to_dict(self) -> dict[str, Any]:
        """For JSON: the fields, with total and fits."""
        return {**asdict(self), "total": self.total, "fits": self.fits}

    def _repr_html_(self) -> str:
        return "".join(f"<p>{escape(line)}</p>" for line in str(self).split("\n"))

    def __str__(self) -> str:
        limit = ""
        if self.device_memory is not None:
            limit = f" of {size_text(self.device_memory)}" + ("" if self.fits else ": too much")
        lines = [
            f"{self.rows} rows of up to {self.longest} tokens, {self.chunk} tokens at a time",
            f"  weights             {size_text(self.weights)}",
            f"  working memory      {size_text(self.work)}",
            f"  attention scores    {size_text(self.scores)}",
            f"  keys and values     {size_text(self.cache)}",
            f"  rotation tables     {size_text(self.rotation)}",
            f"  logits to pick from {size_text(self.picks)}",
            f"  split rows          {size_text(self.split)}",
            f"  together            {size_text(self.total)}{limit}",
        ]
        return "\n".join(lines)


def plan_run(
    config: Config | Model,
    tokens: int | Sequence[int],
    *,
    new_tokens: int = 0,
    frozen: bool = False,
    device_memory: int | str | None = None,
    kernels: str | None = None,
    weight_bytes: float = 2,
    batch_size: int | None = None,
) -> RunPlan:
    """Predicted device memory of `run` (new_tokens=0) or `generate`, without weights or a device.

    config: a Config (`vs.Config.from_pretrained("config.json")`) or a Model, whose own sizes count.
    tokens: of each row's prompt, with its response in `run`. new_tokens: tokens that are generated.
    frozen: with freeze or ablate, where every row has its base run beside it. device_memory: bytes
    or "16GB" of a GPU that are free before loading; without it a configuration is planned for a
    CPU. kernels: a family by name ("matrix" splits rows); default: a Model's, else none that does.
    weight_bytes: bytes of a matrix' weight on the device, for a configuration. batch_size: as in
    `generate`, which also splits rows so that their caches fit half of the free memory; a row whose
    own cache does not is refused there, and does not fit here. Captures of hook_result are not
    counted. Raises ValueError for bad arguments and rows beyond the context.
    """
    c: Any = getattr(config, "config", config)
    memory = memory_bytes(device_memory, "device_memory")
    split = on_matrix_units(config, kernels)
    new = require_int(new_tokens, "new_tokens", 0)
    lengths = _lengths(c, tokens, new)
    if not is_number(weight_bytes) or weight_bytes <= 0:
        raise ValueError(f"weight_bytes must be a number above 0, not {weight_bytes!r}")
    sizes, double = sizes_of(config, memory), 2 if frozen else 1
    most = ROWS if batch_size is None else require_int(batch_size, "batch_size", 1)
    longest, at_once = max(lengths), min(len(lengths), most if new else len(lengths))
    first = min(sizes.chunk, double * sum(sorted(lengths)[-at_once:]))
    slots = double * sum(n + new for n in sorted(lengths)[-at_once:])
    if not new:  # a ring of slots that are used again
        slots = min(slots, 2 * sizes.chunk + 3 * double * longest)
    scores = scratch_bytes(c, sizes.scratch, first, longest)
    if new:
        decoded = min(sizes.chunk, double * at_once)
        scores = max(scores, scratch_bytes(c, sizes.scratch, decoded, longest + new))
    weights = weights_of(config, weight_bytes)
    work = chunk_bytes(c, sizes.chunk) + sizes.readback + UPLOAD
    row = cache_bytes(c, double * (longest + new)) if new else 0
    half = None if memory is None or not new else max(0, memory - weights - work) // 2
    cache = cache_bytes(c, slots)
    return RunPlan(
        rows=len(lengths),
        longest=longest + new,
        chunk=sizes.chunk,
        weights=weights,
        work=work,
        scores=scores,
        cache=cache if half is None else min(cache, max(row, half)),
        rotation=rotation_bytes(c, longest + new, longest),
        picks=_picks(c, sizes, double * at_once) if new > 1 else 0,
        split=split_bytes(c, sizes.chunk) if split else 0,
        device_memory=memory,
        row_fits=half is None or row <= half,
    )


def _picks(c: Config, sizes: Sizes, rows: int) -> int:
    """Logits from which blocks of greedy decoding pick."""
    logits = FLOAT * row_stride(c.d_vocab)
    return logits * max(1, min(sizes.readback // logits, rows))


def _lengths(c: Config, tokens: int | Sequence[int], new: int) -> list[int]:
    """Tokens of each row. Raises ValueError for rows beyond the context."""
    given = [tokens] if isinstance(tokens, int) else list(tokens)
    lengths = [require_int(n, "tokens", 1) for n in given]
    if not lengths or max(lengths) + new > c.n_ctx:
        raise ValueError(f"tokens={tokens!r}: rows of 1 to {c.n_ctx - new} tokens are needed")
    return lengths


def weights_of(config: Config | Model, weight_bytes: float) -> int:
    """Bytes of all weights: a loaded model's, else those of the matrices."""
    engine = getattr(config, "_engine", None)
    if engine is not None:
        return int(engine.plan()["weights"])
    c: Any = getattr(config, "config", config)
    return int(weight_bytes * matrix_weights(c))
