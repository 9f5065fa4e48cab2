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


def reaches(up, down, parallel=False):
    """Whether there is an edge. A head reaches the MLP of its own layer but not its attention; an
    MLP reaches inputs from the next layer on. In a parallel layer neither reaches the other.
    """
    _, kind, layer = up
    _, to, to_layer = down
    return (
        kind == "steer"
        or to_layer > layer
        or (kind == "head" and to == "mlp" and to_layer == layer and not parallel)
    )


def edge_pairs(facts, layer):
    """[(upstream name, downstream name)], upstream-major: the order that decides ties."""
    parallel = getattr(facts, "parallel", False)
    return [
        (u[0], v[0])
        for u in upstream_nodes(facts, layer)
        for v in downstream_nodes(facts, layer)
        if reaches(u, v, parallel)
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


#: An MLP's activation, by name.
ACTIVATIONS = {
    "silu": torch.nn.functional.silu,
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
    "relu": torch.relu,
    "relu2": lambda x: torch.relu(x) ** 2,
}


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
            runs.stream[l] = before = x
            x = self._attention(l, before)
            x = x + self._mlp(l, before if f.parallel else x)
        final = self._enter("logits", x, "model.norm")
        bias = self.ref.w.get("lm_head.bias", 0.0)
        runs.uncapped = f.logit_scale * (final @ self.ref.unembed.T + bias)
        runs.logits = (
            f.final_softcap * torch.tanh(runs.uncapped / f.final_softcap)
            if f.final_softcap
            else runs.uncapped
        )
        return runs

    def _enter(self, name, stream, norm):
        """The residual stream as one downstream input reads it, after the norm (a name, or None):
        [R, S, D].
        """
        x = stream.clone()
        if self.at_input:
            x = self.at_input(name, x, self.runs.outputs)
        self.runs.inputs[name] = x
        # a tensor of its own also without a norm
        self.runs.normed[name] = x.clone() if norm is None else self._norm(x, norm)
        return self.runs.normed[name]

    def _leave(self, name, u):
        """What an upstream node adds to the residual stream: [R, S, D]."""
        u = u.clone()
        if self.at_output:
            u = self.at_output(name, u)
        self.runs.outputs[name] = u
        return u

    def _gain(self, norm):
        return self.ref.w[norm + ".weight"] + self.f.norm_offset

    def _centred(self, x):
        return x - x.mean(-1, keepdim=True) if self.f.norm == "layer" else x

    def _scale(self, x):
        return torch.sqrt((self._centred(x) ** 2).mean(-1, keepdim=True) + self.f.eps)

    def _norm(self, x, norm):
        bias = self.ref.w.get(norm + ".bias", 0.0)
        return self._centred(x) / self._scale(x) * self._gain(norm) + bias

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
        return torch.clamp(y, -f.clip_qkv, f.clip_qkv) if f.clip_qkv else y

    def _qk_norm(self, heads, layer, kind):
        """The norm of all heads' queries or keys, [[R, S, d]]."""
        f, name = self.f, f"model.layers.{layer}.self_attn.{kind}_norm"
        if f.qk_norm == "head":
            return [self._norm(y, name) for y in heads]
        if f.qk_norm == "wide":  # of one head, the statistic is that of all heads of this run
            return list(self._norm(torch.cat(heads, -1), name).split(f.d_head, -1))
        if f.qk_norm == "layer":
            gain, bias = self.ref.w[name + ".weight"], self.ref.w.get(name + ".bias")
            normed = [self._centred(y) / self._scale(y) * gain[i] for i, y in enumerate(heads)]
            return normed if bias is None else [y + bias[i] for i, y in enumerate(normed)]
        return heads

    def _rotate(self, y, layer, kind):
        """A head's query or key turned in the plane of each pair of channels."""
        f = self.f
        if f.rope[layer] is None:
            return y
        freq, factor = (f.rope_long if f.rope_long and self.n > f.rope_switch else f.rope)[layer]
        angle = torch.arange(self.n, dtype=torch.float64)[:, None] * freq
        half = len(freq)
        i = torch.arange(half)
        first, second = (2 * i, 2 * i + 1) if f.rope_interleaved else (i, half + i)
        a, b = y[..., first], y[..., second]
        out = y.index_copy(-1, first, factor * (a * torch.cos(angle) - b * torch.sin(angle)))
        out = out.index_copy(-1, second, factor * (b * torch.cos(angle) + a * torch.sin(angle)))
        if kind == "q" and f.query_beta:
            steps = torch.arange(self.n, dtype=torch.float64) // f.query_length
            out = out * (1 + f.query_beta * torch.log(1 + steps))[:, None]
        return out

    def _attention(self, l, x):
        f, norm = self.f, f"model.layers.{l}.input_layernorm" if self.f.pre_norms else None
        heads = {
            kind: [
                self._project(self._enter(f"a{l}.h{i}<{kind}>", x, norm), l, kind, i)
                for i in range(count)
            ]
            for kind, count in (("q", f.n_heads), ("k", f.n_kv_heads), ("v", f.n_kv_heads))
        }
        for kind in "qk":
            normed = self._qk_norm(heads[kind], l, kind)
            heads[kind] = [self._rotate(y, l, kind) for y in normed]
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
            part = w_o[:, h * f.d_head : (h + 1) * f.d_head]
            results.append(f.residual_scale * (z @ part.T))
        bias = self.ref.w.get(f"model.layers.{l}.self_attn.o_proj.bias")
        # Every head is divided by the RMS of the attention output of all heads of this run.
        if f.post_norms:
            assert bias is None
            whole = self._scale(sum(results))
            results = [
                r / whole * self._gain(f"model.layers.{l}.post_attention_layernorm")
                for r in results
            ]
        x = x if bias is None else x + f.residual_scale * bias
        for h in range(f.n_heads):
            x = x + self._leave(f"a{l}.h{h}", results[h])
        return x

    def _mlp(self, l, x):
        f, w, name = self.f, self.ref.w, f"model.layers.{l}."
        norm = "pre_feedforward_layernorm" if f.post_norms else "post_attention_layernorm"
        y = self._enter(f"m{l}", x, name + norm if f.pre_norms else None)
        project = lambda part, x: (
            x @ w[f"{name}mlp.{part}_proj.weight"].T + w.get(f"{name}mlp.{part}_proj.bias", 0.0)
        )
        post = (
            ACTIVATIONS[f.act](project("gate", y)) * project("up", y)
            if f.gated
            else ACTIVATIONS[f.act](project("up", y))
        )
        out = f.residual_scale * project("down", post)
        if f.post_norms:
            out = self._norm(out, name + "post_feedforward_layernorm")
        return self._leave(f"m{l}", out)
