"""The bench itself and `vksteer verify`: wrong arguments are refused, a wrong device is noticed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading

import numpy as np
import pytest

from child import tool
from op_bench import agree, same_bits
from vksteer import _engine
from vksteer.cli import commands as cli
from vksteer.errors import DeviceError
from vksteer.verify import checking as verify
from vksteer.verify import forward


@pytest.mark.parametrize(
    "change, error",
    [
        ({"n_rows": 4}, ValueError),
        ({"width": 1 << 20}, ValueError),
        ({"width": 1 << 21}, ValueError),
        ({"width": -1}, ValueError),
        ({"width": 2.5}, ValueError),
        ({"stride": float("nan")}, ValueError),
        ({"width": "x"}, TypeError),
        ({"x": "nowhere"}, ValueError),
        ({"x": ("x", 10**9)}, ValueError),
        ({"x": ("x", 40)}, ValueError),
        ({"x": None}, ValueError),
        ({"x": 5}, ValueError),
        ({"flags": 32, "rows": "x"}, ValueError),
        ({"flags": 32}, ValueError),
        ({"no_such_field": 1}, KeyError),
    ],
)
def test_wrong_arguments_never_reach_the_device(on, rng, change, error):
    problem = forward.norm(rng, 3, 33)
    with pytest.raises(error):
        on.run("norm", problem.arguments | change, problem.buffers)
    agree(on, problem)


@pytest.mark.parametrize(
    "build, change",
    [
        (lambda rng: forward.linear(rng, 3, 7, 33), {"k": 1 << 20}),
        (lambda rng: forward.linear(rng, 3, 7, 33), {"n": 0}),
        (lambda rng: forward.linear(rng, 3, 7, 33), {"weight_type": 3}),
        (lambda rng: forward.linear(rng, 3, 7, 33), {"first_k": 8, "n_k": 16}),
        (lambda rng: forward.linear(rng, 3, 7, 33), {"x_stride": 32}),
        (lambda rng: forward.linear(rng, 3, 7, 33), {"weights": ("weights", 1)}),
        (lambda rng: forward.linear(rng, 3, 7, 33), {"segment_rows": 5}),
        (lambda rng: forward.linear(rng, 3, 7, 33), {"family_plus_1": 99}),
        (lambda rng: forward.linear(rng, 3, 7, 33), {"x": ("x", 1)}),
        (lambda rng: forward.attn_scores(rng, [(0, 9)], 4, 2, 6), {"n_kv_heads": 0}),
        (lambda rng: forward.attn_scores(rng, [(0, 9)], 4, 2, 6), {"n_kv_heads": 3}),
        (lambda rng: forward.attn_scores(rng, [(0, 9)], 4, 2, 6), {"n_tiles": 9}),
        (lambda rng: forward.attn_scores(rng, [(0, 9)], 4, 2, 6), {"key_stride": 8}),
        (lambda rng: forward.attn_output(rng, [(0, 9)], 4, 2, 6), {"first_token": 3}),
        (lambda rng: forward.attn_softmax(rng, [(0, 9)], 4), {"key_stride": 4}),
        (lambda rng: forward.rope(rng, [(0, 9)], 4, 2, 6), {"d_head": 5}),
        (lambda rng: forward.act(rng, 3, 7), {"act": 5}),
        (lambda rng: forward.edit(rng, 0, 3, 2, 7), {"kind": 5}),
        (lambda rng: forward.edit(rng, 0, 3, 2, 7), {"n_entries": 1000}),
    ],
)
def test_senseless_sizes_are_refused(on, rng, build, change):
    problem = build(rng)
    with pytest.raises(ValueError):
        on.run(problem.op, problem.arguments | change, problem.buffers)
    agree(on, problem)


def test_wrong_buffers(on, rng):
    problem = forward.norm(rng, 3, 33)
    with pytest.raises(KeyError):
        on.run("no_such_op", {}, {})
    for array in (np.zeros(3), np.zeros((4, 4), np.float32).T[:, :2], [1.0], None):
        with pytest.raises(TypeError):
            on.run("norm", problem.arguments, problem.buffers | {"x": array})
    with pytest.raises(TypeError):
        on.run("norm", problem.arguments, {5: problem.buffers["x"]})
    with pytest.raises(ValueError):
        on.run("norm", {}, {f"b{i}": np.zeros(1, np.float32) for i in range(17)})
    with pytest.raises(TypeError):
        _engine.Bench("device")


def test_a_tile_that_mixes_rows_is_refused(on, rng):
    problem = forward.attn_scores(rng, [(0, 3), (0, 3)], 2, 1, 6)
    problem.buffers["tiles"] = np.array([(0, 4), (4, 2)], np.uint32)
    with pytest.raises(ValueError, match="not of the tile's row"):
        on.run(problem.op, problem.arguments, problem.buffers)


def test_inputs_stay_as_they_were_and_nothing_is_kept(on, rng):
    problem = forward.rope(rng, [(0, 9)], 4, 2, 6)
    before = {name: array.copy() for name, array in problem.buffers.items()}
    counts = {name: sys.getrefcount(array) for name, array in problem.buffers.items()}
    for _ in range(3):
        device, reference = on.run(problem.op, problem.arguments, problem.buffers)
    assert all(same_bits(problem.buffers[name], before[name]) for name in before)
    assert {name: sys.getrefcount(array) for name, array in problem.buffers.items()} == counts
    assert all(a.flags.owndata and a.dtype == np.float32 for a in device.values()) and all(
        a.flags.owndata and a.dtype == np.float64 for a in reference.values()
    )


def test_a_bench_gives_its_memory_back():
    from vksteer.runtime.device import open_device

    engine, _ = open_device(None)
    held = engine.allocated_bytes
    for _ in range(3):
        bench = _engine.Bench(engine)
        bench.run("copy", {}, {"x": np.zeros(1 << 18, np.float32)})
        assert engine.allocated_bytes > held
        del bench
        assert engine.allocated_bytes == held


def test_threads_take_turns(on):
    problems = [forward.linear(np.random.default_rng(i), 9, 77, 53) for i in range(4)]
    want = [on.run(p.op, p.arguments, p.buffers)[0]["dst"] for p in problems]
    failures, done = [], []

    def work(i):
        try:
            for _ in range(10):
                if not same_bits(
                    on.run(problems[i].op, problems[i].arguments, problems[i].buffers)[0]["dst"],
                    want[i],
                ):
                    failures.append(i)
                done.append(i)
        except BaseException as error:  # or it would end in the thread
            failures.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures and len(done) == 40


class Broken:
    """A bench whose device is slightly wrong in one op."""

    def __init__(self, bench, op, harm):
        self.bench, self.op, self.harm = bench, op, harm

    def run(self, op, arguments, buffers):
        device, reference = self.bench.run(op, arguments, buffers)
        if op == self.op:
            self.harm(device)
        return device, reference

    def __getattr__(self, name):
        return getattr(self.bench, name)


def test_verify_command(on, capsys):
    assert cli.main(["verify"]) == 0
    text = capsys.readouterr().out
    assert all(op in text for op in verify.BOUNDS) and "NO" not in text
    assert cli.main(["verify", "--device", "no such device"]) == 2


@pytest.mark.parametrize(
    "op, harm",
    [
        ("linear", lambda d: d["dst"].__imul__(np.float32(1 + 1e-4))),
        ("norm", lambda d: d["dst"].__setitem__((0, 0), np.nan)),
        ("copy", lambda d: d["x"].__iadd__(np.float32(1e-3))),
        ("attn_output", lambda d: d["z"].__setitem__((0, -1), 0.0)),
    ],
)
def test_verify_notices_a_wrong_device(on, monkeypatch, capsys, op, harm):
    monkeypatch.setattr(
        verify, "bench", lambda device=None: (Broken(on, op, harm), "a broken device")
    )
    assert cli.main(["verify"]) == 1
    lines = [line for line in capsys.readouterr().out.splitlines() if " NO" in line]
    assert len(lines) == 1 and lines[0].startswith(op)


def test_verify_survives_a_failing_op(on, monkeypatch):
    def fail(device):
        raise DeviceError("lost")

    monkeypatch.setattr(
        verify, "bench", lambda device=None: (Broken(on, "act", fail), "a broken device")
    )
    rows, _ = verify.verify()
    assert [row.op for row in rows if not row.ok] == ["act"] and "lost" in verify.table(rows)


@pytest.mark.long
@pytest.mark.parametrize("width", ["128", "256", "512", "swiftshader"])
def test_verify_on_other_devices(width):
    """Lavapipe with subgroups of 4, 8 and 16, and SwiftShader: four devices for the
    price of two drivers.
    """
    driver = tool("swiftshader_icd" if width == "swiftshader" else "lavapipe_icd")
    env = (
        os.environ
        | {"VK_DRIVER_FILES": driver}
        | ({} if width == "swiftshader" else {"LP_NATIVE_VECTOR_WIDTH": width})
    )
    done = subprocess.run(
        [sys.executable, "-m", "vksteer", "verify", "--json"],
        env=env,
        check=False,
        capture_output=True,
        text=True,
    )
    result = json.loads(done.stdout)
    assert done.returncode == 0 and result["ok"], [row for row in result["ops"] if not row["ok"]]
