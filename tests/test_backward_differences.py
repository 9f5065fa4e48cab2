"""The float64 references of the backward ops against central differences of the forward ops'
references.

Inputs lie on a grid of 2^-12 and steps are multiples of it, so that float32 buffers hold every
point exactly; five points leave an error of h^4.
"""

from __future__ import annotations

import numpy as np
import pytest

from vksteer.verify import backward, problems
from vksteer.verify import forward as forward_problems

STEP = 2.0**-12
#: As a share of the sum of absolute products. The largest difference met is 2.2e-12 (logit_grad).
TOLERANCE = 1e-7


def on_grid(rng, *shape, scale=1.0) -> np.ndarray:
    return (np.round(rng.standard_normal(shape) * scale / STEP) * STEP).astype(np.float32)


def slope(on, op, arguments, buffers, name, direction, weights) -> float:
    """d/dh of the sum over outputs of weights[output] . output, with buffers[name] + h *
    direction; direction holds whole numbers.
    """

    def value(h):
        moved = buffers[name] + np.float32(h * STEP) * direction.astype(np.float32)
        outputs = on.run(op, arguments, buffers | {name: moved})[1]
        return sum(float((w * np.nan_to_num(outputs[o])).sum()) for o, w in weights.items())

    return (value(-2) - 8 * value(-1) + 8 * value(1) - value(2)) / (12 * STEP)


def matches(on, rng, op, arguments, buffers, name, weights, gradient, tolerance=TOLERANCE):
    """Compares `gradient` [as buffers[name]] of the weighted outputs with differences along three
    random directions, which a single wrong element would show. tolerance: as a share of the sum
    of absolute products.
    """
    gradient = np.nan_to_num(gradient)
    for _ in range(3):
        direction = rng.integers(1, 3, buffers[name].shape) * rng.choice(
            [-1, 1], buffers[name].shape
        )
        want, got = (
            slope(on, op, arguments, buffers, name, direction, weights),
            float((gradient * direction).sum()),
        )
        assert abs(got - want) <= tolerance * np.abs(gradient * direction).sum(), (
            f"{op}, {name}: {got} where differences say {want}"
        )


@pytest.mark.parametrize("weight_type", range(3), ids=problems.WEIGHT_TYPES)
def test_differences_of_linear(on, rng, weight_type):
    back = backward.linear_bwd(rng, 3, 45, 33, weight_type)
    dx = on.run(back.op, back.arguments, back.buffers)[1]["dx"][:, :33]
    forward = forward_problems.linear(rng, 3, 45, 33, weight_type)
    buffers = forward.buffers | {
        "weights": back.buffers["weights"],
        "x": problems.padded(on_grid(rng, 3, 33), 48, 0.0),
    }
    dy = np.nan_to_num(back.buffers["dy"][:, : forward.arguments["dst_stride"]]).astype(np.float64)
    matches(
        on,
        rng,
        "linear",
        forward.arguments,
        buffers,
        "x",
        {"dst": dy},
        np.pad(dx, ((0, 0), (0, 15))),
    )


@pytest.mark.parametrize(
    "flags, groups",
    [((), 1), (("normalized",), 1), (("rows",), 1)]
    + [(("layer",), 1), (("layer", "normalized"), 1), (("layer", "rows"), 1), (("layer",), 4)],
    ids=lambda value: "+".join(value) if isinstance(value, tuple) else f"{value} groups",
)
def test_differences_of_norm(on, rng, flags, groups):
    back = backward.norm_bwd(rng, 3, 33, ("write_scale", "write_normalized", *flags), groups=groups)
    whole = 33 * groups
    back.buffers["x"][:, :whole] = on_grid(rng, len(back.buffers["x"]), whole) + 0.5
    if "normalized" in flags:
        back.buffers["gain"][:] = 1
    reference = on.run(back.op, back.arguments, back.buffers)[1]
    dy = {"dst": np.nan_to_num(back.buffers["dy"]).astype(np.float64)}
    kept = [f for f in flags if f in ("rows", "layer")] + ["bias"] * ("layer" in flags)
    forward = forward_problems.norm(rng, 3, 33, kept, groups=groups)
    shared = {name: back.buffers[name] for name in ("x", "gain", "rows") if name in back.buffers}
    if "rows" in flags:  # a source may be read twice
        dx = np.zeros(shared["x"].shape)
        np.add.at(dx, shared["rows"], np.nan_to_num(reference["dx"]))
    else:
        dx = reference["dx"]
    matches(on, rng, "norm", forward.arguments, forward.buffers | shared, "x", dy, dx)
    if set(flags) - {"layer"}:
        return
    # With the scale as an input, the gradient holds for any scale ...
    parts = lambda array: np.nan_to_num(array).astype(np.float64)[:, :whole].reshape(3, groups, 33)
    x = parts(shared["x"])
    if "layer" in flags:
        x = x - x.mean(-1, keepdims=True)
    scale = (np.round(np.sqrt((x**2).mean(-1) + 1e-5) / STEP) * STEP).astype(np.float32)
    fixed = forward_problems.norm(rng, 3, 33, ("read_scale", *kept), groups=groups)
    gain = back.buffers["gain"].astype(np.float64).reshape(groups, 33)
    along = (parts(back.buffers["dy"]) * gain * x).sum(-1)
    matches(
        on,
        rng,
        "norm",
        fixed.arguments,
        fixed.buffers | shared | {"scale": scale},
        "scale",
        dy,
        -along / scale.astype(np.float64) ** 2,
    )
    # ... and the reference takes it at the scale of the row itself.
    own = np.sqrt((x**2).mean(-1) + np.float64(np.float32(1e-5)))
    np.testing.assert_allclose(reference["dscale"], -along / own**2, rtol=1e-11)
    normed = forward_problems.norm(rng, 3, 33, ("read_normalized", *kept), groups=groups)
    matches(
        on,
        rng,
        "norm",
        normed.arguments,
        normed.buffers | shared,
        "x",
        dy,
        reference["dnormalized"],
    )


@pytest.mark.parametrize("plain", [False, True], ids=["gated", "plain"])
@pytest.mark.parametrize("kind", range(5), ids=problems.ACTIVATIONS)
def test_differences_of_act(on, rng, kind, plain):
    back = backward.act_bwd(rng, 3, 33, kind, plain=plain)
    columns = 33 if plain else 66
    x = on_grid(rng, 3, columns, scale=2.0)
    # the steps reach 4 grid points: those of relu must not cross its bend at 0
    back.buffers["gate_up"][:, :columns] = np.where(np.abs(x) < 8 * STEP, 8 * STEP, x)
    gradient = on.run(back.op, back.arguments, back.buffers)[1]["dgate_up"]
    forward = forward_problems.act(rng, 3, 33, kind, plain=plain)
    matches(
        on,
        rng,
        "act",
        forward.arguments,
        forward.buffers | {"gate_up": back.buffers["gate_up"]},
        "gate_up",
        {"dst": np.nan_to_num(back.buffers["dpost"]).astype(np.float64)},
        gradient,
    )


@pytest.mark.parametrize(
    "flags", [(), ("rotate",), ("qk_norm",), ("qk_norm", "rotate")], ids="+".join
)
def test_differences_of_rope(on, rng, flags):
    rows, heads = [(0, 3), (5, 1)], (4, 2, 6)
    back = backward.rope_bwd(rng, rows, *heads, flags)
    back.buffers["qkv"][:, :48] = on_grid(rng, 4, 48)
    gradient = on.run(back.op, back.arguments, back.buffers)[1]["dqkv"]
    forward = forward_problems.rope(rng, rows, *heads, flags)
    buffers = forward.buffers | {
        name: back.buffers[name] for name in ("qkv", "angles", "q_gain", "k_gain")
    }
    matches(
        on,
        rng,
        "rope",
        forward.arguments,
        buffers,
        "qkv",
        {"qkv": np.nan_to_num(back.buffers["dqkv"]).astype(np.float64)},
        gradient,
    )


class AttentionProblem:
    """Attention over three packed rows: its inputs, and the references of the ops that take it.

    q [n, n_heads * d_head]; k, v [n, n_kv_heads * d_head]; dz as q.
    """

    def __init__(self, on, rng, n_heads, n_kv_heads, d_head, window, softcap):
        self.on, self.packed = on, problems.Packed([(0, n) for n in (11, 1, 9)])
        self.window, self.softcap, self.scale = window, softcap, d_head**-0.5
        packed, width, self.kv_width = self.packed, n_heads * d_head, n_kv_heads * d_head
        self.n = n = len(packed.tokens)
        self.stride, self.kv_stride = problems.row_stride(width), problems.row_stride(self.kv_width)
        q, k, v = (on_grid(rng, n, w) for w in (width, self.kv_width, self.kv_width))
        self.dz = problems.padded(on_grid(rng, n, width), self.stride)
        self.q = problems.padded(q, self.stride)
        self.k_cache, self.v_cache = self.cached(k), self.cached(v)
        key_stride = problems.row_stride(packed.n_keys)
        self.no_scores = problems.nothing(n, n_heads, key_stride)
        self.heads = {"n_heads": n_heads, "key_stride": key_stride, "n_keys": packed.n_keys}
        self.sizes = self.heads | {"n_kv_heads": n_kv_heads, "d_head": d_head}
        self.tiles = {"tokens": "tokens", "tiles": "tiles", "n_tiles": len(packed.tiles)}
        self.index = {"tokens": packed.tokens, "tiles": packed.tiles}

    def cached(self, rows):
        """Rows in the order of tokens, at the cache slots of these tokens."""
        out = np.full((self.packed.n_slots, rows.shape[1]), np.nan, np.float32)
        out[self.packed.tokens[:, 2]] = rows
        return out

    def step(self, op, output, arguments, **buffers):
        """An output of an op's reference, rounded to the float32 that the next op takes."""
        arguments = {name: name for name in buffers} | arguments
        return self.on.run(op, arguments, self.index | buffers)[1][output].astype(np.float32)

    def scores(self, queries, keys, scale, softcap=0.0):
        arguments = self.sizes | self.tiles | {"stride": self.stride}
        arguments |= {"scale": scale, "softcap": softcap}
        buffers = {"qkv": queries, "k_cache": keys, "scores": self.no_scores}
        return self.step("attn_scores", "scores", arguments, **buffers)

    def output(self, pattern, values):
        """[n, n_heads * d_head]: for every head, its pattern times the values."""
        arguments = self.sizes | self.tiles | {"z_stride": self.stride, "window": self.window}
        buffers = {
            "pattern": pattern,
            "v_cache": values,
            "z": problems.nothing(self.n, self.stride),
        }
        return self.step("attn_output", "z", arguments, **buffers)

    def sums(self, a, y):
        """[n, kv_width]: for every key and key/value head, the sum over queries of a times y."""
        arguments = self.sizes | self.tiles | {"last_token": self.n, "window": self.window}
        arguments |= {"y_stride": self.stride, "out_stride": self.kv_stride}
        sums = problems.nothing(self.n, self.kv_stride)
        return self.step("attn_output_bwd", "sums", arguments, a=a, y=y, sums=sums)[
            :, : self.kv_width
        ]

    def gradients(self):
        """{buffer of the fused op: gradient of z . dz}, by the ops that a backward pass runs."""
        scores = self.scores(self.q, self.k_cache, self.scale, self.softcap)
        rows = self.heads | {"tokens": "tokens", "window": self.window, "n_tokens": self.n}
        pattern = self.step("attn_softmax", "scores", rows, scores=scores)
        dpattern = self.scores(self.dz, self.v_cache, 1.0)
        buffers = {"pattern": pattern, "dpattern": dpattern, "scores": scores}
        arguments = rows | {"scale": self.scale, "softcap": self.softcap}
        dscores = self.step("attn_softmax_bwd", "dpattern", arguments, **buffers)
        return {
            "q": self.output(dscores, self.k_cache),
            "k": self.cached(self.sums(dscores, self.q)),
            "v": self.cached(self.sums(pattern, self.dz)),
        }

    def fused(self):
        """(arguments, buffers) of attn_decode, which computes z from q, k and v at once."""
        arguments = self.sizes | {"qkv": "q", "k_cache": "k", "v_cache": "v", "tokens": "tokens"}
        arguments |= {"scores": "scores", "z": "z", "stride": self.stride, "z_stride": self.stride}
        arguments |= {"window": self.window, "scale": self.scale, "softcap": self.softcap}
        buffers = {"q": self.q, "k": self.k_cache, "v": self.v_cache, "scores": self.no_scores}
        buffers |= self.index | {"z": problems.nothing(self.n, self.stride)}
        return arguments | {"n_tokens": self.n}, buffers


@pytest.mark.parametrize(
    "n_heads, n_kv_heads, d_head, window, softcap",
    [(4, 2, 6, 0, 0.0), (3, 1, 8, 4, 0.0), (2, 2, 6, 0, 2.0), (4, 1, 10, 5, 3.0)],
)
def test_differences_of_attention(on, rng, n_heads, n_kv_heads, d_head, window, softcap):
    """Gradients of q, k and v by the ops of a backward pass, against differences of the fused op's
    reference. The tolerance is wider than elsewhere because every op's result is rounded to
    float32 for the next one; the largest difference met is 1.2e-8.
    """
    problem = AttentionProblem(on, rng, n_heads, n_kv_heads, d_head, window, softcap)
    arguments, buffers = problem.fused()
    weights = {"z": np.nan_to_num(problem.dz).astype(np.float64)}
    for name, gradient in problem.gradients().items():
        matches(on, rng, "attn_decode", arguments, buffers, name, weights, gradient, 5e-7)


@pytest.mark.parametrize("softcap", [0.0, 5.0])
def test_differences_of_a_pair_of_logits(on, rng, softcap):
    problem = backward.pair_grad(rng, 3, 33, softcap)
    problem.buffers["normed"][:, :33] = on_grid(rng, 3, 33)
    gradient = on.run(problem.op, problem.arguments, problem.buffers)[1]["dnormed"]
    weights = problem.buffers["weights"].astype(np.float64)[:, None] * (1, -1)
    matches(
        on,
        rng,
        problem.op,
        problem.arguments,
        problem.buffers,
        "normed",
        {"logits": weights},
        gradient,
    )


@pytest.mark.parametrize(
    "softcap, reference_softcap", [(0.0, 0.0), (5.0, 5.0), (0.0, 5.0), (5.0, 0.0)]
)
@pytest.mark.parametrize("kind", range(3), ids=backward.SCALARS)
def test_differences_of_scalars(on, rng, kind, softcap, reference_softcap):
    """Also compares the scalars with their definitions."""
    problem = backward.logit_grad(rng, 3, 33, kind, softcap, reference_softcap=reference_softcap)
    for name in ("logits", "reference", "other"):
        if name in problem.buffers:
            problem.buffers[name][:, :33] = on_grid(rng, 3, 33, scale=2.0)
    reference = on.run(problem.op, problem.arguments, problem.buffers)[1]
    matches(
        on,
        rng,
        problem.op,
        problem.arguments,
        problem.buffers,
        "logits",
        {"values": problem.buffers["weights"].astype(np.float64)},
        reference["logits"],
    )

    def log_p(name):
        x, cap = (
            problem.buffers[name][:, :33].astype(np.float64),
            softcap if name == "logits" else reference_softcap,
        )
        x = cap * np.tanh(x / cap) if cap else x
        return x - np.log(np.exp(x).sum(-1, keepdims=True))

    kl = lambda a, b: (np.exp(log_p(a)) * (log_p(a) - log_p(b))).sum(-1)
    want = (
        log_p("logits")[np.arange(3), problem.buffers["targets"]]
        if kind == 0
        else (
            kl("reference", "logits")
            if kind == 1
            else kl("other", "logits") - kl("reference", "logits")
        )
    )
    np.testing.assert_allclose(reference["values"], want, rtol=1e-12, atol=1e-12)
