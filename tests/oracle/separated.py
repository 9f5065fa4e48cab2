"""The graph of docs/method.md section 4 and a forward pass through it in torch float64, in which
every downstream input is a tensor of its own.

From the steering layer on, each query, key, value, MLP and logits input is a copy of the residual
stream that only its own projection reads, so that autograd's gradient with respect to the copy is
dm/dv through that input alone. Layers below the steering layer are taken from Reference. Several
runs of the same tokens go through together (runs on axis 0): coefficients of an integration path,
patches, circuits. It is written head by head from the page and shares no code with vksteer.

R runs, S positions, D width, H query heads, G key/value heads, d head size, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import torch

# -- names -----------------------------------------------------------------------------------------


def upstream_nodes(facts, layer):
    """[(name, kind, layer)] in order: steer; layer by layer every head, then the MLP. kind:
    "steer", "head" or "mlp".
    """
    nodes = [("steer", "steer", layer)]
    for l in range(layer, facts.n_layers):
        nodes += [(f"a{l}.h{h}", "head", l) for h in range(facts.n_heads)] + [(f"m{l}", "mlp", l)]
    return nodes


def downstream_nodes(facts, layer):
    """[(name, kind, layer)] in order: layer by layer queries, keys, values, the MLP; logits. kind:
    "q", "k", "v", "mlp" or "logits".
    """
    nodes = []
    for l in range(layer, facts.n_layers):
        for kind, count in (("q", facts.n_heads), ("k", facts.n_kv_heads), ("v", facts.n_kv_heads)):
            nodes += [(f"a{l}.h{i}<{kind}>", kind, l) for i in range(count)]
        nodes.append((f"m{l}", "mlp", l))
    return nodes + [("logits", "logits", facts.n_layers)]


def reaches(up, down):
    """Whether there is an edge. A head reaches the MLP of its own layer but not its attention; an
    MLP reaches inputs from the next layer on.
    """
    _, kind, layer = up
    _, to, to_layer = down
    return (
        kind == "steer"
        or to_layer > layer
        or (kind == "head" and to == "mlp" and to_layer == layer)
    )


def edge_pairs(facts, layer):
    """[(upstream name, downstream name)], upstream-major: the order that decides ties."""
    return [
        (u[0], v[0])
        for u in upstream_nodes(facts, layer)
        for v in downstream_nodes(facts, layer)
        if reaches(u, v)
    ]


def edge_names(facts, layer):
    return [f"{u}->{v}" for u, v in edge_pairs(facts, layer)]


def node_names(facts, layer):
    return [name for name, _, _ in upstream_nodes(facts, layer)]


def fed_by(facts, name):
    """Upstream nodes whose output depends on a downstream input: one head, all query heads of a
    key/value head's group, an MLP; [] for logits.
    """
    if name == "logits":
        return []
    if name.startswith("m"):
        return [name]
    head, kind = name[:-1].split("<")
    layer, i = head[1:].split(".h")
    group = facts.n_heads // facts.n_kv_heads
    return (
        [head]
        if kind == "q"
        else [f"a{layer}.h{h}" for h in range(int(i) * group, (int(i) + 1) * group)]
    )


# -- the pass --------------------------------------------------------------------------------------


@dataclass
class Runs:
    """The values of R runs over the same tokens."""

    logits: torch.Tensor = None  # [R, S, V], after the final soft cap
    uncapped: torch.Tensor = None  # [R, S, V], before it
    # upstream node -> [R, S, D], what it adds to the stream ("steer": the stream itself)
    outputs: dict = field(default_factory=dict)
    # downstream node -> [R, S, D], the residual stream as this input alone reads it
    inputs: dict = field(default_factory=dict)
    # downstream node -> [R, S, D], the same after the norm and its gain
    normed: dict = field(default_factory=dict)
    # layer -> [R, S, D], the stream entering it (for comparisons)
    stream: dict = field(default_factory=dict)

    def read(self, capped):
        return self.logits if capped else self.uncapped


class Separated:
    """One row of tokens above a steering layer.

    ref: a Reference. vector: float [D]. The residual stream below `layer` does not depend on
    steering and is computed once.
    """

    def __init__(self, ref, tokens, vector, layer):
        self.ref, self.f, self.layer = ref, ref.facts, layer
        with torch.no_grad():
            self.below = ref.forward(list(tokens)).sites[f"blocks.{layer}.hook_resid_pre"]  # [S, D]
        direction = getattr(vector, "direction", vector)
        self.vector = (
            direction
            if isinstance(direction, torch.Tensor)
            else torch.as_tensor(np.asarray(direction, np.float64))
        )
        self.n = len(tokens)

    def run(self, coefficients, *, at_input=None, at_output=None, gradients=False):
        """Runs with coefficients[r] * vector added to the residual stream at every position of the
        steering layer.

        at_input(name, x, outputs) -> x changes what a downstream input reads (outputs: of the nodes
        before it); at_output(name, u) -> u changes what an upstream node adds to the stream.
        gradients: autograd can go from the logits to every output and input.
        """
        self.at_input, self.at_output, self.runs = at_input, at_output, Runs()
        with torch.set_grad_enabled(gradients):
            return self._run(torch.as_tensor(coefficients, dtype=torch.float64))

    def _run(self, coefficients):
        f, runs = self.f, self.runs
        start = self.below + coefficients[:, None, None] * self.vector
        x = self._leave("steer", start.requires_grad_(torch.is_grad_enabled()))
        for l in range(self.layer, f.n_layers):
            runs.stream[l] = x
            x = self._attention(l, x)
            x = self._mlp(l, x)
        final = self._enter("logits", x, "model.norm.weight")
        runs.uncapped = final @ self.ref.unembed.T
        runs.logits = (
            f.final_softcap * torch.tanh(runs.uncapped / f.final_softcap)
            if f.final_softcap
            else runs.uncapped
        )
        return runs

    def _enter(self, name, stream, norm):
        """The residual stream as one downstream input reads it, after the norm: [R, S, D]."""
        x = stream.clone()
        if self.at_input:
            x = self.at_input(name, x, self.runs.outputs)
        self.runs.inputs[name] = x
        self.runs.normed[name] = self._rms_norm(x, norm)
        return self.runs.normed[name]

    def _leave(self, name, u):
        """What an upstream node adds to the residual stream: [R, S, D]."""
        u = u.clone()
        if self.at_output:
            u = self.at_output(name, u)
        self.runs.outputs[name] = u
        return u

    def _gain(self, weight):
        return self.ref.w[weight] + self.f.norm_offset

    def _rms(self, x):
        return torch.sqrt((x**2).mean(-1, keepdim=True) + self.f.eps)

    def _rms_norm(self, x, weight):
        return x / self._rms(x) * self._gain(weight)

    def _project(self, x, layer, kind, head):
        """One head's query, key or value [R, S, d] from its own normed input."""
        f = self.f
        name, rows = (
            f"model.layers.{layer}.self_attn.{kind}_proj.",
            slice(head * f.d_head, (head + 1) * f.d_head),
        )
        y = x @ self.ref.w[name + "weight"][rows].T
        if name + "bias" in self.ref.w:
            y = y + self.ref.w[name + "bias"][rows]
        if kind == "v":
            return y
        if f.qk_norm:
            y = self._rms_norm(y, f"model.layers.{layer}.self_attn.{kind}_norm.weight")
        freq, factor = f.rope[layer]
        angle = torch.arange(self.n, dtype=torch.float64)[:, None] * torch.cat([freq, freq])
        half = f.d_head // 2
        turned = torch.cat([-y[..., half:], y[..., :half]], dim=-1)
        return factor * (y * torch.cos(angle) + turned * torch.sin(angle))

    def _attention(self, l, x):
        f, norm = self.f, f"model.layers.{l}.input_layernorm.weight"
        heads = {
            kind: [
                self._project(self._enter(f"a{l}.h{i}<{kind}>", x, norm), l, kind, i)
                for i in range(count)
            ]
            for kind, count in (("q", f.n_heads), ("k", f.n_kv_heads), ("v", f.n_kv_heads))
        }
        i = torch.arange(self.n)
        ahead = i[:, None] - i[None, :]  # how far the query is after the key
        seen = (ahead >= 0) & (ahead < (f.window[l] or self.n))
        w_o = self.ref.w[f"model.layers.{l}.self_attn.o_proj.weight"]
        results = []
        for h in range(f.n_heads):
            g = h // (f.n_heads // f.n_kv_heads)
            scores = f.attn_scale * heads["q"][h] @ heads["k"][g].transpose(1, 2)
            if f.attn_softcap:
                scores = f.attn_softcap * torch.tanh(scores / f.attn_softcap)
            pattern = torch.softmax(scores.masked_fill(~seen, -math.inf), dim=-1)
            z = pattern @ heads["v"][g]
            results.append(z @ w_o[:, h * f.d_head : (h + 1) * f.d_head].T)
        bias = self.ref.w.get(f"model.layers.{l}.self_attn.o_proj.bias")
        # Every head is divided by the RMS of the attention output of all heads of this run.
        if f.post_norms:
            assert bias is None
            whole = self._rms(sum(results))
            results = [
                r / whole * self._gain(f"model.layers.{l}.post_attention_layernorm.weight")
                for r in results
            ]
        x = x if bias is None else x + bias
        for h in range(f.n_heads):
            x = x + self._leave(f"a{l}.h{h}", results[h])
        return x

    def _mlp(self, l, x):
        f, w, name = self.f, self.ref.w, f"model.layers.{l}."
        y = self._enter(
            f"m{l}",
            x,
            name
            + (
                "pre_feedforward_layernorm.weight"
                if f.post_norms
                else "post_attention_layernorm.weight"
            ),
        )
        gate, up = (
            y @ w[f"{name}mlp.{p}_proj.weight"].T + w.get(f"{name}mlp.{p}_proj.bias", 0.0)
            for p in ("gate", "up")
        )
        act = (
            torch.nn.functional.silu(gate)
            if f.act == "silu"
            else torch.nn.functional.gelu(gate, approximate="tanh")
        )
        out = (act * up) @ w[name + "mlp.down_proj.weight"].T + w.get(
            name + "mlp.down_proj.bias", 0.0
        )
        if f.post_norms:
            out = self._rms_norm(out, name + "post_feedforward_layernorm.weight")
        return x + self._leave(f"m{l}", out)
