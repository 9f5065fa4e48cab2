"""What an attribution will cost: memory and work, from a configuration alone and before any device
is opened (`vs.patching.plan`).

Memory is computed as the engine computes it (attribution_bytes in csrc/analysis/attribution.c, and
csrc/run), for the layouts that `attribute` tries in turn; tests/test_plan.py compares the two. Work
counts a multiplication and an addition as two operations and is an estimate.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from html import escape
from typing import TYPE_CHECKING, Any

from .. import _engine
from ..base.bytes import memory_bytes, size_text
from ..base.checks import require_int
from ..circuits.graph import graph
from ..runtime.memory_plan import (
    FLOAT,
    MIB,
    ON_CPUS,
    Sizes,
    cache_bytes,
    chunk_bytes,
    layer_weights,
    on_matrix_units,
    row_stride,
    scratch_bytes,
    sizes_of,
    split_bytes,
    split_rows_bytes,
    upload_bytes,
    weights_of,
)

if TYPE_CHECKING:
    from ..circuits.graph import Graph
    from ..loading.config import Config
    from ..runtime.model import Model

#: Sample tokens whose scores are contracted together.
TILE = _engine.ATTRIBUTE_TILE
#: Tokens of a forward and a backward pass on a CPU, where memory allows.
STEP_TOKENS = ON_CPUS.chunk
PICKS, PICKED_ROWS = (
    _engine.constants[name] for name in ("ATTRIBUTION_PICKS_BYTES", "ATTRIBUTION_PICKS_ROWS")
)
#: Rows of logits of three runs, which the two KL metrics need (csrc/run/metric.c).
LOGITS = 3 * (24 << 20)
#: Without max_memory half of the free memory is used, at most so many bytes.
MOST_ON_CPUS, MOST_ON_GPUS = 1 << 30, 8 << 30


@dataclass(frozen=True)
class Plan:
    """Predicted memory (bytes) and work (operations) of one sample, in the first layout that fits
    into max_memory; see `mode`.
    """

    layer: int
    positions: int
    response: int  # positions whose logits are computed
    steps: int
    dims: str
    n_layers: int  # from the steering layer on
    n_edges: int
    n_nodes: int
    weights: int  # bytes of the whole model
    step_tokens: int  # tokens of a forward and a backward pass
    # Sample tokens whose sums are held together. With fewer than `positions`, all steps run once
    # for every such part.
    slots: int
    working: int  # bytes of a forward pass and of what is read back from the device
    tape: int  # bytes of the activations that the backward pass reads
    # Bytes of gradients summed over steps, and of what the derivatives of norms need of each step.
    accumulators: int
    contracted: int  # bytes of a contraction tile: one row of width D for every node
    split: int  # bytes of split rows of products on matrix units; 0 where there are none
    own: int  # bytes of the model's own working memory, which gives the layer inputs
    # "kept": activations of all layers are kept. "recomputed": the input of each layer is kept, and
    # one layer's activations.
    mode: str
    max_memory: int | None
    device_memory: int | None
    forward: float  # operations
    backward: float
    contraction: float  # products of differences of outputs and gradients of inputs, for all edges

    @property
    def total(self) -> int:
        """Bytes that `attribute` takes beside the loaded model, with the keys and values of one
        batch.
        """
        return self.working + self.tape + self.accumulators + self.contracted + self.split

    @property
    def together(self) -> int:
        """Bytes of the device's memory: weights, the model's own working memory and `total`."""
        return self.weights + self.own + self.total

    @property
    def parts(self) -> int:
        """How often all steps run: the positions over `slots`, rounded up."""
        return -(-self.positions // self.slots)

    @property
    def work(self) -> float:
        """All operations."""
        return self.forward + self.backward + self.contraction

    @property
    def fits(self) -> bool:
        """Whether a layout fits. Where none does, `attribute` raises ValueError."""
        return (self.max_memory is None or self.total <= self.max_memory) and (
            self.device_memory is None or self.together <= self.device_memory
        )

    def seconds(self, rate: float) -> float:
        """Seconds of the work at `rate` operations per second."""
        return self.work / rate

    def to_dict(self) -> dict[str, Any]:
        """For JSON: the fields, with total, together, work, fits and parts."""
        return {
            **asdict(self),
            "total": self.total,
            "together": self.together,
            "work": self.work,
            "fits": self.fits,
            "parts": self.parts,
        }

    def _repr_html_(self) -> str:
        return "".join(f"<p>{escape(line)}</p>" for line in str(self).split("\n"))

    def __str__(self) -> str:
        kept = (
            "all activations kept"
            if self.mode == "kept"
            else "layer inputs kept, the rest recomputed"
        )
        limit = (
            ""
            if self.max_memory is None
            else f"; max_memory {size_text(self.max_memory)}"
            + ("" if self.fits else " is too small")
        )
        device = ""
        if self.device_memory is not None:
            device = f" of {size_text(self.device_memory)}" + ("" if self.fits else ": too much")
        parts = (
            ""
            if self.parts == 1
            else f", the steps run {self.parts} times, for {self.slots} tokens each"
        )

        def share(x: float) -> str:
            return f"{_operations(x)} ({100 * x / self.work:.0f} %)"

        return "\n".join(
            [
                (
                    f"Attribution of one sample of {self.positions} positions ({self.response} with"
                    f" logits), {self.steps} steps, layers {self.layer} to"
                    f" {self.layer + self.n_layers - 1}, {self.n_edges} edges between"
                    f" {self.n_nodes} nodes"
                ),
                f"  weights             {size_text(self.weights)}",
                (
                    f"  activations         {size_text(self.tape)}  ({kept};"
                    f" {self.step_tokens} tokens at a time)"
                ),
                f"  sums of gradients   {size_text(self.accumulators)}{parts}",
                f"  a tile's rows       {size_text(self.contracted)}",
                f"  working memory      {size_text(self.working)}",
                f"  split rows          {size_text(self.split)}",
                f"  beside the model    {size_text(self.total)}{limit}",
                f"  the model's own     {size_text(self.own)}",
                f"  together            {size_text(self.together)}{device}",
                (
                    f"  work                {_operations(self.work)}: forward"
                    f" {share(self.forward)}, backward {share(self.backward)}, contraction"
                    f" {share(self.contraction)}"
                ),
            ]
        )


def plan(
    config: Config | Model,
    layer: int,
    positions: int,
    *,
    steps: int = 10,
    dims: str = "steer",
    at: str = "pre_norm",
    metric: str = "logit_diff",
    response: int | None = None,
    max_memory: int | str | None = None,
    weight_bytes: float = 2,
    device_memory: int | str | None = None,
    kernels: str | None = None,
) -> Plan:
    """Predicted memory and work of `attribute` for one sample. Needs no weights and no device.

    config: a Config (`vs.Config.from_pretrained("config.json")`) or a Model, whose own sizes count.
    layer: the steering layer. positions: tokens of prompt and response. response: positions whose
    logits are needed (default: all). steps, dims, at, metric: as in `attribute`. weight_bytes:
    bytes of a weight on the device. max_memory: bytes or "6GiB" (default: no limit); where the
    activations of all layers do not fit, they are recomputed layer by layer. device_memory: bytes
    or "16GB" of a GPU that are free before loading; the layout is then the one that `attribute`
    takes there, and without it a configuration is planned for a CPU. kernels: a family by name
    ("matrix" splits rows); default: a Model's, else none that does. Raises ValueError for a layer
    outside the model, positions outside the context, and bad arguments.
    """
    c: Any = getattr(config, "config", config)
    g, limit = graph(c, layer), memory_bytes(max_memory)
    S, R, T = _check_sizes(c, positions, response, steps)
    _check_options(dims, at, metric, weight_bytes)
    device = memory_bytes(device_memory, "device_memory")
    sizes, units = sizes_of(config, device), on_matrix_units(config, kernels)
    own = _own_bytes(c, sizes, S) + (split_bytes(c, sizes.chunk) if units else 0)
    weights = weights_of(config, weight_bytes)
    if limit is None and device is not None:
        limit = default_memory(max(0, device - weights - own), False)
    memory = _first_layout(c, g.layer, (S, T), (at, metric), sizes, units, limit)
    parts = -(-S // memory["slots"])
    forward, backward = _passes(c, g, S, R, T, memory["mode"], parts, metric)
    return Plan(
        layer=g.layer,
        positions=S,
        response=R,
        steps=T,
        dims=dims,
        n_layers=g.depth,
        n_edges=g.n_edges,
        n_nodes=g.n_upstream,
        weights=weights,
        own=own,
        max_memory=limit,
        device_memory=device,
        forward=forward,
        backward=backward,
        contraction=contraction_operations(c, g, S, T, at),
        **memory,
    )


def _first_layout(
    c: Config,
    layer: int,
    counts: tuple[int, int],
    options: tuple[str, str],
    sizes: Sizes,
    units: bool,
    limit: int | None,
) -> dict[str, Any]:
    """The fields of Plan that the first layout within `limit` decides, or the last layout.

    counts: positions and steps. options: at and metric. units: whether products split their rows.
    """
    (S, T), (at, metric) = counts, options
    found: dict[str, Any] = {}
    for step_tokens, slots, kept in layouts(S, T, None, sizes.chunk):
        arguments = (max(step_tokens, 2 * max(slots, S)), step_tokens, S, layer, slots, T)
        parts = memory_parts(c, sizes.scratch, *arguments, at == "normed", kept)
        working, tape, accumulators, contracted = parts
        found = {
            "step_tokens": step_tokens,
            "slots": slots,
            "working": working + (LOGITS if metric != "logit_diff" else 0),
            "tape": tape,
            "accumulators": accumulators,
            "contracted": contracted,
            "split": attribution_split(c, *arguments) if units else 0,
        }
        total = sum(found.values()) - step_tokens - slots
        found["mode"] = "kept" if kept else "recomputed"
        if limit is None or total <= limit:
            break
    return found


def _own_bytes(c: Config, sizes: Sizes, positions: int) -> int:
    """The model's own working memory with the scores and keys of a run of these positions."""
    return (
        chunk_bytes(c, sizes.chunk)
        + sizes.readback
        + upload_bytes(c, sizes.chunk, False)
        + scratch_bytes(c, sizes.scratch, min(positions, sizes.chunk), positions)
        + cache_bytes(c, min(positions, 2 * sizes.chunk + 3 * positions))
    )


def default_memory(free: int, software: bool) -> int:
    """Bytes that `attribute` may take without max_memory, of `free` bytes."""
    return min(MOST_ON_CPUS if software else MOST_ON_GPUS, free // 2)


def _check_sizes(
    c: Config, positions: int, response: int | None, steps: int
) -> tuple[int, int, int]:
    """(positions, response, steps) as ints."""
    S, T = require_int(positions, "positions", 1), require_int(steps, "steps", 1)
    if getattr(c, "n_ctx", S) < S:
        raise ValueError(f"positions: {S} are more than the model's context of {c.n_ctx}")
    R = S if response is None else require_int(response, "response", 1)
    if R > S:
        raise ValueError(f"response: {R} positions of {S}")
    return S, R, T


def _check_options(dims: str, at: str, metric: str, weight_bytes: object) -> None:
    if dims not in ("steer", "all"):
        raise ValueError(f"dims must be 'steer' or 'all', not {dims!r}")
    if at not in ("pre_norm", "normed"):
        raise ValueError(f"at must be 'pre_norm' or 'normed', not {at!r}")
    if metric not in ("logit_diff", "directional_kl", "kl"):
        raise ValueError(f"metric must be 'logit_diff', 'directional_kl' or 'kl', not {metric!r}")
    if (
        isinstance(weight_bytes, bool)
        or not isinstance(weight_bytes, (int, float))
        or not weight_bytes > 0
    ):
        raise ValueError(f"weight_bytes must be a number above 0, not {weight_bytes!r}")


# -- memory ----------------------------------------------------------------------------------------


def layouts(
    positions: int, steps: int, together: int | None = None, chunk: int = STEP_TOKENS
) -> list[tuple[int, int, bool]]:
    """The layouts that `attribute` tries, in order: (tokens of a forward and a backward pass,
    sample tokens whose sums are held, whether all activations are kept).

    positions: of the longest sample. together: sample tokens of a group of samples, at least
    `positions` (default: of one sample alone). chunk: tokens of a forward pass of the device.
    """
    widths = [max(positions, min(n, positions * steps)) for n in (chunk, STEP_TOKENS)]
    widths = list(dict.fromkeys(n for n in (*widths, positions) if n <= widths[0]))
    tried = []
    if together is not None and together > positions:
        tried = [(wide, together, True) for wide in widths[:-1] or widths]
    tried += [(wide, positions, True) for wide in widths] + [(positions, positions, False)]
    part = -(-positions // (2 * TILE)) * TILE
    while part >= TILE:
        tried.append((positions, part, False))
        if part == TILE:
            break
        part = max(TILE, -(-part // (2 * TILE)) * TILE)
    return tried


def memory_parts(
    c: Config,
    scratch: int,
    capacity: int,
    step_capacity: int,
    longest: int,
    layer: int,
    sample_tokens: int,
    steps: int,
    normed: bool,
    keep_inside: bool,
) -> tuple[int, int, int, int]:
    """Bytes of (a forward pass, the tape, the accumulators, a contraction tile); their sum is the
    engine's attribution_bytes. scratch: of attention scores, at least those of a query tile.
    """
    H, G, n = c.n_heads, c.n_kv_heads, c.n_layers - layer
    gates = 2 if c.gated else 1
    d, q, qkv, gate_up, mlp = (
        row_stride(w)
        for w in (c.d_model, H * c.d_head, (H + 2 * G) * c.d_head, gates * c.d_mlp, c.d_mlp)
    )
    inputs, nodes = H + 2 * G, 1 + n * (H + 1)
    all_nodes = 1 + c.n_layers * (H + 1)
    readback = (
        max(
            FLOAT * all_nodes * (c.d_model + c.n_layers * (inputs + 1) + 1) + 4096,
            2 * PICKED_ROWS * FLOAT * (c.d_vocab + c.d_model),
            PICKS,
        )
        + MIB
    )
    pick = 2 * FLOAT * (d + row_stride(c.d_vocab))  # rows and logits of two runs
    working = (
        chunk_bytes(c, capacity)
        + readback
        + scratch_bytes(c, scratch, capacity, longest)
        + upload_bytes(c, capacity, True)
        + cache_bytes(c, capacity, layer)  # keys and values of a batch
        + min(sample_tokens, max(PICKED_ROWS, PICKS // pick)) * pick
    )
    # In a parallel layer attention and MLP read one stream, and their gradients wait side by side.
    mid, own = (0, 4 * d) if c.parallel else (d, 3 * d)
    inside = mid + 2 * qkv + gate_up + (2 * d if c.post_norms else 0)
    tape = FLOAT * step_capacity * (
        n * d + inside * (n if keep_inside else 1) + own + qkv + q + gate_up + mlp
    ) + (2 if c.attn_softcap else 1) * scratch_bytes(c, scratch, step_capacity, longest)
    # Gradients of the residual stream where the nodes of a layer end: after attention and MLP.
    ends = 1 if c.parallel else 2
    passes_norm = c.pre_norms and not normed
    per_token = 2 * d + n * (q + qkv + (2 + ends) * d)
    if passes_norm:
        per_token += n * steps * (inputs + d)
    sums = per_token * sample_tokens + (n * qkv if passes_norm and c.norm_bias else 0)
    expanded = H * q + inputs * qkv if c.d_head % 16 else 0
    rows = nodes + max(inputs + 1, 1 + ends * n)
    return working, tape, FLOAT * sums, FLOAT * TILE * (rows * d + expanded)


def attribution_split(
    c: Config, capacity: int, step_capacity: int, longest: int, layer: int, slots: int, steps: int
) -> int:
    """Bytes in which products on matrix units split rows (attribution_split_bytes)."""
    inputs = c.n_heads + 2 * c.n_kv_heads + 1
    nodes = 1 + (c.n_layers - layer) * (c.n_heads + 1)
    return max(
        split_bytes(c, capacity),
        split_bytes(c, step_capacity, True),
        _dots_bytes(inputs, nodes, TILE * row_stride(c.d_model)),
    )


def _align(n: int) -> int:
    return -(-n // 256) * 256


def _dots_bytes(n_a: int, n_b: int, n_k: int) -> int:
    """Sums of slices, scales and split rows of scores (op_dots_bytes)."""
    slices = -(-n_k // 4096)
    row = split_rows_bytes(1, 4096 if slices > 1 else n_k) - 512
    at_once = max(1, min(slices, 64 * MIB // ((n_a + n_b) * row)))
    return (
        _align(4 * slices * n_a * n_b)
        + _align(4 * (n_a + n_b) * at_once)
        + (n_a + n_b) * row * at_once
    )


# -- operations ------------------------------------------------------------------------------------


def _keys(c: Config, S: int, layer: int) -> float:
    """Pairs of query and key in one layer: a query attends to itself and the keys before it, at
    most a window of them.
    """
    window = (getattr(c, "window", None) or [0] * c.n_layers)[layer]
    w = min(window or S, S)
    return w * (w + 1) / 2 + (S - w) * w


def _passes(
    c: Config, g: Graph, S: int, R: int, T: int, mode: str, parts: int, metric: str
) -> tuple[float, float]:
    """(forward, backward) operations.

    Forward: the layers below the steering layer run once, unsteered; those from the steering layer
    on in two runs and once for each step. Backward: with respect to activations only, each product
    once, and five products in place of the two of attention scores and output. Runs and steps count
    once for each part. The steps of the two KL metrics need whole rows of logits, forward and
    backward; a logit difference needs two rows of the unembedding.
    """
    product = 2.0 * S * layer_weights(c)
    attention = [4.0 * _keys(c, S, l) * c.n_heads * c.d_head for l in range(c.n_layers)]
    logits = 2.0 * R * c.d_vocab * c.d_model
    stepped = 0.0 if metric == "logit_diff" else logits
    below, above = (
        sum(product + a for a in part) for part in (attention[: g.layer], attention[g.layer :])
    )
    forward = below + parts * (
        2 * (above + logits) + T * (above + stepped) + (T * above if mode == "recomputed" else 0)
    )
    backward = parts * T * (g.depth * product + 2.5 * sum(attention[g.layer :]) + stepped)
    return forward, backward


def contraction_operations(c: Config, g: Graph, S: int, T: int, at: str = "pre_norm") -> float:
    """Operations of (u_clean - u_corrupt)^T dm/dv over all edges of one sample of S positions.

    Outputs of heads and gradients of q, k and v inputs are computed from head space (z W_O and W^T
    g); then each edge costs one product of width D. Before a norm, the derivative of the norm
    adds one product with the residual stream of each step for every q, k and v input.
    """
    H, G, dh, D, n = c.n_heads, c.n_kv_heads, c.d_head, c.d_model, g.depth
    per_token = n * 2.0 * D * dh * (2 * H + 2 * G) + 2.0 * D * g.n_edges
    if at == "pre_norm" and c.pre_norms:
        per_token += T * 2.0 * D * n * (H + 2 * G)
    return S * per_token


def _operations(n: float) -> str:
    for unit, name in ((1e12, "TFLOP"), (1e9, "GFLOP"), (1e6, "MFLOP")):
        if n >= unit:
            return f"{n / unit:.2f} {name}"
    return f"{n:.0f} FLOP"
