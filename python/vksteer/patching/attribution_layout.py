"""How much of an attribution goes through the device at once: the layout that the memory allows,
and the order of passes over samples and steps.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .memory_plan import LOGITS, default_memory, layouts

if TYPE_CHECKING:
    from ..runtime.model import Model

#: Tokens of samples whose sums are held together, where memory allows.
GROUP_TOKENS = 512


@dataclass(frozen=True)
class Layout:
    """How much goes through at once. bytes: device memory beside the weights."""

    capacity: int  # tokens of a forward pass, at least two runs of the longest sample
    step_capacity: int  # tokens of a forward and a backward pass
    longest: int  # tokens of the longest sample
    n_sample_tokens: int  # sample tokens whose sums are held together
    keep_inside: bool  # False: activations inside each layer are recomputed in the backward pass
    bytes: int


def layout(
    model: Model,
    layer: int,
    lengths: Sequence[int],
    steps: int,
    normed: bool,
    distributions: bool,
    max_memory: int | None,
) -> Layout:
    """The largest layout that the memory allows.

    lengths: tokens of the samples. distributions: whether the metric reads whole rows of logits.
    max_memory: bytes, or None for the default. Raises ValueError where not even one contraction
    tile of positions fits.
    """
    from ..runtime.device import _engine

    engine, free = _engine(), model._engine_device.available_bytes
    software = model.device.type == "software"
    budget = default_memory(free, software) if max_memory is None else max_memory
    longest = max(lengths)
    chunk = model._engine.plan()["chunk"]
    units = "matrix" in model.kernels
    together = max(longest, min(GROUP_TOKENS, sum(lengths)))
    needed = 0
    for step_tokens, sample_tokens, inside in layouts(longest, steps, together, chunk):
        capacity = max(step_tokens, 2 * max(sample_tokens, longest))
        sizes = (capacity, step_tokens, longest, layer, sample_tokens, steps, normed, inside)
        needed, split = engine.attribution_bytes(model._engine, *sizes)
        needed += (split if units else 0) + (LOGITS if distributions else 0)
        if needed <= budget:
            return Layout(capacity, step_tokens, longest, sample_tokens, inside, needed)
    raise ValueError(
        f"max_memory={budget / 1e6:.0f} MB is too small for one tile of {engine.ATTRIBUTE_TILE}"
        f" positions of a sample with {longest} tokens: at least {needed / 1e6:.0f} MB are needed"
    )


def passes(lengths: Sequence[int], limit: int, n_steps: int) -> list[tuple[int, int, int, int]]:
    """The passes that cover all steps of consecutive samples with at most `limit` tokens each:
    (first sample, end, first step, end).
    """
    out: list[tuple[int, int, int, int]] = []
    i = 0
    while i < len(lengths):
        j, total = i, 0
        while j < len(lengths) and total + lengths[j] * n_steps <= limit:
            total += lengths[j] * n_steps
            j += 1
        if j > i:
            out.append((i, j, 0, n_steps))
            i = j
            continue
        k = max(1, limit // lengths[i])
        out += [(i, i + 1, s, min(s + k, n_steps)) for s in range(0, n_steps, k)]
        i += 1
    return out


def consecutive(indices: Iterable[int]) -> list[list[int]]:
    """Ascending indices cut into runs of consecutive ones."""
    runs: list[list[int]] = []
    for i in indices:
        if runs and runs[-1][-1] == i - 1:
            runs[-1].append(i)
        else:
            runs.append([i])
    return runs


def group_samples(indices: Iterable[int], lengths: Sequence[int], plan: Layout) -> list[list[int]]:
    """Consecutive samples whose tokens are held together and whose two runs fit into one forward
    pass; a longer sample alone.
    """
    limit = min(plan.n_sample_tokens, plan.capacity // 2)
    groups: list[list[int]] = []
    total = 0
    for i in indices:
        if not groups or total + lengths[i] > limit:
            groups.append([])
            total = 0
        groups[-1].append(i)
        total += lengths[i]
    return groups
