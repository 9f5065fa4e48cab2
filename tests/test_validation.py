"""The Khronos validation layers have nothing to say: core and synchronisation validation in the
default suite, GPU-assisted with --long.

Synchronisation validation follows copies, fills and texel buffers, not what a shader reads through
a buffer address (no layer can); there the order of the record rests on what kernels declare, which
`test_kernel_build.py` compares with their code and `test_barriers.py` with their results. A small C
program with two known mistakes shows that both layers are there and awake.
"""

from __future__ import annotations

import os
import subprocess

import pytest

from child import ROOT, child, tool
from test_drivers import environment, folders  # noqa: F401  a fixture

CORE_AND_SYNC = (
    "VK_VALIDATION_FEATURE_ENABLE_SYNCHRONIZATION_VALIDATION_EXT"
    ":VALIDATION_CHECK_ENABLE_SYNCHRONIZATION_VALIDATION_QUEUE_SUBMIT"
)
GPU_ASSISTED = "VK_VALIDATION_FEATURE_ENABLE_GPU_ASSISTED_EXT"


def layers(enables) -> dict:
    folder = tool("validation_layers")
    # Older layers read VK_LAYER_ENABLES, newer ones VK_VALIDATION_* and VK_KHRONOS_VALIDATION_*.
    sync = (
        {f"{p}_VALIDATE_SYNC": "true" for p in ("VK_VALIDATION", "VK_KHRONOS_VALIDATION")}
        if enables == CORE_AND_SYNC
        else {}
    )
    return environment("lavapipe 16") | {
        "VK_INSTANCE_LAYERS": "VK_LAYER_KHRONOS_validation",
        "VK_LAYER_PATH": folder,
        "VK_LAYER_ENABLES": enables,
        **sync,
    }


def messages(text) -> list[str]:
    return [
        line
        for line in text.splitlines()
        if any(
            w in line
            for w in (
                "VUID-",
                "SYNC-HAZARD",
                "UNASSIGNED-",
                "Validation Error",
                "Validation Warning",
            )
        )
    ]


def test_the_layers_are_awake(tmp_path):
    """A program with a hazard and an invalid size is caught at both, in the
    environment of the tests below.
    """
    subprocess.run(
        [
            "cc",
            "-I",
            ROOT / ".tools/vulkan/usr/include",
            ROOT / "tests/validation_mistakes.c",
            "-l:libvulkan.so.1",
            "-o",
            tmp_path / "mistakes",
        ],
        check=True,
    )
    env = dict(os.environ) | {k: str(v) for k, v in layers(CORE_AND_SYNC).items() if v is not None}
    done = subprocess.run(
        [tmp_path / "mistakes"], env=env, check=False, capture_output=True, text=True
    )
    said = "\n".join(messages(done.stdout + done.stderr))
    assert (
        done.returncode == 0
        and "SYNC-HAZARD-WRITE-AFTER-WRITE" in said
        and "VUID-vkCmdFillBuffer-size" in said
    )


WORK = """
import driver_cases
from vksteer.runtime import decoding
from vksteer.runtime.directions import value_direction

driver_cases.main(sys.argv[2:])
with load(2) as model:
    assert "VkLayer_khronos_validation" in open("/proc/self/maps").read(), (
        "the layer is in this process"
    )
    v = vs.SteeringVector(np.ones(model.config.d_model, np.float32), 1)
    rows = rows_of(model, 300, 9, 1)
    model.run(rows, capture=["*"], edits=[vs.Steer(v, 1.0)], freeze="ov")
    model.generate(
        rows,
        max_new_tokens=5,
        ignore_eos=True,
        capture=["blocks.*.attn.hook_z"],
        edits=[[vs.Ablate(v)], [], [vs.Steer(v, 0.5)]],
        progress=False,
    )
    decoding.BLOCK_SECONDS = np.inf
    steer = [vs.Steer(v, 0.5), vs.Scale("blocks.0.hook_mlp_out", 2.0, positions=slice(304, 308))]
    model.generate(rows, max_new_tokens=12, ignore_eos=True, edits=steer, progress=False)
    value_direction(model, np.ones(model.config.d_model), 1)
    for by in ("logit", "cosine"):
        vs.ov.logit_lens(model, vs.ov.steering_value_vectors(model, v), 40, by)
    vs.ov.decompose(model, rows, v, 1.0, 1), vs.ov.head_weights(model, 1, 0)
    if sys.argv[1] == "prepare":
        model._engine_device.prepare()
print("done")
"""


def silent(enables, folders, timeout, prepare=True):
    """prepare: whether kernels that do not run are compiled too."""
    done = child(
        "sys.path.insert(0, 'tests')\n" + WORK,
        "prepare" if prepare else "only what runs",
        *folders,
        timeout=timeout,
        **layers(enables),
    )
    said = messages(done.stdout + done.stderr)
    assert not said, f"{len(said)} messages, first:\n" + "\n".join(said[:10])
    assert done.returncode == 0 and done.stdout.rstrip().endswith("done") and not done.stderr, (
        done.stderr[-4000:]
    )


def test_core_and_synchronisation_validation_are_silent(folders):
    silent(CORE_AND_SYNC, folders, 280)


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_gpu_assisted_validation_is_silent(folders):
    """Every address that a shader uses is checked against the buffers that live. Instrumented
    kernels take minutes to compile on lavapipe; those that do not run use no address.
    """
    silent(GPU_ASSISTED, folders[:1], 1700, prepare=False)
