"""What attribution will cost: memory and work from a configuration alone, before any device is
opened (`vs.patching.plan`).

Memory follows the engine's own sums (csrc/analysis/attribution.c: attribution_bytes, csrc/run) and
the layouts that `attribute` tries in turn; a test holds the two together. Work counts a
multiplication and an addition as two operations, and is an estimate.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass

from ..base.checks import require_int
from ..circuits.graph import graph

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
FLOAT = 4  # bytes: activations and gradients are float32
TILE = 32  # ATTRIBUTE_TILE: tokens whose scores are contracted at once
QUERIES = 8  # OP_TILE: queries that attention takes at once
STEP_TOKENS = 512  # tokens that go forward and back together, where memory allows
# WORK_SCRATCH, PICKS_BYTES, PICKS_ROWS
SCRATCH, PICKS, PICKED_ROWS, MIB = 32 << 20, 12 << 20, 8, 1 << 20
LOGITS = 72 << 20  # LOGITS_BYTES of attribution.py: rows of logits of the two KL metrics


def memory_bytes(value, what: str = "max_memory") -> int | None:
    """ "6GiB", "500 MB", "1.5G" or a number of bytes -> bytes; None stays None. ValueError naming
    `what` for anything else, and for 0.
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
    """Predicted memory (bytes) and work (operations) of one sample, in the first layout that
    max_memory holds: see `mode`.
    """

    layer: int
    positions: int
    response: int  # positions whose logits are computed
    steps: int
    dims: str
    n_layers: int  # from the steering layer on
    n_edges: int
    n_nodes: int
    weights: int  # bytes, of the whole model
    step_tokens: int  # tokens that go forward and back together
    # tokens whose sums are held together; fewer than positions: the steps are run
    # once for every such part
    slots: int
    working: int  # bytes of a forward pass, and of what comes back from the device
    tape: int  # activations that the backward pass reads
    # gradients summed over steps, and what the norms' derivatives need of each step
    accumulators: int
    contracted: int  # a tile of tokens as rows of the model's width, one for every node
    # "kept": activations of all layers; "recomputed": each layer's input, and
    # one layer's activations
    mode: str
    max_memory: int | None
    forward: float  # operations
    backward: float
    contraction: float  # differences of outputs times gradients of inputs, over all edges

    @property
    def total(self) -> int:
        """Bytes beside the weights, and beside keys and values of one batch (`attribute`
        frees them after each).
        """
        return self.working + self.tape + self.accumulators + self.contracted

    @property
    def parts(self) -> int:
        """Passes over all steps that the positions take."""
        return -(-self.positions // self.slots)

    @property
    def work(self) -> float:
        """Operations, all together."""
        return self.forward + self.backward + self.contraction

    @property
    def fits(self) -> bool:
        """Does the smallest layout fit? Where not, `attribute` refuses."""
        return self.max_memory is None or self.total <= self.max_memory

    def seconds(self, rate: float) -> float:
        """At `rate` operations a second."""
        return self.work / rate

    def to_dict(self) -> dict:
        return {
            **asdict(self),
            "total": self.total,
            "work": self.work,
            "fits": self.fits,
            "parts": self.parts,
        }

    def __str__(self):
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
        share = lambda x: f"{_operations(x)} ({100 * x / self.work:.0f} %)"
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
    config,
    layer: int,
    positions: int,
    *,
    steps: int = 10,
    dims: str = "steer",
    at: str = "pre_norm",
    metric: str = "logit_diff",
    response: int | None = None,
    max_memory=None,
    weight_bytes: float = 2,
) -> Plan:
    """Predicted memory and work of `attribute` for one sample; needs no weights and no device.

    config: a Config (`vs.Config.from_pretrained("config.json")`) or a Model. layer: the steering
    layer. positions: tokens of prompt and response. response: positions whose logits are needed
    (default: all of them). steps, dims, at, metric: as in `attribute`. weight_bytes: per weight on
    the device. max_memory: bytes or "6GiB" (default: without limit); where the activations of all
    layers do not fit, they are recomputed layer by layer. Raises ValueError for a layer outside the
    model, positions outside the context, and bad arguments.
    """
    c = getattr(config, "config", config)
    g = graph(c, layer)
    S, T = require_int(positions, "positions", 1), require_int(steps, "steps", 1)
    if getattr(c, "n_ctx", S) < S:
        raise ValueError(f"positions: {S} are more than the model's context of {c.n_ctx}")
    R = S if response is None else require_int(response, "response", 1)
    if R > S:
        raise ValueError(f"response: {R} positions of {S}")
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
    limit, n = memory_bytes(max_memory), g.depth

    for step_tokens, slots, kept in layouts(S, T):
        parts = memory_parts(
            c,
            max(step_tokens, 2 * max(slots, S)),
            step_tokens,
            g.layer,
            slots,
            T,
            at == "normed",
            kept,
        )
        parts = (parts[0] + (LOGITS if metric != "logit_diff" else 0), *parts[1:])
        if limit is None or sum(parts) <= limit:
            break
    mode = "kept" if kept else "recomputed"
    forward, backward = _passes(c, g, S, R, T, mode, -(-S // slots), metric)
    embeddings = c.d_vocab * c.d_model * (1 if c.tied else 2)
    weights = int(weight_bytes * (embeddings + c.n_layers * layer_weights(c)))
    return Plan(
        g.layer,
        S,
        R,
        T,
        dims,
        n,
        g.n_edges,
        g.n_upstream,
        weights,
        step_tokens,
        slots,
        *parts,
        mode,
        limit,
        forward,
        backward,
        contraction_operations(c, g, S, T, at),
    )


# -- memory ----------------------------------------------------------------------------------------


def layouts(positions: int, steps: int) -> list[tuple[int, int, bool]]:
    """(tokens forward and back, tokens whose sums are held, are activations kept?) of one sample,
    in the order in which `attribute` tries them.
    """
    wide = max(positions, min(STEP_TOKENS, positions * steps))
    tried = [(wide, positions, True), (positions, positions, True), (positions, positions, False)]
    part = -(-positions // (2 * TILE)) * TILE
    while part >= TILE:
        tried.append((positions, part, False))
        if part == TILE:
            break
        part = max(TILE, -(-part // (2 * TILE)) * TILE)
    return tried


def row_stride(width: int) -> int:
    """Floats from row to row on the device (csrc/ops/ops.h)."""
    stride = -(-width // 16) * 16
    return stride if stride % 1024 else stride + 16


def memory_parts(
    c,
    capacity: int,
    step_capacity: int,
    layer: int,
    n_slots: int,
    steps: int,
    normed: bool,
    keep_inside: bool,
) -> tuple[int, int, int, int]:
    """Bytes of (forward pass, tape, sums, a tile's rows); together the
    engine's attribution_bytes.
    """
    H, G, n = c.n_heads, c.n_kv_heads, c.n_layers - layer
    d, q, qkv, gate_up, mlp = (
        row_stride(w)
        for w in (c.d_model, H * c.d_head, (H + 2 * G) * c.d_head, 2 * c.d_mlp, c.d_mlp)
    )
    inputs, nodes = H + 2 * G, 1 + n * (H + 1)

    def scratch(tokens):  # scores of some queries
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
        FLOAT * capacity * (4 * d + qkv + q + gate_up + mlp + 1)
        + readback
        + scratch(capacity)
        + 4 * MIB
    )
    working += 2 * n * capacity * G * c.d_head * FLOAT  # a batch's keys and values
    inside = d + 2 * qkv + gate_up + (2 * d if c.post_norms else 0)
    tape = FLOAT * step_capacity * (
        n * d + inside * (n if keep_inside else 1) + 3 * d + qkv + q + gate_up + mlp
    ) + (2 if c.attn_softcap else 1) * scratch(step_capacity)
    slot = 2 * d + n * (q + qkv + 4 * d + (0 if normed else steps * (inputs + d)))
    expanded = H * q + inputs * qkv if c.d_head % 16 else 0
    rows = nodes + max(inputs + 1, 1 + 2 * n)
    return working, tape, FLOAT * slot * n_slots, FLOAT * TILE * (rows * d + expanded)


def layer_weights(c) -> int:
    """Weights of one layer's matrices."""
    return c.d_model * c.d_head * (2 * c.n_heads + 2 * c.n_kv_heads) + 3 * c.d_model * c.d_mlp


# -- operations ------------------------------------------------------------------------------------


def _keys(c, S: int, layer: int) -> float:
    """Pairs of query and key in one layer: a query sees itself and what comes
    before, at most its window.
    """
    window = (getattr(c, "window", None) or [0] * c.n_layers)[layer]
    w = min(window or S, S)
    return w * (w + 1) / 2 + (S - w) * w


def _passes(c, g, S, R, T, mode, parts, metric):
    """(forward, backward) operations: the layers below once unsteered; those from the steering
    layer on in two runs, and once a step; backward through these with respect to activations: each
    product once, scores and mix as five products in place of two. Runs and steps as often as there
    are parts. The steps of the two KL metrics need whole rows of logits and go back through them; a
    difference of logits needs two rows of the unembedding.
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


def contraction_operations(c, g, S: int, T: int, at: str = "pre_norm") -> float:
    """Operations of (u_clean - u_corrupt) . sum of dm/dv over all edges of one
    sample of S positions.

    Heads' outputs and the gradients of q, k and v inputs are made from head space (z W_O and W^T
    g), then each edge costs one product of width D. A norm's derivative takes the stream of each
    step off every q, k and v input.
    """
    H, G, dh, D, n = c.n_heads, c.n_kv_heads, c.d_head, c.d_model, g.depth
    per_token = n * 2.0 * D * dh * (2 * H + 2 * G) + 2.0 * D * g.n_edges
    if at == "pre_norm":
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
