"""`vksteer circuit`: samples, scores, faithfulness curve, the smallest faithful circuit, and the
overlaps of the circuits of several vectors, in one folder.

A second run with the same arguments takes the vector, samples, scores, curve and circuit that are
finished from the folder. keys.json holds a digest of what each was made from.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .arguments import freeze_prompts, open_model

if TYPE_CHECKING:
    from ..circuits import Circuit
    from ..inputs.samples import Samples
    from ..inputs.vectors import SteeringVector
    from ..judge import LlamaGuard
    from ..patching.edge_scores import EdgeScores
    from ..runtime.model import Model


class _Folder:
    """A folder of results. keys.json says what each file was made from."""

    def __init__(self, path: Path):
        from ..base.store import Store

        path.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._keys = Store(
            path / "keys.json",
            format="vksteer.circuit_folder",
            key=None,
            argument="--out",
            what="list of what the folder's files were made from",
            other="another command",
            remedy="name another folder, or remove the whole folder to begin anew",
        )

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    def made(self, name: str, key: str, costly: bool = False) -> bool:
        """Is this file there, made from `key`? A costly one that was made from something else is
        not overwritten: ValueError.
        """
        if not (self / name).exists():
            return False
        if name in self._keys and self._keys[name] == key:
            return True
        if costly:
            raise ValueError(
                f"{self / name} was made with another model, vector, strength, prompts or settings:"
                " name another folder with --out, or remove it"
            )
        return False

    def put(self, name: str, key: str) -> None:
        self._keys.put(name, key)


def _sizes(text: str | None) -> list[int] | None:
    """The sizes of --sizes; None for the default."""
    if text is None:
        return None
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"--sizes takes whole numbers with commas, not {text!r}") from None


def _text(path: Path, *parts: str) -> None:
    path.write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def _picture(draw: Callable[[Path], Any], path: Path) -> None:
    """Draws a picture; without matplotlib a line on standard error says that there is none."""
    try:
        draw(path)
    except ImportError as error:
        print(f"No picture: {error}", file=sys.stderr)


def _prompts(arguments: argparse.Namespace) -> tuple[Any, Any, list[str]]:
    """(training pair, validation pair, prompts of the side); with --vector both pairs are None."""
    train, validation, (harmful, harmless) = freeze_prompts(arguments)
    return train, validation, harmful if arguments.side == "harmful" else harmless


def _find(
    model: Model,
    train: Any,
    validation: Any,
    arguments: argparse.Namespace,
    folder: _Folder,
    show: bool,
) -> SteeringVector:
    """The difference in means that the rule chooses, or the one that the folder holds."""
    from .. import steering
    from ..base.provenance import digest, identity
    from ..inputs.vectors import SteeringVector

    key = digest("vector", identity(model), train, validation, arguments.criterion)
    if folder.made("vector.safetensors", key, costly=True):
        return SteeringVector.load(folder / "vector.safetensors")
    harmful, harmless = validation
    vector = steering.difference_in_means(model, *train, progress=show).select(
        harmful, harmless, criterion=arguments.criterion, progress=show
    )
    vector.save(folder / "vector.safetensors")
    folder.put("vector.safetensors", key)
    return vector


def _vectors(arguments: argparse.Namespace) -> dict[str, SteeringVector]:
    """{name: vector} of --vector, read before the model, which takes longer to load."""
    from ..inputs.vectors import SteeringVector

    found: dict[str, SteeringVector] = {}
    for path in arguments.vector or []:
        name = stem = Path(path).stem
        number = 2
        while name in found:
            name, number = f"{stem}-{number}", number + 1
        found[name] = SteeringVector.load(path, arguments.layer)
    return found


class _Work:
    """The samples, scores, curve and circuit of one vector, each taken from the folder where it is
    finished.
    """

    def __init__(
        self,
        model: Model,
        vector: SteeringVector,
        coefficient: float,
        prompts: list[str],
        arguments: argparse.Namespace,
        folder: _Folder,
        judge: LlamaGuard | None,
        show: bool,
    ):
        from ..base.provenance import digest, identity

        self.model, self.vector, self.coefficient = model, vector, coefficient
        self.prompts, self.arguments, self.folder = prompts, arguments, folder
        self.judge, self.show = judge, show
        self.key = digest(
            "samples",
            identity(model),
            vector.direction,
            vector.layer,
            coefficient,
            prompts,
            arguments.responses,
            arguments.keep,
            arguments.max_new_tokens,
            arguments.judge,
        )

    def samples(self) -> Samples:
        from ..inputs.samples import Samples, make_samples

        a, name = self.arguments, "samples.json"
        if self.folder.made(name, self.key, costly=True):
            samples = Samples.load(self.folder / name)
        else:
            samples = make_samples(
                self.model,
                self.prompts,
                self.vector,
                self.coefficient,
                responses=a.responses,
                max_new_tokens=a.max_new_tokens,
                keep=a.keep,
                judge=self.judge,
                progress=self.show,
            )
            samples.save(self.folder / name)
            self.folder.put(name, self.key)
        print(f"Samples: {samples.line}")
        if not samples:
            raise ValueError(
                "no sample is left: steering flips none of these prompts. Try another --coefficient"
                " or --side, or --keep all"
            )
        return samples

    def scores(self, samples: Samples) -> EdgeScores:
        from .. import patching
        from ..base.provenance import digest
        from ..patching.edge_scores import EdgeScores

        a, name = self.arguments, "scores.safetensors"
        settings = dict(
            steps=a.steps,
            rule=a.rule,
            metric=a.metric,
            threshold=a.kl_threshold,
            clean=a.clean,
            at=a.at,
            per_sample=True,
        )
        self.key = digest(self.key, settings)
        if self.folder.made(name, self.key, costly=True):
            scores = EdgeScores.load(self.folder / name, self.model)
            print("Scores: taken from the folder")
        else:
            scores = patching.attribute(
                self.model,
                samples,
                self.vector,
                self.coefficient,
                **settings,
                max_memory=a.max_memory,
                progress=self.show,
            )
            scores.save(self.folder / name)
            self.folder.put(name, self.key)
        top = scores.top(20)
        hundredth = scores.distribution(max(1, scores.graph.n_edges // 100))
        shares = "Where the strongest 1 % of the edges end: " + ", ".join(
            f"{name} {100 * share:.1f} %" for name, share in hundredth.items()
        )
        _text(self.folder / "top_edges.md", repr(scores).splitlines()[0], repr(top), shares)
        if a.eap_ig:
            scores.to_eap_ig_json(self.folder / "eap_ig.json")
        print(f"\nThe strongest edges:\n{scores.top(8)!r}\n{shares}\n")
        return scores

    def curve(self, scores: EdgeScores, samples: Samples) -> None:
        from .. import circuits
        from ..base.provenance import digest
        from ..circuits import FaithfulnessCurve

        a, name = self.arguments, "curve.json"
        options = dict(method=a.method, random=a.random, halves=a.halves, seed=a.seed)
        key = digest(self.key, a.sizes, options)
        if self.folder.made(name, key):
            curve = FaithfulnessCurve.load(self.folder / name)
        else:
            curve = circuits.faithfulness_curve(
                scores,
                self.model,
                samples,
                self.vector,
                self.coefficient,
                _sizes(a.sizes),
                **options,
                progress=self.show,
            )
            curve.save(self.folder / name)
            self.folder.put(name, key)
        _text(self.folder / "curve.md", curve.to_markdown())
        _picture(lambda path: curve.plot(path, threshold=a.threshold), self.folder / "curve.png")
        print(curve.to_markdown() + "\n")

    def smallest(self, scores: EdgeScores, samples: Samples) -> Circuit:
        from .. import circuits
        from ..base.provenance import digest

        a, name = self.arguments, "circuit.json"
        key = digest(self.key, a.method, a.threshold)
        if self.folder.made(name, key):
            found = circuits.Circuit.load(self.folder / name, scores.graph)
        else:
            found = circuits.minimum_faithful(
                scores,
                self.model,
                samples,
                self.vector,
                self.coefficient,
                a.threshold,
                method=a.method,
                progress=self.show,
            )
            found.save(self.folder / name)
            self.folder.put(name, key)
        _picture(lambda path: found.plot(path, scores=scores), self.folder / "circuit.png")
        shares = ", ".join(
            f"{kind} {100 * share:.1f} %" for kind, share in found.distribution().items()
        )
        print(
            f"Smallest circuit that carries {a.threshold:.0%} of the effect: {len(found)} of"
            f" {found.graph.n_edges} edges ({100 * len(found) / found.graph.n_edges:.2f} %,"
            f" faithfulness {found.meta['faithfulness']:.3f}), ending in {shares}"
        )
        return found


def _strengths(arguments: argparse.Namespace, n: int) -> list[float]:
    """The strength of each of n vectors, checked."""
    given: list[float] = arguments.coefficient
    strengths = given * n if len(given) == 1 else given
    if len(strengths) != n:
        raise ValueError(
            f"--coefficient: {len(strengths)} numbers for {n} vectors; give one, or one for each"
            " --vector"
        )
    if min(strengths) <= 0:
        raise ValueError("--coefficient takes numbers above 0; the sign comes from --side")
    return strengths


def _check(arguments: argparse.Namespace) -> None:
    """Raises ValueError for options out of range, before anything is loaded."""
    from ..base.bytes import memory_bytes

    _sizes(arguments.sizes)
    if not 0 < arguments.threshold <= 1:
        raise ValueError(
            f"--threshold takes a share above 0 and at most 1, not {arguments.threshold:g}"
        )
    if arguments.random < 0:
        raise ValueError(f"--random takes a whole number from 0 on, not {arguments.random}")
    memory_bytes(arguments.max_memory, "--max-memory")


def circuit(arguments: argparse.Namespace) -> int:
    """Runs the command; the exit status."""
    show, sign = sys.stderr.isatty(), -1.0 if arguments.side == "harmful" else 1.0
    _check(arguments)
    vectors = _vectors(arguments)
    strengths = _strengths(arguments, max(1, len(vectors)))
    train, validation, prompts = _prompts(arguments)
    out = Path(arguments.out)
    with contextlib.ExitStack() as opened:
        model = opened.enter_context(open_model(arguments))
        if not vectors:
            vectors = {"dim": _find(model, train, validation, arguments, _Folder(out), show)}
        for vector in vectors.values():
            vector.check(model, output=False)
        judge = None
        # Answers to harmless prompts are safe with and without steering: no judge is needed.
        if arguments.judge and arguments.side == "harmful":
            from ..judge import LlamaGuard

            judge = LlamaGuard(opened.enter_context(open_model(arguments, arguments.judge)))
        found: dict[str, Circuit] = {}
        parts: dict[str, tuple[Samples, SteeringVector, float]] = {}
        for (name, vector), strength in zip(vectors.items(), strengths):
            folder = _Folder(out / name if len(vectors) > 1 else out)
            coefficient = sign * strength
            print(
                f"{chr(10) if found else ''}{name}: layer {vector.layer}, norm"
                f" {vector.norm:.3g}, {arguments.side} prompts steered by {coefficient:+g}"
            )
            work = _Work(model, vector, coefficient, prompts, arguments, folder, judge, show)
            samples = work.samples()
            scores = work.scores(samples)
            work.curve(scores, samples)
            found[name] = work.smallest(scores, samples)
            parts[name] = samples, vector, coefficient
        if len(found) > 1:
            text = _together(model, found, parts, show)
            _text(out / "overlaps.md", text)
            print("\n" + text)
    files = sorted(str(p.relative_to(out)) for p in out.rglob("*") if p.is_file())
    print(f"\nWritten to {out}: {', '.join(files)}")
    return 0


def _together(
    model: Model,
    found: dict[str, Circuit],
    parts: dict[str, tuple[Samples, SteeringVector, float]],
    show: bool,
) -> str:
    """Markdown of the overlaps of the circuits, the cosines of the vectors, and the faithfulness of
    each circuit under the other vectors of its layer.
    """
    from .. import circuits

    names = list(found)
    text = [
        "Overlaps of the circuits (edges that two share, over the smaller one's size)",
        circuits.overlaps(found),
    ]
    cosines = ", ".join(
        f"{a} and {b} {parts[a][1].cosine(parts[b][1]):.2f}"
        for i, a in enumerate(names)
        for b in names[i + 1 :]
    )
    text.append(f"Cosines of the vectors: {cosines}")
    lines = [
        "| circuit of | " + " | ".join(f"under {b}" for b in names) + " |",
        "|:---|" + "---:|" * len(names),
    ]
    cells: dict[tuple[str, str], str] = {}
    for b, (samples, vector, coefficient) in parts.items():
        alike = [a for a in names if found[a].graph == found[b].graph]
        results = circuits.evaluate(
            [found[a] for a in alike], model, samples, vector, coefficient, progress=show
        )
        cells |= {(a, b): f"{r['logit_diff'].faithfulness:.3f}" for a, r in zip(alike, results)}
    lines += [f"| {a} | " + " | ".join(cells.get((a, b), "-") for b in names) + " |" for a in names]
    return "\n\n".join(
        [
            *text,
            (
                "Faithfulness (logit difference) of each circuit under each vector, on that"
                " vector's samples"
            ),
            "\n".join(lines),
        ]
    )
