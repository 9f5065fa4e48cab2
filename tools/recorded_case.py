"""What the calls recorded by tools/record_outputs.py share: the models, one open model with its
inputs, and the plain values that results are made of.

Each function marked `call` takes a Case and returns {result's name: value}; a value is an array or
plain data whose JSON is exact. Values of one kind of site are stacked over the layers. Only the
public interface is used, so that the calls run unchanged on other trees. All seeds are fixed.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

import vksteer as vs

GGUF = Path(__file__).resolve().parent.parent / ".models/SmolLM2-135M-Instruct.Q4_1.gguf"
#: name -> (source, coefficient of steering, tokens of a response)
MODELS = {
    "tiny-llama-chat": ("tiny-llama-chat", -1.0, 40),
    "tiny-gemma-chat": ("tiny-gemma-chat", -0.7, 40),
    "SmolLM2": (str(GGUF), 4.0, 6),
}
METRICS = ("logit_diff", "logit_diff_per_sample", "kl", "directional_kl", "match", "logprob")
METHODS = ("pruned", "top", "greedy_backward", "greedy_forward")
TEXTS = ["I cannot help with that.", "Sure. Take the hammer and go to the river.", "", "no no " * 9]
QUIET = {"progress": False}

CALLS = []


def call(function):
    """Mark a function of a Case as one recorded call. It returns {result's name: value}."""
    CALLS.append(function)
    return function


class Case:
    """One open model and the inputs that its calls share."""

    def __init__(self, name: str):
        source, self.coefficient, self.new_tokens = MODELS[name]
        self.source, self.small = source, name.startswith("tiny")
        self.model = vs.Model.from_pretrained(source, progress=False)
        self.layers = self.model.config.n_layers
        harmful, harmless = vs.data.tiny_pair("train", 64 if self.small else 3)
        self.candidates = vs.steering.difference_in_means(self.model, harmful, harmless, **QUIET)
        self.validation = vs.data.tiny_pair("validation", 12 if self.small else 2)
        self.harmful, self.harmless = vs.data.tiny_pair("test", 4 if self.small else 2)
        if self.small:
            self.vector = self.candidates.select(*self.validation, **QUIET)
        else:
            self.vector = self.candidates.vector(-1, self.layers - 4)
        rng = np.random.default_rng(1)
        top = self.model.config.d_vocab
        self.rows = [rng.integers(0, top, n).tolist() for n in (9, 4, 14, 1, 6, 11)]
        self.responses = [rng.integers(0, top, n).tolist() for n in (3, 0, 5, 2, 4, 1)]
        self.samples = vs.patching.make_samples(
            self.model,
            self.harmful[:3],
            self.vector,
            self.coefficient,
            keep="all",
            max_new_tokens=self.new_tokens // 2,
            **QUIET,
        )
        self.scored = (self.model, self.samples, self.vector, self.coefficient)
        self.steer = vs.Steer(self.vector, self.coefficient)
        self._scores = None

    @property
    def scores(self):
        """Scores of all edges, which the calls on circuits start from."""
        if self._scores is None:
            self._scores = vs.patching.attribute(*self.scored, steps=3, per_sample=True, **QUIET)
        return self._scores

    def noise(self, seed: int, *shape: int) -> np.ndarray:
        """Random numbers whose spread is that of the steering vector's entries."""
        size = self.vector.norm / np.sqrt(self.vector.width)
        return (size * np.random.default_rng(seed).standard_normal(shape)).astype(np.float32)


# -- what results are made of ------------------------------------------------------------------


def by_kind(sites) -> dict:
    """Arrays of sites, stacked over layers: "blocks.{l}.hook_resid_pre" -> [L, ...]."""
    kinds: dict[str, list] = {}
    for name, array in sites:
        head, _, rest = name.partition(".")
        kind = "blocks.{l}." + rest.partition(".")[2] if head == "blocks" else name
        kinds.setdefault(kind, []).append(array)
    return {kind: np.stack(arrays) for kind, arrays in kinds.items()}


def of_run(run) -> dict:
    found = {"tokens": run.tokens, "mask": run.mask, "touched": run.touched}
    return found | {"logits": run.logits} | by_kind(run.items())


def of_generations(generations) -> dict:
    captured = {
        f"{name}, row {i}": array
        for i, g in enumerate(generations)
        for name, array in g.captured.items()
    }
    plain = [[g.text, g.tokens, g.finish_reason, g.prompt_tokens] for g in generations]
    return {"generations": plain} | captured


def of_scores(scores) -> dict:
    names = ("edges", "nodes", "dims", "weights", "sample_edges", "sample_nodes", "n_positions")
    found = {name: getattr(scores, name) for name in names}
    for i, array in enumerate(scores.positions or ()):
        found[f"positions of sample {i}"] = array
    return found


def of_metrics(result) -> dict:
    names = ("faithfulness", "value", "full", "empty")
    return {metric: {name: getattr(r, name) for name in names} for metric, r in result.items()}
