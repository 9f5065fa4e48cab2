"""Most bytes of the engine's buffers during runs, attribution and circuits, with their plans.

`measure` opens the model anew for each, so that nothing is left of the one before; it also runs in
a child process on the newer Mesa, with products on matrix units.
"""

from __future__ import annotations

import numpy as np

import vksteer as vs
from vksteer.circuits.runs import Passes
from vksteer.runtime.memory_plan import UPLOAD


def measure(name: str, short: bool = False) -> dict[str, list[float]]:
    """{what: [measured bytes, planned bytes]}. name: a model's. short: few tokens and no circuits,
    for a large model where products are slow.
    """
    found: dict[str, list[float]] = {}
    share = 8 if short else 1
    for case in (plain_run, generation, attribution, circuits)[: 3 if short else 4]:
        with vs.Model.from_pretrained(name, progress=False) as model:
            case(model, np.random.default_rng(0), found, share)
    return found


def draw(model, rng, *lengths):
    return [rng.integers(0, model.config.d_vocab, n).tolist() for n in lengths]


def beside(plan) -> int:
    """What a run adds to a model that was just loaded; loading has split rows already."""
    parts = (plan.scores, plan.cache, plan.rotation, plan.picks)
    return sum(parts) + UPLOAD


def plain_run(model, rng, found, share):
    rows = draw(model, rng, 250 // share, 200 // share, 120 // share)
    device = model._engine_device
    held = device.allocated_bytes
    device.peak_bytes(True)
    model.run(rows, logits="last")
    plan = vs.plan_run(model, [len(r) for r in rows])
    found["run, all"] = [device.peak_bytes(), plan.total]
    found["run, beside the model"] = [device.peak_bytes() - held, beside(plan)]


def generation(model, rng, found, share):
    rows = draw(model, rng, *(n // share for n in (150, 120, 130, 90)))
    device = model._engine_device
    held = device.allocated_bytes
    device.peak_bytes(True)
    model.generate(rows, max_new_tokens=8, ignore_eos=True, progress=False)
    plan = vs.plan_run(model, [len(r) for r in rows], new_tokens=8)
    found["generate, all"] = [device.peak_bytes(), plan.total]
    found["generate, beside the model"] = [device.peak_bytes() - held, beside(plan)]


def steering(model, rng):
    direction = rng.standard_normal(model.config.d_model).astype(np.float32)
    return vs.SteeringVector(direction, 1)


def attribution(model, rng, found, share):
    vector, device = steering(model, rng), model._engine_device
    cases = ((48, 10, None), (64, 2, "40MB")) if share == 1 else ((16, 2, None),)
    for n, steps, memory in cases:
        samples = [vs.patching.Sample(*draw(model, rng, n - 8, 8))]
        model._cache = None
        held = device.allocated_bytes
        device.peak_bytes(True)
        options = {"steps": steps, "max_memory": memory}
        plan = vs.patching.plan(model, 1, n, response=9, **options)
        if not plan.fits:  # a larger model
            continue
        vs.patching.attribute(model, samples, vector, 1.0, progress=False, **options)
        found[f"attribution, {plan.mode}, {n}"] = [device.peak_bytes() - held, plan.total]


def circuits(model, rng, found, _):
    vector, device = steering(model, rng), model._engine_device
    samples = [vs.patching.Sample(*draw(model, rng, 40, 8)) for _ in range(3)]
    scores = vs.patching.attribute(model, samples, vector, 1.0, steps=1, progress=False)
    some = [scores.circuit(n) for n in (50, 100, 200)]
    for metric in ("logit_diff", "kl"):
        planned, held = [0], [0]
        fit = Passes.fit

        def watched(self, rows, lengths, first=()):
            out = fit(self, rows, lengths, first)
            _, engine, _, chunk, slots = out
            planned[0] = engine.bytes(chunk, slots, max(lengths), self.distributions)[0]
            held[0] = device.allocated_bytes  # the memory is reserved next
            device.peak_bytes(True)
            return out

        Passes.fit = watched
        try:
            vs.circuits.evaluate(
                some, model, samples, vector, 1.0, metrics=(metric,), progress=False
            )
        finally:
            Passes.fit = fit
        found[f"circuits, {metric}"] = [device.peak_bytes() - held[0], planned[0]]
