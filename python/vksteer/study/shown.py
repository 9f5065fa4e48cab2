"""Steps of a study that keep examples for the reader: answers side by side, and the tokens of some
samples with their scores.

What a model wrote, and the prompts, lie in the steps' own files; results.json holds numbers alone.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import patching
from ..base.json_files import read_json
from ..base.whole_files import write_whole
from ..circuits.final_rows import final_rows
from ..circuits.graph import INPUT_KINDS, Graph
from ..inputs.prompts import token_text
from ..patching.edge_scores import EdgeScores
from .inside import MAIN, coefficient, load_samples
from .steps import Context, Outcome, step
from .vectors import load_vector

if TYPE_CHECKING:
    from ..inputs.samples import Sample
    from ..loading.tokenizer import Tokenizer

#: Prompts of each kind whose answers are kept, and samples whose tokens are.
MOST_PROMPTS, MOST_SAMPLES = 20, 3
SIDES = ("harmless", "harmful")
TEXTS, TOKENS = "texts.json", "tokens.json"
LIMIT = 1 << 28  # bytes of the file of answers


@step("texts", "answers side by side", needs=("prompts", "table1"), uses=("data_hash",))
def texts(c: Context) -> Outcome:
    """Answers of the unsteered and the steered model and of every row of Table 1, with the first
    token in which a row differs from the unsteered and from the steered answer.
    """
    answers = read_json(c.inputs["table1"].file("answers.json"), limit=LIMIT)["rows"]
    harmful, harmless = c.data.pair("test")
    shown: dict[str, list[dict[str, Any]]] = {}
    counts: dict[str, dict[str, dict[str, float]]] = {}
    for side, prompts in zip(SIDES, (harmless, harmful), strict=True):
        rows = {name: [a["text"] for a in sides[side]] for name, sides in answers.items()}
        tokens = {name: [_ids(c.model.tokenizer, t) for t in said] for name, said in rows.items()}
        shown[side] = [
            {"prompt": prompt, "answers": {n: _answer(c, rows, tokens, n, i) for n in rows}}
            for i, prompt in enumerate(prompts[:MOST_PROMPTS])
        ]
        counts[side] = {name: _alike(tokens, name) for name in rows}
    _write(c, TEXTS, {"sides": shown})
    kept = {side: len(some) for side, some in shown.items()}
    asked = {"harmless": len(harmless), "harmful": len(harmful)}
    return Outcome({"kept": kept, "prompts": asked, "alike": counts}, [TEXTS])


def _ids(tokenizer: Tokenizer | None, text: str) -> list[int]:
    """The tokens of an answer; its characters' codes where the model has no tokenizer."""
    if tokenizer is None:
        return [ord(x) for x in text]
    return tokenizer.encode(text, add_bos=False)


def first_difference(a: Sequence[int], b: Sequence[int]) -> int | None:
    """The index of the first token in which two rows differ; None where they are equal."""
    for i, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return i
    return None if len(a) == len(b) else min(len(a), len(b))


def _answer(
    c: Context,
    rows: dict[str, list[str]],
    tokens: dict[str, list[list[int]]],
    name: str,
    i: int,
) -> dict[str, Any]:
    """{"text", "base", "steered"}: one answer, and where it differs from those two: None, or
    [token, first character, end of that token].
    """
    text, ids = rows[name][i], tokens[name][i]
    content: dict[str, Any] = {"text": text}
    for key, other in (("base", "unsteered"), ("steered", "none")):
        at = first_difference(ids, tokens[other][i])
        content[key] = None if at is None else [at, *_span(c.model.tokenizer, text, ids, at)]
    return content


def _span(tokenizer: Tokenizer | None, text: str, ids: Sequence[int], at: int) -> tuple[int, int]:
    """The characters of token `at` in a text; (its length, its length) where the text has ended."""
    if tokenizer is None:
        return min(at, len(text)), min(at + 1, len(text))
    start, end = (_common(text, tokenizer.decode(ids[:n])) for n in (at, at + 1))
    return start, max(end, min(start + 1, len(text)))


def _common(text: str, beginning: str) -> int:
    """How many characters both begin with: a token may be a part of a character."""
    n = 0
    while n < min(len(text), len(beginning)) and text[n] == beginning[n]:
        n += 1
    return n


def _alike(tokens: dict[str, list[list[int]]], name: str) -> dict[str, float]:
    """Shares of the answers of a row that are those of the unsteered and of the steered model."""
    n = len(tokens[name])
    return {
        key: sum(a == b for a, b in zip(tokens[name], tokens[other], strict=True)) / n
        for key, other in (("base", "unsteered"), ("steered", "none"))
    }


@step(
    "positions",
    "scores of single samples by token and layer",
    needs=("candidates", "strength", "attribution"),
    uses=("steps",),
)
def positions(c: Context) -> Outcome:
    """Some samples of the main data set, attributed by position."""
    found = load_samples(c, "attribution", MAIN)
    if found is None:
        return Outcome({"why": "steering flips no prompt of this data set"})
    samples, scores = found
    assert scores.weights is not None
    chosen = [int(i) for i in np.flatnonzero(scores.weights)[:MOST_SAMPLES]]
    made = [c.once(f"sample {i}", partial(_by_position, c, samples[i])) for i in chosen]
    rows = [[token_text(c.model, t) for t in samples[i].tokens] for i in chosen]
    _write(c, TOKENS, {"tokens": rows})
    return Outcome(
        {
            "samples": chosen,
            "of": len(samples),
            "layer": scores.graph.layer,
            "coefficient": coefficient(c, MAIN),
            "shown": made,
            "prompt_share": [_prompt_share(one) for one in made],
        },
        [TOKENS],
    )


def _by_position(c: Context, sample: Sample) -> dict[str, Any]:
    """{"prompt": prompt tokens, "steered": [first, end) position, "metric": positions that the
    metric reads, "tokens": [S] score of the node steer at every position, "layers": [layers + 1][S]
    sums of the scores of the edges that end in each layer's inputs, the logits last}.
    """
    vector, a = load_vector(c, "dim"), coefficient(c, MAIN)
    scores = patching.attribute(
        c.model, [sample], vector, a, steps=c.settings.steps, per_position=True, progress=False
    )
    assert scores.positions is not None
    steer, layers = by_position(scores)
    (rows,) = final_rows(c.model, [sample], vector, a)
    at = rows.first + np.flatnonzero(rows.greedy_base != rows.greedy_steered)
    return {
        "prompt": len(sample.prompt_tokens),
        "steered": [0, len(sample)],  # the vector acts on every token
        "metric": at,
        "tokens": steer,
        "layers": layers,
    }


def by_position(scores: EdgeScores, sample: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(float64 [S], float64 [layers + 1, S]) of one sample's scores by position: the node steer's
    at each position, which is what steering adds there to the metric, to first order; and of the
    edges that end in each layer's inputs and in the logits.
    """
    assert scores.positions is not None
    graph, table = scores.graph, scores.positions[sample].astype(np.float64)
    ends = input_layers(graph)[graph.downstream]
    layers = np.stack([table[ends == l].sum(axis=0) for l in range(graph.depth + 1)])
    return table[graph.upstream == 0].sum(axis=0), layers


def input_layers(graph: Graph) -> np.ndarray:
    """int64 [n_downstream]: the layer of every input, counted from the steering layer; the logits
    count as one more.
    """
    found = np.arange(graph.n_downstream) // graph.width
    assert graph.input_kind[-1] == INPUT_KINDS.index("logits")
    return np.asarray(found, np.int64)


def _prompt_share(one: dict[str, Any]) -> float:
    """The share of the tokens' scores, by size, that lies in the prompt."""
    sizes = np.abs(np.array(one["tokens"], np.float64))
    total = float(sizes.sum())
    return float(sizes[: one["prompt"]].sum()) / total if total else 0.0


def _write(c: Context, name: str, content: dict[str, Any]) -> None:
    text = json.dumps(content, ensure_ascii=False, allow_nan=False, sort_keys=True)
    write_whole(c.folder / name, (text + "\n").encode())
