"""What must not go wrong whatever happens: no driver, wrong device, too little memory, fork,
threads, exit, Ctrl-C, failures of the driver, leaks.

Everything runs in child processes, most of which must end with code 0 and say nothing on stderr.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import struct
import subprocess
from pathlib import Path

import pytest

from child import child, quiet, tool

HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def llama(zoo):
    return zoo.folder("llama2")


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
    for wanted in (d.index, str(d.index), d.uuid, dashed.upper(), d.name, d.name.split()[0].lower(), d):
        with load(device=wanted) as model:
            assert model.device == d, wanted
        if isinstance(wanted, str):
            os.environ["VKSTEER_DEVICE"] = wanted
            with load() as model:
                assert model.device == d, wanted
            os.environ["VKSTEER_DEVICE"] = "nothing like it"
            with load(device=wanted) as model:
                assert model.device == d, "device= wins"
            del os.environ["VKSTEER_DEVICE"]
for wanted in (len(found), -1, "radeon 9700", "", "0" * 32, 1e9, True):
    for variable in (False, True):
        if variable:
            os.environ["VKSTEER_DEVICE"] = str(wanted)
        try:
            load(device=None if variable else wanted).close()
        except vs.DeviceError as e:
            assert all(d.name in str(e) for d in found) and ("VKSTEER_DEVICE" in str(e)) == variable, e
        else:
            assert variable and wanted == "", wanted
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


def hollow_model(folder, bytes_wanted):
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
    n_layers = max(1, -(-bytes_wanted // sum(map(size, layer.values()))))
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


# -- the driver fails ------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def faulty(tmp_path_factory):
    """Environment in which the Vulkan loader is faulty_vulkan.c around the real one."""
    folder = tmp_path_factory.mktemp("faulty")
    real = next(
        (
            line.split("=> ")[1]
            for line in subprocess.run(
                ["/sbin/ldconfig", "-p"], capture_output=True, text=True
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
NAMES = ["vkAllocateMemory", "vkCreateBuffer", "vkBindBufferMemory", "vkMapMemory", "vkCreateSemaphore", "vkCreateCommandPool",
         "vkAllocateCommandBuffers", "vkResetCommandPool", "vkBeginCommandBuffer", "vkEndCommandBuffer", "vkQueueSubmit", "vkWaitSemaphores",
         "vkCreateShaderModule", "vkCreateComputePipelines", "vkCreateBufferView", "vkCreateDescriptorPool", "vkAllocateDescriptorSets"]
HOST, DEVICE, LOST = -1, -2, -4
v = None

def work(model):
    v = vs.SteeringVector(np.linspace(-1, 1, model.config.d_model, dtype=np.float32), 1)
    rows = rows_of(model, 5, 40, 1)
    run = model.run(rows, edits=[vs.Steer(v, 1.0)], capture=["blocks.*.attn.hook_pattern", "blocks.1.attn.hook_result"], freeze="qk")
    made = model.generate(rows, max_new_tokens=3, ignore_eos=True, progress=False, capture=["blocks.1.hook_resid_post"])
    return [run.logits, run["blocks.1.attn.hook_pattern"], made[0].tokens, made[1].captured["blocks.1.hook_resid_post"]]

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


# -- fork, threads, exit ---------------------------------------------------------------------------


@pytest.mark.parametrize("leave", ["os._exit(0)", "sys.exit(0)"], ids=["_exit", "exit"])
@pytest.mark.parametrize("running", [False, True], ids=["idle", "busy"])
def test_fork(llama, leave, running):
    """The child gets DeviceError, at once, even when a thread of the parent held the device's lock;
    the parent goes on, bit for bit.
    """
    quiet(
        child(
            f"""
import gc, signal, threading
model = load()
rows = rows_of(model, 4, 19)
want = model.run(rows).logits
stop = threading.Event()
def busy():
    while not stop.is_set():
        model.run(rows_of(model, *[200] * 8))
thread = threading.Thread(target=busy, daemon=True) if {running} else None
if thread:
    thread.start()
    time.sleep(0.3)
for _ in range(3):
    pid = os.fork()
    if pid == 0:
        signal.alarm(20)  # a hang ends here
        from vksteer.runtime.device import _engine
        for call in (lambda: model.run(rows), lambda: model.generate(rows, max_new_tokens=2, progress=False), load,
                     lambda: _engine().Cache(model._engine, 4), lambda: model._engine_device.prepare()):
            try:
                call()
                os._exit(7)
            except vs.DeviceError as e:
                if "fork" not in str(e):
                    os._exit(8)
        assert vs.devices() == []
        model.close()
        del model
        gc.collect()
        {leave}
    _, status = os.waitpid(pid, 0)
    assert status == 0, status
    assert np.array_equal(model.run(rows).logits, want)
stop.set()
if thread:
    thread.join()
assert np.array_equal(model.run(rows).logits, want)
""",
            llama,
        )
    )


def test_fork_before_use(llama):
    quiet(
        child(
            """
pid = os.fork()
with load() as model:
    model.run([[1, 2, 3]])
if pid:
    assert os.waitpid(pid, 0)[1] == 0
""",
            llama,
        )
    )


def test_threads_get_the_same_bits(llama):
    quiet(
        child(
            """
import threading
sys.setswitchinterval(1e-5)
model = load()
jobs = [rows_of(model, *lengths, seed=i) for i, lengths in enumerate([(5, 80, 3), (33,), (1, 1, 200), (64, 2)])]
v = vs.SteeringVector(np.ones(model.config.d_model, np.float32), 1)
def job(i):
    run = model.run(jobs[i], edits=[vs.Steer(v, 0.1 * i)], capture=["blocks.*.hook_resid_post"], freeze="ov" if i % 2 else None)
    text = model.generate(jobs[i], max_new_tokens=4, ignore_eos=True, edits=[vs.Steer(v, 0.1 * i)], progress=False)
    return [run.logits, *(a for _, a in run.items()), *(g.tokens for g in text)]
want = [job(i) for i in range(4)]
wrong = []
def loop(i):
    try:
        for n in range(8):
            if not all(np.array_equal(a, b) for a, b in zip(job(i), want[i])):
                wrong.append(f"thread {i}, round {n}: other bits")
    except BaseException as e:
        wrong.append(repr(e))
threads = [threading.Thread(target=loop, args=(i,)) for i in range(4)]
for t in threads: t.start()
for t in threads: t.join()
assert not wrong, wrong
""",
            llama,
        )
    )


def test_closing_while_others_run_and_load(llama):
    """Every thread gets its result or ValueError; nothing crashes, and all
    device memory comes back.
    """
    quiet(
        child(
            """
import threading
wrong, done = [], []
first = load()
device = first._engine_device
for turn in range(6):
    model = load()
    def use(call):
        try:
            while True:
                call()
                done.append(1)
        except ValueError as e:
            if "closed" not in str(e):
                wrong.append(e)
        except BaseException as e:
            wrong.append(e)
    rows = rows_of(model, 30, 60)
    edits = [vs.Scale("blocks.1.attn.hook_z", 0.5)]
    calls = [lambda: model.run(rows, edits=edits), lambda: model.generate(rows, max_new_tokens=3, progress=False), lambda: model.run(rows, capture="*"),
             lambda: model._value_direction(np.ones(model.config.d_model), 1)]
    threads = [threading.Thread(target=use, args=(c,)) for c in calls] + [threading.Thread(target=lambda: load().close())]
    for t in threads: t.start()
    time.sleep(0.05 + 0.05 * turn)
    model.close()
    for t in threads: t.join()
    assert not wrong, wrong
assert len(done) > 4
first.run([[1, 2]])
first.close()
import gc; del model, calls; gc.collect()
assert device.allocated_bytes == 0, device.allocated_bytes
""",
            llama,
        )
    )


EXITS = {
    "a live model": "model = load(); model.run([[1, 2, 3]])",
    "a model in a cycle": (
        "model = load(); model.me = model; run = model.run([[1, 2]], capture='*'); run.model ="
        " model; del model"
    ),
    "a loaded and never used model": "model = load()",
    "an engine object in a global of another module": (
        "import builtins; builtins.kept = load(); builtins.kept.run([[1]]); builtins.cache ="
        " kept._cache"
    ),
    "an exception on the way": "model = load(); model.run([[1]]); sys.exit(0)",
    "a running thread": (
        "import threading; model = load(); threading.Thread(target=lambda:"
        " [model.run(rows_of(model, *[100] * 4)) for _ in range(20)]).start(); time.sleep(0.1)"
    ),
    "a running daemon thread": (
        """
import threading
model = load()
def forever():
    while True:
        model.run(rows_of(model, *[100] * 4))
threading.Thread(target=forever, daemon=True).start()
time.sleep(0.3)
"""
    ),
    "daemon threads that generate, load and hold long runs": (
        """
import threading
model = load()
def forever(call):
    while True:
        call()
for call in (lambda: model.generate(rows_of(model, 5, 9), max_new_tokens=400, progress=False), lambda: load().close(), lambda: model.run(rows_of(model, *[500] * 60))):
    threading.Thread(target=forever, args=(call,), daemon=True).start()
time.sleep(0.5)
"""
    ),
}


@pytest.mark.parametrize("what", EXITS)
def test_interpreter_exit(llama, what):
    for _ in range(3 if "daemon" in what else 1):
        assert quiet(child(EXITS[what], llama, timeout=30)) == ""


def test_arrays_outlive_the_model_and_a_closed_model_refuses(llama):
    quiet(
        child(
            """
model = load()
rows = rows_of(model, 7, 12)
run = model.run(rows, capture=["*"])
made = model.generate(rows, max_new_tokens=4, ignore_eos=True, capture=["blocks.*.hook_resid_post"], progress=False)
arrays = [run.logits, run.tokens, run.mask, *(a for _, a in run.items()), *(a for g in made for a in [g.tokens, g.prompt_tokens, *g.captured.values()])]
copies = [a.copy() for a in arrays]
model.run(rows_of(model, 7, 12, seed=9), capture=["*"])
model.close()
model.close()
with load() as other:
    other.run(rows_of(other, 90, seed=5), capture=["*"])
assert all(a.flags.c_contiguous and a.flags.writeable for a in arrays)
assert all(np.array_equal(a, b, equal_nan=False) for a, b in zip(arrays, copies))
from vksteer.runtime.device import _engine
calls = [lambda: model.run(rows), lambda: model.generate(rows, progress=False), lambda: model._engine.plan(), lambda: _engine().Cache(model._engine, 5),
         lambda: model._engine.vector("ln1", 0), lambda: model._engine.finish(), lambda: model._engine.kernels]
for i, call in enumerate(calls):
    try:
        call()
        assert False, i
    except ValueError as e:
        assert "closed" in str(e), e
repr(model), model.sites, model.config
""",
            llama,
        )
    )


# -- signals ---------------------------------------------------------------------------------------

INTERRUPT = """
import signal, threading
sent = []
def soon(seconds):
    sent.clear()
    def kill():
        sent.append(time.monotonic())
        os.kill(os.getpid(), signal.SIGINT)
    threading.Timer(seconds, kill).start()
"""


def test_interrupting_a_long_run_and_a_generation(llama):
    out = quiet(
        child(
            INTERRUPT
            + """
model = load()
rows = rows_of(model, 8, 30)
want = model.run(rows, capture=["*"])
n = 16
while True:  # a run of a few seconds
    long = rows_of(model, *[500] * n)
    start = time.monotonic()
    model.run(long, logits="last")
    if time.monotonic() - start > 2:
        break
    n *= 2
for call in (lambda: model.run(long, logits="last"), lambda: model.generate(rows * 8, max_new_tokens=470, ignore_eos=True, progress=False),
             lambda: model.run(long, logits=None, capture=["blocks.1.hook_resid_post", "blocks.2.mlp.hook_post"])):
    soon(0.4)
    try:
        call()
        assert False, "ended before it could be interrupted"
    except KeyboardInterrupt:
        print(time.monotonic() - sent[0])
    again = model.run(rows, capture=["*"])
    assert np.array_equal(again.logits, want.logits) and all(np.array_equal(again[s], want[s]) for s in want.keys())
""",
            llama,
            timeout=200,
        )
    )
    waits = [float(line) for line in out.splitlines()]
    assert len(waits) == 3 and max(waits) < 1.0, waits


def test_interrupting_a_load(llama):
    quiet(
        child(
            """
import signal
from vksteer.runtime.device import open_device
engine, _ = open_device()
for step in (1, 5, 9):
    def interrupt(done, total):
        if done == step:
            os.kill(os.getpid(), signal.SIGINT)
    start = time.monotonic()
    try:
        load(progress=interrupt)
        assert False
    except KeyboardInterrupt:
        assert time.monotonic() - start < 1
    assert engine.allocated_bytes == 0
with load() as model:
    model.run([[1, 2]])
assert engine.allocated_bytes == 0
""",
            llama,
        )
    )


def test_a_signal_handler_may_not_enter_a_call_again(llama):
    """It gets RuntimeError for what it tries; the call it interrupted ends as
    if nothing had been.
    """
    quiet(
        child(
            """
import gc, signal
model, spare = load(), load()
rows = rows_of(model, *[400] * 40)
want = model.run(rows, logits="last").logits
model.generate([[1]], max_new_tokens=1, progress=False)  # its modules are imported here: in the handler that could outlast the timer's period
said = []
def handler(*_):
    global spare
    gc.collect()
    spare = None  # freed here, inside the other's call
    gc.collect()
    for call in (lambda: model.run([[1]]), model.close, lambda: model.generate([[1]], max_new_tokens=1, progress=False)):
        try:
            call()
            said.append("no error")
        except RuntimeError as e:
            said.append(str(e))
signal.signal(signal.SIGALRM, handler)
signal.setitimer(signal.ITIMER_REAL, 0.1, 0.1)
got = model.run(rows, logits="last").logits
signal.setitimer(signal.ITIMER_REAL, 0)
assert np.array_equal(got, want)
assert said and sum("signal handler" in s for s in said) >= max(3, len(said) - 3), said  # the last signal may come after the call
model.run([[1, 2]])
""",
            llama,
        )
    )
