"""The ops of decoding on GPUs: against their float64 references, and bit-identical to the separate
steps that they fuse, for any number of rows.
"""

from __future__ import annotations

import numpy as np
import pytest

from op_bench import SIZES, agree, same_bits
from vksteer.verify import decoding, problems

ROWS = (1, 2, 3, 8, 9)


@pytest.mark.parametrize("weight_type", range(3), ids=problems.WEIGHT_TYPES)
@pytest.mark.parametrize("norm", problems.NORM_KINDS)
@pytest.mark.parametrize("n, k", [(2, 1), (34, 33), (66, 257)])
def test_linear_decode(on, rng, n, k, norm, weight_type):
    for i, rows in enumerate(ROWS):
        finish = ("plain", "act", "gate")[i % 3]
        agree(
            on,
            decoding.linear_decode(
                rng,
                rows,
                n,
                k,
                weight_type,
                norm,
                finish,
                act=i,
                bias=i % 2 == 0,
                add=finish == "plain",
                norm_bias=norm == "layer",
            ),
        )


@pytest.mark.parametrize("weight_type", range(3), ids=problems.WEIGHT_TYPES)
@pytest.mark.parametrize("norm", ["rms", "none"])
@pytest.mark.parametrize("n, k", [(2, 1), (34, 33), (66, 257)])
def test_linear_decode_after_a_post_norm(on, rng, n, k, norm, weight_type):
    for i, rows in enumerate(ROWS):
        agree(
            on,
            decoding.linear_decode(
                rng, rows, n, k, weight_type, norm, "gate", act=i, bias=i % 2 == 0, post=True
            ),
        )


def run(on, op, buffers, sources, **arguments):
    """Runs an op on buffers, whose names it knows as `sources` says; returns all buffers."""
    return buffers | on.run(op, {**sources, **arguments}, buffers)[0]


@pytest.mark.parametrize("norm", ["rms", "none"])
def test_a_product_after_a_post_norm_equals_its_steps(on, rng, norm):
    n, k = 70, 333
    problem = decoding.linear_decode(rng, 9, n, k, 1, norm, "gate", 1, True, post=True)
    a, buffers = problem.arguments, problem.buffers
    fused = on.run("linear_decode", a, buffers)[0]
    flags = problems.NORM_FLAGS | problems.flags("NORM", "decode")
    steps = run(
        on,
        "norm",
        buffers | {"mid": np.zeros((9, a["x_stride"]), np.float32)},
        {"x": "sub", "gain": "post_gain", "add": "x", "dst": "mid"},
        width=k,
        stride=a["x_stride"],
        n_rows=9,
        eps=a["eps"],
        flags=flags["decode"] + flags["add"],
    )
    assert same_bits(fused["mid"][:, :k], steps["mid"][:, :k])
    plain = {name: v for name, v in a.items() if name not in ("sub", "post_gain", "mid")}
    steps = on.run("linear_decode", plain | {"x": "mid"}, steps)[0]
    assert same_bits(fused["dst"], steps["dst"])
    for rows in ROWS:
        few = on.run("linear_decode", a | {"n_rows": rows}, buffers)[0]
        assert same_bits(few["dst"][:rows], fused["dst"][:rows])
        assert same_bits(few["mid"][:rows], fused["mid"][:rows])


@pytest.mark.parametrize("norm", ["rms", "layer"])
@pytest.mark.parametrize("finish", ["plain", "act", "gate"])
def test_the_fused_product_equals_its_steps_and_does_not_depend_on_the_rows(on, rng, norm, finish):
    n, k, act = 70, 333, 1
    layer = norm == "layer"
    problem = decoding.linear_decode(rng, 9, n, k, 1, norm, finish, act, True, norm_bias=layer)
    a, fused = problem.arguments, on.run("linear_decode", problem.arguments, problem.buffers)[0]
    wide, stride = problems.row_stride(n), a["x_stride"]
    steps = dict(problem.buffers) | {
        "normed": np.zeros((9, stride), np.float32),
        "product": np.zeros((9, wide), np.float32),
    }
    norm_flags = problems.NORM_FLAGS | problems.flags("NORM", "decode")
    steps = run(
        on,
        "norm",
        steps,
        {"x": "x", "gain": "gain", "dst": "normed"} | ({"bias": "norm_bias"} if layer else {}),
        width=k,
        stride=stride,
        n_rows=9,
        eps=a["eps"],
        flags=norm_flags["decode"] + (norm_flags["layer"] + norm_flags["bias"]) * layer,
    )
    matrix = {name: a[name] for name in ("weight_type", "n", "k", "family_plus_1")}
    steps = run(
        on,
        "linear",
        steps,
        {"x": "normed", "weights": "weights", "bias": "bias", "dst": "product"},
        **matrix,
        n_rows=9,
        x_stride=stride,
        dst_stride=wide,
        decode=1,
    )
    if finish == "plain":
        want = steps["product"]
    else:
        steps = run(
            on,
            "act",
            steps,
            {"gate_up": "product", "dst": "dst"},
            width=n // 2 if finish == "gate" else n,
            in_stride=wide,
            out_stride=a["dst_stride"],
            act=act,
            plain=int(finish == "act"),
            n_tokens=9,
        )
        want = steps["dst"]
    columns = n // 2 if finish == "gate" else n
    assert same_bits(fused["dst"][:, :columns], want[:, :columns])
    for rows in (1, 2, 3, 8):
        some = on.run("linear_decode", a | {"n_rows": rows}, problem.buffers)[0]
        assert same_bits(some["dst"][:rows, :columns], fused["dst"][:rows, :columns])


def test_a_gate_of_a_large_matrix_equals_its_halves(on, rng):
    """Whether 8 or 32 columns share a workgroup depends on W, not on how it is finished."""
    n, k, act = 16400, 80, 1
    fused = decoding.linear_decode(rng, 1, n, k, 1, "rms", "gate", act)
    product = decoding.linear_decode(rng, 1, n, k, 1, "rms", "plain")
    shared = {name: fused.buffers[name] for name in ("weights", "x", "gain")}
    got = on.run("linear_decode", fused.arguments, fused.buffers)[0]["dst"]
    both = on.run("linear_decode", product.arguments, product.buffers | shared)[0]["dst"]
    want = on.run(
        "act",
        {"gate_up": "product", "dst": "dst", "width": n // 2, "in_stride": both.shape[1]}
        | {"out_stride": got.shape[1], "act": act, "plain": 0, "n_tokens": 1},
        {"product": both, "dst": np.zeros_like(got)},
    )[0]["dst"]
    assert same_bits(got[:, : n // 2], want[:, : n // 2])


STEPS = [
    (64, 64, ("rotate", "store")),
    (20, 8, ("rotate", "interleaved", "store")),
    (256, 256, ("rotate", "store", "norm_head")),
    (16, 16, ("rotate", "store", "norm_wide")),
    (64, 32, ("rotate", "store", "norm_layer")),
    (20, 8, ("rotate", "store", "norm_layer", "norm_bias")),
    (4, 0, ("store",)),
]


@pytest.mark.parametrize("d_head, d_rot, flags", STEPS, ids=str)
def test_attn_step(on, rng, d_head, d_rot, flags):
    for group, window, softcap in ((1, 0, 0.0), (3, 5, 20.0), (7, 0, 0.0)):
        cached = [0, 33, 258] if d_head < 256 else [0, 33]
        agree(
            on,
            decoding.attn_step(rng, cached, 2 * group, 2, d_head, d_rot, flags, window, softcap),
        )


def test_attn_step_of_frozen_rows_and_of_a_given_pattern(on, rng):
    agree(on, decoding.attn_step(rng, [9, 9, 300, 300], 6, 2, 20, flags=(), frozen=True))
    agree(on, decoding.attn_step(rng, [0, 37, 700], 8, 2, 16, flags=("pattern",)))


@pytest.mark.parametrize("d_head, d_rot, flags", STEPS, ids=str)
def test_attn_step_equals_its_steps(on, rng, d_head, d_rot, flags):
    """Norms, rotation, scores, softmax and z by a kernel each give the same bits."""
    one = decoding.attn_step(rng, [0, 9, 290], 6, 2, d_head, d_rot, flags, window=280, softcap=9.0)
    a, fused = one.arguments, on.run(one.op, one.arguments, one.buffers)[0]
    names = lambda *fields: {f: a[f] for f in fields}
    rope_flags, norm_flags = problems.ROPE_FLAGS, problems.flags("NORM", "decode", "layer")
    buffers, of = dict(one.buffers), set(flags)
    sums = {"norm_wide": norm_flags["decode"], "norm_layer": sum(norm_flags.values())}
    bias = problems.NORM_FLAGS["bias"] * ("norm_bias" in of)
    for name in sums.keys() & of:
        for heads, at, gain in ((6, 0, "q_gain"), (2, 6 * d_head, "k_gain")):
            part = np.ascontiguousarray(buffers["qkv"][:, at:])
            layer = name == "norm_layer"
            part = on.run(
                "norm",
                {"x": "x", "gain": "gain", "dst": "x", "n_rows": 3, "eps": a["eps"]}
                | {"width": d_head if layer else heads * d_head, "stride": part.shape[1]}
                | {"n_groups": heads if layer else 0, "flags": sums[name] + bias}
                | ({"bias": ("gain", heads * d_head)} if bias else {}),
                {"x": part, "gain": buffers[gain]},
            )[0]["x"]
            buffers["qkv"] = np.concatenate([buffers["qkv"][:, :at], part], 1)
    buffers |= on.run(
        "rope",
        {f: f for f in ("qkv", "angles", "q_angles", "tokens", "q_gain", "k_gain")}
        | {"k_cache": "k_cache", "v_cache": "v_cache", "n_tokens": 3}
        | names("n_heads", "n_kv_heads", "d_head", "d_rot", "stride", "eps")
        | {
            "flags": rope_flags["store"]
            + rope_flags["rotate"] * ("rotate" in of)
            + rope_flags["interleaved"] * ("interleaved" in of)
            + rope_flags["qk_norm"] * ("norm_head" in of)
        },
        buffers,
    )[0]
    for cache in ("k_cache", "v_cache"):
        assert same_bits(buffers[cache], fused[cache])
    buffers |= {"tiles": np.array([(t, 1) for t in range(3)], np.uint32)}
    shared = {"tokens": "tokens", "scores": "scores"} | names("n_heads", "key_stride", "n_keys")
    kv = names("n_kv_heads", "d_head")
    buffers |= on.run(
        "attn_scores",
        shared
        | kv
        | {"qkv": "qkv", "k_cache": "k_cache", "tiles": "tiles", "n_tiles": 3}
        | names("stride", "scale", "softcap"),
        buffers,
    )[0]
    buffers |= on.run(
        "attn_softmax", shared | names("window") | {"n_tokens": 3, "decode": 1}, buffers
    )[0]
    for t, pos in enumerate((0, 9, 290)):
        assert same_bits(buffers["scores"][t, :, : pos + 1], fused["scores"][t, :, : pos + 1])
    given = on.run(one.op, a | {"flags": decoding.STEP_FLAGS["pattern"]}, buffers)[0]
    assert same_bits(given["z"], fused["z"])
    stored = on.run(one.op, a | {"flags": 0}, buffers)[0]  # q and k are made already
    assert same_bits(stored["z"], fused["z"])


def test_refusals(on, rng):
    good = decoding.linear_decode(rng, 2, 8, 16, norm="rms", finish="gate")
    for change in ({"finish": 3}, {"norm": 7}, {"n_k": 16}, {"n": 7}):
        with pytest.raises(ValueError):
            on.run("linear_decode", good.arguments | change, good.buffers)
    for finish in ("act", "gate"):  # the residual would come before the activation
        added = decoding.linear_decode(rng, 2, 8, 16, finish=finish, add=True)
        with pytest.raises(ValueError, match="cannot be finished so"):
            on.run("linear_decode", added.arguments, added.buffers)
    good = decoding.attn_step(rng, [3], 2, 1, 8)
    for change in ({"d_head": 6}, {"d_rot": 10}):
        with pytest.raises(ValueError):
            on.run("attn_step", good.arguments | change, good.buffers)


# -- the token that a row of logits picks ----------------------------------------------------------


@pytest.mark.parametrize("ties", [False, True])
def test_pick(on, rng, ties):
    for rows in (0, 1, 3):
        for width in (*SIZES, 1000, 4099):
            problem = decoding.pick(rng, rows, width, ties=ties)
            got = agree(on, problem).device["dst"]
            np.testing.assert_array_equal(got, problem.buffers["x"][:, :width].argmax(axis=1))


@pytest.mark.parametrize("width", [1, 8, 257, 1000])
def test_pick_of_rows_to_look_at(on, rng, width):
    for bad in (np.nan, np.inf, -np.inf):
        problem = decoding.pick(rng, 3, width, bad=bad)
        got = agree(on, problem).device["dst"]
        assert got[1] == -1 and (got[[0, 2]] >= 0).all()
    for empty in ((0.0, 0.0), (2.0, 0.5), (-2.0, 1e-3)):
        got = agree(on, decoding.pick(rng, 3, width, empty=empty)).device["dst"]
        assert got[0] == -1 and (got[1:] >= 0).all()
    equal = decoding.pick(rng, 2, width)
    equal.buffers["x"][:, :width] = -3.0
    equal.buffers["x"][:, width:] = 7.0  # pad columns do not count
    assert (agree(on, equal).device["dst"] == 0).all()


@pytest.mark.parametrize("change", [{"n_rows": 4}, {"width": 0}, {"x_stride": 32}])
def test_senseless_picks_are_refused(on, rng, change):
    problem = decoding.pick(rng, 3, 33)
    with pytest.raises(ValueError):
        on.run(problem.op, problem.arguments | change, problem.buffers)


@pytest.mark.parametrize("weight_type", range(3), ids=problems.WEIGHT_TYPES)
def test_embed_of_picked_tokens(on, rng, weight_type):
    for share in (1, 2, 5):
        for n_tokens in (0, 1, 7, 10):
            problem = decoding.embed_picked(rng, n_tokens, 257, 33, weight_type, share)
            agree(on, problem)
    for change in ({"share": 0}, {"positions": 1}):
        with pytest.raises(ValueError):
            on.run(problem.op, problem.arguments | change, problem.buffers)
