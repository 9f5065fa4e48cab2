"""A driver that fails: a call returns an error, the device is lost, a cache is damaged."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path

import pytest

from child import child, quiet

HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def faulty(tmp_path_factory):
    """Environment in which the Vulkan loader is faulty_vulkan.c around the real one."""
    folder = tmp_path_factory.mktemp("faulty")
    real = next(
        (
            line.split("=> ")[1]
            for line in subprocess.run(
                ["/sbin/ldconfig", "-p"], check=False, capture_output=True, text=True
            ).stdout.splitlines()
            if "libvulkan.so.1 " in line and ("x86-64" in line or platform.machine() != "x86_64")
        ),
        None,
    )
    assert real, (
        "ldconfig knows no libvulkan.so.1 of this machine: run tools/setup.sh run, which installs"
        " the Vulkan loader"
    )
    subprocess.run(
        [
            "cc",
            "-shared",
            "-fPIC",
            "-O1",
            "-Wall",
            "-Werror",
            "-o",
            folder / "libvulkan.so.1",
            HERE / "faulty_vulkan.c",
            "-ldl",
        ],
        check=True,
    )
    return {"LD_LIBRARY_PATH": folder, "REAL_VULKAN": real}


FAULTS = """
import ctypes

faults = ctypes.CDLL("libvulkan.so.1")
arm = lambda name, n, result, stays=0: faults.fault_arm(name.encode(), n, result, stays)
NAMES = [
    "vkAllocateMemory",
    "vkCreateBuffer",
    "vkBindBufferMemory",
    "vkMapMemory",
    "vkCreateSemaphore",
    "vkCreateCommandPool",
    "vkAllocateCommandBuffers",
    "vkResetCommandPool",
    "vkBeginCommandBuffer",
    "vkEndCommandBuffer",
    "vkQueueSubmit",
    "vkWaitSemaphores",
    "vkCreateShaderModule",
    "vkCreateComputePipelines",
    "vkCreateBufferView",
    "vkCreateDescriptorPool",
    "vkAllocateDescriptorSets",
]
HOST, DEVICE, LOST = -1, -2, -4
v = None


def work(model):
    v = vs.SteeringVector(np.linspace(-1, 1, model.config.d_model, dtype=np.float32), 1)
    rows = rows_of(model, 5, 40, 1)
    run = model.run(
        rows,
        edits=[vs.Steer(v, 1.0)],
        capture=["blocks.*.attn.hook_pattern", "blocks.1.attn.hook_result"],
        freeze="qk",
    )
    made = model.generate(
        rows,
        max_new_tokens=3,
        ignore_eos=True,
        progress=False,
        capture=["blocks.1.hook_resid_post"],
    )
    return [
        run.logits,
        run["blocks.1.attn.hook_pattern"],
        made[0].tokens,
        made[1].captured["blocks.1.hook_resid_post"],
    ]


same = lambda a, b: all(np.array_equal(x, y) for x, y in zip(a, b))
"""


def test_every_call_of_the_driver_may_fail(llama, faulty):
    """The n-th call of each function fails, in loading and in running: DeviceError, nothing is lost
    or leaked, and the model goes on.
    """
    out = quiet(
        child(
            FAULTS
            + """
with load() as model:
    want = work(model)
    device = model._engine_device
assert device.allocated_bytes == 0
seen = {}
for name in NAMES:
    for n in (1, 2, 3, 7, 20, 60):
        arm(name, n, DEVICE)
        try:
            load().close()
        except vs.DeviceError as e:
            seen[name, "load"] = seen.get((name, "load"), 0) + 1
        assert device.allocated_bytes == 0, (name, n)
    arm("vkQueueSubmit", 10**9, 0)
with load() as model:
    for name in NAMES:
        for n in (1, 2, 3, 5, 9, 16, 28, 50):
            model._cache = None
            arm(name, n, HOST if n % 2 else DEVICE)
            try:
                work(model)
            except vs.DeviceError as e:
                seen[name, "run"] = seen.get((name, "run"), 0) + 1
                assert "memory" in str(e)
            arm("vkQueueSubmit", 10**9, 0)
    assert same(work(model), want)
assert device.allocated_bytes == 0
print(sorted(seen.items()))
""",
            llama,
            timeout=280,
            **faulty,
        )
    )
    for name in (
        "vkAllocateMemory",
        "vkCreateBuffer",
        "vkQueueSubmit",
        "vkWaitSemaphores",
        "vkEndCommandBuffer",
    ):
        assert f"('{name}', 'load')" in out and f"('{name}', 'run')" in out


@pytest.mark.parametrize("name", ["vkQueueSubmit", "vkWaitSemaphores", "vkAllocateMemory"])
def test_a_lost_device_is_an_exception(llama, faulty, name):
    """From then on every call says so; closing works; other processes are not concerned. A new
    model in this process needs a new device.
    """
    quiet(
        child(
            FAULTS
            + f"""
model = load()
want = work(model)
model._cache = None
arm({name!r}, 4, LOST, 1)
for _ in range(3):
    try:
        work(model)
        assert False
    except vs.DeviceError as e:
        assert "lost" in str(e) and "load it again" in str(e), e
arm({name!r}, 10**9, 0)
kept = model
kept.close()
with load() as model:
    assert same(work(model), want), "a new model gets a new device"
""",
            llama,
            **faulty,
        )
    )


def test_a_damaged_pipeline_cache_costs_time_only(llama, tmp_path):
    """Garbage, cut and read-only caches; and two processes that write at the same time."""
    quiet(
        child(
            """
import gc
from pathlib import Path
folder = Path(os.environ["VKSTEER_CACHE"])
with load() as model:
    want = model.run(rows_of(model, 9)).logits
    name = f"pipelines-{model.device.uuid}.bin"
    for junk in (b"", b"junk", b"\\xff" * 5000, bytes(64)):
        (folder / name).write_bytes(junk)
        from vksteer.runtime import device
        device._open.clear()
        with load() as other:
            assert other._engine_device is not model._engine_device
            assert np.array_equal(other.run(rows_of(model, 9)).logits, want)
        device._open.clear()
        del other
        gc.collect()  # the last user is gone: the device is destroyed and writes its cache
        magic = (folder / name).read_bytes()[:4]
        assert magic == (32).to_bytes(4, "little"), "the damaged file is the one the engine keeps"
""",
            llama,
            VKSTEER_CACHE=tmp_path,
        )
    )
    # Mesa gets a folder of its own, because it reports one that it cannot make.
    quiet(
        child(
            "with load() as m: m.run(rows_of(m, 3))",
            llama,
            VKSTEER_CACHE="/proc/nowhere",
            MESA_SHADER_CACHE_DIR=tmp_path / "mesa",
        )
    )
