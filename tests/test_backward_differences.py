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

# -- references against differences ---------------------------------------------------------------------


#
# Inputs lie on a grid of 2^-12 and steps are multiples of it, so that float32 buffers hold every
# point exactly; five points leave an error of h^4.
STEP = 2.0**-12


def on_grid(rng, *shape, scale=1.0) -> np.ndarray:
    return (np.round(rng.standard_normal(shape) * scale / STEP) * STEP).astype(np.float32)


def slope(on, op, arguments, buffers, name, direction, weights) -> float:
    """d/dh of sum over outputs of weights[output] . output, with buffers[name] + h *
    direction (whole numbers).
    """

    def value(h):
        reference = on.run(
            op,
            arguments,
            buffers | {name: buffers[name] + np.float32(h * STEP) * direction.astype(np.float32)},
        )[1]
        return sum(
            float((w * np.nan_to_num(reference[output])).sum()) for output, w in weights.items()
        )

    return (value(-2) - 8 * value(-1) + 8 * value(1) - value(2)) / (12 * STEP)


def matches(on, rng, op, arguments, buffers, name, weights, gradient, tolerance=1e-7):
    """`gradient` [as buffers[name]] is that of the weighted outputs: along random directions, which
    a single wrong element would turn.
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


def doubles(problem_or_buffers, **more):
    return {
        name: np.nan_to_num(array.astype(np.float64))
        for name, array in {**problem_or_buffers, **more}.items()
    }


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


@pytest.mark.parametrize("flags", [(), ("normalized",), ("rows",)], ids="+".join)
def test_differences_of_norm(on, rng, flags):
    back = backward.norm_bwd(rng, 3, 33, ("write_scale", "write_normalized", *flags))
    back.buffers["x"][:, :33] = on_grid(rng, len(back.buffers["x"]), 33)
    if "normalized" in flags:
        back.buffers["gain"][:] = 1
    reference = on.run(back.op, back.arguments, back.buffers)[1]
    dy = {"dst": np.nan_to_num(back.buffers["dy"]).astype(np.float64)}
    forward = forward_problems.norm(rng, 3, 33, [f for f in flags if f == "rows"])
    shared = {name: back.buffers[name] for name in ("x", "gain", "rows") if name in back.buffers}
    if "rows" in flags:  # a source may be read twice
        dx = np.zeros(shared["x"].shape)
        np.add.at(dx, shared["rows"], np.nan_to_num(reference["dx"]))
    else:
        dx = reference["dx"]
    matches(on, rng, "norm", forward.arguments, forward.buffers | shared, "x", dy, dx)
    if flags:
        return
    # as an input: the gradient is for any scale ...
    scale = (np.round(np.sqrt((shared["x"][:, :33] ** 2).mean(-1) + 1e-5) / STEP) * STEP).astype(
        np.float32
    )
    fixed = forward_problems.norm(rng, 3, 33, ("read_scale",))
    x = shared["x"].astype(np.float64)[:, :33]
    dn = np.nan_to_num(back.buffers["dy"])[:, :33].astype(np.float64) * back.buffers["gain"]
    matches(
        on,
        rng,
        "norm",
        fixed.arguments,
        fixed.buffers | shared | {"scale": scale},
        "scale",
        dy,
        -(dn * x).sum(-1) / scale.astype(np.float64) ** 2,
    )
    # ... and the reference's is at the row's own
    own = np.sqrt((x**2).mean(-1) + np.float64(np.float32(1e-5)))
    np.testing.assert_allclose(reference["dscale"], -(dn * x).sum(-1) / own**2, rtol=1e-12)
    normed = forward_problems.norm(rng, 3, 33, ("read_normalized",))
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


@pytest.mark.parametrize("kind", range(3), ids=problems.ACTIVATIONS)
def test_differences_of_act(on, rng, kind):
    back = backward.act_bwd(rng, 3, 33, kind)
    back.buffers["gate_up"][:, :66] = on_grid(rng, 3, 66, scale=2.0)
    gradient = on.run(back.op, back.arguments, back.buffers)[1]["dgate_up"]
    forward = forward_problems.act(rng, 3, 33, kind)
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


@pytest.mark.parametrize(
    "n_heads, n_kv_heads, d_head, window, softcap",
    [(4, 2, 6, 0, 0.0), (3, 1, 8, 4, 0.0), (2, 2, 6, 0, 2.0), (4, 1, 10, 5, 3.0)],
)
def test_differences_of_attention(on, rng, n_heads, n_kv_heads, d_head, window, softcap):
    """The whole of it: gradients of q, k and v by the steps that a backward pass takes, against
    attention's fused reference.
    """
    lengths = (11, 1, 9)
    packed = problems.Packed([(0, n) for n in lengths])
    n, width = len(packed.tokens), n_heads * d_head
    stride, z_stride, key_stride, kv_width = (
        problems.row_stride(width),
        problems.row_stride(width),
        problems.row_stride(packed.n_keys),
        n_kv_heads * d_head,
    )
    q, k, v = on_grid(rng, n, width), on_grid(rng, n, kv_width), on_grid(rng, n, kv_width)
    dz = problems.padded(on_grid(rng, n, width), z_stride)
    cache = lambda rows: _into_slots(packed, rows)
    sizes = {
        "n_heads": n_heads,
        "n_kv_heads": n_kv_heads,
        "d_head": d_head,
        "key_stride": key_stride,
        "n_keys": packed.n_keys,
    }
    tiles = sizes | {"tokens": "tokens", "tiles": "tiles", "n_tiles": len(packed.tiles)}
    index = {"tokens": packed.tokens, "tiles": packed.tiles}
    blank = problems.nothing(n, n_heads, key_stride)

    def step(
        op, arguments, **buffers
    ):  # the reference's result, rounded to what the next step takes
        return {
            name: array.astype(np.float32)
            for name, array in on.run(op, arguments, index | buffers)[1].items()
        }

    score = tiles | {"qkv": "q", "k_cache": "k", "scores": "scores", "stride": stride}
    scores = step(
        "attn_scores",
        score | {"scale": d_head**-0.5, "softcap": softcap},
        q=problems.padded(q, stride),
        k=cache(k),
        scores=blank,
    )["scores"]
    soft = {
        "scores": "scores",
        "tokens": "tokens",
        "n_heads": n_heads,
        "key_stride": key_stride,
        "window": window,
        "n_tokens": n,
        "n_keys": packed.n_keys,
    }
    pattern = step("attn_softmax", soft, scores=scores)["scores"]
    dpattern = step("attn_scores", score | {"scale": 1.0}, q=dz, k=cache(v), scores=blank)["scores"]
    dscores = step(
        "attn_softmax_bwd",
        {
            "pattern": "pattern",
            "dpattern": "dpattern",
            "scores": "scores",
            "tokens": "tokens",
            "n_heads": n_heads,
            "key_stride": key_stride,
            "window": window,
            "scale": d_head**-0.5,
            "softcap": softcap,
            "n_tokens": n,
            "n_keys": packed.n_keys,
        },
        pattern=pattern,
        dpattern=dpattern,
        scores=scores,
    )["dpattern"]
    mix = tiles | {"pattern": "a", "v_cache": "k", "z": "z", "z_stride": z_stride, "window": window}
    dq = step("attn_output", mix, a=dscores, k=cache(k), z=problems.nothing(n, z_stride))["z"]
    sums = tiles | {
        "a": "a",
        "y": "y",
        "sums": "sums",
        "last_token": n,
        "y_stride": stride,
        "out_stride": problems.row_stride(kv_width),
        "window": window,
    }
    dk = step(
        "attn_output_bwd",
        sums,
        a=dscores,
        y=problems.padded(q, stride),
        sums=problems.nothing(n, problems.row_stride(kv_width)),
    )["sums"]
    dv = step(
        "attn_output_bwd",
        sums,
        a=pattern,
        y=dz,
        sums=problems.nothing(n, problems.row_stride(kv_width)),
    )["sums"]

    fused = sizes | {
        "qkv": "q",
        "k_cache": "k",
        "v_cache": "v",
        "tokens": "tokens",
        "scores": "scores",
        "z": "z",
        "stride": stride,
        "z_stride": z_stride,
        "window": window,
        "scale": d_head**-0.5,
        "softcap": softcap,
        "n_tokens": n,
    }
    buffers = index | {
        "q": problems.padded(q, stride),
        "k": cache(k),
        "v": cache(v),
        "scores": blank,
        "z": problems.nothing(n, z_stride),
    }
    weights = {"z": np.nan_to_num(dz).astype(np.float64)}
    for name, gradient in (
        ("q", dq),
        ("k", cache(dk[:, :kv_width])),
        ("v", cache(dv[:, :kv_width])),
    ):
        matches(on, rng, "attn_decode", fused, buffers, name, weights, gradient, tolerance=5e-7)


def _into_slots(packed, rows):
    out = np.full((packed.n_slots, rows.shape[1]), np.nan, np.float32)
    out[packed.tokens[:, 2]] = rows
    return out


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
    """And the scalars are what their names say."""
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
