"""What must not go wrong whatever happens: no driver, the wrong device, too little memory.

Everything runs in child processes, most of which must end with code 0 and say nothing on stderr.
"""

from __future__ import annotations

import json
import os
import shutil
import struct

import pytest

from child import child, quiet, tool

# -- import, no driver, choice of device -----------------------------------------------------------


def test_import_is_fast_and_loads_no_driver():
    code = (
        "import sys, time; t = time.perf_counter(); import vksteer; print(time.perf_counter() - t,"
        " 'vksteer._engine' in sys.modules,any('vulkan' in l for l in open('/proc/self/maps')))"
    )
    best = []
    for _ in range(5):
        seconds, engine, mapped = quiet(child(code, preamble="", PYTHONFAULTHANDLER=None)).split()
        assert (engine, mapped) == ("False", "False")
        best.append(float(seconds))
    assert min(best) <= 0.15


@pytest.fixture(params=["no driver", "no loader"])
def nothing(request, tmp_path):
    """Environment of a machine without Vulkan."""
    if request.param == "no driver":
        return {
            "VK_DRIVER_FILES": tmp_path / "none.json",
            "VK_ICD_FILENAMES": tmp_path / "none.json",
        }
    for name in ("libvulkan.so.1", "libvulkan.so"):  # what cannot be loaded hides what could
        (tmp_path / name).write_bytes(b"no library")
    return {"LD_LIBRARY_PATH": tmp_path}


def test_without_vulkan(nothing, llama, tmp_path):
    """The error says what to install, and comes before any weight is read."""
    damaged = tmp_path / "damaged"
    shutil.copytree(llama, damaged)
    (damaged / "model.safetensors").write_bytes(b"\xff" * 100)
    out = quiet(
        child(
            """
assert vs.devices() == []
for source in (sys.argv[1], sys.argv[2], "nowhere/at-all"):
    try:
        vs.Model.from_pretrained(source)
    except vs.DeviceError as e:
        print(e)
""",
            llama,
            damaged,
            **nothing,
        )
    )
    assert len(out.splitlines()) == 3
    assert all(
        "install" in line and "mesa-vulkan-drivers" in line and "NVIDIA" in line
        for line in out.splitlines()
    )


def test_choice_of_device(llama):
    both = os.pathsep.join(map(tool, ("lavapipe_icd", "swiftshader_icd")))
    out = quiet(
        child(
            """
found = vs.devices()
assert [d.index for d in found] == list(range(len(found)))
for d in found:
    dashed = f"{d.uuid[:8]}-{d.uuid[8:12]}-{d.uuid[12:16]}-{d.uuid[16:20]}-{d.uuid[20:]}"
    for choice in (
        d.index,
        str(d.index),
        d.uuid,
        dashed.upper(),
        d.name,
        d.name.split()[0].lower(),
        d,
    ):
        with load(device=choice) as model:
            assert model.device == d, choice
        if isinstance(choice, str):
            os.environ["VKSTEER_DEVICE"] = choice
            with load() as model:
                assert model.device == d, choice
            os.environ["VKSTEER_DEVICE"] = "nothing like it"
            with load(device=choice) as model:
                assert model.device == d, "device= wins"
            del os.environ["VKSTEER_DEVICE"]
for choice in (len(found), -1, "radeon 9700", "", "0" * 32, 1e9, True):
    for variable in (False, True):
        if variable:
            os.environ["VKSTEER_DEVICE"] = str(choice)
        try:
            load(device=None if variable else choice).close()
        except vs.DeviceError as e:
            assert (
                all(d.name in str(e) for d in found) and ("VKSTEER_DEVICE" in str(e)) == variable
            ), e
        else:
            assert variable and choice == "", choice
        os.environ.pop("VKSTEER_DEVICE", None)
print(len(found))
""",
            llama,
            VK_DRIVER_FILES=both,
            VK_ICD_FILENAMES=both,
        )
    )
    assert int(out) == 2, "one device of each software driver"


def test_a_software_device_is_taken_with_one_warning(llama):
    code = """
import sys, warnings, vksteer as vs
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    for device in (None, 0, None):
        vs.Model.from_pretrained(sys.argv[1], progress=False, device=device).close()
print([str(w.message) for w in seen if "software" in str(w.message)])
"""
    icd = tool("lavapipe_icd")
    assert (
        quiet(child(code, llama, preamble="", VK_DRIVER_FILES=icd, VK_ICD_FILENAMES=icd)).count(
            "software device"
        )
        == 1
    )
    assert (
        quiet(
            child(
                code,
                llama,
                preamble="",
                VK_DRIVER_FILES=icd,
                VK_ICD_FILENAMES=icd,
                VKSTEER_DEVICE="0",
            )
        ).strip()
        == "[]"
    )


# -- too big ---------------------------------------------------------------------------------------


def hollow_model(folder, least_bytes):
    """A Llama of at least so many bytes whose file is a hole: nothing is written but the header."""
    D, F, V, H, G, d = 4096, 16384, 1000, 32, 8, 128
    layer = {
        "input_layernorm.weight": (D,),
        "post_attention_layernorm.weight": (D,),
        "self_attn.q_proj.weight": (H * d, D),
        "self_attn.k_proj.weight": (G * d, D),
        "self_attn.v_proj.weight": (G * d, D),
        "self_attn.o_proj.weight": (D, H * d),
        "mlp.gate_proj.weight": (F, D),
        "mlp.up_proj.weight": (F, D),
        "mlp.down_proj.weight": (D, F),
    }
    size = lambda shape: 2 * shape[0] * (shape[1] if len(shape) > 1 else 1)
    n_layers = max(1, -(-least_bytes // sum(map(size, layer.values()))))
    shapes = {
        "model.embed_tokens.weight": (V, D),
        "model.norm.weight": (D,),
        "lm_head.weight": (V, D),
    }
    shapes |= {
        f"model.layers.{l}.{name}": shape for l in range(n_layers) for name, shape in layer.items()
    }
    header, at = {}, 0
    for name, shape in shapes.items():
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, at + size(shape)]}
        at += size(shape)
    text = json.dumps(header).encode()
    folder.mkdir()
    with open(folder / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + at)
    (folder / "config.json").write_text(
        json.dumps(
            dict(
                model_type="llama",
                architectures=["LlamaForCausalLM"],
                hidden_size=D,
                intermediate_size=F,
                vocab_size=V,
                num_hidden_layers=n_layers,
                num_attention_heads=H,
                num_key_value_heads=G,
                max_position_embeddings=8192,
                rms_norm_eps=1e-5,
                rope_theta=10000.0,
                hidden_act="silu",
                tie_word_embeddings=False,
            )
        )
    )
    return folder


def test_too_big_a_model(tmp_path):
    """Refused by the plan, before anything is allocated, with both sizes."""
    out = quiet(
        child(
            """
import re
from vksteer.runtime.device import open_device
engine, device = open_device()
sys.path.insert(0, "tests")
from pathlib import Path
from test_robustness import hollow_model
folder = hollow_model(Path(sys.argv[1]) / "hollow", 3 * engine.available_bytes)
start, before = time.perf_counter(), rss()
try:
    vs.Model.from_pretrained(str(folder), progress=False)
except vs.DeviceError as e:
    print(e)
assert time.perf_counter() - start < 5 and rss() - before < 100e6 and engine.allocated_bytes == 0
""",
            tmp_path,
            preamble="".join(
                [
                    (
                        "import os, sys, time, warnings; warnings.simplefilter('ignore')\nimport"
                        " numpy as np, vksteer as vs\n"
                    ),
                    "rss = lambda: int(open('/proc/self/statm').read().split()[1]) * 4096\n",
                ]
            ),
        )
    )
    assert "GB" in out and "free" in out and "smaller" in out


def test_too_long_and_too_many(zoo):
    """Rows longer than the context or than memory are refused with what fits; many rows are
    cut into micro-batches.
    """
    import vksteer as vs
    from vksteer.runtime.generation import _micro_batches

    model = zoo.engine("llama2")
    for call in (
        lambda: model.run([[1] * 513]),
        lambda: model.generate([[1] * 100], max_new_tokens=413, progress=False),
    ):
        with pytest.raises(ValueError, match="512"):
            call()
    per_slot = model._engine.plan()["cache_per_token"]

    class Small:
        """A model on a device with little memory left."""

        _engine = model._engine

        class _engine_device:
            available_bytes = 1000 * per_slot

    assert [len(p) for p in _micro_batches(Small, [100] * 12, None)] == [5, 5, 2]
    assert [list(p) for p in _micro_batches(Small, [400, 200, 10], None)] == [[0], [1, 2]]
    with pytest.raises(ValueError, match="at most 500 tokens fit"):
        list(_micro_batches(Small, [501], None))
    from vksteer.runtime.device import _engine

    slots = 2 * model._engine_device.available_bytes // per_slot
    if slots < 2**32:
        with pytest.raises(vs.DeviceError, match="tokens fit"):
            _engine().Cache(model._engine, slots)
