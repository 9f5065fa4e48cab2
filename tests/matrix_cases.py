"""Products on matrix units against their float64 references, for a child process on the newer Mesa,
whose software driver has them. Tiny sizes: it reaches 0.3 GFLOP/s and compiles a kernel in 1 to 4
seconds.

`python matrix_cases.py CASE` prints one JSON object.
"""

from __future__ import annotations

import json
import sys

import numpy as np

import attention_cases
from vksteer.verify import attribution, backward, checking, forward, problems

#: rows, n, k: one element, ragged everywhere, more than a partial sum (256 values) and a tile
SHAPES = [(1, 1, 1), (33, 77, 53), (40, 45, 300)]


def matrix_units(on) -> int:
    return next(number for number, name in on.families() if name == "matrix")


def several(rng, weight_type):
    """Products with every kind of epilogue, slice and segment."""
    for rows, n, k in SHAPES:
        yield forward.linear(
            rng, rows, n, k, weight_type, bias=rows > 1, add=rows == 33, softcap=3.0 * (rows == 33)
        )
        yield backward.linear_bwd(rng, rows, n, k, weight_type, add=rows == 33)
    yield forward.linear(rng, 9, 45, 96, weight_type, first_k=16, n_k=48)
    yield forward.linear(rng, 3, 45, 90, weight_type, first_k=80, n_k=16)  # into the pad
    yield forward.linear(rng, 0, 45, 90, weight_type)
    yield forward.linear(rng, 5, 130, 33, weight_type, bias=True, add=True, segment_rows=32)
    yield backward.linear_bwd(rng, 5, 130, 50, weight_type, segment_rows=64, add=True)
    yield backward.linear_bwd(rng, 5, 130, 50, weight_type, segment_rows=64, scale=0.5)
    yield backward.linear_bwd(
        rng, 5, 130, 96, weight_type, first_n=32, n_sum=64, first_k=16, n_k=48
    )


def dots(rng):
    yield attribution.dots(rng, 5, 11, 100)
    yield attribution.dots(rng, 37, 70, 9000)  # three slices, the last one short
    yield attribution.dots(rng, 1, 1, 4096)


def worst(on, made) -> dict:
    """{op: (largest error, label)} of problems."""
    found: dict[str, tuple[float, str]] = {}
    for problem in made:
        outcome = checking.check(on, problem)
        found[problem.op] = max(
            found.get(problem.op, (0.0, "")), (outcome.error, f"{problem.label}: {outcome.where}")
        )
    return found


def products(on, rng, types=("float32", "bfloat16", "float16")) -> dict:
    return {
        name: worst(on, several(rng, weight_type))
        for weight_type, name in enumerate(problems.WEIGHT_TYPES)
        if name in types
    } | {"rows": worst(on, dots(rng))}


def dst(on, problem, rows=slice(None)):
    part = {
        name: array[rows].copy() if name in ("x", "add", "dst", "dy", "dx") else array
        for name, array in problem.buffers.items()
    }
    name = "dx" if "dx" in part else "dst"
    return on.run(problem.op, problem.arguments | {"n_rows": len(part[name])}, part)[0][name]


def bits(on, rng) -> int:
    """Compares rows alone and in parts with the same rows among others; returns how many parts."""
    n_parts = 0
    for weight_type in range(3):
        for problem in (
            forward.linear(rng, 70, 77, 300, weight_type, bias=True, add=True),
            backward.linear_bwd(rng, 70, 77, 53, weight_type, add=True),
        ):
            whole = dst(on, problem)
            for first, rows in ((0, 1), (69, 1), (33, 1), (5, 8), (31, 33), (0, 64)):
                part = dst(on, problem, slice(first, first + rows))
                assert np.array_equal(
                    part.view(np.uint32), whole[first : first + rows].view(np.uint32)
                ), f"{problem.op}, {problem.label}: {rows} rows from {first}"
                n_parts += 1
    return n_parts


def magnitudes(on, rng) -> dict:
    """The largest error of a result, as a share of its sum_k |x| |W|, where rows lie 120 powers of
    two apart, and weights of a matrix 8.
    """
    found = {}
    for weight_type, name in enumerate(problems.WEIGHT_TYPES):
        problem = forward.linear(rng, 9, 45, 300, weight_type)
        scales = 2.0 ** np.array([-60, -40, -30, -1, 0, 3, 20, 50, 60])
        problem.buffers["x"][:, :300] *= scales[:, None].astype(np.float32)
        words, weights = problems.panels(
            rng.standard_normal((45, 300)) * 2.0 ** rng.integers(-8, 1, (45, 300)), weight_type
        )
        problem.buffers["weights"] = words
        device, reference = on.run(problem.op, problem.arguments, problem.buffers)
        units = np.abs(problem.buffers["x"][:, :300].astype(np.float64)) @ np.abs(weights).T
        found[name] = float(
            (np.abs(device["dst"][:, :45] - reference["dst"][:, :45]) / units).max()
        )
    return found


def model(folder) -> dict:
    """A model on matrix units, against the broadcast kernels: logits, gradients, scores of edges,
    rows alone, in a batch and with captures; and with fast products.
    """
    import warnings

    import vksteer as vs

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        fast = vs.Model.from_pretrained(folder, precision="fast", progress=False)
        again = vs.Model.from_pretrained(folder, precision="fast", progress=False)
    split = vs.Model.from_pretrained(folder, progress=False)
    rng = np.random.default_rng(4)
    rows = [rng.integers(0, split.config.d_vocab, n).tolist() for n in (9, 1, 40)]
    vector = vs.SteeringVector(rng.standard_normal(split.config.d_model).astype(np.float32), 1)
    samples = [vs.patching.Sample(rows[0], rows[2][:5])]
    at = ["blocks.0.hook_resid_pre"]

    def computed(of):
        logits = of.run(rows).logits
        gradients = of.gradients(rows, of=vs.LogitDiff(-1, 1, 2), at=at, progress=False)[at[0]]
        scores = vs.patching.attribute(of, samples, vector, 1.0, steps=2, progress=False)
        return {"logits": logits, "gradients": gradients, "scores": scores.edges}

    on_units, rounded = computed(split), computed(fast)
    for row, batched in zip(rows, on_units["logits"]):
        alone = split.run([row]).logits[0]
        assert np.array_equal(alone, batched[-len(row) :]), "alone and batched"
    sites = ["blocks.*.attn.hook_attn_scores", "blocks.*.attn.hook_pattern"]
    with split.profile() as passes:
        captured = split.run(rows, capture=sites)
    assert all(map(np.array_equal, captured.logits, on_units["logits"])), "with captures"
    with split.profile() as profile:  # the range of a model's weights is known
        split._engine.measure_linear(8, 64, 64)
    split._engine.kernels = "broadcast"
    want = computed(split)
    error = lambda got, of: float(np.abs(got[of] - want[of]).max() / np.abs(want[of]).max())
    return {
        "kernels": fast.kernels,
        "precision": [fast.precision, again.precision, split.precision],
        "said": [str(w.message) for w in said if "precision" in str(w.message)],
        "attention": sorted(c.kernel for c in passes.kernels if c.kernel.startswith("attn_")),
        "measured": {cost.kernel: cost.calls for cost in profile.kernels},
        "provenance": vs.patching.attribute(
            fast, samples, vector, 1.0, steps=1, progress=False
        ).provenance.get("precision"),
        "split": {of: error(on_units, of) for of in want},
        "fast": {of: error(rounded, of) for of in want},
    }


def encoder(folder) -> dict:
    """An autoencoder's features on matrix units: how often the range of its matrix is measured, the
    largest error as a share of the largest value, and whether bits depend on tiles.
    """
    import vksteer as vs
    from vksteer.sae.encoding import Encoder

    on = vs.Model.from_pretrained(folder, progress=False)
    rng = np.random.default_rng(6)
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)
    # features of different magnitudes, so that tiles would have ranges of their own
    weights = draw(36, 300) * 2.0 ** rng.integers(-8, 4, 300).astype(np.float32)
    sae = vs.sae.SAE(weights, draw(300), draw(300, 36), draw(36), kind="relu", site=None)
    h, found = draw(50, 36), []
    for memory in (256 << 20, 80_000, 40_000):
        encoding = Encoder(on, sae, memory)
        with on.profile() as profile:
            sums = encoding.sums([h[:20], h[20:]])
            values, _ = encoding.top(h, 300)
        calls = {cost.kernel: cost.calls for cost in profile.kernels}
        found.append((sums, values, calls["matrix_range"], calls["feature_act"]))
    z = sae.encode(h)
    want = np.stack([z[:20].sum(axis=0), z[20:].sum(axis=0)])
    return {
        "kernels": on.kernels,
        "ranges": [f[2] for f in found],
        "tiles": [f[3] for f in found],
        "same": all(np.array_equal(a, b) for f in found[1:] for a, b in zip(f[:2], found[0][:2])),
        "error": float(np.abs(found[0][0] - want).max() / np.abs(want).max()),
    }


def main(case: str, *folders: str) -> None:
    if case in ("model", "encoder"):
        print(json.dumps({"model": model, "encoder": encoder}[case](*folders)))
        return
    on, _ = checking.bench("llvmpipe")
    rng = np.random.default_rng(3)
    on.use(matrix_units(on), case.startswith("fast"), 0 if case == "large" else 2048)
    if case == "attention":
        rows, heads, cases = attention_cases.RAGGED, (6, 2), ((0, 0.0), (40, 0.0), (3, 5.0))
        whole = [attention_cases.attend(on, rng, rows, heads, 20, *of) for of in cases]
        out = {"products": worst(on, attention_cases.several(rng)), "whole": whole}
        out["bits"] = attention_cases.bits(on, rng)
        out["magnitudes"] = attention_cases.magnitudes(on, rng)
        out["plain"] = attention_cases.plain(on, rng, 0, matrix_units(on))
    elif case == "fast attention":
        out = {"products": worst(on, attention_cases.several(rng))}
        out["bits"] = attention_cases.bits(on, rng)
    elif case == "split":
        out = products(on, rng) | {"bits": bits(on, rng), "magnitudes": magnitudes(on, rng)}
    elif case == "fast":
        out = products(on, rng, types=("bfloat16",))
    else:
        out = products(on, rng)
        for fast in (False, True):
            on.use(matrix_units(on), fast)
            on.self_test(matrix_units(on))
    print(json.dumps(out))


if __name__ == "__main__":
    main(*sys.argv[1:])
