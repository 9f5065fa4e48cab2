"""Figures that need a fresh process each time: import, loading, memory. Each function runs a few
lines of Python and reads the JSON that they print.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys

import peers
from timing import at_most, row

RSS = """
def rss():  # bytes: anonymous and shared memory; mapped file pages do not count
    fields = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return sum(int(fields[k].split()[0]) * 1024 for k in ("RssAnon", "RssShmem"))
"""


def fresh(code: str, n: int = 1) -> list:
    """The JSON that the code prints on its last line, from n processes one after the other."""
    out = []
    for _ in range(n):
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", code],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(done.stderr[-2000:])
        out.append(json.loads(done.stdout.strip().splitlines()[-1]))
    return out


def import_time(rounds: int) -> list[dict]:
    code = "import time; t = time.perf_counter(); import vksteer{}; print(time.perf_counter() - t)"
    plain, touched = (
        statistics.median(fresh(code.format(more), rounds))
        for more in ("", "; vksteer.Model; vksteer.devices()")
    )
    return [
        at_most("import vksteer", plain, 0.15, "s", n=rounds),
        row("import, model class and device list", touched, "s", n=rounds),
    ]


def load(rounds: int) -> list[dict]:
    ours = (
        "import time, vksteer as vs\nvs.devices()\nt = time.perf_counter()\nm ="
        " vs.Model.from_pretrained({!r}, progress=False)\nprint(time.perf_counter() - t)"
    )
    theirs = (
        "import json, time, gguf, numpy\nfrom gguf.quants import dequantize\nt ="
        " time.perf_counter()\nr = gguf.GGUFReader({!r})\na = [dequantize(x.data, x.tensor_type)"
        " for x in r.tensors]\nprint(time.perf_counter() - t)"
    )
    torch = (
        "import os, time\nos.environ['HF_HUB_OFFLINE'] = '1'\nimport torch,"
        " transformers\ntransformers.logging.disable_progress_bar()\nt = time.perf_counter()\nm ="
        " transformers.AutoModelForCausalLM.from_pretrained({!r},"
        " dtype=torch.bfloat16)\nprint(time.perf_counter() - t)"
    )
    folder, file = str(peers.safetensors_folder()), str(peers.GGUF)
    times = {name: [] for name in ("folder", "gguf", "package", "transformers")}
    fresh(ours.format(folder))  # the file cache and the pipeline cache are warm from here on
    for _ in range(rounds):
        for name, code in (
            ("folder", ours.format(folder)),
            ("gguf", ours.format(file)),
            ("package", theirs.format(file)),
            ("transformers", torch.format(folder)),
        ):
            times[name] += fresh(code)
    m = {name: statistics.median(t) for name, t in times.items()}
    return [
        at_most(
            "load SmolLM2, safetensors",
            m["folder"],
            2,
            "s",
            transformers_s=m["transformers"],
            n=rounds,
        ),
        at_most(
            "load SmolLM2, GGUF, over the gguf package's open + dequantise",
            m["gguf"] / m["package"],
            2,
            "times",
            ours_s=m["gguf"],
            package_s=m["package"],
            n=rounds,
        ),
    ]


def memory() -> list[dict]:
    code = (
        RSS
        + """
import json, vksteer as vs
m = vs.Model.from_pretrained({!r}, progress=False)
before = m._engine_device.available_bytes
m.run([list(range(100, 228))], logits="last")
m.generate([list(range(100, 116))], max_new_tokens=16, ignore_eos=True, progress=False)
plan = m._engine.plan()
software = m.device.type == "software"
device = 0 if software else plan["weights"] + plan["work"] + 300 * plan["cache_per_token"]
sizes = dict(weights=plan["weights"], work=plan["work"], resident=rss(), software=software)
print(json.dumps(dict(total=rss() + device, **sizes)))
"""
    )
    (m,) = fresh(code.format(str(peers.safetensors_folder())))
    how = (
        "resident (the software device's memory is the process's own)"
        if m["software"]
        else "resident, plus the engine's plan of device memory"
    )
    return [
        at_most(
            "memory over weights, SmolLM2, 128-token prefill and decoding",
            (m["total"] - m["weights"]) / 1e6,
            400,
            "MB",
            weights_mb=m["weights"] / 1e6,
            work_mb=m["work"] / 1e6,
            resident_mb=m["resident"] / 1e6,
            how=how,
        )
    ]
