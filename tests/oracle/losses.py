"""Losses of learned steering vectors in torch float64, from docs/method.md section 2, with their
gradients by autograd.

An example has prompt, winning, losing (token lists) and sign (+1 or -1); its steered runs carry
(coefficient * sign) * direction at every position of prompt and response. Only the first 64 tokens
of a response are summed, and |y| is how many these are. The reference model of PO is not steered.
"""

from __future__ import annotations

import torch

from .reference import Steer, Vector

LIMIT = 64


def log_prob(ref, prompt, response, steer=None, limit=LIMIT):
    """(log p of the response's first `limit` tokens after the prompt, how many these are)."""
    response = list(response)[:limit]
    logits = ref.forward(
        list(prompt) + response,
        edits=[steer] if steer else [],
        prompt_length=len(prompt),
        keep=False,
    ).logits
    said = torch.log_softmax(logits[len(prompt) - 1 : -1], dim=-1)
    return said[torch.arange(len(response)), torch.tensor(response)].sum(), len(response)


def _steer(example, direction, layer, coefficient):
    return Steer(Vector(direction, layer), coefficient * example.sign)


def ntp(ref, example, direction, layer, coefficient, *, reduction="mean", limit=LIMIT):
    """-log p(winning | steered), the mean over its tokens or their sum."""
    value, n = log_prob(
        ref, example.prompt, example.winning, _steer(example, direction, layer, coefficient), limit
    )
    return -value / (n if reduction == "mean" else 1)


def po(ref, example, direction, layer, coefficient, *, phi=2e-2, limit=LIMIT):
    """-log sigmoid(delta): delta = b/|yw| log p(yw|steered) - 1/|yl| log p(yl|steered), b = max(phi
    (log p(yl) - log p(yw)), 1) of the unsteered model.
    """
    steer = _steer(example, direction, layer, coefficient)
    (won, n_won), (lost, n_lost) = (
        log_prob(ref, example.prompt, y, steer, limit) for y in (example.winning, example.losing)
    )
    with torch.no_grad():
        plain_won, plain_lost = (
            log_prob(ref, example.prompt, y, None, limit)[0]
            for y in (example.winning, example.losing)
        )
    b = max(phi * float(plain_lost - plain_won), 1.0)
    return -torch.nn.functional.logsigmoid(b / n_won * won - lost / n_lost)


def with_gradient(loss, ref, examples, direction, layer, coefficient, **options):
    """(mean of `loss` over the examples, its gradient with respect to the direction [D])."""
    v = torch.as_tensor(direction).to(torch.float64).clone().requires_grad_()
    value = torch.stack([loss(ref, e, v, layer, coefficient, **options) for e in examples]).mean()
    return value.item(), torch.autograd.grad(value, v)[0]
