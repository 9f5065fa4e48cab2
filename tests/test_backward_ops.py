"""The backward ops against their float64 twins, as test_ops.py does it; and the twins against
central differences of the forward ops' twins.
"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from op_bench import BATCHES, HEADS, ROWS, SIZES, agree, few, same_bits, seeds
from vksteer.verify import backward, problems
from vksteer.verify import forward as forward_problems

# -- matrices --------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight_type", range(3), ids=problems.WEIGHT_TYPES)
@pytest.mark.parametrize(
    "n, k", [(1, 1), (3, 7), (33, 33), (31, 16), (77, 53), (257, 129), (65, 257)]
)
def test_linear_bwd(on, families, rng, n, k, weight_type):
    for i, rows in enumerate((0, *ROWS, 65)):
        for family in families:
            agree(
                on, backward.linear_bwd(rng, rows, n, k, weight_type, add=i % 2 == 0, family=family)
            )


@pytest.mark.parametrize("weight_type", range(3), ids=problems.WEIGHT_TYPES)
def test_linear_bwd_gives_a_row_the_same_bits_whatever_is_beside_it(on, families, rng, weight_type):
    """For every number of rows, every place among them, every family of kernels."""
    whole = backward.linear_bwd(rng, 33, 77, 100, weight_type, add=True)
    want = on.run(whole.op, whole.arguments, whole.buffers)[0]["dx"]
    for family in families:
        for rows in (*ROWS, 4, 5, 12, 13, 24, 25, 32):
            for first in {0, 33 - rows, (33 - rows) // 2}:
                part = {
                    name: array if name == "weights" else array[first : first + rows].copy()
                    for name, array in whole.buffers.items()
                }
                got = on.run(
                    whole.op, whole.arguments | {"n_rows": rows, "family_plus_1": family + 1}, part
                )[0]["dx"]
                assert same_bits(got, want[first : first + rows]), (
                    f"{rows} rows from {first}, family {family}"
                )


@pytest.mark.parametrize("weight_type", range(3), ids=problems.WEIGHT_TYPES)
@pytest.mark.parametrize("n, k", [(1, 1), (77, 100), (257, 129), (130, 33), (2100, 17)])
def test_linear_bwd_of_many_rows_keeps_the_bits(on, families, rng, weight_type, n, k):
    """A row's bits are those of the same row alone, chunks, slices and the strips that many rows
    are taken in included.
    """
    whole = backward.linear_bwd(rng, 70, n, k, weight_type)
    n_k = (k + 15) // 16 * 16
    for family in families:
        for more in (
            {},
            {"chunk_rows": 96 if n < 1000 else 1024},
            {"first_k": n_k - 16, "n_k": 16},
            *([{"first_n": 16, "n_sum": 48}] if n > 64 else []),
        ):
            arguments = whole.arguments | {"family_plus_1": family + 1} | more
            want = on.run(whole.op, arguments, whole.buffers)[0]["dx"]
            for first, rows in ((0, 5), (60, 10), (22, 48), (3, 16)):
                part = {
                    name: array if name == "weights" else array[first : first + rows].copy()
                    for name, array in whole.buffers.items()
                }
                got = on.run(whole.op, arguments | {"n_rows": rows}, part)[0]["dx"]
                assert same_bits(got, want[first : first + rows]), (
                    f"rows {first} to {first + rows}, family {family}, {more}"
                )


@pytest.mark.parametrize("weight_type", range(3), ids=problems.WEIGHT_TYPES)
def test_linear_bwd_slices_and_chunks(on, families, rng, weight_type):
    for family in families:
        for first_k, n_k in ((0, 16), (16, 48), (64, 16), (80, 16), (32, 64)):
            agree(
                on,
                backward.linear_bwd(
                    rng,
                    9,
                    45,
                    90,
                    weight_type,
                    first_k=first_k,
                    n_k=n_k,
                    family=family,
                    add=first_k == 16,
                ),
            )
        for first_n, n_sum in ((0, 16), (16, 48), (64, 32), (112, 18), (32, 98), (96, 34)):
            for chunk_rows in (0, 32, 96):
                agree(
                    on,
                    backward.linear_bwd(
                        rng,
                        5,
                        130,
                        33,
                        weight_type,
                        first_n=first_n,
                        n_sum=n_sum,
                        family=family,
                        chunk_rows=chunk_rows,
                        add=first_n == 16,
                    ),
                )
        for rows in (1, 5, 33):
            for chunk_rows in (32, 64, 96):
                agree(
                    on,
                    backward.linear_bwd(
                        rng,
                        rows,
                        130,
                        33,
                        weight_type,
                        add=rows == 5,
                        chunk_rows=chunk_rows,
                        family=family,
                    ),
                )


def test_linear_bwd_in_pieces_has_the_whole_bits(on, families, rng):
    """Chunks of the matrix, the sum over rows taken in two goes, columns taken apart."""
    problem = backward.linear_bwd(rng, 5, 130, 100)
    for family in families:
        arguments = problem.arguments | {"family_plus_1": family + 1}
        want = on.run("linear_bwd", arguments, problem.buffers)[0]["dx"]
        for rows in (32, 64, 128, 160):
            assert same_bits(
                on.run("linear_bwd", arguments | {"chunk_rows": rows}, problem.buffers)[0]["dx"],
                want,
            )
        for cut in (16, 48, 128):
            buffers = on.run("linear_bwd", arguments | {"n_sum": cut}, problem.buffers)[0]
            buffers = problem.buffers | {"dx": buffers["dx"]}
            got = on.run(
                "linear_bwd",
                arguments | {"first_n": cut, "n_sum": 130 - cut, "dy": ("dy", cut), "add": 1},
                _cut(problem, cut, buffers),
            )[0]["dx"]
            assert same_bits(got, want), f"cut at {cut}, family {family}"
        for first_k, n_k in ((0, 16), (48, 64)):
            got = on.run(
                "linear_bwd", arguments | {"first_k": first_k, "n_k": n_k}, problem.buffers
            )[0]["dx"]
            assert same_bits(got[:, :n_k], want[:, first_k : first_k + n_k])


def _cut(problem, cut, buffers):
    """dy, its last row long enough to be read from column `cut` on."""
    return buffers | {
        "dy": np.concatenate(
            [buffers["dy"], np.full((1, buffers["dy"].shape[1]), np.nan, np.float32)]
        )
    }


def test_linear_bwd_of_extreme_weights(on, rng):
    """One-hot rows of dy read the weights themselves: every finite half."""
    for weight_type in (1, 2):
        bits = rng.integers(0, 1 << 16, (40, 64)).astype(np.uint16)
        values = (
            (bits.astype(np.uint32) << 16).view(np.float32)
            if weight_type == 1
            else bits.view(np.float16).astype(np.float32)
        )
        if weight_type == 1:  # a float32 subnormal may be flushed to zero by a device
            values = np.where(np.abs(values) < np.finfo(np.float32).tiny, np.float32(0), values)
        values = np.where(np.isfinite(values), values, np.float32(1))
        problem = backward.linear_bwd(rng, 40, 40, 64, weight_type)
        problem.buffers["weights"], _ = problems.panels(values, weight_type)
        problem.buffers["dy"] = problems.padded(
            np.eye(40, dtype=np.float32), problem.arguments["y_stride"], 0.0
        )
        for result in on.run(problem.op, problem.arguments, problem.buffers):
            np.testing.assert_array_equal(result["dx"][:, :64], values)


# -- row by row ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags",
    [
        (),
        ("add",),
        ("rows",),
        ("rows", "add"),
        ("write_scale",),
        ("write_scale", "no_out"),
        ("write_normalized",),
        ("write_scale", "write_normalized", "add"),
        ("normalized",),
        ("normalized", "write_normalized", "add"),
        ("normalized", "write_scale", "no_out"),
    ],
    ids="+".join,
)
def test_norm_bwd(on, rng, flags):
    for rows in (0, 1, 3, 33):
        for width in (*SIZES, 576, 1024):
            agree(on, backward.norm_bwd(rng, rows, width, flags))
    agree(on, backward.norm_bwd(rng, 7, 33, flags, in_place=True))


@pytest.mark.parametrize("scale", [1e-15, 1e-3, 1e6, 1e15])
def test_norm_bwd_of_small_and_large_values(on, rng, scale):
    agree(on, backward.norm_bwd(rng, 3, 257, ("write_scale", "write_normalized"), scale=scale))


@pytest.mark.parametrize("kind", range(3), ids=problems.ACTIVATIONS)
def test_act_bwd(on, rng, kind):
    for n_tokens in (0, 1, 3, 33):
        for width in SIZES:
            agree(on, backward.act_bwd(rng, n_tokens, width, kind))


@pytest.mark.parametrize("kind", range(3), ids=problems.ACTIVATIONS)
def test_act_bwd_everywhere(on, rng, kind):
    gate = np.concatenate(
        [
            np.linspace(-12, 12, 193),
            [0.0, -0.0, 1e-30, -1e-30, 88, -88, 104, -104, 1e4, -1e4, 1e10, -1e10],
        ]
    ).astype(np.float32)
    problem = backward.act_bwd(rng, 1, len(gate), kind, gate=gate[None])
    assert np.isfinite(agree(on, problem).device["dgate_up"][0, : 2 * len(gate)]).all()


# -- attention -------------------------------------------------------------------------------------


@pytest.mark.parametrize("d_head", [2, 6, 16, 64, 80, 128, 256])
def test_rope_bwd(on, rng, d_head):
    for rows in BATCHES:
        for n_heads, n_kv_heads in HEADS[1:3]:
            for flags in ((), ("rotate",), ("qk_norm",), ("qk_norm", "rotate")):
                agree(on, backward.rope_bwd(rng, rows, n_heads, n_kv_heads, d_head, flags))


@pytest.mark.parametrize("softcap", [0.0, 3.0])
@pytest.mark.parametrize("window", [0, 1, 5, 8, 1000])
def test_attn_softmax_bwd(on, rng, window, softcap):
    for rows in BATCHES + [[(0, 257)]]:
        agree(on, backward.attn_softmax_bwd(rng, rows, 3, window, softcap))
    for tile in (1, 3, 5):
        agree(
            on, backward.attn_softmax_bwd(rng, [(0, 17), (0, 1), (0, 19)], 4, window, softcap, tile)
        )


LENGTHS = [(), (1,), (3, 7), (33,), (1, 17, 9, 70, 8)]


@pytest.mark.parametrize("d_head", [2, 6, 16, 64, 80, 128, 256])
def test_attn_mix_bwd_over_head_sizes(on, rng, d_head):
    for rows in LENGTHS:
        agree(on, backward.attn_mix_bwd(rng, rows, 4, 2, d_head))


@pytest.mark.parametrize("n_heads, n_kv_heads", HEADS)
def test_attn_mix_bwd_over_head_groups(on, rng, n_heads, n_kv_heads):
    for rows in LENGTHS:
        for window in (0, 4):
            agree(on, backward.attn_mix_bwd(rng, rows, n_heads, n_kv_heads, 16, window))


@pytest.mark.parametrize("window", [0, 1, 5, 8, 1000])
def test_attn_mix_bwd_windows_and_pieces(on, rng, window):
    for rows in LENGTHS + [(257,)]:
        for pieces in (1, 2, 3):
            for piece in range(pieces):
                agree(on, backward.attn_mix_bwd(rng, rows, 2, 1, 6, window, pieces, piece))


@pytest.mark.parametrize("window", [0, 5])
def test_attn_mix_bwd_in_pieces_has_the_whole_bits(on, rng, window):
    problem = backward.attn_mix_bwd(rng, (17, 1, 33), 6, 2, 80, window)
    n, buffers, arguments = 51, problem.buffers, problem.arguments
    want = on.run("attn_mix_bwd", arguments, buffers)[0]["sums"]
    for cuts in ((25,), (1, 17, 18), (8, 16, 24, 50)):
        sums = buffers["sums"]
        for first, last in zip((0, *cuts), (*cuts, n)):
            sums = on.run(
                "attn_mix_bwd",
                arguments | {"first_token": first, "last_token": last, "add": int(first > 0)},
                buffers | {"a": buffers["a"][first:last].copy(), "sums": sums},
            )[0]["sums"]
        assert same_bits(sums, want), f"cut at {cuts}"
    for skip in (1, 2, 4):  # from a later tile of keys on
        later = buffers["tiles"][skip:].copy()
        got = on.run(
            "attn_mix_bwd", arguments | {"n_tiles": len(later)}, buffers | {"tiles": later}
        )[0]["sums"]
        assert (
            same_bits(got[later[0, 0] :], want[later[0, 0] :])
            and np.isnan(got[: later[0, 0]]).all()
        )
    rows = [slice(0, 17), slice(17, 18), slice(18, 51)]
    for r, tokens in enumerate(rows):  # a row alone
        packed = problems.Packed([(0, (17, 1, 33)[r])])
        alone = buffers | {
            "a": buffers["a"][tokens].copy(),
            "y": buffers["y"][tokens].copy(),
            "sums": buffers["sums"][tokens].copy(),
            "tokens": packed.tokens,
            "tiles": packed.tiles,
        }
        got = on.run(
            "attn_mix_bwd",
            arguments
            | {
                "first_token": 0,
                "last_token": len(packed.tokens),
                "n_tiles": len(packed.tiles),
            },
            alone,
        )[0]["sums"]
        assert same_bits(got, want[tokens])


# -- scalars of the logits -------------------------------------------------------------------------


@pytest.mark.parametrize("softcap", [0.0, 5.0])
def test_pair_grad(on, rng, softcap):
    for rows in (0, 1, 3, 33):
        for width in (*SIZES, 576, 1024):
            agree(on, backward.pair_grad(rng, rows, width, softcap))


@pytest.mark.parametrize("softcap", [0.0, 5.0, 30.0])
@pytest.mark.parametrize("kind", range(3), ids=backward.SCALARS)
def test_logit_grad(on, rng, kind, softcap):
    for rows in (0, 1, 3, 9):
        for width in (*SIZES, 1024, 5000):
            agree(on, backward.logit_grad(rng, rows, width, kind, softcap))
    for spread in (0.0, 1e-3, 50.0):
        agree(on, backward.logit_grad(rng, 3, 257, kind, softcap, spread))
        agree(
            on,
            backward.logit_grad(
                rng,
                3,
                257,
                kind,
                softcap,
                spread,
                reference_softcap=5.0 - softcap if softcap <= 5.0 else 7.0,
            ),
        )


def test_a_divergence_from_itself_is_nothing(on, rng):
    problem = backward.logit_grad(rng, 3, 1000, 1)
    problem.buffers["reference"] = problem.buffers["logits"].copy()
    device, _ = on.run(problem.op, problem.arguments, problem.buffers)
    assert np.array_equal(device["values"], np.zeros(3)) and np.array_equal(
        device["logits"], np.zeros_like(device["logits"])
    )


@pytest.mark.parametrize(
    "build",
    [
        lambda rng: backward.norm_bwd(rng, 33, 257, ("add", "write_scale", "write_normalized")),
        lambda rng: backward.act_bwd(rng, 33, 257, 1),
        lambda rng: backward.pair_grad(rng, 33, 257, 5.0),
        lambda rng: backward.logit_grad(rng, 33, 257, 2, 5.0),
    ],
    ids=["norm_bwd", "act_bwd", "pair_grad", "logit_grad"],
)
def test_a_row_alone_has_the_bits_of_a_row_in_company(on, rng, build):
    problem = build(rng)
    whole = on.run(problem.op, problem.arguments, problem.buffers)[0]
    count = "n_tokens" if "n_tokens" in problem.arguments else "n_rows"
    for r in (0, 7, 32):
        cut = {
            name: (
                array
                if name == "gain"
                else array[2 * r : 2 * r + 2].copy()
                if name == "rows"
                else array[r : r + 1].copy()
            )
            for name, array in problem.buffers.items()
        }
        alone = on.run(problem.op, problem.arguments | {count: 1}, cut)[0]
        for name in alone:
            if name not in ("gain", "rows"):
                assert same_bits(alone[name], whole[name][r : r + 1]), name


# -- twins against differences ---------------------------------------------------------------------
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
        twin = on.run(
            op,
            arguments,
            buffers | {name: buffers[name] + np.float32(h * STEP) * direction.astype(np.float32)},
        )[1]
        return sum(float((w * np.nan_to_num(twin[output])).sum()) for output, w in weights.items())

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
    twin = on.run(back.op, back.arguments, back.buffers)[1]
    dy = {"dst": np.nan_to_num(back.buffers["dy"]).astype(np.float64)}
    forward = forward_problems.norm(rng, 3, 33, [f for f in flags if f == "rows"])
    shared = {name: back.buffers[name] for name in ("x", "gain", "rows") if name in back.buffers}
    if "rows" in flags:  # a source may be read twice
        dx = np.zeros(shared["x"].shape)
        np.add.at(dx, shared["rows"], np.nan_to_num(twin["dx"]))
    else:
        dx = twin["dx"]
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
    # ... and the twin's is at the row's own
    own = np.sqrt((x**2).mean(-1) + np.float64(np.float32(1e-5)))
    np.testing.assert_allclose(twin["dscale"], -(dn * x).sum(-1) / own**2, rtol=1e-12)
    normed = forward_problems.norm(rng, 3, 33, ("read_normalized",))
    matches(
        on, rng, "norm", normed.arguments, normed.buffers | shared, "x", dy, twin["dnormalized"]
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
    attention's fused twin.
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

    def step(op, arguments, **buffers):  # the twin's result, rounded to what the next step takes
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
    dq = step("attn_mix", mix, a=dscores, k=cache(k), z=problems.nothing(n, z_stride))["z"]
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
        "attn_mix_bwd",
        sums,
        a=dscores,
        y=problems.padded(q, stride),
        sums=problems.nothing(n, problems.row_stride(kv_width)),
    )["sums"]
    dv = step(
        "attn_mix_bwd",
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
    twin = on.run(problem.op, problem.arguments, problem.buffers)[1]
    matches(
        on,
        rng,
        problem.op,
        problem.arguments,
        problem.buffers,
        "logits",
        {"values": problem.buffers["weights"].astype(np.float64)},
        twin["logits"],
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
    np.testing.assert_allclose(twin["values"], want, rtol=1e-12, atol=1e-12)


# -- any shape -------------------------------------------------------------------------------------


@few
@given(
    seed=seeds,
    rows=st.integers(0, 40),
    n=st.integers(1, 140),
    k=st.integers(1, 140),
    weight_type=st.integers(0, 2),
    add=st.booleans(),
    chunk_rows=st.sampled_from([0, 32, 64]),
    family=st.integers(0, 2),
)
def test_any_linear_bwd(on, families, seed, rows, n, k, weight_type, add, chunk_rows, family):
    agree(
        on,
        backward.linear_bwd(
            np.random.default_rng(seed),
            rows,
            n,
            k,
            weight_type,
            add,
            chunk_rows=chunk_rows,
            family=families[family % len(families)],
        ),
    )


@few
@given(
    seed=seeds,
    rows=st.lists(st.integers(1, 30), max_size=5),
    kv=st.integers(1, 3),
    group=st.integers(1, 4),
    half=st.integers(1, 40),
    window=st.sampled_from([0, 1, 3, 9]),
    pieces=st.integers(1, 3),
)
def test_any_attention_bwd(on, seed, rows, kv, group, half, window, pieces):
    rng = np.random.default_rng(seed)
    agree(on, backward.rope_bwd(rng, [(0, n) for n in rows], kv * group, kv, 2 * half))
    agree(on, backward.attn_softmax_bwd(rng, [(0, n) for n in rows], kv * group, window))
    for piece in range(pieces):
        agree(on, backward.attn_mix_bwd(rng, rows, kv * group, kv, 2 * half, window, pieces, piece))


@few
@given(
    seed=seeds,
    n_tokens=st.integers(1, 20),
    width=st.integers(1, 300),
    kind=st.integers(0, 2),
    softcap=st.sampled_from([0.0, 3.0]),
)
def test_any_row_op_bwd(on, seed, n_tokens, width, kind, softcap):
    rng = np.random.default_rng(seed)
    agree(
        on,
        backward.norm_bwd(
            rng,
            n_tokens,
            width,
            [
                f
                for f in ("add", "rows", "normalized", "write_scale", "write_normalized")
                if rng.integers(2)
            ],
        ),
    )
    agree(on, backward.act_bwd(rng, n_tokens, width, kind))
    agree(on, backward.pair_grad(rng, n_tokens, width, softcap))
    agree(on, backward.logit_grad(rng, n_tokens, width, kind, softcap))


# -- the bench -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "build, change",
    [
        (lambda rng: backward.linear_bwd(rng, 3, 45, 33), {"first_n": 8}),
        (lambda rng: backward.linear_bwd(rng, 3, 45, 33), {"n_sum": 17}),
        (lambda rng: backward.linear_bwd(rng, 3, 45, 33), {"first_k": 16, "n_k": 48}),
        (lambda rng: backward.linear_bwd(rng, 3, 45, 33), {"x_stride": 32}),
        (lambda rng: backward.linear_bwd(rng, 3, 45, 33), {"y_stride": 32}),
        (lambda rng: backward.linear_bwd(rng, 3, 45, 33), {"dy": ("dy", 1)}),
        (lambda rng: backward.linear_bwd(rng, 3, 45, 33), {"n": 300}),
        (lambda rng: backward.linear_bwd(rng, 3, 45, 33), {"family_plus_1": 99}),
        (lambda rng: backward.attn_mix_bwd(rng, (9,), 4, 2, 6), {"n_kv_heads": 3}),
        (lambda rng: backward.attn_mix_bwd(rng, (9,), 4, 2, 6), {"key_stride": 8}),
        (lambda rng: backward.attn_mix_bwd(rng, (9,), 4, 2, 6), {"n_tiles": 9}),
        (lambda rng: backward.attn_softmax_bwd(rng, [(0, 9)], 4), {"key_stride": 4}),
        (lambda rng: backward.rope_bwd(rng, [(0, 9)], 4, 2, 6), {"d_head": 5}),
        (lambda rng: backward.act_bwd(rng, 3, 7), {"act": 3}),
        (lambda rng: backward.logit_grad(rng, 3, 7), {"kind": 3}),
        (lambda rng: backward.norm_bwd(rng, 3, 7), {"flags": 32}),
    ],
)
def test_senseless_sizes_are_refused(on, rng, build, change):
    problem = build(rng)
    with pytest.raises(ValueError):
        on.run(problem.op, problem.arguments | change, problem.buffers)
    agree(on, problem)
