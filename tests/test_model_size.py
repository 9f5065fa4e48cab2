"""Models that are too large for the device, and what loading a large one takes beside the device's
own memory.
"""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys

import pytest

import vksteer as vs
from model_writers import TINY, write_folder
from vksteer.errors import DeviceError
from vksteer.loading.config import Config
from vksteer.loading.tensor_names import engine_tensors, hf_name
from vksteer.runtime import memory, weights

#: Llama 3.2 3B: 6.4 GB of bfloat16.
LARGE = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_hidden_layers": 28,
    "num_attention_heads": 24,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}


def write_sparse(folder, config=LARGE):
    """A folder whose checkpoint has a header and a hole in place of the weights, all zero."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    facts, header, at = Config.from_hf(config), {}, 0
    for name, shape in engine_tensors(facts):
        size = 2
        for n in shape:
            size *= n
        header[hf_name(name, facts, "model.", "lm_head.weight")] = {
            "dtype": "BF16",
            "shape": list(shape),
            "data_offsets": [at, at + size],
        }
        at += size
    text = json.dumps(header).encode()
    with open(folder / "model.safetensors", "wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        stream.truncate(8 + len(text) + at)
    return folder


def test_weight_bytes_are_the_engines(zoo):
    for name, dtype in (("llama2", "float32"), ("gemma2", "bfloat16"), ("qwen3", "float16")):
        with vs.Model.from_pretrained(zoo.folder(name), dtype=dtype, progress=False) as model:
            plan = model._engine.plan()["weights"]
        config = Config.from_pretrained(zoo.folder(name))
        assert memory.weight_bytes(config, dtype) <= plan
    config = Config.from_hf(LARGE)
    assert memory.weight_bytes(config, "bfloat16") == pytest.approx(6.43e9, rel=0.01)


def test_what_would_fit_is_said_before_reading(tmp_path, monkeypatch):
    folder = write_sparse(tmp_path / "m")
    read = []
    monkeypatch.setattr(weights._Weights, "source", lambda self, name: read.append(name))
    monkeypatch.setattr(memory, "available_bytes", lambda device: 8_000_000_000)
    with pytest.raises(DeviceError) as error:
        vs.Model.from_pretrained(folder, dtype="float32", progress=False)
    said = str(error.value)
    assert "12.85 GB as float32" in said and "8.00 GB free" in said
    assert "dtype='bfloat16' (6.43 GB)" in said and "dtype='float16'" in said
    monkeypatch.setattr(memory, "available_bytes", lambda device: 5_000_000_000)
    with pytest.raises(DeviceError, match=r"6.43 GB as bfloat16.*no dtype \(at least 6.43 GB\)"):
        vs.Model.from_pretrained(folder, progress=False)
    assert not read


def test_another_device_is_named(monkeypatch, tmp_path):
    config = Config.from_hf(LARGE)
    other = vs.Device(
        index=7, name="Large card", vendor="v", type="discrete", driver="d", uuid="u",
        memory_bytes=80_000_000_000, suitable=True, missing="", features={},
    )  # fmt: skip
    monkeypatch.setattr(memory, "devices", lambda: [other])
    monkeypatch.setattr(memory, "available_bytes", lambda device: 1_000_000)
    mine = vs.devices()[0]
    with pytest.raises(DeviceError, match=r"device=7 \(Large card, 80.00 GB\)"):
        memory.check_fits(None, mine, config, "bfloat16", "m")
    write_folder(tmp_path / "m", TINY)
    monkeypatch.setattr(memory, "available_bytes", lambda device: 100)
    with pytest.raises(DeviceError, match=r"0\.00 GB free"):
        vs.Model.from_pretrained(tmp_path / "m", progress=False)


CHILD = """
import sys, threading, time
import vksteer as vs

def anonymous():
    for line in open("/proc/self/status"):
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024

peak = 0
def watch():
    global peak
    while True:
        peak = max(peak, anonymous())
        time.sleep(0.01)

threading.Thread(target=watch, daemon=True).start()
before = anonymous()
with vs.Model.from_pretrained(sys.argv[1], progress=False) as model:
    plan = model._engine.plan()
    print(peak - before, plan["weights"], plan["work"])
"""


@pytest.mark.long
def test_loading_a_large_folder_keeps_memory_flat(tmp_path):
    """The weights of a software device are anonymous memory themselves; nothing of their size may
    be allocated beside them.
    """
    folder = write_sparse(tmp_path / "m")
    result = subprocess.run(
        [sys.executable, "-c", CHILD, str(folder)],
        check=False, capture_output=True, text=True, timeout=600, env=os.environ,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-2000:]
    grown, held, work = map(int, result.stdout.split())
    assert held == pytest.approx(6.43e9, rel=0.02)
    assert grown <= held + work + 500_000_000
