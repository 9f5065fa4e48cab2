"""Commands wait for what they depend on: results keep their bits with a barrier before every
command, and where commands between two barriers are recorded in reverse order.

lavapipe runs dispatches one after another, so that a missing barrier shows only in the reverse
order. Every array that the calls return is compared. test_kernel_build.py compares what the
barriers rest on, the declared directions of addresses, with the compiled kernels.
"""

from __future__ import annotations

import json

import pytest

from child import child
from test_drivers import THREADS, environment, python_of

MODES = ("needed", "all", "reverse")
#: Kernel families: the device's own, that of GPUs, and on the newer Mesa that of matrix units.
KERNELS = (
    pytest.param("", id="own"),
    "tiled",
    pytest.param("matrix", marks=[pytest.mark.long, pytest.mark.timeout(1800)]),
)
FAMILIES = ("gemma2", "gpt_neox")

WORK = """
import dataclasses, hashlib, json
from vksteer.runtime import decoding

decoding.BLOCK_SECONDS = np.inf  # steps of a block, and so dispatches, do not depend on time

def digest(value):
    if isinstance(value, np.ndarray):
        return hashlib.sha256(value.tobytes()).hexdigest()
    if isinstance(value, (list, tuple)):
        return [digest(v) for v in value]
    if isinstance(value, dict):
        return {k: digest(v) for k, v in value.items()}
    return value

found = {}
for folder in range(1, len(sys.argv)):
    with load(folder) as model:
        D, L = model.config.d_model, model.config.n_layers
        rng = np.random.default_rng(1)
        vector = vs.SteeringVector(rng.standard_normal(D).astype(np.float32), 1)
        rows, steer, quiet = rows_of(model, 40, 9, 1), vs.Steer(vector, 1.0), {"progress": False}
        edits = [[steer], [vs.Ablate(vector)], [vs.Scale("blocks.0.attn.hook_z", 0.5)]]
        with model.profile() as p:
            run = model.run(rows, capture=["*"], edits=edits)
            some = {f"run {site}": run[site] for site in model.sites}
            for name, how in (("ov", {"freeze": "ov"}), ("qk", {"freeze": "qk"}),
                              ("svv", {"ablate": "svv"})):
                some[name] = model.run(rows, edits=[steer], **how).logits
            out = model.generate(rows, max_new_tokens=6, ignore_eos=True, edits=edits, **quiet)
            some["generated"] = [g.tokens for g in out]
            of = [vs.KL(run.logits[b, -2:], [-2, -1]) for b in range(2)]
            grads = model.gradients(rows[:2], of=of, at=list(model.sites), edits=[steer], **quiet)
            some |= {f"gradient {site}": grads[site] for site in model.sites}
            samples = [vs.patching.Sample(rows[0], rows[1][:3]), vs.patching.Sample(rows[1], [7])]
            scores = vs.patching.attribute(model, samples, vector, 1.0, steps=3, **quiet)
            some["edges"] = [scores.edges, scores.nodes]
            result = vs.circuits.evaluate([scores.circuit(20)], model, samples, vector, 1.0,
                                          **quiet)[0]
            some["circuit"] = {metric: r.value for metric, r in result.items()}
            some["values"] = vs.ov.steering_value_vectors(model, vector)
        # without a profile the commands of a step are kept and run again
        out = model.generate(rows, max_new_tokens=9, ignore_eos=True, edits=edits, **quiet)
        some["in blocks"] = [g.tokens for g in out]
        found[folder] = {k: digest(v) for k, v in some.items()}
        found[folder]["counts"] = [p.dispatches, p.barriers, p.submissions]
print(json.dumps(found, default=str))
"""


@pytest.fixture(scope="module", params=KERNELS)
def results(zoo, request):
    """{mode: what the calls returned, of every model}."""
    folders = [zoo.folder(name) for name in FAMILIES]
    driver = "newer lavapipe" if request.param == "matrix" else THREADS
    kernels = {"VKSTEER_KERNELS": request.param or None}
    found = {}
    for mode in MODES:
        done = child(
            WORK,
            *folders,
            timeout=500,
            executable=python_of(driver),
            VKSTEER_BARRIERS=mode,
            **environment(driver) | kernels,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        found[mode] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("mode", MODES[1:])
def test_results_do_not_depend_on_where_barriers_are(results, mode):
    for model, expected in results["needed"].items():
        got = results[mode][model]
        assert set(got) == set(expected) and len(got) > 100
        assert [k for k in got if got[k] != expected[k] and k != "counts"] == []


def test_barriers_are_fewer_where_commands_are_independent(results):
    for model in results["needed"]:
        dispatches, barriers, _ = results["needed"][model]["counts"]
        everywhere, reverse = (results[m][model]["counts"] for m in ("all", "reverse"))
        assert everywhere[0] == reverse[0] == dispatches and reverse[1] == barriers
        assert everywhere[1] >= dispatches
        assert barriers < 0.9 * everywhere[1]


def test_another_value_is_refused(zoo):
    done = child(
        """
try:
    load()
except ValueError as error:
    print(error)
""",
        zoo.folder(FAMILIES[0]),
        VKSTEER_BARRIERS="none",
    )
    assert 'VKSTEER_BARRIERS=none: use "needed", "all" or "reverse"' in done.stdout
