"""Circuits of many sizes under a random model, with the engine and the float64 oracle: what the
tests of the model under circuits share.
"""

from __future__ import annotations

import numpy as np

import vksteer as vs
from oracle import circuits as oc
from oracle.attribution import Case
from oracle.reference import Vector
from vksteer.circuits.circuit import Circuit

SHARES = (0, 0.02, 0.2, 0.5, 0.8, 0.95, 1)


class Setting:
    """The engine and the oracle of a family, a vector, ragged samples without near ties, circuits
    of many sizes.
    """

    def __init__(self, zoo, name, rng, layer=1, coefficient=1.0, sizes=((7, 9), (4, 1), (12, 21))):
        self.model, self.ref = zoo.engine(name), zoo.reference(name)
        c = self.model.config
        self.vector = vs.SteeringVector(rng.standard_normal(c.d_model).astype(np.float32), layer)
        self.coefficient, self.layer = coefficient, layer
        self.exact = Vector(np.asarray(self.vector.direction, np.float64), layer)
        draw = lambda n: rng.integers(0, c.d_vocab, n).tolist()
        self.samples = []
        while len(self.samples) < len(sizes):
            sample = vs.patching.Sample(
                draw(sizes[len(self.samples)][0]), draw(sizes[len(self.samples)][1])
            )
            if Case(self.ref, sample, self.exact, coefficient).margin() > 1e-3:
                self.samples.append(sample)
        self.graph = vs.patching.graph(self.model, layer)
        self.circuits = [
            Circuit(self.graph, np.flatnonzero(rng.random(self.graph.n_edges) < share))
            for share in SHARES
        ]

    def evaluate(self, circuits=None, metrics=oc.METRICS, **options):
        return vs.circuits.evaluate(
            self.circuits if circuits is None else circuits,
            self.model,
            self.samples,
            self.vector,
            self.coefficient,
            metrics,
            progress=False,
            **options,
        )

    def oracle(self, **options):
        return oc.evaluate(
            self.ref,
            [set(c) for c in self.circuits],
            self.samples,
            self.exact,
            self.coefficient,
            oc.METRICS,
            **options,
        )


def same(a, b):
    assert a.keys() == b.keys()
    for metric in a:
        for name in a[metric].per_sample:
            assert np.array_equal(a[metric].per_sample[name], b[metric].per_sample[name]), (
                f"{metric} {name}"
            )


def check_metrics(setting):
    """Every metric of all circuits is the oracle's."""
    # Largest errors met on lavapipe: 8.5e-7 of a part, 8.5e-5 of a faithfulness, 0 of match. One
    # near tie changes match by up to 1 / 31.
    for circuit, got, want in zip(
        setting.circuits, setting.evaluate(), setting.oracle(), strict=True
    ):
        for metric in oc.METRICS:
            scale = max(1.0, abs(want[metric].full), abs(want[metric].empty))
            for part in ("value", "full", "empty"):
                a, b = getattr(got[metric], part), getattr(want[metric], part)
                if metric != "match":  # near ties under a circuit may fall either way
                    assert abs(a - b) <= 1e-4 * scale, (
                        f"{len(circuit)} edges, {metric} {part}: {a} against {b}"
                    )
            a, b = got[metric].faithfulness, want[metric].faithfulness
            assert abs(a - b) <= (0.06 if metric == "match" else 2e-3 * max(1.0, abs(b))), (
                f"{len(circuit)} edges, {metric}: {a} against {b}"
            )
