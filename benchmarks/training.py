"""A step of NTP and of PO on SmolLM2 (6 examples, 64 response tokens, layer 15) beside PyTorch,
which also starts at layer 15's kept input.

Both sides hold the same weights (ours bfloat16 as stored, PyTorch float32, its fastest here),
differentiate nothing below the layer and no weight, and unembed only where a response token is
predicted. Rows have one length, so that PyTorch's batch has no padding.
"""

from __future__ import annotations

import statistics
import time
from types import SimpleNamespace

import numpy as np
import peers
from timing import at_least, at_most, summary, take_turns

from vksteer import steering
from vksteer.inputs.vectors import SteeringVector
from vksteer.runtime import ceilings
from vksteer.runtime.model import Model

LAYER, EXAMPLES, PROMPT, RESPONSE, COEFFICIENT, PHI = 15, 6, 32, 64, 1.0, 2e-2


def examples(seed: int = 0) -> list:
    rng = np.random.default_rng(seed)
    draw = lambda n: rng.integers(1000, 20_000, n).tolist()
    return [
        SimpleNamespace(
            prompt=draw(PROMPT),
            winning=draw(RESPONSE),
            losing=draw(RESPONSE),
            sign=1 if i % 2 else -1,
        )
        for i in range(EXAMPLES)
    ]


class Peer:
    """The same losses in PyTorch: the layers from LAYER on, with transformers' own modules, on
    inputs that were computed once.
    """

    def __init__(self, torch_model, some):
        import torch

        self.torch, self.model = torch, torch_model
        self.rows = torch.tensor([e.prompt + y for e in some for y in (e.winning, e.losing)])
        self.signs = torch.tensor([float(e.sign) for e in some for _ in range(2)])
        with torch.inference_mode():
            kept = torch_model.model(
                input_ids=self.rows[:, :-1], output_hidden_states=True, use_cache=False
            ).hidden_states[LAYER]
        self.inputs = kept.clone()
        for p in torch_model.parameters():
            p.requires_grad_(False)
        with torch.no_grad():
            self.reference = self.log_p(slice(None), torch.zeros(kept.shape[-1]))

    def log_p(self, which, v):
        """Log p of the responses of some rows, [n]."""
        torch, m = self.torch, self.model.model
        h = self.inputs[which] + COEFFICIENT * self.signs[which, None, None] * v
        places = torch.arange(h.shape[1])[None]
        angles = m.rotary_emb(h, places)
        for layer in m.layers[LAYER:]:
            out = layer(h, attention_mask=None, position_ids=places, position_embeddings=angles)
            h = out[0] if isinstance(out, tuple) else out
        logits = self.model.lm_head(m.norm(h[:, PROMPT - 1 :]))
        said = self.rows[which][:, PROMPT:]
        return (
            -torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), said.flatten(), reduction="none"
            )
            .view(said.shape)
            .sum(1)
        )

    def step(self, direction, po: bool):
        """(loss, gradient float32 [D])."""
        torch = self.torch
        v = torch.tensor(direction, requires_grad=True)
        if po:
            log_p = self.log_p(slice(None), v) / RESPONSE
            b = (PHI * (self.reference[1::2] - self.reference[::2])).clamp(min=1)
            loss = -torch.nn.functional.logsigmoid(b * log_p[::2] - log_p[1::2]).mean()
        else:
            loss = -(self.log_p(slice(None, None, 2), v) / RESPONSE).mean()
        loss.backward()
        return loss.item(), v.grad.numpy()


def counted(call, seconds: list):
    """A function that makes the call and appends the processor time of all threads to `seconds`.
    Other load changes it little, except that waiting threads of PyTorch spin.
    """

    def run():
        start = time.process_time()
        call()
        seconds.append(time.process_time() - start)

    return run


def operations(model, rows: int) -> float:
    """Operations of the matrix products of one step, forward and backward, without attention."""
    c = model.config
    layer = (ceilings.matrix_weights(model) - c.d_vocab * c.d_model) / c.n_layers
    return (
        4.0
        * rows
        * (
            (PROMPT + RESPONSE - 1) * (c.n_layers - LAYER) * layer
            + RESPONSE * c.d_vocab * c.d_model
        )
    )


def run(rounds: int, device):
    """Yields, for each loss, the time against PyTorch's and the share of the matrix kernel's
    peak.
    """
    folder = peers.safetensors_folder()
    some = examples()
    peer = Peer(peers.torch_model(folder, "float32"), some)
    with Model.from_pretrained(folder, device=device, progress=False) as model:
        vector = SteeringVector(
            np.random.default_rng(1).standard_normal(model.config.d_model) / 2, LAYER
        )
        for name, n, ours in (
            ("NTP", EXAMPLES, lambda: steering.ntp_loss(model, some, vector, COEFFICIENT)),
            (
                "PO",
                2 * EXAMPLES,
                lambda: steering.po_loss(model, some, vector, COEFFICIENT, phi=PHI),
            ),
        ):
            theirs = lambda: peer.step(vector.direction, name == "PO")
            (loss, gradient), (want, want_gradient) = ours(), theirs()
            error = float(np.abs(gradient - want_gradient).max() / np.abs(want_gradient).max())
            if abs(loss - want) > 1e-3 * abs(want) or error > 1e-2:
                raise RuntimeError(
                    f"the two sides do not compute the same: losses {loss} and {want}, gradients"
                    f" differ by {error:.2g} of the largest"
                )
            cpu = {"ours": [], "torch": []}
            times = take_turns(
                {"ours": counted(ours, cpu["ours"]), "torch": counted(theirs, cpu["torch"])}, rounds
            )
            s, t = summary(times["ours"]), summary(times["torch"])
            peak = ceilings.measure(model, 3).matrix
            rate = operations(model, n) / s["median_s"]
            what = (
                f"{name} step, SmolLM2 from layer {LAYER}, {EXAMPLES} examples, {RESPONSE} response"
                " tokens"
            )
            yield at_most(
                f"{what}: time over PyTorch's",
                s["median_s"] / t["median_s"],
                2.8,
                "times",
                ours=s,
                peer=t,
                ratio=t["median_s"] / s["median_s"],
                cpu_s={side: statistics.median(c[1:]) for side, c in cpu.items()},
                largest_difference=error,
            )
            yield at_least(
                f"{what}: share of the matrix kernel's measured peak",
                100 * rate / peak,
                55,
                "%",
                gflops=rate / 1e9,
                matrix_peak_gflops=peak / 1e9,
            )
