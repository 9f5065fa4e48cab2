"""The engine on several drivers: lavapipe with subgroups of 4, 8 and 16, a newer lavapipe that has
cooperative matrices, and SwiftShader (test_amd_table.py: AMD's null devices, which only compile).

Each driver runs in a child process. By default it runs driver_cases.py; with --long all tests of
the engine (SUITE) run on each driver. Results may differ in bits between drivers, but not within
one, whatever the number of the driver's threads.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from child import ROOT, child, quiet, tool

FAMILIES = ("gemma2", "gemma3", "qwen2", "qwen3")  # stored as float32, bfloat16, float16, float32

#: name -> (key of .tools/env.json, environment, subgroup size)
DRIVERS = {
    "lavapipe 4": ("lavapipe_icd", {"LP_NATIVE_VECTOR_WIDTH": 128}, 4),
    "lavapipe 8": ("lavapipe_icd", {"LP_NATIVE_VECTOR_WIDTH": 256}, 8),
    "lavapipe 16": ("lavapipe_icd", {"LP_NATIVE_VECTOR_WIDTH": 512}, 16),
    "newer lavapipe": ("newer_lavapipe_icd", {"LP_NATIVE_VECTOR_WIDTH": 256}, 8),
    "swiftshader": ("swiftshader_icd", {}, 4),
}
#: More threads than the reference machine has processors: workgroups run at the same time and end
#: in any order.
THREADS = "lavapipe 8 with 3 threads"
THREADED = {
    THREADS: ("lavapipe_icd", {"LP_NATIVE_VECTOR_WIDTH": 256, "LP_NUM_THREADS": 3}, 8),
}


def environment(driver) -> dict:
    key, extra, _ = (DRIVERS | THREADED)[driver]
    icd = tool(key)
    return {"VK_DRIVER_FILES": icd, "VK_ICD_FILENAMES": icd, "VKSTEER_KERNELS": None, **extra}


def python_of(driver) -> str:
    """The newer Mesa needs its own C library, and so a Python that is started on that."""
    newer = (DRIVERS | THREADED)[driver][0].startswith("newer_")
    return tool("newer_mesa_python") if newer else sys.executable


@pytest.fixture(scope="session")
def folders(zoo):
    """Models with the oracle's answers beside them."""
    import driver_cases

    made = []
    for name in FAMILIES:
        made.append(zoo.folder(name))
        with zoo.lock():
            if not (made[-1] / "expected.npz").exists():
                driver_cases.expect(zoo.reference(name), made[-1] / "expected.npz")
    return made


#: Their subgroup sizes are those of SwiftShader and of THREADS, which the short tests have.
TWICE = ("lavapipe 4", "lavapipe 8")


@pytest.mark.parametrize(
    "driver",
    [
        pytest.param(name, marks=pytest.mark.long) if name in TWICE else name
        for name in DRIVERS | THREADED
    ],
)
def test_parity_edits_freezing_and_generation(driver, folders, record_property):
    """Every kernel family against the oracle; a row alone equals the same row in a batch."""
    code = (
        "import sys; sys.path.insert(0, 'tests'); import driver_cases;"
        " driver_cases.main(sys.argv[1:])"
    )
    # driver_cases.py goes through the kernel families itself.
    out = quiet(
        child(
            code,
            *folders,
            preamble="",
            timeout=280,
            executable=python_of(driver),
            **environment(driver) | {"VKSTEER_KERNELS": "broadcast"},
        )
    )
    results = [json.loads(line) for line in out.splitlines()]
    assert {r["folder"] for r in results} == {f.name for f in folders} and len(results) >= len(
        folders
    )
    assert ("matrix" in {r["kernels"] for r in results}) == (driver == "newer lavapipe")
    for r in results:
        assert (
            r["subgroup"] == (DRIVERS | THREADED)[driver][2]
            and r["comparisons"] > 100
            and r["worst"] < r["bound"]
        )
    worst = max(results, key=lambda r: r["worst"])
    record_property("worst", f"{driver}: {worst}")
    print(
        f"{driver}: {len(results)} runs, worst {worst['worst']:.1e} ({worst['folder']},"
        f" {worst['kernels']})"
    )


def test_commands_and_their_children_run_on_the_newer_mesa():
    """tools/with_newer_mesa.sh starts Python, the scripts of .venv and what these start by
    sys.executable on the newer Mesa, although that needs another C library than the machine's.
    """
    code = """
import os, subprocess, sys
from vksteer.runtime.device import devices
print(devices()[0].features["subgroup_size"], devices()[0].driver, flush=True)
if len(sys.argv) < 2:
    sys.exit(subprocess.run([sys.executable, "-c", os.environ["CODE"], "child"]).returncode)
"""
    script = ROOT / "tools/with_newer_mesa.sh"
    assert tool("newer_mesa_python")
    env = {k: v for k, v in os.environ.items() if not k.startswith(("VK_", "LP_"))}
    run = partial(subprocess.run, capture_output=True, text=True, check=True, timeout=60, cwd=ROOT)
    lines = [
        line
        for python in ("python", sys.executable)
        for line in run([script, python, "-c", code], env=env | {"CODE": code}).stdout.splitlines()
    ]
    command = [script, Path(sys.executable).parent / "vksteer", "devices"]
    described = re.search("Mesa .*", run(command, env=env).stdout)[0]
    assert len(lines) == 4 and {line.split(" ", 1)[0] for line in lines} == {"8"}
    for line in [*lines, described]:
        major, minor = re.search(r"Mesa (\d+)\.(\d+)", line).groups()
        assert (int(major), int(minor)) >= (26, 1), line


def test_vector_widths_do_not_share_compiled_fetches(tmp_path):
    """In one folder, Mesa's cache would give the texel fetches compiled for one vector width to
    another, with wrong values or a crash; so each width has its own folder, also below one that
    the user or a parent process named.
    """
    code = """
import os
import numpy as np
from vksteer.verify import forward
from vksteer.runtime.device import _engine
problem = forward.linear(np.random.default_rng(0), 1, 33, 16, 1)
bench = _engine().Bench(_engine().Device(0))
arguments = problem.arguments | {"family_plus_1": 2}
device, reference = (result["dst"] for result in bench.run("linear", arguments, problem.buffers))
same = np.allclose(device, reference, atol=1e-3, equal_nan=True)
assert same, "the fetches compiled for another width"
print(os.environ["MESA_SHADER_CACHE_DIR"])
"""
    given = tmp_path / "users"
    for driver in ("lavapipe 8", "lavapipe 4", "lavapipe 16"):
        given = quiet(
            child(code, preamble="", MESA_SHADER_CACHE_DIR=given, **environment(driver))
        ).strip()
        assert os.path.dirname(given) == str(tmp_path / "users")
    own = quiet(
        child(
            code,
            preamble="",
            MESA_SHADER_CACHE_DIR=None,
            VKSTEER_CACHE=tmp_path,
            **environment("lavapipe 4"),
        )
    ).strip()
    assert os.path.dirname(own) == str(tmp_path / "mesa")


@pytest.mark.parametrize("driver", DRIVERS)
def test_every_kernel_compiles(driver):
    out = quiet(
        child(
            """
from vksteer.runtime.device import open_device
engine, device = open_device()
engine.prepare()
print(device.features["int64"])
""",
            executable=python_of(driver),
            **environment(driver),
        )
    )
    assert out.strip() in ("True", "False")


# -- the tests of the engine, per driver -----------------------------------------------------------

SUITE = [
    "test_forward_parity.py",
    "test_edits.py",
    "test_edit_refusals.py",
    "test_bits.py",
    "test_generate.py",
    "test_generate_sampling.py",
    "test_freezing.py",
    "test_ops.py",
    "test_ops_attention.py",
    "test_ops_calls.py",
    "test_ops_linear.py",
    "test_ops_rotation.py",
    "test_ops_epilogues.py",
    "test_layer_kinds.py",
    "test_resume.py",
]
#: The tests of the backward pass too, on the driver on which matrix units can be tested.
MORE = {
    "newer lavapipe": ["test_gradients.py", "test_gradients_rotation.py", "test_attribution_ops.py"]
}


#: Parity, gradients and equal bits, and products of every size, for matrix units.
MATRIX_SUITE = [
    "test_forward_parity.py",
    "test_gradients.py",
    "test_bits.py",
    "test_ops_linear.py",
    "test_attribution_ops.py",
]


def run_tests(driver, files, *options, timeout, kernels=None):
    """Runs test files on a driver, in a process of pytest of their own, with this kernel family
    only where one is named; returns its last line.
    """
    files = [str(ROOT / "tests" / f) for f in files]  # pytest refuses one that is not there
    env = {k: v for k, v in os.environ.items() if not k.startswith(("VK_", "VKSTEER_"))}
    settings = environment(driver) | {"VKSTEER_KERNELS": kernels}
    env |= {k: str(v) for k, v in settings.items() if v is not None}
    done = subprocess.run(
        [
            python_of(driver),
            "-m",
            "pytest",
            "-p",
            "no:cacheprovider",
            "-q",
            "--timeout=1200",
            *options,
            *files,
        ],
        env=env,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert done.returncode == 0, f"{driver}\n" + done.stdout[-8000:]
    return done.stdout.splitlines()[-1]


@pytest.mark.long
@pytest.mark.timeout(600)
def test_bits_with_several_threads(tmp_path):
    """With one thread, workgroups run one after another, and a race between two is not seen."""
    last = run_tests(THREADS, ["test_bits.py"], f"--basetemp={tmp_path / 'base'}", timeout=580)
    assert " passed" in last and "skipped" not in last


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("driver", DRIVERS)
def test_the_suite(driver, tmp_path):
    """The tests of the engine; on SwiftShader, which is very slow, only those of three families."""
    narrow = (
        ["-k", "(gemma3 or qwen2 or llama3) and not window and not linear"]
        if driver == "swiftshader"
        else []
    )
    files = SUITE + MORE.get(driver, [])
    last = run_tests(driver, files, f"--basetemp={tmp_path / 'base'}", *narrow, timeout=3500)
    print(f"{driver}: {last}")


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_matrix_units(tmp_path):
    """Every product on matrix units, which the newer lavapipe has."""
    base = f"--basetemp={tmp_path / 'base'}"
    last = run_tests("newer lavapipe", MATRIX_SUITE, base, timeout=3500, kernels="matrix")
    assert " passed" in last and "skipped" not in last
    print(last)


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_every_family_on_swiftshader(tmp_path):
    """Logits, every site, gradients and greedy text of every family on the second driver; the
    first one runs them in the tests themselves.
    """
    files = ["test_forward_parity.py", "test_gradients.py", "test_generate.py"]
    some = "logits_and_every_site or every_site_of_every_family or greedy_is_the_oracles"
    last = run_tests(
        "swiftshader", files, f"--basetemp={tmp_path / 'base'}", "-k", some, timeout=1100
    )
    assert " passed" in last and "skipped" not in last
