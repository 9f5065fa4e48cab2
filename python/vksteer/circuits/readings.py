"""What metrics read of a run, and their values (docs/method.md section 5).

Metrics of a sample with P prompt tokens and S tokens in all. A sample without positions for a
metric has weight 0 there and is left out.

- logit_diff: logit(y) - logit(y*), the greedy tokens of the clean and of the corrupt run, at the
  positions P - 1 to S - 1 where they differ; pooled over all positions;
- logit_diff_per_sample: the same, averaged within each sample first and then over samples;
- directional_kl: KL(P_corrupt||P_x) - KL(P_clean||P_x), at the positions P - 1 to S - 1 with
  KL(P_steer||P_base) > threshold;
- kl: KL(P_clean||P_x) at the positions that predict a response token, P - 1 to S - 2;
- match: the share of these positions whose greedy token is that of the clean run;
- logprob: log p of the response tokens there.

Whatever `clean` says, a circuit is run by steering and keeping the base run's contributions of
edges outside it; `full` is the steered run, `empty` the base run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from ..base.types import Array, Float64Array
from .final_rows import FinalRows, Request, request

if TYPE_CHECKING:
    from ..runtime.model import Model

#: Metrics of two logits; the others read the whole distribution.
PAIRS = ("logit_diff", "logit_diff_per_sample")

#: What was read of a run's rows: (pairs, distributions), each None where no metric needs it. pairs:
#: the logits of two tokens, float32 [..., n, 2]. distributions: float32 [..., n, 4], KL from the
#: steered and from the base run's distribution, log p(target) and the greedy token.
Read: TypeAlias = tuple[Array | None, Array | None]


@dataclass
class MetricResult:
    """A metric of one circuit C: value m(C), full m(steered run), empty m(base run). per_sample:
    "value", "full", "empty" and "weight", float64 [n_samples] each.
    """

    value: float
    full: float
    empty: float
    per_sample: dict[str, Float64Array]

    @property
    def faithfulness(self) -> float:
        """(value - empty) / (full - empty); NaN where steering changes nothing."""
        difference = self.full - self.empty
        return (self.value - self.empty) / difference if difference else float("nan")

    def __repr__(self) -> str:
        return (
            f"MetricResult(faithfulness={self.faithfulness:.4f}, value={self.value:.4g},"
            f" full={self.full:.4g}, empty={self.empty:.4g})"
        )


class Reader:
    """The metrics of one sample: which rows they read, and their values from what was read there.

    clean: "steered" or "base". kl_apart: kl is read at positions with KL(P_steer||P_base) >
    threshold, as in attribution. rows: the rows that are read, ascending indices into the
    FinalRows, int64 [n]. a, b: greedy tokens of the clean and the corrupt run.
    """

    def __init__(
        self,
        rows: FinalRows,
        metrics: Sequence[str],
        clean: str,
        threshold: float,
        kl_apart: bool = False,
    ) -> None:
        self.final, self.clean, self.metrics = rows, clean, metrics
        n = len(rows.targets)
        differ = np.flatnonzero(rows.greedy_base != rows.greedy_steered)
        apart = np.flatnonzero(rows.kl_base > threshold)
        at = {"logit_diff": differ, "logit_diff_per_sample": differ, "directional_kl": apart} | (
            {"kl": apart} if kl_apart else {}
        )
        self.at = {m: at.get(m, np.arange(n - 1)) for m in metrics}
        self.rows = (
            np.unique(np.concatenate(list(self.at.values()))).astype(np.int64)
            if metrics
            else np.zeros(0, np.int64)
        )
        self.a, self.b = (
            (rows.greedy_steered, rows.greedy_base)
            if clean == "steered"
            else (rows.greedy_base, rows.greedy_steered)
        )

    def values(self, metric: str, pairs: Array | None, distributions: Array | None) -> Float64Array:
        """The metric at each of its positions, float64. pairs, distributions: as in Read, over
        `rows`.
        """
        at = np.searchsorted(self.rows, self.at[metric])
        if metric in PAIRS:
            assert pairs is not None
            logits = pairs[at].astype(np.float64)
            return np.asarray(logits[:, 0] - logits[:, 1])
        assert distributions is not None
        x = distributions[at].astype(np.float64)
        clean, corrupt = (0, 1) if self.clean == "steered" else (1, 0)
        if metric == "kl":
            return np.asarray(x[:, clean])
        if metric == "directional_kl":
            return np.asarray(x[:, corrupt] - x[:, clean])
        if metric == "match":
            return np.asarray(x[:, 3].astype(np.int64) == self.a[self.at[metric]], np.float64)
        return np.asarray(x[:, 2])

    def mean(self, metric: str, read: Read) -> float:
        """The mean over the metric's positions, at least one."""
        return float(self.values(metric, *read).mean())


def distributions_needed(metrics: Sequence[str]) -> bool:
    """Whether one of the metrics reads whole distributions."""
    return any(m not in PAIRS for m in metrics)


def joint_request(readers: Sequence[Reader], metrics: Sequence[str], softcap: float) -> Request:
    """One request for the rows of several samples, in the order of the readers."""

    def join(get: Callable[[Reader], Array]) -> Array:
        return np.concatenate([get(r) for r in readers])

    pairs = any(m in PAIRS for m in metrics)
    distributions = distributions_needed(metrics)
    return request(
        softcap,
        join(lambda r: r.a[r.rows]) if pairs else None,
        join(lambda r: r.b[r.rows]) if pairs else None,
        join(lambda r: r.final.steered[r.rows]) if distributions else None,
        join(lambda r: r.final.base[r.rows]) if distributions else None,
        join(lambda r: r.final.targets[r.rows]) if distributions else None,
    )


def measure_ends(
    model: Model, readers: Sequence[Reader], metrics: Sequence[str], softcap: float
) -> list[Read]:
    """What the steered and the base run read at every sample's rows: pairs [2, n, 2] and
    distributions [2, n, 4], steered first.
    """
    from ..runtime.device import _engine

    out: list[Read] = []
    # Sample by sample, so that the rows of all samples are never copied at once.
    for reader in readers:
        if not reader.rows.size:
            out.append((np.zeros((2, 0, 2)), np.zeros((2, 0, 4))))
            continue
        both = np.ascontiguousarray(
            np.stack([reader.final.steered[reader.rows], reader.final.base[reader.rows]]),
            np.float32,
        )
        pairs, distributions, _ = _engine().measure(
            model._engine, both, both.shape[1], joint_request([reader], metrics, softcap)
        )
        out.append((pairs, distributions))
    return out


def read_of(read: Read, run: int) -> Read:
    """What one run of several read."""
    pairs, distributions = read
    return (
        None if pairs is None else pairs[run],
        None if distributions is None else distributions[run],
    )
