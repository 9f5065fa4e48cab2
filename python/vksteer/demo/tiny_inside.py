"""The analysis in part 1 of the demo: the edges that carry the bundled model's vector, the tokens
that its value vectors promote, and how sparse it can be.
"""

from __future__ import annotations

import time
from pathlib import Path

TAUS = (0.3, 1.0, 2.0)
SHARES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.4)


def inside(
    model, vector, plus: float, minus: float, harmful, harmless, out: Path, say, progress: bool
) -> dict:
    """Circuit, curve, lens table and sparsity curve on a few test prompts, printed and written to
    `out`; returns what goes into JSON. Without matplotlib a message says that a picture is left
    out. say: a function that prints one text.
    """
    start = time.perf_counter()
    pictures = []

    def picture(call, name):
        try:
            call(out / name)
            pictures.append(name)
        except ImportError as error:
            say(f"No picture {name}: {error}")

    scores, circuit_result = _circuit(model, vector, minus, harmful, out, say, progress, picture)
    lens_result = _lens(model, vector, out, say, progress)
    sparsity_result = (
        _sparsity(
            model, vector, scores, plus, minus, harmful, harmless, out, say, progress, picture
        )
        if scores is not None
        else {}
    )
    seconds = time.perf_counter() - start
    say(
        f"\n{seconds:.0f} s. Written to {out}/: circuit.md, lens.md,"
        f" sparsity.md{''.join(', ' + p for p in pictures)}"
    )
    return {
        "circuit": circuit_result,
        "lens": lens_result,
        "sparsity": sparsity_result,
        "inside_seconds": seconds,
    }


def _circuit(model, vector, minus, harmful, out, say, progress, picture):
    from .. import circuits, patching

    samples = patching.make_samples(
        model, harmful, vector, -minus, max_new_tokens=72, progress=False
    )
    if not len(samples):
        say("\nSteering flips none of these prompts: no circuit.")
        return None, {}
    scores = patching.attribute(
        model, samples, vector, -minus, steps=10, dims="steer", progress=progress
    )
    sizes = sorted({max(1, round(share * scores.graph.n_edges)) for share in SHARES})
    curve = circuits.faithfulness_curve(
        scores, model, samples, vector, -minus, sizes, random=2, progress=progress
    )
    faithful = circuits.minimum_faithful(scores, model, samples, vector, -minus, progress=progress)
    say(
        f"\nWhich edges carry it? {len(samples)} answers, the steering layer and those above:"
        f" {scores.graph.n_edges} edges\n"
    )
    say(repr(scores.top(8)))
    say("\n" + curve.to_markdown())
    shares = ", ".join(
        f"{kind} {100 * share:.0f} %" for kind, share in faithful.distribution().items()
    )
    say(
        f"\nSmallest circuit with 85 % of the effect: {len(faithful)} edges of"
        f" {scores.graph.n_edges}; they end in {shares}"
    )
    (out / "circuit.md").write_text(
        f"{scores.top(20)!r}\n\n{curve.to_markdown()}\n", encoding="utf-8"
    )
    picture(curve.plot, "curve.png")
    picture(faithful.plot, "circuit.png")
    return scores, {
        "samples": len(samples),
        "edges": scores.graph.n_edges,
        "smallest": len(faithful),
        "curve": curve.to_dict(),
    }


def _lens(model, vector, out, say, progress):
    from .. import ov

    values = ov.steering_value_vectors(model, vector)
    lens = ov.logit_lens(model, values, top=5, progress=progress)
    say(
        "\nWhat the vector writes through each head (steering value vectors, the largest first),"
        " and the tokens that these promote:\n"
    )
    say(values.to_markdown(6))
    say("\n" + lens.to_markdown(top=3))
    (out / "lens.md").write_text(
        values.to_markdown(20) + "\n\n" + lens.to_markdown() + "\n", encoding="utf-8"
    )
    return {"largest": [list(map(int, place)) for place in values.largest(6)]}


def _sparsity(model, vector, scores, plus, minus, harmful, harmless, out, say, progress, picture):
    from .. import sparsify

    table = sparsify.sweep(
        model,
        vector,
        scores,
        harmful,
        harmless,
        (plus, minus),
        taus=TAUS,
        methods=("gradient", "random"),
        max_new_tokens=72,
        progress=progress,
    )
    say("\nHow many dimensions does it need? Chosen by gradient, and as many at random:\n")
    say(table.to_markdown())
    (out / "sparsity.md").write_text(table.to_markdown() + "\n", encoding="utf-8")
    picture(table.plot, "sparsity.png")
    return table.to_dict()
