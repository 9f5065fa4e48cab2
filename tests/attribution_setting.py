"""The engine and the oracle of a family, a vector and samples, for the tests of attribution."""

from __future__ import annotations

import numpy as np
import pytest

from oracle import attribution as oracle
from oracle.compare import assert_close
from vksteer.patching import attribute

#: Of the largest score of an array.
BOUND = 1e-3
SIZES = ((7, 9), (4, 14), (12, 3))


class Setting:
    """The oracle and the engine of a family, a vector, and samples of three lengths without near
    ties.
    """

    def __init__(self, zoo, rng, name, layer=1, coefficient=1.0, sizes=SIZES):
        import vksteer as vs

        self.ref, self.model = zoo.reference(name), zoo.engine(name)
        self.vector = vs.SteeringVector(
            rng.standard_normal(self.ref.facts.d_model).astype(np.float32), layer
        )
        self.coefficient = coefficient
        self.cases = oracle.clear_cases(self.ref, rng, self.vector, coefficient, sizes)
        self.samples = [
            vs.patching.Sample(c.sample.prompt_tokens, c.sample.response_tokens) for c in self.cases
        ]

    def both(self, what=None, **options):
        """(scores of the engine, scores of the oracle) of all samples or of one."""
        some = range(len(self.cases)) if what is None else [what]
        mine = {
            k: v
            for k, v in options.items()
            if k not in ("at", "dims", "per_position", "per_sample", "max_memory")
        }
        want = oracle.attribute(
            self.ref,
            [self.samples[i] for i in some],
            self.vector,
            self.coefficient,
            cases=[self.cases[i] for i in some],
            **mine,
        )
        return self.engine(some, **options), want

    def engine(self, some=None, **options):
        samples = self.samples if some is None else [self.samples[i] for i in some]
        return attribute(
            self.model, samples, self.vector, self.coefficient, progress=False, **options
        )


@pytest.fixture
def setting(zoo, rng):
    return lambda name, **options: Setting(zoo, rng, name, **options)


def check(what, got, want, at):
    assert got.n_positions == want.n, what
    assert_close(f"{what} edges", got.edges, want.edges[at], BOUND)
    assert_close(f"{what} nodes", got.nodes, want.nodes, BOUND)
