"""A random steering vector for the tests of sparsification."""

from __future__ import annotations

from vksteer.inputs.vectors import SteeringVector


def vector(rng, width=37, **more):
    return SteeringVector(
        rng.standard_normal(width), 2, position=-1, method="dim", meta={"model": "m"}, **more
    )
