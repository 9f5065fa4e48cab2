"""A random model, a steering vector and a sample for the tests of the independent attribution."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from oracle import circuits as oc
from oracle.attribution import Case
from oracle.reference import Vector
from oracle.separated import (
    edge_names,
)

KINDS = [
    "llama3",
    "gemma2",
    "qwen2",
    "qwen3",
    "llama_bias",
    "gpt2",
    "gpt_neox",
    "cohere_norm",
    "olmo",
    "olmo2",
    "granite",
    "ministral3",
]


class Setting:
    """A family's oracle, a vector at a layer, samples and their cases."""

    def __init__(self, zoo, name, rng, layer=1, sizes=((7, 9), (4, 3)), coefficient=1.0):
        self.ref = zoo.reference(name)
        self.facts, self.layer, self.coefficient = self.ref.facts, layer, coefficient
        draw = lambda n: rng.integers(0, self.facts.d_vocab, n).tolist()
        self.vector = Vector(rng.standard_normal(self.facts.d_model), layer)
        self.samples = [
            SimpleNamespace(prompt_tokens=draw(p), response_tokens=draw(r)) for p, r in sizes
        ]
        self.cases = [Case(self.ref, s, self.vector, coefficient) for s in self.samples]
        self.names = edge_names(self.facts, layer)
        self.common = self.ref, self.samples[0], self.vector, coefficient

    @property
    def case(self):
        return self.cases[0]

    def evaluate(self, circuits, *metrics, **options):
        return oc.evaluate(
            self.ref,
            circuits,
            self.samples,
            self.vector,
            self.coefficient,
            metrics,
            cases=self.cases,
            **options,
        )


@pytest.fixture
def setting(zoo, rng):
    return lambda name, **options: Setting(zoo, name, rng, **options)
