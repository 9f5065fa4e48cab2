"""What an attribution will cost: memory and work, from a configuration alone and before any device
is opened (`vs.patching.plan`).

Memory is computed as the engine computes it (attribution_bytes in csrc/analysis/attribution.c, and
csrc/run), for the layouts that `attribute` tries in turn; tests/test_plan.py compares the two. Work
counts a multiplication and an addition as two operations and is an estimate.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from html import escape
from typing import TYPE_CHECKING, Any

from .. import _engine
from ..base.checks import require_int
from ..circuits.graph import graph

if TYPE_CHECKING:
    from ..circuits.graph import Graph
    from ..loading.config import Config
    from ..runtime.model import Model

_UNITS = {
    "": 1,
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
    "tib": 2**40,
    "k": 2**10,
    "m": 2**20,
    "g": 2**30,
    "t": 2**40,
}
#: Bytes of an activation or a gradient (float32).
FLOAT = 4
#: Sample tokens whose scores are contracted together.
TILE = _engine.ATTRIBUTE_TILE
#: Queries that the attention kernels compute together.
QUERIES = _engine.constants["OP_TILE"]
#: Tokens of a forward and a backward pass, where memory allows.
STEP_TOKENS = 512
SCRATCH, PICKS, PICKED_ROWS = (
    _engine.constants[name]
    for name in ("WORK_SCRATCH", "ATTRIBUTION_PICKS_BYTES", "ATTRIBUTION_PICKS_ROWS")
)
MIB = 1 << 20
#: row_stride(width): floats from one row of the device's arrays to the next.
row_stride = _engine.row_stride
#: Rows of logits of three runs, which the two KL metrics need (csrc/run/metric.c).
LOGITS = 3 * (24 << 20)


def memory_bytes(value: object, what: str = "max_memory") -> int | None:
    """A number of bytes from a number or a text such as "6GiB", "500 MB" or "1.5G"; None stays
    None. Raises ValueError naming `what` for anything else, and for 0.
    """
    if value is None:
        return None
    if isinstance(value, str):
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", value)
        if not match or match[2].lower() not in _UNITS:
            raise ValueError(
                f"{what}={value!r}: use a number of bytes, or a text such as '6GiB' or '500MB'"
            )
        value = int(float(match[1]) * _UNITS[match[2].lower()])
    elif isinstance(value, float) and value.is_integer():
        value = int(value)
    return require_int(value, what, 1)


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
    # "kept": activations of all layers are kept. "recomputed": the input of each layer is kept, and
    # one layer's activations.
    mode: str
    max_memory: int | None
    forward: float  # operations
    backward: float
    contraction: float  # products of differences of outputs and gradients of inputs, for all edges

    @property
    def total(self) -> int:
        """Bytes beside the weights and beside the keys and values of one batch, which `attribute`
        frees after each.
        """
        return self.working + self.tape + self.accumulators + self.contracted

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
        return self.max_memory is None or self.total <= self.max_memory

    def seconds(self, rate: float) -> float:
        """Seconds of the work at `rate` operations per second."""
        return self.work / rate

    def to_dict(self) -> dict[str, Any]:
        """For JSON: the fields, with total, work, fits and parts."""
        return {
            **asdict(self),
            "total": self.total,
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
            else f"; max_memory {_size(self.max_memory)}" + ("" if self.fits else " is too small")
        )
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
                f"  weights             {_size(self.weights)}",
                (
                    f"  activations         {_size(self.tape)}  ({kept}; {self.step_tokens} tokens"
                    " at a time)"
                ),
                f"  sums of gradients   {_size(self.accumulators)}{parts}",
                f"  a tile's rows       {_size(self.contracted)}",
                f"  working memory      {_size(self.working)}",
                f"  beside the weights  {_size(self.total)}{limit}",
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
) -> Plan:
    """Predicted memory and work of `attribute` for one sample. Needs no weights and no device.

    config: a Config (`vs.Config.from_pretrained("config.json")`) or a Model. layer: the steering
    layer. positions: tokens of prompt and response. response: positions whose logits are needed
    (default: all). steps, dims, at, metric: as in `attribute`. weight_bytes: bytes of a weight on
    the device. max_memory: bytes or "6GiB" (default: no limit); where the activations of all layers
    do not fit, they are recomputed layer by layer. Raises ValueError for a layer outside the model,
    positions outside the context, and bad arguments.
    """
    c: Any = getattr(config, "config", config)
    g, limit = graph(c, layer), memory_bytes(max_memory)
    S, R, T = _check_sizes(c, positions, response, steps)
    _check_options(dims, at, metric, weight_bytes)
    logits = LOGITS if metric != "logit_diff" else 0
    for step_tokens, sample_tokens, kept in layouts(S, T):
        capacity = max(step_tokens, 2 * max(sample_tokens, S))
        working, tape, accumulators, contracted = memory_parts(
            c, capacity, step_tokens, g.layer, sample_tokens, T, at == "normed", kept
        )
        working += logits
        if limit is None or working + tape + accumulators + contracted <= limit:
            break
    mode = "kept" if kept else "recomputed"
    forward, backward = _passes(c, g, S, R, T, mode, -(-S // sample_tokens), metric)
    return Plan(
        layer=g.layer,
        positions=S,
        response=R,
        steps=T,
        dims=dims,
        n_layers=g.depth,
        n_edges=g.n_edges,
        n_nodes=g.n_upstream,
        weights=int(weight_bytes * (_embedding_weights(c) + c.n_layers * layer_weights(c))),
        step_tokens=step_tokens,
        slots=sample_tokens,
        working=working,
        tape=tape,
        accumulators=accumulators,
        contracted=contracted,
        mode=mode,
        max_memory=limit,
        forward=forward,
        backward=backward,
        contraction=contraction_operations(c, g, S, T, at),
    )


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


def layouts(positions: int, steps: int, together: int | None = None) -> list[tuple[int, int, bool]]:
    """The layouts that `attribute` tries, in order: (tokens of a forward and a backward pass,
    sample tokens whose sums are held, whether all activations are kept).

    positions: of the longest sample. together: sample tokens of a group of samples, at least
    `positions` (default: of one sample alone).
    """
    wide = max(positions, min(STEP_TOKENS, positions * steps))
    tried = [(wide, together, True)] if together is not None and together > positions else []
    tried += [(wide, positions, True), (positions, positions, True), (positions, positions, False)]
    part = -(-positions // (2 * TILE)) * TILE
    while part >= TILE:
        tried.append((positions, part, False))
        if part == TILE:
            break
        part = max(TILE, -(-part // (2 * TILE)) * TILE)
    return tried


def memory_parts(
    c: Config,
    capacity: int,
    step_capacity: int,
    layer: int,
    sample_tokens: int,
    steps: int,
    normed: bool,
    keep_inside: bool,
) -> tuple[int, int, int, int]:
    """Bytes of (a forward pass, the tape, the accumulators, a contraction tile); their sum is the
    engine's attribution_bytes.
    """
    H, G, n = c.n_heads, c.n_kv_heads, c.n_layers - layer
    gates = 2 if c.gated else 1
    d, q, qkv, gate_up, mlp = (
        row_stride(w)
        for w in (c.d_model, H * c.d_head, (H + 2 * G) * c.d_head, gates * c.d_mlp, c.d_mlp)
    )
    inputs, nodes = H + 2 * G, 1 + n * (H + 1)

    def scratch(tokens: int) -> int:
        """Attention scores of as many queries as fit into the scratch memory."""
        row = FLOAT * H * row_stride(tokens)
        every, least = row * max(tokens, QUERIES), row * QUERIES
        return every if every < SCRATCH else max(least, SCRATCH)

    all_nodes = 1 + c.n_layers * (H + 1)
    readback = (
        max(
            FLOAT * all_nodes * (c.d_model + c.n_layers * (inputs + 1) + 1) + 4096,
            2 * PICKED_ROWS * FLOAT * (c.d_vocab + c.d_model),
            PICKS,
        )
        + MIB
    )
    working = (
        FLOAT * capacity * ((5 if c.parallel else 4) * d + qkv + q + gate_up + mlp + 1)
        + readback
        + scratch(capacity)
        + 4 * MIB
    )
    working += 2 * n * capacity * G * c.d_head * FLOAT  # keys and values of a batch
    # In a parallel layer attention and MLP read one stream, and their gradients wait side by side.
    mid, own = (0, 4 * d) if c.parallel else (d, 3 * d)
    inside = mid + 2 * qkv + gate_up + (2 * d if c.post_norms else 0)
    tape = FLOAT * step_capacity * (
        n * d + inside * (n if keep_inside else 1) + own + qkv + q + gate_up + mlp
    ) + (2 if c.attn_softcap else 1) * scratch(step_capacity)
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


def layer_weights(c: Config) -> int:
    """Number of weights in the matrices of one layer."""
    mlp = (3 if c.gated else 2) * c.d_model * c.d_mlp
    return c.d_model * c.d_head * (2 * c.n_heads + 2 * c.n_kv_heads) + mlp


def _embedding_weights(c: Config) -> int:
    """Number of weights in the tables of tokens and positions and in the unembedding."""
    rows = c.d_vocab * (1 if c.tied else 2) + (c.n_ctx if c.pos_embed else 0)
    return rows * c.d_model


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


def _size(n: float) -> str:
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if n >= unit:
            return f"{n / unit:.1f} {name}"
    return f"{n:.0f} B"


def _operations(n: float) -> str:
    for unit, name in ((1e12, "TFLOP"), (1e9, "GFLOP"), (1e6, "MFLOP")):
        if n >= unit:
            return f"{n / unit:.2f} {name}"
    return f"{n:.0f} FLOP"
