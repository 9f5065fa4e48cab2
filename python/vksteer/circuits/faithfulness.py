"""How much of steering's effect circuits of each size carry, and the smallest one that carries enough (method.md section 5).

Faithfulness = (m(C) - m(0)) / (m(M) - m(0)), m pooled over all metric positions of all samples before the ratio. Intervals are bootstrap over samples:
samples are drawn with replacement, pooled, and only then divided.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from typing import Any, Sequence

import numpy as np

from . import search as circuit_search
from ..inputs.prompt_pair import whole
from ..inputs.vectors import digest

#: What the paper calls faithful.
THRESHOLD = 0.85
#: Sizes of `faithfulness_curve` where none are named, as shares of all edges.
SHARES = (0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1.0)
#: Levels of the bisection whose circuits are run in one pass: 2**n - 1 circuits over one base pass cost little more than n over n passes.
AHEAD = 3


def pooled(per_sample: dict) -> tuple[float, float, float]:
    """(m(C), m(M), m(0)) over all samples: means weighted by the samples' metric positions. NaN where there is none."""
    weight = np.asarray(per_sample["weight"], np.float64)
    used = weight > 0
    if not used.any():
        return math.nan, math.nan, math.nan
    return tuple(float(weight[used] @ np.asarray(per_sample[name], np.float64)[used] / weight[used].sum()) for name in ("value", "full", "empty"))


def bootstrap(per_sample: dict, draws: int = 1000, confidence: float = 0.95, seed: int = 0) -> tuple[float, float]:
    """(low, high) of the pooled ratio when samples are drawn with replacement; percentiles (Efron 1979).

    per_sample: {"value", "full", "empty", "weight"}, each [n_samples], of which those of weight 0 are left out. NaN for fewer than two samples.
    Draws whose denominator is 0 are left out.
    """
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie between 0 and 1, not {confidence!r}")
    weight = np.asarray(per_sample["weight"], np.float64)
    used = weight > 0
    n = int(used.sum())
    if n < 2 or draws < 1:
        return math.nan, math.nan
    value, full, empty = (np.asarray(per_sample[name], np.float64)[used] for name in ("value", "full", "empty"))
    counts = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=draws) * weight[used]
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = (counts @ (value - empty)) / (counts @ (full - empty))
    ratios = ratios[np.isfinite(ratios)]
    if not ratios.size:
        return math.nan, math.nan
    low, high = np.quantile(ratios, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


@dataclass
class FaithfulnessCurve:
    """Faithfulness by circuit size. Rows are in the order of `sizes`, which ascend.

    sizes: edges asked for, int64 [n]; edges: what the circuits have (pruning keeps a few more), int64 [n]; n_edges: of the whole graph.
    faithfulness, low, high: float64 [n], of `metric`, with the bootstrap interval (NaN where there is none).
    random: float64 [n, r], r random circuits of at least twice the size (NaN where the graph has not that many); random_edges: int64 [n, r].
    values: {metric: {"faithfulness", "value"} float64 [n] and "full", "empty" numbers}. setting: what was run. circuits: list of Circuit, not saved.
    """

    metric: str
    n_edges: int
    sizes: np.ndarray
    edges: np.ndarray
    faithfulness: np.ndarray
    low: np.ndarray
    high: np.ndarray
    random: np.ndarray
    random_edges: np.ndarray
    values: dict[str, dict]
    setting: dict
    circuits: list = field(default_factory=list, repr=False, compare=False)

    def __len__(self):
        return self.sizes.size

    def __repr__(self):
        return self.to_markdown()

    def smallest(self, threshold: float = THRESHOLD) -> int | None:
        """The smallest size on the curve that reaches the threshold, or None."""
        reach = np.flatnonzero(self.faithfulness >= threshold)
        return int(self.sizes[reach[0]]) if reach.size else None

    def to_dict(self) -> dict:
        """For JSON; NaN as None."""
        plain = lambda x: [plain(v) for v in x] if isinstance(x, (list, np.ndarray)) else {k: plain(v) for k, v in x.items()} if isinstance(x, dict) else _number(x)
        return {"metric": self.metric, "n_edges": self.n_edges, **{name: plain(getattr(self, name)) for name in (*_ARRAYS, "values", "setting")}}

    @classmethod
    def from_dict(cls, content: dict) -> "FaithfulnessCurve":
        """The inverse of `to_dict`, without the circuits. Raises ValueError for anything else."""
        try:
            arrays = {name: np.array(content[name], kind) for name, kind in _ARRAYS.items()}
            n = arrays["sizes"].size
            for name in ("random", "random_edges"):
                arrays[name] = arrays[name].reshape(n, -1) if n else arrays[name].reshape(0, 0)
            curve = cls(str(content["metric"]), int(content["n_edges"]), **arrays, values=dict(content["values"]), setting=dict(content["setting"]))
            for values in curve.values.values():
                values.update({name: np.array(values[name], np.float64) for name in ("faithfulness", "value")})
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"no faithfulness curve: {error!r}") from None
        if any(arrays[name].shape != (n,) for name in ("edges", "faithfulness", "low", "high")) or arrays["random"].shape != arrays["random_edges"].shape:
            raise ValueError("no faithfulness curve: its columns differ in length")
        return curve

    def save(self, path) -> None:
        """JSON with a checksum; an existing file is replaced whole."""
        from ..base.whole_files import write_whole

        content = json.loads(json.dumps({"format": "vksteer.faithfulness_curve", "version": 1, **self.to_dict()}))
        write_whole(path, (json.dumps({**content, "checksum": digest(content)}, indent=1) + "\n").encode())

    @classmethod
    def load(cls, path) -> "FaithfulnessCurve":
        """Read what `save` wrote. ModelError for a file that was cut short or edited or is something else."""
        from ..loading.config import read_json
        from ..errors import ModelError

        content = read_json(path, limit=1 << 26)
        if content.get("format") != "vksteer.faithfulness_curve" or content.get("version") != 1:
            raise ModelError(f"{path}: no faithfulness curve of vksteer (format {content.get('format')!r}, version {content.get('version')!r})")
        stated = content.pop("checksum", None)
        if stated != digest(content):
            raise ModelError(f"{path}: the content does not match its checksum: the file was edited or damaged")
        try:
            return cls.from_dict(content)
        except ValueError as error:
            raise ModelError(f"{path}: {error}") from None

    def to_markdown(self) -> str:
        """One row per size: edges, share, faithfulness with its interval, mean of the random circuits of twice the size."""
        s = self.setting
        how = f"found on {s['n_found_on']}, judged on {s['n_judged_on']} other samples" if s.get("halves") else f"{s.get('n_samples', '?')} samples"
        title = f"Faithfulness by {self.metric} of {s.get('method', '?')} circuits out of {self.n_edges} edges; {how}"
        more = [name for name in self.values if name != self.metric]
        interval, control = np.isfinite(self.low).any(), self.random.shape[1] > 0
        head = ["asked", "edges", "share", "faithfulness"] + (["random, twice the size"] if control else []) + more
        lines = [title + ("" if not interval else f"; {100 * s.get('confidence', 0.95):g} % bootstrap intervals over samples") + ".", "",
                 "| " + " | ".join(head) + " |", "|" + "---:|" * len(head)]
        for i in range(len(self)):
            cells = [f"{self.sizes[i]}", f"{self.edges[i]}", f"{100 * self.edges[i] / self.n_edges:.2f} %",
                     f"{self.faithfulness[i]:.3f}" + (f" [{self.low[i]:.3f}, {self.high[i]:.3f}]" if np.isfinite(self.low[i]) else "")]
            if control:
                found = self.random[i][np.isfinite(self.random[i])]
                cells.append(f"{found.mean():.3f}" if found.size else "-")
            cells += [f"{self.values[name]['faithfulness'][i]:.3f}" for name in more]
            lines.append("| " + " | ".join(cells) + " |")
        return "\n".join(lines)

    def plot(self, path=None, *, threshold: float | None = THRESHOLD):
        """Faithfulness against size with its interval, random circuits beside it: a matplotlib Figure, saved to `path` if one is given."""
        try:
            from matplotlib.figure import Figure
        except ImportError:
            raise ImportError("plots need matplotlib: pip install 'vksteer[plot]'") from None
        figure = Figure(figsize=(6.4, 3.8), layout="constrained")
        axes = figure.add_subplot()
        share = 100 * self.edges / self.n_edges
        if np.isfinite(self.low).any():
            axes.fill_between(share, self.low, self.high, color="#4878a8", alpha=0.2, linewidth=0)
        axes.plot(share, self.faithfulness, "o-", ms=3.5, color="#4878a8", label=f"{self.setting.get('method', '')} circuits".strip())
        for r in range(self.random.shape[1]):
            axes.plot(share, self.random[:, r], ".", ms=5, color="#999999", label="random, twice the size" if r == 0 else None)
        if threshold is not None:
            axes.axhline(threshold, color="#c8643c", lw=0.8, ls="--", label=f"{threshold:g}")
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:g}")
        axes.set_xlabel(f"edges in the circuit, % of {self.n_edges}")
        axes.set_ylabel(f"faithfulness ({self.metric})")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8)
        if path is not None:
            figure.savefig(path, dpi=150)
        return figure


_ARRAYS = {"sizes": np.int64, "edges": np.int64, "faithfulness": np.float64, "low": np.float64, "high": np.float64, "random": np.float64, "random_edges": np.int64}


def _number(x):
    if isinstance(x, (float, np.floating)):
        return float(x) if math.isfinite(x) else None
    return x.item() if isinstance(x, np.generic) else x


def _per_sample(result) -> dict | None:
    found = getattr(result, "per_sample", None)
    return found if found is not None and {"value", "full", "empty", "weight"} <= set(found) else None


def _curve(scores, sizes, circuits, results, metric, metrics, setting, controls=None, draws=0) -> FaithfulnessCurve:
    """From what `evaluate` gave: results[i] belongs to circuits[i]; controls[i] is a list of (circuit, result) or absent."""
    main = [r[metric] for r in results]
    intervals = [bootstrap(p, draws, setting.get("confidence", 0.95), setting.get("seed", 0)) if draws and (p := _per_sample(r)) else (math.nan, math.nan) for r in main]
    values = {m: {"faithfulness": np.array([r[m].faithfulness for r in results], np.float64), "value": np.array([r[m].value for r in results], np.float64),
                  "full": float(results[0][m].full), "empty": float(results[0][m].empty)} for m in metrics} if results else {}
    controls = controls or [[] for _ in circuits]
    width = max(map(len, controls), default=0)
    random, random_edges = np.full((len(circuits), width), np.nan), np.zeros((len(circuits), width), np.int64)
    for i, some in enumerate(controls):
        for j, (circuit, result) in enumerate(some):
            random[i, j], random_edges[i, j] = result[metric].faithfulness, len(circuit)
    return FaithfulnessCurve(metric, scores.graph.n_edges, np.array(sizes, np.int64), np.array([len(c) for c in circuits], np.int64),
                             np.array([r.faithfulness for r in main], np.float64), np.array([x[0] for x in intervals]), np.array([x[1] for x in intervals]),
                             random, random_edges, values, setting, list(circuits))


def _setting(scores, model, samples, vector, coefficient, **more) -> dict[str, Any]:
    from ..inputs.samples import samples_hash

    return {"n_samples": len(samples), "coefficient": float(coefficient), "layer": vector.layer, "vector_hash": digest(vector.direction),
            "samples_hash": samples_hash(samples), "model_hash": scores.provenance.get("model_hash"),
            "scores_vector_hash": scores.provenance.get("vector_hash"), **more}


def _changes(results, metric):
    """ValueError where there is nothing to be faithful to."""
    r = results[0][metric]
    if not math.isfinite(r.full - r.empty) or r.full == r.empty:
        raise ValueError(f"steering changes nothing on these samples: {metric} is {r.full:g} with all edges and {r.empty:g} with none, so faithfulness is undefined")


# -- the smallest circuit ------------------------------------------------------------------------------------------------------------------------------


def grid(n_edges: int, step: float = 0.01) -> list[int]:
    """Sizes at every `step` of the edges, rounded up, the last one all edges."""
    if not 0 < step <= 1:
        raise ValueError(f"step must be a share above 0 and at most 1, not {step!r}")
    # 1e-9: 3 * 0.01 of 100 edges are 3, not 4
    return sorted({min(n_edges, math.ceil(i * step * n_edges - 1e-9)) for i in range(1, math.ceil(1 / step - 1e-9) + 1)} - {0})


def _midpoints(low: int, high: int, levels: int) -> list[int]:
    """Every size that `levels` steps of a bisection between low and high could ask for."""
    if not levels or high - low < 2:
        return []
    middle = (low + high) // 2
    return [*_midpoints(low, middle, levels - 1), middle, *_midpoints(middle, high, levels - 1)]


def minimum_faithful(scores, model, samples, vector, coefficient, threshold: float = THRESHOLD, *, method: str = "pruned", metric: str = "logit_diff",
                     step: float = 0.01, progress=True, **options):
    """The smallest circuit of `scores` that carries at least `threshold` of steering's effect: a Circuit, its `curve` kept.

    The smallest size of a fixed grid (`step` of the edges) that reaches it, all in one pass; then bisection between that size and the one before
    it, which supposes that faithfulness rises inside the one step. vector: may be another than the one that was scored, of the same layer.
    method: as in `scores.circuit`. options: for `vs.circuits.evaluate`.
    Raises ValueError before any work for scores of another model or graph, and a threshold outside (0, 1]; after it where steering changes nothing.
    """
    from .. import circuits as c

    samples = _checked(scores, model, samples, vector, threshold)
    sizes = grid(scores.graph.n_edges, step)
    found: dict[int, tuple] = {}  # size -> (circuit, result)

    def measure(some):
        """Evaluates what is not known yet, each different circuit once."""
        wanted = {n: scores.circuit(n, method) for n in some if n not in found}
        known = {circuit: result for circuit, result in found.values()}
        new = [x for x in dict.fromkeys(wanted.values()) if x not in known]
        if new:
            known.update(zip(new, c.evaluate(new, model, samples, vector, coefficient, (metric,), progress=progress, **options)))
        found.update({n: (circuit, known[circuit]) for n, circuit in wanted.items()})

    def reaches(n):
        share = found[n][1][metric].faithfulness
        # All edges carry everything; a threshold of 1 is not to fail by rounding.
        return share >= threshold or len(found[n][0]) == scores.graph.n_edges and abs(share - 1) < 1e-2

    measure(sizes)
    _changes([found[sizes[-1]][1]], metric)
    at = next((i for i, n in enumerate(sizes) if reaches(n)), None)
    if at is None:
        best = max(sizes, key=lambda n: found[n][1][metric].faithfulness)
        raise ValueError(f"no circuit reaches {threshold:g} by {metric}: the best of {len(sizes)} has {found[best][1][metric].faithfulness:.3f} ({best} edges)")
    low, high = (sizes[at - 1] if at else 0), sizes[at]
    while high - low > 1:
        measure(_midpoints(low, high, AHEAD))
        for _ in range(AHEAD):
            if high - low > 1:
                middle = (low + high) // 2
                low, high = (low, middle) if reaches(middle) else (middle, high)
    order = sorted(found)
    setting = _setting(scores, model, samples, vector, coefficient, method=method, threshold=threshold, step=step)
    curve = _curve(scores, order, [found[n][0] for n in order], [found[n][1] for n in order], metric, (metric,), setting)
    circuit = found[high][0]
    meta = {**circuit.meta, "n": high, "threshold": threshold, "metric": metric, "faithfulness": float(found[high][1][metric].faithfulness)}
    return c.Circuit(circuit.graph, circuit.edges, meta=meta, curve=curve)


def _checked(scores, model, samples, vector, threshold=THRESHOLD) -> list:
    from ..inputs.samples import check_samples

    if isinstance(threshold, bool) or not isinstance(threshold, (int, float, np.number)) or not 0 < threshold <= 1:
        raise ValueError(f"threshold must be a share above 0 and at most 1, not {threshold!r}")
    vector.check(model)
    scores.check(model, layer=vector.layer)
    return check_samples(model, samples)


# -- the curve -------------------------------------------------------------------------------------------------------------------------------------------


def faithfulness_curve(scores, model, samples, vector, coefficient, sizes: Sequence[int] | None = None, *, method: str = "pruned",
                       metrics: Sequence[str] = ("logit_diff",), random: int = 3, bootstrap: int = 1000, confidence: float = 0.95, halves: bool = False,
                       seed: int = 0, progress=True, **options) -> FaithfulnessCurve:
    """Faithfulness of the circuits of many sizes, random circuits of twice the size beside them, with bootstrap intervals: one call, one pass.

    sizes: numbers of edges (default: SHARES of them). metrics: the first is drawn, bootstrapped and compared with random circuits; others stand beside it.
    random: random circuits for each size (0: none). bootstrap: draws of samples (0: no intervals). halves: find the circuits on one half of the
    samples (drawn by `seed`) and judge them on the other; needs scores made with per_sample=True from the same samples in the same order.
    options: for `vs.circuits.evaluate`.
    Raises ValueError before any work for scores of another model or graph, bad sizes, and halves without per-sample scores.
    """
    from .. import circuits as c

    samples = _checked(scores, model, samples, vector)
    E = scores.graph.n_edges
    if sizes is None:
        sizes = {max(1, round(share * E)) for share in SHARES}
    sizes = sorted({circuit_search.check_size(scores.graph, n, "sizes") for n in sizes})
    if not sizes or sizes[0] < 1:
        raise ValueError("sizes must hold at least one number, each from 1 on")
    n_random, draws, seed = whole(random, "random", 0), whole(bootstrap, "bootstrap", 0), whole(seed, "seed", 0)
    metrics = (metrics,) if isinstance(metrics, str) else tuple(metrics)
    if not metrics:
        raise ValueError("metrics is empty: name at least one, for example 'logit_diff'")
    more = {"method": method, "seed": seed, "confidence": confidence, "bootstrap": draws, "halves": bool(halves)}
    if halves:
        first, second = _halves(scores, samples, seed)
        more |= {"found_on": first, "judged_on": second, "n_found_on": len(first), "n_judged_on": len(second)}
        scores, samples = scores.of_samples(first), [samples[i] for i in second]

    chosen = [scores.circuit(n, method) for n in sizes]
    growths = [circuit_search.Growth(scores.graph, circuit_search.random_order(scores.graph, seed + r)) for r in range(n_random)]
    control = [[c.Circuit(scores.graph, g.edges(2 * n), meta={"method": "random", "n": 2 * n, "seed": seed + r}) for r, g in enumerate(growths) if 2 * n <= E]
               for n in sizes]
    every = list(dict.fromkeys([*chosen, *(x for some in control for x in some)]))
    results = dict(zip(every, c.evaluate(every, model, samples, vector, coefficient, metrics, progress=progress, **options)))
    _changes(list(results.values()), metrics[0])
    setting = _setting(scores, model, samples, vector, coefficient, **more)
    return _curve(scores, sizes, chosen, [results[x] for x in chosen], metrics[0], metrics, setting, [[(x, results[x]) for x in some] for some in control], draws)


def _halves(scores, samples, seed: int) -> tuple[list[int], list[int]]:
    """Two halves of the samples that have metric positions: ascending indices."""
    from ..inputs.samples import samples_hash

    if scores.sample_edges is None:
        raise ValueError("halves=True needs scores of each sample: make them with attribute(..., per_sample=True)")
    if len(scores.weights) != len(samples):
        raise ValueError(f"halves=True needs the samples that were scored: the scores hold {len(scores.weights)}, given are {len(samples)}")
    stated = scores.settings.get("samples_hash")
    if stated and stated != samples_hash(samples):
        raise ValueError("halves=True needs the samples that were scored, in the same order; these are others")
    used = np.flatnonzero(scores.weights > 0)
    if used.size < 2:
        raise ValueError(f"halves=True needs at least two samples with metric positions, not {used.size}")
    shuffled = np.random.default_rng(seed).permutation(used)
    middle = (used.size + 1) // 2
    return sorted(shuffled[:middle].tolist()), sorted(shuffled[middle:].tolist())
