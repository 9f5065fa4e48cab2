"""Fork, threads, interpreter exit and signals."""

from __future__ import annotations

import pytest

from child import child, quiet


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
        calls = (
            lambda: model.run(rows),
            lambda: model.generate(rows, max_new_tokens=2, progress=False),
            load,
            lambda: _engine().Cache(model._engine, 4),
            lambda: model._engine_device.prepare(),
        )
        for call in calls:
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
jobs = [
    rows_of(model, *lengths, seed=i)
    for i, lengths in enumerate([(5, 80, 3), (33,), (1, 1, 200), (64, 2)])
]
v = vs.SteeringVector(np.ones(model.config.d_model, np.float32), 1)


def job(i):
    run = model.run(
        jobs[i],
        edits=[vs.Steer(v, 0.1 * i)],
        capture=["blocks.*.hook_resid_post"],
        freeze="ov" if i % 2 else None,
    )
    text = model.generate(
        jobs[i], max_new_tokens=4, ignore_eos=True, edits=[vs.Steer(v, 0.1 * i)], progress=False
    )
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
for t in threads:
    t.start()
for t in threads:
    t.join()
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

from vksteer.runtime.directions import value_direction

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
    calls = [
        lambda: model.run(rows, edits=edits),
        lambda: model.generate(rows, max_new_tokens=3, progress=False),
        lambda: model.run(rows, capture="*"),
        lambda: value_direction(model, np.ones(model.config.d_model), 1),
    ]
    threads = [threading.Thread(target=use, args=(c,)) for c in calls] + [
        threading.Thread(target=lambda: load().close())
    ]
    for t in threads:
        t.start()
    time.sleep(0.05 + 0.05 * turn)
    model.close()
    for t in threads:
        t.join()
    assert not wrong, wrong
assert len(done) > 4
first.run([[1, 2]])
first.close()
import gc

del model, calls
gc.collect()
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


for call in (
    lambda: model.generate(rows_of(model, 5, 9), max_new_tokens=400, progress=False),
    lambda: load().close(),
    lambda: model.run(rows_of(model, *[500] * 60)),
):
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
made = model.generate(
    rows, max_new_tokens=4, ignore_eos=True, capture=["blocks.*.hook_resid_post"], progress=False
)
arrays = [
    run.logits,
    run.tokens,
    run.mask,
    *(a for _, a in run.items()),
    *(a for g in made for a in [g.tokens, g.prompt_tokens, *g.captured.values()]),
]
copies = [a.copy() for a in arrays]
model.run(rows_of(model, 7, 12, seed=9), capture=["*"])
model.close()
model.close()
with load() as other:
    other.run(rows_of(other, 90, seed=5), capture=["*"])
assert all(a.flags.c_contiguous and a.flags.writeable for a in arrays)
assert all(np.array_equal(a, b, equal_nan=False) for a, b in zip(arrays, copies))
from vksteer.runtime.device import _engine

calls = [
    lambda: model.run(rows),
    lambda: model.generate(rows, progress=False),
    lambda: model._engine.plan(),
    lambda: _engine().Cache(model._engine, 5),
    lambda: model._engine.vector("ln1", 0),
    lambda: model._engine.finish(),
    lambda: model._engine.kernels,
]
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


INTERRUPT = """
import signal, threading
sent = []
def soon(seconds):
    sent.clear()
    def kill():
        sent.append(clocks())
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
for call in (
    lambda: model.run(long, logits="last"),
    lambda: model.generate(rows * 8, max_new_tokens=470, ignore_eos=True, progress=False),
    lambda: model.run(
        long, logits=None, capture=["blocks.1.hook_resid_post", "blocks.2.mlp.hook_post"]
    ),
):
    soon(0.4)
    try:
        call()
        assert False, "ended before it could be interrupted"
    except KeyboardInterrupt:
        assert_within_a_second(sent[0])
        print("interrupted")
    again = model.run(rows, capture=["*"])
    assert np.array_equal(again.logits, want.logits) and all(
        np.array_equal(again[s], want[s]) for s in want.keys()
    )
""",
            llama,
            timeout=200,
        )
    )
    assert out.splitlines() == ["interrupted"] * 3


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
    start = clocks()
    try:
        load(progress=interrupt)
        assert False
    except KeyboardInterrupt:
        assert_within_a_second(start)
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
model.generate(
    [[1]], max_new_tokens=1, progress=False
)  # its modules are imported here, not in the handler
said = []


def handler(*_):
    global spare
    gc.collect()
    spare = None  # freed here, inside the other's call
    gc.collect()
    for call in (
        lambda: model.run([[1]]),
        model.close,
        lambda: model.generate([[1]], max_new_tokens=1, progress=False),
    ):
        try:
            call()
            said.append("no error")
        except RuntimeError as e:
            said.append(str(e))
    # One signal after another: on a loaded machine the handler may outlast a timer's period.
    if running:
        signal.setitimer(signal.ITIMER_REAL, 0.1)


running = True
signal.signal(signal.SIGALRM, handler)
signal.setitimer(signal.ITIMER_REAL, 0.1)
got = model.run(rows, logits="last").logits
running = False
signal.setitimer(signal.ITIMER_REAL, 0)
assert np.array_equal(got, want)
assert said and sum("signal handler" in s for s in said) >= max(3, len(said) - 3), (
    said
)  # the last signal may come after the call
model.run([[1, 2]])
""",
            llama,
        )
    )
