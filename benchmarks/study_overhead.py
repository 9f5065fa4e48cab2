"""What a study costs beyond its parts: the tiny study of a bundled model, and the same calls of the
public interface made by hand without a folder, in turns.

    python benchmarks/study_overhead.py [--rounds N] [--out FILE.json]

Times are of the processor, over all threads of the process, so that other work on the machine
counts little; the median of the rounds' ratios should be at most 1.05. The parts are those of one
study that is made first: its vectors, coefficients, samples' counts and settings.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from timing import at_most

import vksteer as vs
from vksteer import data, freezing, ov, patching, reliability, sparsify, steering
from vksteer.circuits.faithfulness import halves_of
from vksteer.study.meaning import meaning
from vksteer.study.settings import Settings
from vksteer.study.shown import MOST_SAMPLES
from vksteer.study.vectors import BASELINE, BATCH, LR

QUIET: dict[str, Any] = {"progress": False}
THRESHOLD = 0.85


class Parts:
    """The calls of a study one after the other, with what later ones need."""

    def __init__(self, model: vs.Model, settings: Settings) -> None:
        self.model, self.s = model, settings
        self.pairs = {
            split: data.tiny_pair(split, getattr(settings, split))
            for split in ("train", "validation", "test")
        }
        self.new = {"max_new_tokens": settings.new_tokens, **QUIET}

    def run(self) -> None:
        model, s, pairs, new = self.model, self.s, self.pairs, self.new
        reliability.screen(model, *pairs["train"], seed=s.seed, **QUIET)
        found = steering.difference_in_means(model, *pairs["train"], **QUIET)
        self.dim = found.select(*pairs["validation"], **QUIET)
        sweep = steering.sweep(model, self.dim, s.coefficients, *pairs["validation"], **new)
        self.plus, self.minus = sweep.best_pair or (1.0, 1.0)
        steering.calibrate(model, self.dim, *pairs["validation"], **new)
        strengths = self.plus, self.minus
        examples = steering.training_data(model, *pairs["train"], self.dim, strengths, **new)
        vectors = {"dim": self.dim} | self.learned(examples)
        steering.compare(
            model, vectors, *pairs["test"], strengths,
            circuits=False, prompt_baseline=BASELINE, **new,
        )  # fmt: skip
        freezing.ablation_table(
            model, self.dim, *pairs["test"], strengths,
            random_control=s.controls, prompt_baseline=BASELINE, seed=s.seed, **new,
        )  # fmt: skip
        scores = self.inside(vectors)
        prompts = pairs["test"][0][: s.samples]
        ov.rerouting(model, prompts, self.dim, -self.minus, **QUIET)
        meaning(model, self.dim, pairs["train"], found.table.refusal_tokens.texts, **QUIET)
        sparsify.sweep(
            model, self.dim, scores, *pairs["test"], strengths,
            taus=s.taus, methods=("gradient", "random"), seed=s.seed, **new,
        )  # fmt: skip

    def learned(self, examples: steering.TrainingData) -> dict[str, vs.SteeringVector]:
        options = {
            "layer": self.dim.layer, "coefficient": 1.0, "epochs": self.s.epochs, "lr": LR,
            "batch_size": BATCH, "limit": self.s.new_tokens, "seed": 42 + self.s.seed, **QUIET,
        }  # fmt: skip
        trains = {"ntp": steering.train_ntp, "po": steering.train_po}
        return {
            name: train(self.model, examples, **options).normalized_to(self.dim)
            for name, train in trains.items()
        }

    def inside(self, vectors: dict[str, vs.SteeringVector]) -> patching.EdgeScores:
        """Attribution and circuits of every data set and learned vector; the scores of the first
        data set.
        """
        jobs = [("dim", side, of) for side in (0, 1) for of in ("steered", "base")]
        jobs += [(name, 0, "steered") for name in vectors if name != "dim"]
        first = None
        for name, side, responses in jobs:
            vector, a = vectors[name], (-self.minus, self.plus)[side]
            prompts = self.pairs["test"][side][: self.s.samples]
            samples = patching.make_samples(
                self.model, prompts, vector, a, responses=responses, **self.new
            )
            if not samples:
                continue
            options = {"steps": self.s.steps, "dims": "steer", "per_sample": True, **QUIET}
            scores = patching.attribute(self.model, samples, vector, a, **options)
            if first is None:
                first = scores
                self.exact(samples, scores, a)
                self.by_position(samples, a)
                sizes = [round(x * scores.graph.n_edges) for x in (*self.s.shares, 1)]
                vs.circuits.faithfulness_curve(
                    scores, self.model, samples, vector, a, sizes, random=2, halves=True, **QUIET
                )
            halves = halves_of(scores, samples, self.s.seed)
            mine, others = ([samples[i] for i in half] for half in halves)
            circuit = vs.circuits.minimum_faithful(
                scores.of_samples(halves[0]), self.model, mine, vector, a, THRESHOLD,
                step=self.s.grid, **QUIET,
            )  # fmt: skip
            circuit.evaluate(self.model, others, vector, a, **QUIET)
        assert first is not None, "steering flips no prompt"
        return first

    def exact(self, samples: Any, scores: patching.EdgeScores, a: float) -> None:
        assert scores.sample_edges is not None
        order = np.argsort(-np.abs(scores.sample_edges[0]))[: self.s.patches]
        patching.exact(self.model, samples[0], self.dim, a, edges=order.tolist(), **QUIET)

    def by_position(self, samples: Any, a: float) -> None:
        for sample in samples[:MOST_SAMPLES]:
            patching.attribute(
                self.model, [sample], self.dim, a, steps=self.s.steps, per_position=True, **QUIET
            )


def processor_seconds(call: Callable[[], object]) -> float:
    start = time.process_time()
    call()
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    with vs.Model.from_pretrained("tiny-llama-chat", progress=False) as model:
        parts, rows = Parts(model, Settings.of("tiny")), []
        for number in range(arguments.rounds + 1):
            with tempfile.TemporaryDirectory() as folder:
                study = processor_seconds(
                    lambda to=folder: vs.study.run(model, out=to, size="tiny", progress=False)
                )
            by_hand = processor_seconds(parts.run)
            if number:  # the first round compiles kernels
                rows.append((study, by_hand))
                print(f"study {study:.1f} s, by hand {by_hand:.1f} s: {study / by_hand:.3f}")
    ratio = statistics.median(study / by_hand for study, by_hand in rows)
    result = at_most(
        "tiny study over its parts, processor time", ratio, 1.05, "times",
        study_s=statistics.median(s for s, _ in rows), n=len(rows),
    )  # fmt: skip
    print(json.dumps(result, indent=1))
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
