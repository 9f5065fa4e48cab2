"""`vksteer bench`: what bounds a model on a device."""

from __future__ import annotations

import argparse
import json
import time
from typing import TYPE_CHECKING, Any, NamedTuple

from .arguments import Help, device_argument, positive

if TYPE_CHECKING:
    from ..base.progress import Progress
    from ..runtime.ceilings import Ceilings
    from ..runtime.model import Model
    from ..runtime.profile import KernelCost, Profile

#: A share of the measured rate from which on a phase counts as bound by it.
BOUND = 0.5
#: The device is idle for a larger share than this: the host is what it waits for.
IDLE = 0.4
#: Commands shorter than this on average are bound by being started and waited for.
SHORT = 50e-6
ROUNDS = 3


class Phase(NamedTuple):
    """Prefill, or decoding. seconds: of the calls without a profile, the best of ROUNDS; the
    others are the fastest profile's figures. tokens: new positions, of all rows.
    """

    name: str
    tokens: int
    seconds: float
    device_seconds: float
    host_seconds: float
    dispatches: int
    barriers: int
    kernels: list[KernelCost]


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "bench",
        formatter_class=Help,
        help="measure what bounds a model on a device",
        description=(
            "Measure how fast the device reads memory and multiplies matrices, run prefill and"
            " decoding of a\nmodel, and print each kernel's share of these two rates, with a"
            " verdict in words. Tokens are random."
        ),
    )
    add = parser.add_argument
    add("--model", default="tiny-llama-chat", help="folder, GGUF file or name (default: bundled)")
    add("--dtype", default="auto", help="how matrices are held on the device (default: auto)")
    add("--rows", type=positive, default=1, help="rows of the batch (default: 1)")
    add("--prompt-tokens", type=positive, default=128, help="of each row's prompt (default: 128)")
    add("--new-tokens", type=positive, default=32, help="decoded by each row (default: 32)")
    device_argument(parser)
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from ..base.progress import Progress
    from ..runtime.ceilings import measure
    from ..runtime.model import Model

    with Model.from_pretrained(
        args.model, device=args.device, dtype=args.dtype, progress=not args.json
    ) as model:
        longest = args.prompt_tokens + args.new_tokens
        if longest > model.config.n_ctx:
            raise ValueError(
                f"{longest} tokens a row, and this model's context is {model.config.n_ctx}: lower"
                " --prompt-tokens or --new-tokens"
            )
        ceilings = measure(model)
        with Progress(not args.json, 2 * (2 * ROUNDS + 1), "bench") as progress:
            phases = _phases(model, args.rows, args.prompt_tokens, args.new_tokens, progress)
        result = {
            "model": model.name,
            "device": str(model.device),
            "kernels": list(model.kernels),
            "rows": args.rows,
            "prompt_tokens": args.prompt_tokens,
            "new_tokens": args.new_tokens,
            "read_bytes_per_second": ceilings.read,
            "matrix_flops_per_second": ceilings.matrix,
            "phases": [_described(phase, ceilings) for phase in phases],
        }
    print(json.dumps(result, indent=1) if args.json else text(result))
    return 0


def _phases(
    model: Model, rows: int, prompt_tokens: int, new_tokens: int, progress: Progress
) -> list[Phase]:
    import numpy as np

    draw = np.random.default_rng(0).integers
    prompts = [draw(0, model.config.d_vocab, prompt_tokens).tolist() for _ in range(rows)]

    def call(n: int) -> None:
        model.generate(prompts, max_new_tokens=n, ignore_eos=True, progress=False)
        progress.step()

    def timed(n: int) -> tuple[float, Profile]:
        call(n)  # compiles kernels
        best = min(_seconds(call, n) for _ in range(ROUNDS))
        profiles = []
        for _ in range(ROUNDS):
            with model.profile() as profile:
                call(n)
            profiles.append(profile)
        return best, min(profiles, key=lambda p: p.seconds)

    short, first = timed(1)
    long, whole = timed(1 + new_tokens)
    return [
        _phase("prefill", rows * prompt_tokens, short, first, None),
        _phase("decoding", rows * new_tokens, max(long - short, 1e-9), whole, first),
    ]


def _seconds(call: Any, n: int) -> float:
    begin = time.perf_counter()
    call(n)
    return time.perf_counter() - begin


def _phase(name: str, tokens: int, seconds: float, p: Profile, less: Profile | None) -> Phase:
    """The figures of `p`, without those of `less`, which it includes. Both vary from run to run; no
    time is below 0.
    """
    earlier = {} if less is None else {cost.kernel: cost for cost in less.kernels}
    kernels = [c.minus(earlier[c.kernel]) if c.kernel in earlier else c for c in p.kernels]
    kernels = [c._replace(seconds=max(c.seconds, 0.0)) for c in kernels if c.calls > 0]
    kernels.sort(key=lambda c: -c.seconds)
    return Phase(
        name,
        tokens,
        seconds,
        sum(c.seconds for c in kernels),
        max(p.host_seconds - (less.host_seconds if less else 0), 0.0),
        p.dispatches - (less.dispatches if less else 0),
        p.barriers - (less.barriers if less else 0),
        kernels,
    )


def _shares(costs: list[KernelCost], ceilings: Ceilings) -> tuple[float, float]:
    """(of the measured read rate, of the measured matrix rate)"""
    seconds = sum(c.seconds for c in costs)
    if not seconds > 0:
        return 0.0, 0.0
    moved = sum(c.bytes_read + c.bytes_written for c in costs)
    return moved / seconds / ceilings.read, sum(c.flops for c in costs) / seconds / ceilings.matrix


def _described(phase: Phase, ceilings: Ceilings) -> dict[str, Any]:
    memory, matrix = _shares(phase.kernels, ceilings)
    return {
        "name": phase.name,
        "tokens": phase.tokens,
        "tokens_per_second": phase.tokens / phase.seconds,
        "seconds": phase.seconds,
        "device_seconds": phase.device_seconds,
        "host_seconds": phase.host_seconds,
        "dispatches": phase.dispatches,
        "barriers": phase.barriers,
        "memory_share": memory,
        "matrix_share": matrix,
        "verdict": verdict(phase, memory, matrix),
        "kernels": [_kernel(c, phase, ceilings) for c in phase.kernels],
    }


def _kernel(cost: KernelCost, phase: Phase, ceilings: Ceilings) -> dict[str, Any]:
    memory, matrix = _shares([cost], ceilings)
    return {
        "kernel": cost.kernel,
        "calls": cost.calls,
        "seconds": cost.seconds,
        "time_share": cost.seconds / phase.device_seconds if phase.device_seconds > 0 else 0.0,
        "memory_share": memory,
        "matrix_share": matrix,
    }


def verdict(phase: Phase, memory: float, matrix: float) -> str:
    """What bounds the phase, in words."""
    idle = 1 - phase.device_seconds / phase.seconds
    each = phase.device_seconds / max(phase.dispatches, 1)
    if max(memory, matrix) >= BOUND:
        if memory >= matrix:
            return f"bound by memory: {memory:.0%} of the measured bandwidth"
        return f"bound by arithmetic: {matrix:.0%} of the measured matrix rate"
    if idle > IDLE:
        return (
            f"bound by the host: the device is idle for {idle:.0%} of the time, and calls take"
            f" {phase.host_seconds / phase.seconds:.0%} of it without their waits"
        )
    reached = f"{memory:.0%} of the measured bandwidth, {matrix:.0%} of the measured matrix rate"
    if each < SHORT:
        return (
            f"bound by dispatches: {phase.dispatches} of {each * 1e6:.1f} us each on average"
            f" ({reached})"
        )
    return f"bound by neither memory nor arithmetic ({reached}): see the longest kernels"


def text(result: dict[str, Any]) -> str:
    names = ", ".join(result["kernels"])
    read, matrix = result["read_bytes_per_second"] / 1e9, result["matrix_flops_per_second"] / 1e9
    lines = [
        f"{result['model']} on {result['device']}, kernels {names}",
        f"measured: reads {read:.1f} GB/s, matrices {matrix:.1f} GFLOP/s",
    ]
    for phase in result["phases"]:
        times = ", ".join(
            f"{name} {1e3 * phase[key]:.1f} ms"
            for name, key in (
                ("device", "device_seconds"),
                ("host", "host_seconds"),
                ("wall", "seconds"),
            )
        )
        counts = f"{phase['dispatches']} dispatches, {phase['barriers']} barriers"
        rate = f"{phase['tokens']} tokens, {phase['tokens_per_second']:.1f} a second"
        lines += ["", f"{phase['name']}: {rate}; {counts}; {times}"]
        lines.append(
            f"{'kernel':28} {'calls':>7} {'ms':>10} {'time':>6} {'memory':>7} {'matrix':>7}"
        )
        lines += [
            f"{k['kernel']:28} {k['calls']:7} {k['seconds'] * 1e3:10.3f} {k['time_share']:6.1%}"
            f" {k['memory_share']:7.1%} {k['matrix_share']:7.1%}"
            for k in phase["kernels"]
        ]
        lines.append(phase["verdict"])
    return "\n".join(lines)
