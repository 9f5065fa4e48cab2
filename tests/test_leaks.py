"""Decoding, loading and closing models, and every type of the extension leak no memory."""

from __future__ import annotations

import pytest

from child import child, quiet


def test_ten_thousand_decode_steps_keep_memory_flat(llama):
    out = quiet(
        child(
            """
model = load()
device = model._engine_device
sizes, held, steps = [], [], 0
while steps < 10_000:
    model.generate([[1, 2, 3]], max_new_tokens=500, ignore_eos=True, progress=False)
    steps += 500
    sizes.append(rss())
    held.append(device.allocated_bytes)
print((sizes[-1] - sizes[3]) / 1e6, max(held[3:]) - min(held[3:]))
""",
            llama,
            timeout=280,
        )
    )
    grown, held = out.split()
    assert float(grown) < 4 and int(held) == 0, out


def test_loading_and_closing_leaks_nothing(llama):
    out = quiet(
        child(
            """
sizes = []
for i in range(50):
    with load() as model:
        device = model._engine_device
        model.run([[1, 2, 3]], capture=["blocks.0.hook_resid_post"])
        of, at = vs.LogitDiff(-1, 1, 2), ["blocks.0.hook_resid_post"]
        model.gradients([[1, 2, 3]], of=of, at=at, progress=False)
    assert device.allocated_bytes == 0
    sizes.append(rss())
print((sizes[-1] - sizes[14]) / 1e6)
""",
            llama,
        )
    )
    assert float(out) < 8, f"{out} MB over 35 loads"


LEAKS = {
    "MappedFile": ("engine.MappedFile(sys.argv[1] + '/model.safetensors')", 5000),
    "Cache": ("engine.Cache(model._engine, 64)", 400),
    "Edits": (
        (
            "engine.Edits(model._engine, np.zeros(0, np.int64), np.zeros(0, np.float32),"
            " np.zeros(0, np.uint32), np.zeros(0, np.uint32), np.ones(2000, np.float32), 2)"
        ),
        2000,
    ),
    "Model": ("engine.Model(device, facts)", 200),
    "Device": ("engine.Device(0, '')", 60),
    "a refused Model": ("refused(lambda: engine.Model(device, {**facts, 'd_head': 3}))", 2000),
    "a refused Edits": (
        (
            "refused(lambda: engine.Edits(model._engine, np.zeros(3, np.int64), np.zeros(0,"
            " np.float32), 1, 2, 3, 4))"
        ),
        2000,
    ),
    "PackedRows": (
        (
            "engine.PackedRows(**{n: np.zeros(2, np.uint32) for n in 'tokens n_tokens start slot"
            " group edit_row'.split()}, **{n: np.zeros(2, np.int32) for n in 'out_row column"
            " key_column'.split()}, edits=engine.Edits(model._engine, np.zeros(0, np.int64),"
            " np.zeros(0, np.float32), np.zeros(0, np.uint32), np.zeros(0, np.uint32),"
            " np.ones(200, np.float32), 2))"
        ),
        2000,
    ),
    "a refused PackedRows": (
        (
            "refused(lambda: engine.PackedRows(tokens=np.zeros(2, np.uint32), n_tokens=3)),"
            " refused(lambda: engine.PackedRows())"
        ),
        2000,
    ),
    "a refused Cache": ("refused(lambda: engine.Cache(model._engine, 0))", 2000),
    "a refused forward": (
        (
            "refused(lambda: model.run([[1, 2, 99999]])), refused(lambda:"
            " model._engine.forward(*[0] * 4))"
        ),
        2000,
    ),
    "devices": ("engine.devices()", 300),
    "describe": ("device.info, device.describe('norm')", 300),
    "Tape": ("engine.Tape(model._engine, 64, 1)", 150),
    "Attribution": ("engine.Attribution(model._engine, 64, 32, 16, 1, 16, 2)", 100),
    "Encoder": (
        (
            "engine.Encoder(model._engine, 64, 40, 0, 16, 32).top(np.ones(80, np.float32), 2),"
            " refused(lambda: engine.Encoder(model._engine, 64, 40, 0, 16, 7)), refused(lambda:"
            " engine.Encoder(model._engine, 64, 40, 0, 16, 32).sums(np.ones(3, np.float32), 2))"
        ),
        150,
    ),
    "a refused Tape": (
        (
            "refused(lambda: engine.Tape(model._engine, 64, 99)), refused(lambda:"
            " engine.Tape(model._engine, 0, 0))"
        ),
        500,
    ),
    "a refused Attribution": (
        "refused(lambda: engine.Attribution(model._engine, 16, 32, 16, 1, 16, 2))",
        1000,
    ),
    "gradients": (
        (
            "model.gradients([[1, 2, 3], [4]], of=vs.LogitDiff(-1, 1, 2),"
            " at=['blocks.0.hook_resid_post'], progress=False)"
        ),
        300,
    ),
    "value vectors, a lens, rows": (
        (
            "model._engine.value_vectors(np.ones(40, np.float32), 0),"
            " model._engine.lens(np.ones(80, np.float32), 5, True), model._engine.rows('o', 0,"
            " 0, 40)"
        ),
        300,
    ),
    "a refused lens": (
        (
            "refused(lambda: model._engine.lens(np.ones(40, np.float32), 0)), refused(lambda:"
            " model._engine.value_vectors(np.ones(3, np.float32), 0)), refused(lambda:"
            " model._engine.rows('o', 0, 99, 1))"
        ),
        2000,
    ),
    "a run with captures": (
        "model.run([[1, 2, 3], [4]], capture='*', edits=[vs.Scale('blocks.1.attn.hook_z', 0.5)])",
        150,
    ),
}


@pytest.mark.parametrize("what", LEAKS)
def test_no_type_leaks(llama, what):
    """Memory and reference counts after many calls: of objects, their types, and what they hold."""
    code, n = LEAKS[what]
    out = quiet(
        child(
            f"""
import gc
from vksteer.runtime.device import _engine
from vksteer.runtime.weights import _facts
engine = _engine()
model = load()
device, facts = model._engine_device, _facts(model.config, 0)
def refused(call):
    try:
        call()
        assert False
    except (ValueError, TypeError, vs.ModelError):
        pass
types = [engine.MappedFile, engine.Cache, engine.Edits, engine.Model, engine.Device, engine.Tape]
types += [engine.Attribution, engine.PackedRows, vs.DeviceError, vs.ModelError]
watched = [*types, device, model._engine, None]
def round(n):
    for _ in range(n):
        {code}
round({n} // 2)  # what the interpreter caches has settled by then
gc.collect()
before, counts, held = rss(), [sys.getrefcount(w) for w in watched], device.allocated_bytes
round({n})
gc.collect()
after = [sys.getrefcount(w) for w in watched]
# Growth is a leak. A call that gives up one reference too many would show as -{n}. The
# interpreter's caches drop a few dozen references to None in the first hundreds of calls.
assert all(-max(10, {n} // 4) < a - b < 10 for a, b in zip(after, counts)), (counts, after)
assert device.allocated_bytes == held
print((rss() - before) / 1e6)
""",
            llama,
        )
    )
    assert float(out) < 4, f"{out.strip()} MB after {n}"
