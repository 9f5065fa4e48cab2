"""model.profile(): counts and bytes agree with what the model must do, results keep their bits, and
a profile ends however its block ends.
"""

from __future__ import annotations

import json
import math
import threading

import numpy as np
import pytest

from oracle.compare import assert_same_bits
from vksteer import cli
from vksteer.cli import bench


@pytest.fixture
def model(zoo):
    return zoo.engine("llama3", dtype="auto")


def rows_of(model, *lengths):
    rng = np.random.default_rng(3)
    return [rng.integers(0, model.config.d_vocab, n).tolist() for n in lengths]


def test_bits_are_those_without_a_profile(model):
    rows = rows_of(model, 70, 5)
    call = lambda: model.generate(
        rows,
        max_new_tokens=5,
        ignore_eos=True,
        capture=["blocks.*.hook_resid_post"],
        progress=False,
    )
    plain = call()
    with model.profile() as p:
        profiled = call()
    for a, b in zip(plain, profiled):
        assert_same_bits("tokens", a.tokens, b.tokens)
        for site in a.captured:
            assert_same_bits(site, a.captured[site], b.captured[site])
    assert p.dispatches > 0 and p.seconds > 0


def test_figures_add_up(model):
    before = model._engine.dispatches
    with model.profile() as p:
        model.run(rows_of(model, 40, 9), capture=["*"])
    assert p.dispatches == model._engine.dispatches - before
    named = [k for k in p.kernels if k.kernel not in ("(copy)", "(fill)")]
    assert sum(k.calls for k in named) == p.dispatches
    assert p.submissions <= p.barriers <= p.dispatches + 2 * len(p.kernels)
    assert [k.seconds for k in p.kernels] == sorted((k.seconds for k in p.kernels), reverse=True)
    for name in ("bytes_read", "bytes_written", "flops", "seconds"):
        assert math.isclose(getattr(p, name), sum(getattr(k, name) for k in p.kernels))
    assert all(k.seconds >= 0 and k.bytes_written > 0 for k in p.kernels)
    assert 0 < p.host_seconds < 60
    table = p.table()
    assert [r["kernel"] for r in table] == [k.kernel for k in p.kernels]
    assert math.isclose(sum(r["share"] for r in table), 1)
    first = p.kernels[0]
    assert table[0]["gflop_per_second"] == first.flops / first.seconds / 1e9
    assert json.loads(json.dumps(p.to_dict()))["dispatches"] == p.dispatches
    assert all(k.kernel in str(p) for k in p.kernels)


def matrices(model) -> list[tuple[int, int]]:
    c = model.config
    q, kv = c.n_heads * c.d_head, c.n_kv_heads * c.d_head
    layer = [
        (q + 2 * kv, c.d_model),
        (c.d_model, q),
        (2 * c.d_mlp, c.d_model),
        (c.d_model, c.d_mlp),
    ]
    return layer * c.n_layers + [(c.d_vocab, c.d_model)]


def test_bytes_of_products_are_those_of_the_weights(model):
    """One token's products read every weight once, in panels of 32 rows and columns padded to 16;
    their other operands are rows of one token.
    """
    with model.profile() as p:
        model.run(rows_of(model, 1), logits="last")
    linear = [k for k in p.kernels if k.kernel.startswith("linear")]
    up = lambda n, to: (n + to - 1) // to * to
    weights = sum(2 * up(n, 32) * up(k, 16) for n, k in matrices(model))
    operands = sum(4 * (3 * n + 2 * up(k, 16)) for n, k in matrices(model))
    assert weights < sum(k.bytes_read for k in linear) < weights + operands
    flops = sum(k.flops for k in linear)
    least, most = (2 * sum(n * up(k, to) for n, k in matrices(model)) for to in (1, 16))
    assert least <= flops <= most


def test_decoding_reads_the_cache(model):
    """Of two generations that differ in the prompt's length, the longer reads more by its keys and
    values.
    """
    read = []
    for length in (32, 64):
        rows = rows_of(model, length)
        with model.profile() as p:
            model.generate(rows, max_new_tokens=9, ignore_eos=True, progress=False)
        read.append(
            sum(k.bytes_read for k in p.kernels if k.kernel.startswith("attn_decode"))
            or pytest.fail("no decoding kernel of attention ran")
        )
    keys = 8 * 32 * model._engine.plan()["cache_per_token"]
    scores = 8 * 32 * 4 * model.config.n_heads * model.config.n_layers
    assert math.isclose(read[1] - read[0], keys + scores, rel_tol=1e-6)


def test_nested_profiles_and_threads(model):
    rows = rows_of(model, 12)
    with model.profile() as outer:
        model.run(rows)
        with model.profile() as inner:
            model.run(rows)
            assert inner.dispatches > 0  # readable before the end, too
        worker = threading.Thread(target=model.run, args=(rows,))
        worker.start()
        worker.join()
    assert outer.dispatches == 3 * inner.dispatches
    calls = {k.kernel: k.calls for k in outer.kernels}
    assert all(calls[k.kernel] == 3 * k.calls for k in inner.kernels if k.kernel != "(fill)")


def test_an_exception_ends_the_profile(model):
    rows = rows_of(model, 12)
    p = model.profile()

    def fail():
        with p:
            model.run(rows)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    held = p.dispatches
    with pytest.raises(ValueError, match="nothing is profiled"):
        model._engine.profile_read()
    model.run(rows)
    assert p.dispatches == held > 0


def test_a_begin_that_is_interrupted_leaves_no_profile(model, monkeypatch):
    p = model.profile()

    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr(p, "_read", interrupted)
    with pytest.raises(KeyboardInterrupt), p:
        pass
    with pytest.raises(ValueError, match="nothing is profiled"):
        model._engine.profile_read()


def test_a_profile_is_used_once(model):
    p = model.profile()
    with pytest.raises(ValueError, match="has not begun"):
        _ = p.dispatches
    with p:
        pass
    assert p.dispatches == 0 and p.table() == [] and "0 dispatches" in str(p)
    with pytest.raises(ValueError, match="used once"), p:
        pass


# --- vksteer bench --------------------------------------------------------------------------------


def test_bench(capsys):
    options = ["--rows", "2", "--prompt-tokens", "24", "--new-tokens", "3"]
    assert cli.main(["bench", *options, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    prefill, decoding = result["phases"]
    assert (prefill["tokens"], decoding["tokens"]) == (48, 6)
    assert result["read_bytes_per_second"] > 1e8 and result["matrix_flops_per_second"] > 1e8
    for phase in result["phases"]:
        assert math.isclose(sum(k["time_share"] for k in phase["kernels"]), 1)
        assert phase["dispatches"] == sum(
            k["calls"] for k in phase["kernels"] if not k["kernel"].startswith("(")
        )
        assert phase["verdict"].startswith("bound by ") and phase["verdict"] in bench.text(result)
    # three steps of decoding, each as many dispatches, and one more where the device picks a token
    picks = sum(k["calls"] for k in decoding["kernels"] if k["kernel"] == "pick")
    assert picks <= 3 and (decoding["dispatches"] - picks) % 3 == 0
    names = {k["kernel"] for k in decoding["kernels"]}
    assert not any(name.startswith("attn_softmax") for name in names)


def test_bench_refuses_what_does_not_fit(capsys):
    assert cli.main(["bench", "--prompt-tokens", "100000"]) == 2
    assert "lower --prompt-tokens or --new-tokens" in capsys.readouterr().err


@pytest.mark.parametrize(
    "device, memory, matrix, said",
    [
        (0.9, 0.81, 0.02, "bound by memory: 81% of the measured bandwidth"),
        (0.9, 0.1, 0.6, "bound by arithmetic: 60% of the measured matrix rate"),
        (0.3, 0.2, 0.1, "bound by the host: the device is idle for 70% of the time"),
        (0.009, 0.2, 0.1, "bound by dispatches: 1000 of 9.0 us each on average (20% of"),
        (0.9, 0.2, 0.1, "bound by neither memory nor arithmetic (20% of"),
    ],
)
def test_the_verdict(device, memory, matrix, said):
    seconds = 0.01 if device < 0.1 else 1.0
    phase = bench.Phase("decoding", 10, seconds, device, 0.2, 1000, 1000, [])
    assert bench.verdict(phase, memory, matrix).startswith(said)
