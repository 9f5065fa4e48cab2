"""What attribution will cost: memory and work from a configuration alone, before any device is opened (`vs.patching.plan`).

Memory is counted per token from what the engine keeps (csrc/run): the tape of activations that the backward pass reads, and the sums of gradients
over the integration's steps. Work counts a multiplication and an addition as two operations. Everything is an estimate; the engine's own plan,
printed by `attribute`, is what holds.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass

from .graph import graph
from .pairs import whole

_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12, "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40,
          "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}
FLOAT = 4  # bytes: activations and gradients are float32


def memory_bytes(value, what: str = "max_memory") -> int | None:
    """"6GiB", "500 MB", "1.5G" or a number of bytes -> bytes; None stays None. ValueError naming `what` for anything else, and for 0."""
    if value is None:
        return None
    if isinstance(value, str):
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", value)
        if not match or match[2].lower() not in _UNITS:
            raise ValueError(f"{what}={value!r}: use a number of bytes, or a text such as '6GiB' or '500MB'")
        value = int(float(match[1]) * _UNITS[match[2].lower()])
    elif isinstance(value, float) and value.is_integer():
        value = int(value)
    return whole(value, what, 1)


@dataclass(frozen=True)
class Plan:
    """Predicted memory (bytes) and work (operations) of one sample. `total` is the larger of what is wanted and what is unavoidable: see `mode`."""

    layer: int
    positions: int
    response: int         # positions whose logits are computed
    steps: int
    dims: str
    n_layers: int         # from the steering layer on
    n_edges: int
    n_nodes: int
    weights: int          # bytes, of the whole model
    tape_kept: int        # activations of all layers that are differentiated
    tape_recomputed: int  # each layer's input, and one layer's activations
    accumulators: int     # gradients summed over steps, and what the norms' derivatives need of each step
    scores: int           # results: edges and nodes, and dimensions
    mode: str             # "kept", or "recomputed" where max_memory does not hold the tape
    max_memory: int | None
    forward: float        # operations
    backward: float
    contraction: float    # differences of outputs times gradients of inputs, over all edges

    @property
    def tape(self) -> int:
        """Of the chosen mode."""
        return self.tape_kept if self.mode == "kept" else self.tape_recomputed

    @property
    def total(self) -> int:
        """Bytes beside the weights."""
        return self.tape + self.accumulators + self.scores

    @property
    def work(self) -> float:
        """Operations, all together."""
        return self.forward + self.backward + self.contraction

    @property
    def fits(self) -> bool:
        """Does one whole sample fit into max_memory? Where not, the engine goes through the positions in tiles."""
        return self.max_memory is None or self.total <= self.max_memory

    def seconds(self, rate: float) -> float:
        """At `rate` operations a second."""
        return self.work / rate

    def to_dict(self) -> dict:
        return {**asdict(self), "tape": self.tape, "total": self.total, "work": self.work, "fits": self.fits}

    def __str__(self):
        kept = f"all activations kept; recomputing them would take {_size(self.tape_recomputed)}" if self.mode == "kept" else \
            f"layer inputs kept, the rest recomputed; keeping all would take {_size(self.tape_kept)}"
        limit = "" if self.max_memory is None else f"; max_memory {_size(self.max_memory)}" + ("" if self.fits else " is too small for a whole sample: it is cut into tiles of positions")
        share = lambda x: f"{_operations(x)} ({100 * x / self.work:.0f} %)"
        return "\n".join([
            f"Attribution of one sample of {self.positions} positions ({self.response} with logits), {self.steps} steps, layers {self.layer} to "
            f"{self.layer + self.n_layers - 1}, {self.n_edges} edges between {self.n_nodes} nodes",
            f"  weights             {_size(self.weights)}",
            f"  activations         {_size(self.tape)}  ({kept})",
            f"  sums of gradients   {_size(self.accumulators)}",
            f"  results             {_size(self.scores)}",
            f"  beside the weights  {_size(self.total)}{limit}",
            f"  work                {_operations(self.work)}: forward {share(self.forward)}, backward {share(self.backward)}, contraction {share(self.contraction)}"])


def plan(config, layer: int, positions: int, *, steps: int = 10, dims: str = "steer", at: str = "pre_norm", response: int | None = None, max_memory=None,
         weight_bytes: float = 2) -> Plan:
    """Predicted memory and work of `attribute` for one sample; needs no weights and no device.

    config: a Config (`vs.Config.from_pretrained("config.json")`) or a Model. layer: the steering layer. positions: tokens of prompt and response.
    response: positions whose logits are needed (default: all of them). steps, dims, at: as in `attribute`. weight_bytes: per weight on the device.
    max_memory: bytes or "6GiB"; where the activations of all layers do not fit, they are recomputed layer by layer.
    Raises ValueError for a layer outside the model, positions outside the context, and bad arguments.
    """
    c = getattr(config, "config", config)
    g = graph(c, layer)
    S, T = whole(positions, "positions", 1), whole(steps, "steps", 1)
    if S > getattr(c, "n_ctx", S):
        raise ValueError(f"positions: {S} are more than the model's context of {c.n_ctx}")
    R = S if response is None else whole(response, "response", 1)
    if R > S:
        raise ValueError(f"response: {R} positions of {S}")
    if dims not in ("steer", "all"):
        raise ValueError(f"dims must be 'steer' or 'all', not {dims!r}")
    if at not in ("pre_norm", "normed"):
        raise ValueError(f"at must be 'pre_norm' or 'normed', not {at!r}")
    if isinstance(weight_bytes, bool) or not isinstance(weight_bytes, (int, float)) or not weight_bytes > 0:
        raise ValueError(f"weight_bytes must be a number above 0, not {weight_bytes!r}")
    limit, n = memory_bytes(max_memory), g.depth

    tape, sums = tape_floats(c), accumulator_floats(c, T)
    kept = S * n * tape * FLOAT
    recomputed = S * (n * c.d_model + tape) * FLOAT
    accumulators = S * n * sums * FLOAT
    results = 8 * (g.n_edges + g.n_upstream) + FLOAT * c.d_model * (g.n_upstream if dims == "all" else 1)
    mode = "kept" if limit is None or kept + accumulators + results <= limit else "recomputed"
    forward, backward = _passes(c, g, S, R, T, mode)
    embeddings = c.d_vocab * c.d_model * (1 if c.tied else 2)
    weights = int(weight_bytes * (embeddings + c.n_layers * layer_weights(c)))
    return Plan(g.layer, S, R, T, dims, n, g.n_edges, g.n_upstream, weights, kept, recomputed, accumulators, results, mode, limit, forward, backward,
                contraction_operations(c, g, S, T, at))


# -- per token and layer -----------------------------------------------------------------------------------------------------------------------------


def tape_floats(c) -> int:
    """Numbers that the backward pass reads of one token in one layer: two layer inputs, q, k and v before and after the rotation, the mixed values,
    gate and up; the outputs before post-norms, where there are any."""
    H, G, dh = c.n_heads, c.n_kv_heads, c.d_head
    return 2 * c.d_model + 2 * (H + 2 * G) * dh + H * dh + 2 * c.d_mlp + (2 * c.d_model if c.post_norms else 0)


def accumulator_floats(c, steps: int) -> int:
    """Numbers that are summed or kept over the steps for one token in one layer: gradients of q, k and v and of the MLP's input, and for each step
    what the derivative of the norms needs: the normed residual and one number for each input."""
    H, G = c.n_heads, c.n_kv_heads
    return (H + 2 * G) * c.d_head + c.d_model + steps * (c.d_model + (H + 2 * G) + 2)


def layer_weights(c) -> int:
    """Weights of one layer's matrices."""
    return c.d_model * c.d_head * (2 * c.n_heads + 2 * c.n_kv_heads) + 3 * c.d_model * c.d_mlp


# -- operations ----------------------------------------------------------------------------------------------------------------------------------------


def _keys(c, S: int, layer: int) -> float:
    """Pairs of query and key in one layer: a query sees itself and what comes before, at most its window."""
    window = (getattr(c, "window", None) or [0] * c.n_layers)[layer]
    w = min(window or S, S)
    return w * (w + 1) / 2 + (S - w) * w


def _passes(c, g, S, R, T, mode):
    """(forward, backward) operations: every layer once unsteered, those from the steering layer on once steered and once a step; backward through
    these with respect to activations: each product once, scores and mix as five products in place of two."""
    product = 2.0 * S * layer_weights(c)
    attention = [4.0 * _keys(c, S, l) * c.n_heads * c.d_head for l in range(c.n_layers)]
    logits = 2.0 * R * c.d_vocab * c.d_model
    below, above = (sum(product + a for a in part) for part in (attention[:g.layer], attention[g.layer:]))
    forward = below + (T + 2) * (above + logits) + (T * above if mode == "recomputed" else 0)
    backward = T * (g.depth * product + 2.5 * sum(attention[g.layer:]) + logits)
    return forward, backward


def contraction_operations(c, g, S: int, T: int, at: str = "pre_norm") -> float:
    """Operations of (u_clean - u_corrupt) . sum of dm/dv over all edges of one sample of S positions.

    Heads' outputs and the gradients of q, k and v inputs are made from head space (z W_O and W^T g), then each edge costs one product of width D.
    A norm's derivative adds a term along the normed residual of each step: the output's part along it, once for each norm, and one number for
    each edge and step.
    """
    H, G, dh, D, n = c.n_heads, c.n_kv_heads, c.d_head, c.d_model, g.depth
    per_token = n * 2.0 * D * dh * (2 * H + 2 * G) + 2.0 * D * g.n_edges
    if at == "pre_norm":
        later = lambda i: 2 * (n - 1 - i) + 1  # norms after layer i
        pairs = 2 * n + 1 + sum(H * (1 + later(i)) + later(i) for i in range(n))
        per_token += T * (2.0 * D * pairs + 2.0 * g.n_edges)
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
