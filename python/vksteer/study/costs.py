"""What the steps of a study will cost: seconds, from counts of work and measured rates, and device
memory, from the plans of the calls that the steps make.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING

import numpy as np

from .. import _engine as extension
from .. import circuits
from ..circuits.graph import graph
from ..circuits.plan import Rows, kept_matrix
from ..circuits.runs import RUNS_MOST, Passes
from ..patching.attribution_layout import layout
from .prompts import Prompts
from .rates import Rates
from .settings import Settings
from .steps import Cost
from .store import Finished
from .vectors import BATCH
from .work import ROWS, WORK, Known, Shape

if TYPE_CHECKING:
    from ..runtime.model import Model

#: Tokens of one batch of prompts (steering/candidates.py), and circuits that are compiled to see
#: how much memory one takes.
PROMPT_TOKENS, COMPILED = 8192, 4
#: Steps whose rows are decoded beside their unsteered run, and those that only run prompts.
PAIRED, PASSES = {"table1"}, {"screen", "candidates", "rerouting"}


def known(finished: Mapping[str, Finished]) -> Known:
    """What the finished steps say about the work of the others."""
    found = {name: one.result for name, one in finished.items()}
    learned = [found[name]["trained"] for name in ("ntp", "po") if name in found]
    samples = {
        name: int(said["samples"])
        for step, field in (("attribution", "data_sets"), ("attribution_learned", "vectors"))
        if step in found
        for name, said in found[step][field].items()
    }
    pairs = found.get("pairs")
    return Known(
        layer=int(found["candidates"]["layer"]) if "candidates" in found else None,
        examples=None if pairs is None else _examples(pairs["counts"]),
        vectors=1 + sum(learned) if len(learned) == 2 else None,
        samples=samples,
    )


def _examples(counts: Mapping[str, int]) -> int:
    """Pairs that are left of those asked for; the other counts say why prompts gave none."""
    return counts["asked"] - sum(n for reason, n in counts.items() if reason != "asked")


class Costs:
    """Predicts steps of one model's studies.

    rates: those of this model and device. Prompts are tokenized once for each text.
    """

    def __init__(self, model: Model, rates: Rates) -> None:
        self.model, self.rates = model, rates
        self._lengths: dict[str, int] = {}

    def _tokens(self, prompts: Iterable[str]) -> int:
        texts = list(prompts)
        missing = [text for text in dict.fromkeys(texts) if text not in self._lengths]
        if missing:
            rows = self.model.chat_tokens(missing)
            self._lengths.update(zip(missing, map(len, rows), strict=True))
        return sum(self._lengths[text] for text in texts)

    def shape(self, data: Prompts, finished: Mapping[str, Finished]) -> Shape:
        """What the work of a study of these prompts depends on."""
        config = self.model.config
        sides = {split: [*data.harmful[split], *data.harmless[split]] for split in data.harmful}
        return Shape(
            {split: (len(texts), self._tokens(texts)) for split, texts in sides.items()},
            config.n_layers,
            self.model.post_instruction_length,
            self.rates.nonzero,
            lambda layer: graph(config, layer).n_edges,
            self.rates.sharing,
            config.n_heads,
            config.d_vocab,
            self.rates.lengths,
            known(finished),
        )

    def seconds(
        self, names: Iterable[str], settings: Settings, shape: Shape
    ) -> dict[str, tuple[float, float]]:
        """{step: (seconds, processor seconds)} of whole steps."""
        return {name: self.rates.cost(WORK[name](shape, settings)) for name in names}

    def predict(self, names: Iterable[str], settings: Settings, shape: Shape) -> dict[str, Cost]:
        """{step: its cost} of whole steps."""
        names = list(names)
        memory = _Memory(self.model, settings, shape)
        return {
            name: Cost(*both, memory.of(name))
            for name, both in self.seconds(names, settings, shape).items()
        }


class _Memory:
    """Predicted device memory, by step."""

    def __init__(self, model: Model, settings: Settings, shape: Shape) -> None:
        self.model, self.settings, self.shape = model, settings, shape
        plan = model._engine.plan()
        # what the model holds now, such as the tape of the last training, stays beside a step's own
        held = model._engine_device.allocated_bytes
        self.base = max(held, plan["weights"] + plan["work"])
        self.slot = plan["cache_per_token"]
        self._kept: dict[str, int] = {}

    def of(self, name: str) -> int:
        special: dict[str, Callable[[], int]] = {
            "ntp": lambda: self._training(BATCH),
            "po": lambda: self._training(2 * BATCH),
            "attribution": self._attribution,
            "attribution_learned": self._attribution,
            "positions": self._attribution,
            "circuits": lambda: self._circuits(round(1 / self.settings.grid)),
            "exact": lambda: self._circuits(self.settings.patches),
        }
        if name in ("prompts", "values", "texts"):
            return self.base
        if name in special:
            if name not in self._kept:
                self._kept[name] = self.base + special[name]()
            return self._kept[name]
        n, tokens = self.shape.prompts[
            "test" if name in ("behaviour", "table1", "sparsity", "rerouting") else
            "train" if name in ("screen", "candidates", "pairs") else "validation"
        ]  # fmt: skip
        if name in PASSES:
            return self.base + self.slot * min(tokens, PROMPT_TOKENS)
        rows = min(ROWS, 2 * n if name == "pairs" else n)
        slots = rows * (tokens / n + self.settings.new_tokens)
        return self.base + round(self.slot * slots * (2 if name in PAIRED else 1))

    def _sample(self) -> int:
        """Tokens of a sample."""
        return min(
            round(self.shape.tokens("test", 1) + self.shape.lengths.mean(self.settings.new_tokens)),
            self.model.config.n_ctx,
        )

    def _training(self, sequences: int) -> int:
        tokens = sequences * self._sample()
        return self.slot * tokens + extension.tape_bytes(
            self.model._engine, max(tokens, 16), self.shape.layer, True
        )

    def _attribution(self) -> int:
        lengths = [self._sample()] * max(1, self.settings.samples)
        try:
            return layout(
                self.model, self.shape.layer, lengths, self.settings.steps, False, False, None
            ).bytes
        except ValueError:  # not one sample fits: the step itself says so, and others may run
            return int(self.model._engine_device.available_bytes)

    def _circuits(self, n: int) -> int:
        """Bytes of n circuits in one pass, from those of a few random ones, at most what passes
        may take.
        """
        g = graph(self.model.config, self.shape.layer)
        width = self.model.config.d_model
        passes = Passes(self.model, g, np.zeros(width, np.float32), None)
        some = [circuits.random(g, max(1, g.n_edges // 4), seed) for seed in range(COMPILED)]
        rows = [Rows(kept_matrix(g, one.edges)) for one in some]
        lengths = [self._sample()] * max(1, self.settings.samples)
        _, compiled, _, chunk, slots = passes.fit(rows, lengths)
        held = (chunk, slots, max(lengths), passes.distributions)
        few, _ = compiled.bytes(*held)
        _, alone, _, _, _ = passes.fit(rows[:1], lengths)
        one, _ = alone.bytes(*held)
        wanted = one + (few - one) / (COMPILED - 1) * (min(n, RUNS_MOST) - 1)
        return round(min(passes.budget, wanted)) + self.slot * slots
