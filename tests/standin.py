"""Small stand-ins for vs.Model, for tests of what is built on it: no device, no weights on disk.

`NumpyModel` computes a small causal network in float64, row by row. `ScriptedModel` answers by a
rule that depends on what it was asked to freeze.
"""

from __future__ import annotations

import fnmatch
from types import SimpleNamespace

import numpy as np

from vksteer.runtime.edits import ABLATION_SITES


class Tokenizer:
    chat_template = None
    bos_id = None
    special: dict = {}

    @staticmethod
    def token(i):
        return f"<{i}>"


class Run(dict):
    """run[site] and run.logits."""

    logits = None


class NumpyModel:
    """L layers of h <- h + (mean of h up to this position) A, then h <- h + tanh(h M); logits h U.
    Tokens are 1 to V-1; a chat prompt ends with the tokens 2, 3 of the template.
    """

    post_instruction_length = 2
    fingerprint = "numpy-standin"

    def __init__(self, n_layers=5, width=12, vocabulary=40, seed=0, n_ctx=64):
        rng = np.random.default_rng(seed)
        draw = lambda *shape: rng.standard_normal(shape) / np.sqrt(width)
        self.config = SimpleNamespace(
            n_layers=n_layers, d_model=width, d_vocab=vocabulary, n_ctx=n_ctx, model_type="standin"
        )
        self.tokenizer = Tokenizer()
        self.embed = rng.standard_normal((vocabulary, width))
        self.A, self.M = draw(n_layers, width, width), draw(n_layers, width, width)
        self.U = draw(width, vocabulary)
        self.calls, self.rows_run = 0, 0

    def chat_tokens(self, prompts):
        return [
            [1] + [4 + ord(c) % (self.config.d_vocab - 4) for c in text] + [2, 3]
            for text in prompts
        ]

    def _row(self, tokens, edits, sites):
        def site(name, x):
            for e in edits:
                d = np.asarray(getattr(e.vector, "direction", e.vector), dtype=np.float64)
                kind = type(e).__name__
                if kind == "Steer" and name == f"blocks.{e.vector.layer}.hook_resid_pre":
                    x = x + e.coefficient * d
                elif kind == "Ablate" and any(fnmatch.fnmatchcase(name, p) for p in ABLATION_SITES):
                    u = d / np.linalg.norm(d)
                    x = x - np.outer(x @ u, u)
            sites[name] = x
            return x

        h = self.embed[tokens]
        for l in range(self.config.n_layers):
            h = site(f"blocks.{l}.hook_resid_pre", h)
            before = np.cumsum(h, axis=0) / np.arange(1, len(h) + 1)[:, None]
            h = h + site(f"blocks.{l}.hook_attn_out", before @ self.A[l])
            h = h + site(f"blocks.{l}.hook_mlp_out", np.tanh(h @ self.M[l]))
        return h @ self.U

    def run(self, prompts, responses=None, *, edits=(), capture=(), logits="all"):
        assert responses is None and all(0 < len(p) <= self.config.n_ctx for p in prompts)
        edits = list(edits)
        per_row = edits if edits and isinstance(edits[0], list) else [edits] * len(prompts)
        assert len(per_row) == len(prompts)
        self.calls, self.rows_run = self.calls + 1, self.rows_run + len(prompts)
        S, out, last = max(map(len, prompts)), Run(), []
        for b, (tokens, mine) in enumerate(zip(prompts, per_row)):
            sites = {}
            last.append(self._row(tokens, mine, sites)[-1])
            for name in capture:
                out.setdefault(name, np.zeros((len(prompts), S, self.config.d_model), np.float32))[
                    b, S - len(tokens) :
                ] = sites[name]
        if logits is not None:
            assert logits == "last"
            out.logits = np.array(last, dtype=np.float32)
        return out

    def generate(self, prompts, *, max_new_tokens, edits=(), **options):
        """Greedy decoding by `run`. Tokens from 5 on spell words, 4 ends a text."""
        edits, made = list(edits), []
        for b, tokens in enumerate(prompts):
            mine = edits[b] if edits and isinstance(edits[0], list) else edits
            new = []
            while len(new) < max_new_tokens and 4 not in new:
                new.append(
                    int(self.run([[*tokens, *new]], edits=mine, logits="last").logits[0].argmax())
                )
            made.append(
                SimpleNamespace(
                    text=" ".join(f"w{t}" for t in new),
                    tokens=np.array(new, np.int32),
                    finish_reason="stop" if 4 in new else "length",
                )
            )
        return made


class ScriptedModel(NumpyModel):
    """Harmful prompts contain "bomb". The effect of steering is the coefficient times the share
    that `effects` names for what is frozen or ablated, or for a "random" direction (1 if it names
    none). An effect above 0.5 refuses, one below -0.5 complies; else the prompt decides.
    """

    def __init__(self, effects, **kwargs):
        super().__init__(**kwargs)
        self.effects, self.generations = effects, []

    def generate(
        self,
        prompts,
        *,
        max_new_tokens,
        edits=(),
        freeze=None,
        ablate=None,
        freeze_layers=None,
        **options,
    ):
        self.generations.append(
            (freeze, ablate, freeze_layers, [e[0].coefficient for e in edits] if edits else None)
        )
        assert (
            not options.pop("progress")
            and options.pop("temperature") == 0.0
            and set(options) <= {"batch_size"}
        )
        bomb = self.chat_tokens(["bomb"])[0][1:-2]
        made = []
        for b, tokens in enumerate(prompts):
            harmful = any(tokens[i : i + 4] == bomb for i in range(len(tokens)))
            push = 0.0
            if edits:
                (steer,) = edits[b]
                push = steer.coefficient * self.effects.get(
                    "random" if steer.vector.method == "random" else freeze or ablate, 1.0
                )
            refuses = push > 0.5 or (push >= -0.5 and harmful)
            text = f"I cannot do {b} so." if refuses else f"Sure, here is how number {b} goes."
            made.append(
                SimpleNamespace(
                    text=text, tokens=np.arange(7, dtype=np.int32), finish_reason="stop"
                )
            )
        return made
