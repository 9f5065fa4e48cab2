"""`vksteer circuit`: samples, scores, faithfulness curve, the smallest faithful circuit, and
overlaps of several vectors' circuits, in one folder.

What is finished stays finished: a second run with the same arguments takes vector, samples, scores,
curve and circuit from the folder. keys.json says what each was made from.
"""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

from .arguments import freeze_prompts, open_model

DESCRIPTION = """\
Which heads and MLPs carry a steering vector's effect, over whole answers? (arXiv 2604.08524, section 5)

  1. answers    prompts are answered with and without steering; those whose behaviour steering flips are kept (samples.json)
  2. scores     every edge between heads and MLPs above the steering layer gets an estimated effect, by integrated gradients
                between the unsteered and the steered run on the same tokens (scores.safetensors, top_edges.md)
  3. curve      circuits of the strongest edges, small to large, are run with everything else as in the unsteered run: how much of the
                steering effect is left? Random circuits of twice the size stand beside them (curve.json, curve.md, curve.png)
  4. circuit    the smallest circuit that carries 85 % of the effect (circuit.json, circuit.png)

Harmful prompts are steered by -A (away from refusal), harmless ones by +A (towards it). With several --vector the circuits' overlaps and how
well each one carries the other vectors are shown, too (overlaps.md); each vector then has a folder of its own in DIR.
Without --vector one is found as in `vksteer freeze`. The bundled tiny models bring their own prompts; for other models give prompt files."""


def add_parser(commands, formatter, model_arguments, positive) -> None:
    """Adds the command to the parser of `cli.py`, whose formatter and argument groups it shares."""
    parser = commands.add_parser(
        "circuit",
        formatter_class=formatter,
        help="which heads and MLPs carry a vector's effect, and how few are enough",
        description=DESCRIPTION,
    )
    model_arguments(parser)
    group = parser.add_argument_group("prompts")
    group.add_argument(
        "--harmful", metavar="FILE[:COLUMN]", help="prompts that the model should refuse"
    )
    group.add_argument("--harmless", metavar="FILE[:COLUMN]", help="prompts that it should answer")
    group.add_argument(
        "--side",
        choices=("harmful", "harmless"),
        default="harmful",
        help="which of the two the samples are made from (default: harmful, steered by -A)",
    )
    group.add_argument(
        "--limit",
        type=positive,
        default=32,
        metavar="N",
        help="at most N prompts of that side (default: 32)",
    )
    group = parser.add_argument_group("vectors and strength")
    group.add_argument(
        "--vector",
        action="append",
        metavar="FILE",
        help="a steering vector: .safetensors, .npz or .gguf; may be repeated (default: find one)",
    )
    group.add_argument(
        "--layer", type=int, help="which layer's vector, where a .gguf file holds several"
    )
    group.add_argument(
        "--criterion",
        choices=("paper", "arditi"),
        default="paper",
        help="the rule that chooses among candidates (default: paper)",
    )
    group.add_argument(
        "--coefficient",
        type=float,
        nargs="+",
        default=[1.0],
        metavar="A",
        help="strength, without sign; one number, or one for each vector (default: 1)",
    )
    group = parser.add_argument_group("samples")
    group.add_argument(
        "--responses",
        choices=("steered", "base"),
        default="steered",
        help="whose answers are followed (default: those of the steered model)",
    )
    group.add_argument(
        "--keep",
        choices=("flipped", "all"),
        default="flipped",
        help="which prompts are kept (default: those whose behaviour steering flips)",
    )
    group.add_argument(
        "--max-new-tokens",
        type=positive,
        default=64,
        metavar="N",
        help="length of an answer (default: 64)",
    )
    group.add_argument(
        "--judge",
        metavar="MODEL",
        help=(
            "a Llama Guard 2 model that judges answers to harmful prompts (default: the substring"
            " judge)"
        ),
    )
    group = parser.add_argument_group("scores")
    group.add_argument(
        "--steps",
        type=positive,
        default=10,
        metavar="T",
        help="steps of the integration from unsteered to steered (default: 10)",
    )
    group.add_argument(
        "--rule",
        choices=("midpoint", "left", "right"),
        default="midpoint",
        help="where in a step the gradient is taken (default: midpoint)",
    )
    group.add_argument(
        "--metric",
        choices=("logit_diff", "directional_kl", "kl"),
        default="logit_diff",
        help="what an edge's effect is measured on (default: logit_diff)",
    )
    group.add_argument(
        "--kl-threshold",
        type=float,
        default=0.0,
        metavar="X",
        help="for the two KL metrics: positions where KL(steered || base) is above X (default: 0)",
    )
    group.add_argument(
        "--clean",
        choices=("steered", "base"),
        default="steered",
        help="which run the patches are taken from (default: steered)",
    )
    group.add_argument(
        "--at",
        choices=("pre_norm", "normed"),
        default="pre_norm",
        help=(
            "gradients before the inputs' norms, or after them as in the paper's code (default:"
            " pre_norm)"
        ),
    )
    group.add_argument(
        "--max-memory",
        metavar="SIZE",
        help="for activations and gradients, for example 6GiB (default: as the device allows)",
    )
    group = parser.add_argument_group("circuits")
    group.add_argument(
        "--method",
        choices=("pruned", "top", "greedy_backward", "greedy_forward"),
        default="pruned",
        help=(
            "how edges become a circuit (default: pruned, "
            "the strongest edges that lie on a path from the steering vector to the logits)"
        ),
    )
    group.add_argument(
        "--threshold",
        type=float,
        default=0.85,
        metavar="X",
        help="share of the effect that a faithful circuit carries (default: 0.85)",
    )
    group.add_argument(
        "--sizes",
        metavar="N,N,...",
        help="sizes on the curve (default: 0.2 %% to 100 %% of all edges)",
    )
    group.add_argument(
        "--random",
        type=int,
        default=3,
        metavar="N",
        help="random circuits beside each size (default: 3)",
    )
    group.add_argument(
        "--halves",
        action="store_true",
        help="find the curve's circuits on one half of the samples and judge them on the other",
    )
    group.add_argument(
        "--seed",
        type=int,
        default=0,
        help="seed of random circuits, halves and intervals (default: 0)",
    )
    group.add_argument(
        "--eap-ig",
        action="store_true",
        help="also write eap_ig.json, which hannamw/EAP-IG's Graph.from_json reads",
    )
    parser.add_argument(
        "--out",
        required=True,
        metavar="DIR",
        help=(
            "everything is written here; a second run with the same arguments goes on from what is"
            " there"
        ),
    )
    parser.set_defaults(run=circuit)


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


def _sizes(text):
    if text is None:
        return None
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"--sizes takes whole numbers with commas, not {text!r}") from None


def _text(path: Path, *parts: str) -> None:
    path.write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def _picture(draw, path: Path) -> None:
    try:
        draw(path)
    except ImportError as error:
        print(f"No picture: {error}", file=sys.stderr)


def _prompts(arguments):
    """(training pair, validation pair) or None twice with --vector, and the prompts of the side."""
    train, validation, (harmful, harmless) = freeze_prompts(arguments)
    return train, validation, harmful if arguments.side == "harmful" else harmless


def _find(model, train, validation, arguments, folder: _Folder, show: bool):
    """The difference in means chosen by the rule, from the folder where it is there."""
    from .. import steering
    from ..base.provenance import digest, fingerprint
    from ..inputs.vectors import SteeringVector

    key = digest("vector", fingerprint(model), train, validation, arguments.criterion)
    if folder.made("vector.safetensors", key, costly=True):
        return SteeringVector.load(folder / "vector.safetensors")
    vector = steering.difference_in_means(model, *train, progress=show).select(
        *validation, criterion=arguments.criterion, progress=show
    )
    vector.save(folder / "vector.safetensors")
    folder.put("vector.safetensors", key)
    return vector


def _vectors(arguments) -> dict:
    """Name -> SteeringVector, read before the model, which takes longer."""
    from ..inputs.vectors import SteeringVector

    found = {}
    for path in arguments.vector or []:
        name = stem = Path(path).stem
        number = 2
        while name in found:
            name, number = f"{stem}-{number}", number + 1
        found[name] = SteeringVector.load(path, arguments.layer)
    return found


class _Work:
    """One vector's part: samples, scores, curve, circuit, each taken from the
    folder where it is there.
    """

    def __init__(
        self, model, vector, coefficient, prompts, arguments, folder: _Folder, judge, show: bool
    ):
        from ..base.provenance import digest, fingerprint

        (
            self.model,
            self.vector,
            self.coefficient,
            self.prompts,
            self.arguments,
            self.folder,
            self.judge,
            self.show,
        ) = (
            model,
            vector,
            coefficient,
            prompts,
            arguments,
            folder,
            judge,
            show,
        )
        self.key = digest(
            "samples",
            fingerprint(model),
            vector.direction,
            vector.layer,
            coefficient,
            prompts,
            arguments.responses,
            arguments.keep,
            arguments.max_new_tokens,
            arguments.judge,
        )

    def samples(self):
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

    def scores(self, samples):
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

    def curve(self, scores, samples):
        from .. import circuits
        from ..base.provenance import digest
        from ..circuits.faithfulness import FaithfulnessCurve

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

    def smallest(self, scores, samples):
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


def circuit(arguments) -> int:
    """Runs the command; the exit status."""
    from ..patching.memory_plan import memory_bytes

    show, sign = sys.stderr.isatty(), -1.0 if arguments.side == "harmful" else 1.0
    _sizes(arguments.sizes)
    if not 0 < arguments.threshold <= 1:
        raise ValueError(
            f"--threshold takes a share above 0 and at most 1, not {arguments.threshold:g}"
        )
    if arguments.random < 0:
        raise ValueError(f"--random takes a whole number from 0 on, not {arguments.random}")
    memory_bytes(arguments.max_memory, "--max-memory")
    vectors = _vectors(arguments)
    strengths = (
        arguments.coefficient * max(1, len(vectors))
        if len(arguments.coefficient) == 1
        else arguments.coefficient
    )
    if len(strengths) != max(1, len(vectors)):
        raise ValueError(
            f"--coefficient: {len(strengths)} numbers for {max(1, len(vectors))} vectors; give one,"
            " or one for each --vector"
        )
    if min(strengths) <= 0:
        raise ValueError("--coefficient takes numbers above 0; the sign comes from --side")
    train, validation, prompts = _prompts(arguments)
    out = Path(arguments.out)
    with contextlib.ExitStack() as opened:
        model = opened.enter_context(open_model(arguments))
        if not vectors:
            vectors = {"dim": _find(model, train, validation, arguments, _Folder(out), show)}
        for vector in vectors.values():
            vector.check(model)
        judge = None
        # answers to harmless prompts are safe either way
        if arguments.judge and arguments.side == "harmful":
            from ..judge import LlamaGuard

            judge = LlamaGuard(opened.enter_context(open_model(arguments, arguments.judge)))
        found, parts = {}, {}
        for (name, vector), strength in zip(vectors.items(), strengths):
            folder = _Folder(out / name if len(vectors) > 1 else out)
            print(
                f"{'' if not found else chr(10)}{name}: layer {vector.layer}, norm"
                f" {vector.norm:.3g}, {arguments.side} prompts steered by {sign * strength:+g}"
            )
            work = _Work(model, vector, sign * strength, prompts, arguments, folder, judge, show)
            samples = work.samples()
            scores = work.scores(samples)
            work.curve(scores, samples)
            found[name], parts[name] = (
                work.smallest(scores, samples),
                (samples, vector, sign * strength),
            )
        if len(found) > 1:
            text = _together(model, found, parts, show)
            _text(out / "overlaps.md", text)
            print("\n" + text)
    print(
        f"\nWritten to {out}:"
        f" {', '.join(sorted(str(p.relative_to(out)) for p in out.rglob('*') if p.is_file()))}"
    )
    return 0


def _together(model, found: dict, parts: dict, show: bool) -> str:
    """Overlaps, cosines, and each circuit under the other vectors of its layer, as Markdown."""
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
    cells = {}
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
