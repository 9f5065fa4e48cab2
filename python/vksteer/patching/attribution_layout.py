"""How much of an attribution goes through the device at once: the layout that the memory allows,
and the order of passes over samples and steps.
"""

from __future__ import annotations

from dataclasses import dataclass

#: Tokens that go forward and back together, and slots of a group, where memory allows.
STEP_TOKENS, GROUP_TOKENS = 512, 512
#: Without max_memory: this much, or half of what is free.
DEFAULT_MEMORY = 1 << 30
#: Tiles of logits of three runs (csrc/run/metric.c).
LOGITS_BYTES = 3 * (24 << 20)


@dataclass(frozen=True)
class Layout:
    """How much goes through at once. bytes: device memory beside the weights."""

    capacity: int  # tokens of a forward pass: two runs of the longest sample at least
    step_capacity: int  # tokens forward and back
    n_slots: int  # tokens whose sums are held
    keep_inside: bool  # False: the inside of each layer is computed again on the way back
    bytes: int


def layout(
    model,
    layer: int,
    lengths,
    steps: int,
    normed: bool,
    distributions: bool,
    max_memory: int | None,
) -> Layout:
    """The largest layout that the memory allows. distributions: the metric reads whole rows of
    logits. ValueError where not even one tile of positions fits.
    """
    from ..runtime.device import _engine

    engine, free = _engine(), model._engine_device.available_bytes
    budget = min(DEFAULT_MEMORY, free // 2) if max_memory is None else max_memory
    longest = max(lengths)
    tile = engine.ATTRIBUTE_TILE
    wide = max(longest, min(STEP_TOKENS, longest * steps))
    slots = max(longest, min(GROUP_TOKENS, sum(lengths)))
    least = None

    def size(step_tokens, n_slots, inside):
        capacity = max(step_tokens, 2 * max(n_slots if n_slots >= longest else longest, longest))
        needed = engine.attribution_bytes(
            model._engine, capacity, step_tokens, layer, n_slots, steps, normed, inside
        )
        return capacity, needed + (LOGITS_BYTES if distributions else 0)

    tried = [
        (wide, slots, True),
        (wide, longest, True),
        (longest, longest, True),
        (longest, longest, False),
    ]
    part = -(-longest // (2 * tile)) * tile
    while part >= tile:
        tried += [(longest, part, False)]
        if part == tile:
            break
        part = max(tile, -(-part // (2 * tile)) * tile)
    for step_tokens, n_slots, inside in tried:
        capacity, needed = size(step_tokens, n_slots, inside)
        if needed <= budget:
            return Layout(capacity, step_tokens, n_slots, inside, needed)
        least = needed
    raise ValueError(
        f"max_memory={budget / 1e6:.0f} MB is too small for one tile of {tile} positions of a"
        f" sample with {longest} tokens: at least {least / 1e6:.0f} MB are needed"
    )


def passes(lengths, limit, n_steps):
    """(first sample, end, first step, end) of the passes that cover all steps of consecutive
    samples with at most `limit` tokens.
    """
    out, i = [], 0
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


def consecutive(indices):
    runs: list[list[int]] = []
    for i in indices:
        if runs and runs[-1][-1] == i - 1:
            runs[-1].append(i)
        else:
            runs.append([i])
    return runs


def group_samples(indices, lengths, plan):
    """Samples whose tokens fit the slots together, and twice the tokens one forward pass."""
    groups, total = [], 0
    for i in indices:
        if (
            not groups
            or total + lengths[i] > plan.n_slots
            or 2 * (total + lengths[i]) > plan.capacity
        ):
            groups.append([])
            total = 0
        groups[-1].append(i)
        total += lengths[i]
    return groups
