"""Plans of memory against the most bytes that the engine's buffers took at once, for plain runs,
attribution and circuits, and the sizes that follow from a device's memory.
"""

from __future__ import annotations

import dataclasses
import json
from types import SimpleNamespace

import pytest

from child import ROOT, child, quiet, tool
from test_plan import LLAMA_3B, LLAMA_8B
from vksteer import plan_run
from vksteer.runtime.memory_plan import (
    ON_CPUS,
    ON_GPUS,
    Sizes,
    cache_bytes,
    chunk_bytes,
    scratch_bytes,
    sizes_for,
    split_bytes,
    upload_bytes,
)

#: The largest share by which a plan may miss. Met: 0.05 (circuits on matrix units).
SHARE = 0.1
#: Bytes that count as nothing beside a model of hundreds of MB. Met: 0.85 MB of 6.3 (SmolLM2 with
#: short prompts on matrix units, beside its 360 MB).
NOTHING = 1e6


def agree(found: dict[str, list[float]], nothing: float = 0.0) -> None:
    assert len(found) > 3
    for what, (measured, planned) in found.items():
        print(f"{what}: {measured / planned:.3f} of {planned / 1e6:.2f} MB")
        close = abs(measured / planned - 1) < SHARE or abs(measured - planned) < nothing
        assert close, f"{what}: {measured} bytes, planned {planned}"


def measured(name, kernels, short=False, **options):
    """What memory_cases.measure finds in a process of its own, where no other test's model is held
    on the device.
    """
    done = child(
        "sys.path.insert(0, 'tests'); import json, memory_cases;"
        " print(json.dumps(memory_cases.measure(sys.argv[1], len(sys.argv) > 2)))",
        name,
        *["short"] * short,
        timeout=850,
        VKSTEER_KERNELS=kernels,
        **options,
    )
    return json.loads(quiet(done).splitlines()[-1])


def on_newer_mesa(name, short=False):
    """With products on matrix units, which split their rows."""
    icd = tool("newer_lavapipe_icd")
    return measured(
        name,
        "matrix",
        short,
        executable=tool("newer_mesa_python"),
        VK_DRIVER_FILES=icd,
        VK_ICD_FILENAMES=icd,
        LP_NATIVE_VECTOR_WIDTH=256,
    )


@pytest.mark.parametrize("kernels", ["broadcast", "tiled"])
@pytest.mark.parametrize("name", ["tiny-llama-chat", "tiny-gemma-chat"])
def test_plans_are_what_is_held(name, kernels):
    agree(measured(name, kernels))


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", ["tiny-llama-chat", "tiny-gemma-chat"])
def test_plans_with_split_rows_are_what_is_held(name):
    agree(on_newer_mesa(name))


def test_weights_of_a_real_model_waste_little():
    """Its matrices do not fill buffers of 64 MiB evenly, as those of tiny models do."""
    from oracle import real as files

    done = child(
        "model = load(dtype='auto'); print(model._engine_device.allocated_bytes,"
        " model._engine.plan()['weights'] + model._engine.plan()['work'])",
        str(files.gguf("smollm2")),
        VKSTEER_KERNELS="broadcast",
    )
    allocated, planned = map(int, quiet(done).split())
    assert abs(allocated / planned - 1) < 0.02  # 0.006 met; some work memory comes with a run


def test_a_row_that_generate_refuses_does_not_fit():
    """Its cache may take half of what is free beside the model."""
    on = {"device_memory": "20GB", "kernels": "matrix"}
    assert plan_run(llama_8b(), 4096, new_tokens=1024, **on).fits
    plan = plan_run(llama_8b(), 7000, new_tokens=1024, **on)
    assert not plan.fits and not plan.row_fits and plan.total < 20e9
    many = plan_run(llama_8b(), [512] * 64, new_tokens=512, **on)  # in parts, which fit
    assert many.fits and many.cache < plan_run(llama_8b(), [512] * 64, new_tokens=512).cache
    one = plan_run(llama_8b(), [512] * 8, new_tokens=8, batch_size=1)
    assert 8 * one.cache == plan_run(llama_8b(), [512] * 8, new_tokens=8).cache
    with pytest.raises(ValueError, match="batch_size"):
        plan_run(llama_8b(), 8, new_tokens=8, batch_size=0)


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("kernels", ["broadcast", "tiled", "matrix"])
def test_plans_of_smollm2_are_what_is_held(kernels):
    from oracle import real as files

    path = str(files.gguf("smollm2"))
    short = kernels != "broadcast"  # the others are slow on CPUs
    on = on_newer_mesa(path, short) if kernels == "matrix" else measured(path, kernels, short)
    agree(on, short * NOTHING)


@pytest.mark.parametrize("name", ["llama3", "gemma2", "gpt2", "gpt_neox", "olmo2", "phi"])
def test_sums_are_the_engine_s(zoo, name):
    """Byte for byte: what the engine says of a loaded model."""
    model = zoo.engine(name)
    c, of = model.config, model._engine.plan()
    assert of["cache_per_token"] == cache_bytes(c, 1)
    assert of["split"] == split_bytes(c, of["chunk"])
    assert of["work"] == (
        chunk_bytes(c, of["chunk"])
        + of["readback"]
        + scratch_bytes(c, of["scratch"], of["chunk"], of["chunk"])
        + upload_bytes(c, of["chunk"], False)
    )
    assert Sizes(of["chunk"], of["scratch"], of["readback"]) == ON_CPUS
    plan = plan_run(model, [9, 5])
    assert plan.weights == of["weights"] and plan.split == 0


#: What plans of runs ask of a configuration beside what plans of attribution do.
MORE = dict(
    gated=True,
    parallel=False,
    pos_embed=False,
    pre_norms=True,
    norm_bias=False,
    d_rot=128,
    rope=[None],
    rope_switch=0,
    query_beta=0.0,
)


def llama_3b():
    return SimpleNamespace(**LLAMA_3B, **MORE)


def llama_8b():
    return SimpleNamespace(**LLAMA_8B, **MORE)


def memory_table() -> str:
    """The table of docs/performance.md."""
    from vksteer.patching import plan

    lines = [
        (
            "| model, free memory | weights | chunk | `run` of 8 x 512 | `generate` 512 of 8 x 512"
            " | attribution of 512 tokens | activations |"
        ),
        "|---|---:|---:|---:|---:|---:|---|",
    ]
    for name, c, layer, memories in (
        ("3B", llama_3b(), 12, ("8GB", "12GB", "16GB", "80GB")),
        ("8B", llama_8b(), 14, ("20GB", "24GB", "80GB")),
    ):
        for memory in memories:
            on = {"device_memory": memory, "kernels": "matrix"}
            run, made = plan_run(c, [512] * 8, **on), plan_run(c, [512] * 8, new_tokens=512, **on)
            p = plan(c, layer, 512, **on)
            cells = [f"{x.total / 1e9:.1f} GB" if x.fits else "too much" for x in (run, made)]
            how = f"{p.mode}, {p.step_tokens} tokens a pass" + (
                f", {p.parts} parts" if p.parts > 1 else ""
            )
            cells += [f"{p.together / 1e9:.1f} GB", how] if p.fits else ["too much", ""]
            lines.append(
                f"| {name}, {memory[:-2]} GB | {p.weights / 1e9:.1f} GB | {run.chunk} |"
                f" {' | '.join(cells)} |"
            )
    return "\n".join(lines)


def test_the_documented_table_is_what_the_plans_say():
    assert memory_table() in (ROOT / "docs/performance.md").read_text()


def test_sizes_follow_the_memory():
    """A sixteenth for the buffers of a chunk, a 64th for scores, a 32nd for readback."""
    c = llama_3b()
    assert chunk_bytes(c, 2048) == 4 * 2048 * (4 * 3088 + 5136 + 3088 + 16400 + 8208 + 1)
    assert sizes_for(c, 80 << 30) == ON_GPUS and sizes_for(c, None) == ON_CPUS
    assert sizes_for(c, 4 << 30) == Sizes(1024, 64 << 20, 64 << 20)
    assert sizes_for(c, 2 << 30) == Sizes(512, 32 << 20, 64 << 20)
    assert sizes_for(c, 1 << 20) == Sizes(64, 4 << 20, 16 << 20)
    assert sizes_for(c, 1 << 30, ON_CPUS) == Sizes(256, 16 << 20, 32 << 20)


def test_attribution_of_a_3b_model_takes_at_most_16_gb():
    from vksteer.patching import plan

    for kernels in ("tiled", "matrix"):
        for memory in ("16GB", "24GB", "80GB", "139GiB"):
            p = plan(llama_3b(), 12, 512, steps=10, device_memory=memory, kernels=kernels)
            assert p.fits and p.together < 16e9
            assert (p.split > 0) == (kernels == "matrix")
    assert p.mode == "kept" and p.step_tokens == 2048
    assert not plan(llama_3b(), 12, 512, device_memory="6GB").fits
    text = str(plan(llama_3b(), 12, 512, device_memory="16GB"))
    assert "together" in text and "of 16.0 GB" in text


def test_a_plan_of_a_run_by_hand():
    c = llama_3b()
    p = plan_run(c, [100, 300], device_memory="24GB", kernels="matrix")
    assert p.work == chunk_bytes(c, 2048) + (64 << 20) + (1 << 20)
    assert p.scores == 4 * 24 * 304 * 400 and p.cache == 2 * 28 * 400 * 8 * 128 * 4
    assert p.rotation == 2 * 512 * 128 * 4 and p.picks == 0
    assert p.split == 256 + 4 * 1920 + 1920 * 8192 * 4  # as many rows as 64 MiB hold
    assert p.total == p.weights + p.beside_weights and p.fits
    g = plan_run(c, [100] * 70, new_tokens=50, frozen=True)
    assert g.picks == 4 * 128256 * 128  # 130 rows would fit
    assert g.cache == 2 * 28 * 2 * 64 * 150 * 8 * 128 * 4 and g.split == 0
    assert json.loads(json.dumps(g.to_dict()))["total"] == g.total
    assert "keys and values" in str(g) and dataclasses.asdict(g)["longest"] == 150


@pytest.mark.parametrize(
    "arguments, says",
    [
        (dict(tokens=[]), "tokens"),
        (dict(tokens=0), "tokens"),
        (dict(tokens=200_000), "131072 tokens"),
        (dict(tokens=5, new_tokens=-1), "new_tokens"),
        (dict(tokens=5, kernels="fast"), "broadcast, texels, tiled, matrix"),
        (dict(tokens=5, device_memory="much"), "device_memory"),
        (dict(tokens=5, weight_bytes=0), "weight_bytes"),
    ],
)
def test_a_plan_of_a_run_refuses(arguments, says):
    with pytest.raises(ValueError, match=says):
        plan_run(llama_3b(), **arguments)


SMALL = """
import hashlib, json
with load() as model:
    device, small = model._engine_device, "VKSTEER_MEMORY" in os.environ
    rows, quiet = rows_of(model, 200, 90, 1), {"progress": False}
    vector = vs.SteeringVector(np.ones(model.config.d_model, np.float32), 1)
    edits = [vs.Steer(vector, 0.5)]
    run = model.run(rows, edits=edits, capture=["*hook_result", "*hook_pattern"])
    out = [run.logits, *(run[s] for s in run.keys())]
    out.append(model.run(rows[:1], edits=edits, freeze="qk").logits)
    out += [g.tokens for g in model.generate(rows, max_new_tokens=9, ignore_eos=True, **quiet)]
    samples = [vs.patching.Sample(rows[1], rows[0][:9]), vs.patching.Sample(rows[2], [3])]
    scores = vs.patching.attribute(model, samples, vector, 1.0, steps=3,
                                   max_memory="28MB" if small else None, **quiet)
    out += [scores.edges, scores.nodes]
    if len(sys.argv) > 2:
        circuits = [scores.circuit(n) for n in (20, 60)]
        metrics = ("logit_diff", "kl")
        for found in vs.circuits.evaluate(circuits, model, samples, vector, 1.0,
                                          metrics=metrics, **quiet):
            out += [np.array([found[m].value for m in found])]
    plan = model._engine.plan()
    print(json.dumps({
        "bits": [hashlib.sha256(np.ascontiguousarray(x).tobytes()).hexdigest() for x in out],
        "sizes": [plan["chunk"], plan["scratch"], plan["readback"]],
        "peak": device.peak_bytes(), "free": device.available_bytes,
    }))
"""


def test_a_small_device_gives_the_same_bits():
    """Runs, generation, attribution and circuits with memory enough, and with little: chunks of
    fewer tokens, attention in more spans, attribution in parts.
    """
    model = "tiny-llama-chat"
    run = lambda *circuits, **environment: json.loads(
        quiet(child(SMALL, model, *circuits, **environment)).splitlines()[-1]
    )
    large = run("circuits")
    assert large["sizes"] == [512, 32 << 20, 64 << 20]
    for memory, circuits in ((60_000_000, ()), (220_000_000, ("circuits",))):
        small = run(*circuits, VKSTEER_MEMORY=memory)
        assert small["sizes"] == [256 if memory < 1e8 else 512, 4 << 20, 16 << 20]
        assert small["peak"] <= memory and small["free"] < memory
        assert small["bits"] == large["bits"][: len(small["bits"])] and len(small["bits"]) > 10


def test_too_small_a_device_says_so(zoo):
    code = """
for memory in ("200kB", "12MB", "lots"):
    os.environ["VKSTEER_MEMORY"] = memory
    from vksteer.runtime import device
    device._open.clear()
    try:
        load()
    except (vs.DeviceError, ValueError) as error:
        print(type(error).__name__, error)
"""
    lines = quiet(child(code, zoo.folder("llama3"))).splitlines()
    assert len(lines) == 3
    assert "free" in lines[0] and "out of device memory" in lines[1]
    assert lines[2].startswith("ValueError VKSTEER_MEMORY='lots': use a number of bytes")
