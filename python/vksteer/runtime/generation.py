"""`model.generate`: checks every argument and edit, and decodes one micro-batch after the other."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

from ..base.checks import require_int
from ..base.progress import Progress
from ..base.types import ProgressLike
from .batch import Batch, check_freeze_spec, steering_of
from .cache_edits import row_cache_edits
from .decoding import Decoding, Generation, OnToken, Request, Row
from .edit_compiler import per_row
from .run import check_tokens
from .sampling import Sampling

if TYPE_CHECKING:
    from .model import Model
    from .sites import Site


def _request(
    model: Model,
    max_new_tokens: int,
    temperature: float,
    top_k: int,
    top_p: float,
    seed: int,
    stop: str | Iterable[str] | None,
    ignore_eos: bool,
) -> Request:
    stops = () if stop is None else (stop,) if isinstance(stop, str) else tuple(stop)
    if not all(isinstance(s, str) and s for s in stops):
        raise ValueError(f"stop={stop!r}: use a str or a list of str, none of them empty")
    if stops:
        model._need_tokenizer("a stop string")
    return Request(
        require_int(max_new_tokens, "max_new_tokens", 1),
        Sampling(float(temperature), require_int(top_k, "top_k", 0), float(top_p), int(seed)),
        stops,
        frozenset(model.eos_ids),
        bool(ignore_eos),
    )


def generate(
    model: Model,
    prompts: Any,
    *,
    max_new_tokens: int,
    edits: Any,
    freeze: str | None,
    ablate: str | None,
    freeze_layers: Iterable[int] | None,
    temperature: float,
    top_k: int,
    top_p: float,
    seed: int,
    stop: str | Iterable[str] | None,
    ignore_eos: bool,
    capture: str | Iterable[str],
    batch_size: int | None,
    on_token: OnToken | None,
    progress: ProgressLike,
    circuit: Any = None,
    cache_edits: Any = (),
) -> list[Generation]:
    """See Model.generate."""
    model._check_open()
    request = _request(model, max_new_tokens, temperature, top_k, top_p, seed, stop, ignore_eos)
    sites = _sites(model, capture)
    rows = model.chat_tokens(prompts)
    in_cache = row_cache_edits(model, cache_edits, rows, request.max_new_tokens)
    for i, row in enumerate(rows):
        check_tokens(model, row, i, request.max_new_tokens)
    rows_edits, shared = per_row(edits, len(rows))
    spec = check_freeze_spec(freeze, ablate, freeze_layers, rows_edits, model.config.n_layers)
    most = None if batch_size is None else require_int(batch_size, "batch_size", 1)
    if circuit is not None:
        _check_circuit(circuit, any(in_cache))._check_rows(model, rows_edits, freeze, ablate, sites)
    double = 2 if spec or circuit is not None else 1

    def batch_of(part: Sequence[int], under: Any = None) -> Any:
        lengths = [len(rows[i]) for i in part]
        some = ([rows_edits[i] for i in part], shared)
        if under is not None:
            return under._decoding_batch(model, lengths, some)
        return Batch(model, lengths, [None] * len(part), some, spec)

    # Every edit is checked before the first row is run; a single micro-batch needs no other.
    everything = batch_of(range(len(rows)))
    slots = [(len(r) + request.max_new_tokens) * double for r in rows]
    parts = list(_micro_batches(model, slots, most))
    if circuit is not None:
        steering = lambda i: steering_of(rows_edits[i])
        parts = [list(same) for part in parts for _, same in groupby(part, key=steering)]
    done = []
    with Progress(progress, len(rows) * request.max_new_tokens, "generate") as bar:
        for part in parts:
            states = [Row(model, i, rows[i], request, rows_edits[i], in_cache[i]) for i in part]
            single = circuit is None and len(parts) == 1
            batch = everything if single else batch_of(part, circuit)
            Decoding(model, batch, states, sites, on_token, bar).run()
            done += [s.result() for s in states]
    return done


def _check_circuit(circuit: Any, cache_edited: bool) -> Any:
    if not hasattr(circuit, "_decoding_batch"):
        raise ValueError(f"circuit must be a Circuit, not {circuit!r}")
    if cache_edited:
        raise ValueError(
            "under a circuit the base run and the circuit's run have keys and values of their own:"
            " cache_edits do not combine with it"
        )
    return circuit


def _sites(model: Model, capture: str | Iterable[str]) -> list[Site]:
    sites = model._sites.find_all(capture)
    if any(s.over_keys for s in sites):
        raise ValueError(
            "scores and patterns of decoded tokens have a different number of keys at every step:"
            " capture them with run(prompt, response)"
        )
    return sites


def _micro_batches(model: Model, slots: list[int], batch_size: int | None) -> Iterator[list[int]]:
    """Groups of consecutive rows whose caches fit half of the free memory together.

    slots: cache slots of each row. Raises ValueError, saying what would fit, for a row that does
    not fit alone.
    """
    per_slot = model._engine.plan()["cache_per_token"]
    budget = max(model._engine_device.available_bytes // 2, per_slot)
    if max(slots) * per_slot > budget:
        raise ValueError(
            f"a row of {max(slots)} tokens needs {max(slots) * per_slot / 1e9:.2f} GB of keys and"
            f" values and {budget / 1e9:.2f} GB may be used: at most {budget // per_slot} tokens"
            " fit; shorten the prompt or lower max_new_tokens"
        )
    limit = batch_size or 64
    part: list[int] = []
    used = 0
    for i, n in enumerate(slots):
        if part and (len(part) >= limit or (used + n) * per_slot > budget):
            yield part
            part, used = [], 0
        part.append(i)
        used += n
    yield part
