"""Part 1 of the demo: the study of a bundled model, told while it runs.

Every chapter is one call of `vs.study.run` for the steps that it tells about; what an earlier run
left in the folder is taken from it, so an interrupted demo goes on where it stopped.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .report import heading, picture, say, side_by_side

if TYPE_CHECKING:
    from ..runtime.model import Model
    from ..study import Study

MODEL = "tiny-gemma-chat"
#: What the circuit is told of: answers to harmful requests, steered so that they are given.
MAIN = "harmful.steered"
SHOWN = 2  # prompts of each kind whose answers are shown
WORDS = {
    "none": "nothing",
    "QK": "attention patterns (QK)",
    "OV": "attention values (OV)",
    "SVV": "direct part of the values (SVV)",
    "MLP direct": "direct part of the MLP inputs",
    "MLP": "MLP outputs",
}
INPUTS = {"q": "queries", "k": "keys", "v": "values", "mlp": "MLPs", "logits": "the logits"}


def bundled(out: Path, size: str, device: str | None, progress: bool) -> Study:
    """Runs the study of MODEL in out/study and tells what it finds; returns it.

    size: of the study. device: as in Model.from_pretrained. progress: whether bars are shown.
    """
    from .. import study
    from ..runtime.model import Model

    start, folder = time.perf_counter(), out / "study"
    heading(f"1. Why does a steering vector work? The study of {MODEL}")
    say(
        "A chat model of a village world: it helps with safe requests and declines dangerous ones"
        " (all of them invented and harmless)."
    )
    with Model.from_pretrained(MODEL, device=device, progress=False) as model:
        c = model.config
        say(
            f"{model.device}\n{c.architecture}: {c.n_layers} layers, width {c.d_model}, {c.n_heads}"
            f" heads, vocabulary {c.d_vocab}"
        )

        def chapter(*steps: str) -> Study:
            only = steps or None
            return study.run(model, out=folder, size=size, only=only, progress=progress)

        planned = study.run(
            model, out=folder, size=size, plan_only=True, predict=False, progress=False
        )
        finished = _plan(planned)
        _vector(chapter("candidates", "strength"), model)
        _table1(chapter("table1"), out)
        _circuit(chapter("circuits"), out)
        whole = chapter()
    _claims(whole)
    seconds = time.perf_counter() - start
    kept = ", all of it from the earlier run" if finished else ""
    say(f"\nThe study is complete ({seconds:.0f} s{kept}).")
    _where(whole, out)
    return whole


def _plan(planned: Study) -> bool:
    """Says what an earlier run has left; whether that is everything."""
    states = [step.reason for step in planned.planned]
    done = states.count("done")
    if done == len(states):
        say(
            f"\nThe study in {planned.folder}/ is complete: nothing is computed again. For a new"
            " one, remove that folder."
        )
    elif done or "partial" in states:
        say(
            f"\nAn earlier run left {done} of {len(states)} steps in {planned.folder}/: it goes on"
            " from there."
        )
    return done == len(states)


def _vector(study: Study, model: Model) -> None:
    """The vector, its strengths, and the answers to a few test prompts under it."""
    from .. import data
    from ..inputs.vectors import SteeringVector
    from ..runtime.edits import Steer

    steps = study.results["steps"]
    found, settings = steps["candidates"], study.results["settings"]
    plus, minus = steps["strength"]["coefficient"]
    heading("The vector")
    say(
        f"The mean activation of {settings['train']} declined requests minus that of as many"
        f" answered ones, before layer {found['layer']} of {found['n_layers']} (they count from 0)"
        f" at position {found['position']}.\nThe paper's rule chose it among the differences of all"
        f" layers and positions, {found['rejected']} of which its filters removed."
    )
    none = "" if steps["strength"]["works"] else " (no strength works in both directions)"
    say(
        f"Strengths, chosen on validation prompts: +{plus:g} makes it decline, -{minus:g} makes it"
        f" answer{none}."
    )
    heading("What it does to answers")
    vector = SteeringVector.load(study.file("candidates", "dim.safetensors"))
    titles = [f"-{minus:g} (away from refusal)", "unsteered", f"+{plus:g} (towards refusal)"]
    edits = [[Steer(vector, a)] if a else [] for a in (-minus, 0, plus)]
    harmful, harmless = data.tiny_pair("test", settings["test"], settings["seed"])
    prompts = harmful[:SHOWN] + harmless[:SHOWN]
    made = model.generate(
        [p for p in prompts for _ in edits],
        edits=edits * len(prompts),
        max_new_tokens=settings["new_tokens"],
        progress=False,
    )
    for i, prompt in enumerate(prompts):
        say(f"\n> {prompt}")
        say(side_by_side(titles, [g.text for g in made[3 * i : 3 * i + 3]]))


def _rate(rate: Mapping[str, Any]) -> str:
    return f"{rate['asr']:.2f} [{rate['low']:.2f}, {rate['high']:.2f}]"


def _table1(study: Study, out: Path) -> None:
    """Table 1, without the rows of random directions, and its picture."""
    from ..freezing import AblationTable, TableRow
    from ..judge import Rate

    rows, setting = (study.results["steps"]["table1"][name] for name in ("rows", "setting"))
    plus, minus = setting["coefficient"]
    heading("Through which parts it acts (Table 1)")
    say(
        f"The share of requests that are answered when one part of the model is kept as in the"
        f" unsteered run: {setting['n_harmless']} harmless test requests under +{plus:g} and"
        f" {setting['n_harmful']} that should be declined under -{minus:g}, with 95 % intervals.\n"
    )
    say(f"| kept as without steering | harmless, +{plus:g} | declined, -{minus:g} | change |")
    say("|:---|---:|---:|---:|")
    for name, words in WORDS.items():
        row = rows[name]
        change = "" if name == "none" else f"{100 * row['average_change']:.0f} %"
        say(f"| {words} | {_rate(row['harmless'])} | {_rate(row['harmful'])} | {change} |")
    base = rows["unsteered"]
    say(f"| (no steering) | {_rate(base['harmless'])} | {_rate(base['harmful'])} | |")
    qk, ov = (100 * rows[name]["average_change"] for name in ("QK", "OV"))
    say(
        f"\nKeeping the attention patterns changes the rates by {qk:.0f} % on average, keeping the"
        f" values by {ov:.0f} %."
    )

    def rebuilt(name: str, row: Mapping[str, Any]) -> TableRow:
        sides = {side: Rate(**row[side]) for side in ("harmless", "harmful")}
        return TableRow(name, **{**row, **sides})

    table = AblationTable([rebuilt(name, row) for name, row in rows.items()], {}, setting)
    picture(table.plot, out / "table1.png")


def _circuit(study: Study, out: Path) -> None:
    """The smallest faithful circuit, its strongest edges, the curve, and their pictures."""
    from ..circuits.circuit import Circuit
    from ..circuits.curve import FaithfulnessCurve
    from ..patching.edge_scores import EdgeScores

    steps = study.results["steps"]
    found, curve = steps["circuits"]["smallest"][MAIN], steps["circuits"]["curve"]
    heading("The circuit")
    if "size" not in found:
        say(f"There is no faithful circuit: {found['why']}")
        return
    scores = EdgeScores.load(study.file("attribution", f"{MAIN}.scores.safetensors"))
    circuit = Circuit.load(study.file("circuits", f"{MAIN}.circuit.json"), scores.graph)
    ends = [f"{n} in {INPUTS[kind]}" for kind, n in circuit.counts().items() if n]
    layers = {n for name in circuit.node_names for n in re.findall(r"\d+", name)[:1]}
    say(
        f"{scores.graph.n_edges} edges lead from the vector through heads and MLPs to the logits."
        f" The first {len(circuit)} of them by their scores, over {len(layers)} layers, carry"
        f" {_share(found)} of the effect: {found['samples_found']} answers that steering changes"
        f" chose them, {found['samples_judged']} others judge them.\n"
        f"They end: {', '.join(ends)}."
    )
    say(f"The strongest (a4.h0 is head 0 of layer 4, m4 its MLP):\n\n{scores.top(8)!r}")
    picture(partial(circuit.plot, scores=scores), out / "circuit.png")
    if "edges" in curve:
        held_out = FaithfulnessCurve.from_dict(curve)
        say(f"\n{held_out.to_markdown()}")
        picture(held_out.plot, out / "curve.png")


def _share(found: Mapping[str, Any]) -> str:
    """The faithfulness of a circuit with its interval, where they are defined."""
    value, low, high = (found[name] for name in ("faithfulness", "low", "high"))
    if value is None:
        return "an unknown share"
    interval = "" if low is None or high is None else f" [{100 * low:.0f}, {100 * high:.0f}]"
    return f"{100 * value:.0f}{interval} %"


def _claims(study: Study) -> None:
    """The paper's five claims with this model's verdicts."""
    from ..study.claims import shown

    heading("The paper's five claims on this model")
    for number, claim in enumerate(study.results["claims"], 1):
        value = "not measured" if claim["value"] is None else shown(claim)
        say(f"{number}. {claim['claim']}")
        say(f"   {claim['verdict']}: {value}; {claim['why']}.")


def _where(study: Study, out: Path) -> None:
    """The path of the report and what is to be seen in it."""
    found = study.results["steps"]["circuits"]["smallest"][MAIN]
    size = f"#circuit:n={found['size']}" if "size" in found else ""
    made = [name for name in ("table1.png", "circuit.png", "curve.png") if (out / name).exists()]
    if made:
        say(f"Pictures in {out}/: {', '.join(made)}")
    say(
        "The report, one file for a browser, with every figure and a viewer of the circuit (move"
        f" the slider of edges, click a head):\n  {study.report}\n"
        f"  {study.report.resolve().as_uri()}{size}"
    )
