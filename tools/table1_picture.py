"""Draws Table 1 of the bundled tiny-llama-chat as docs/images/table1.svg, from its table1.json.

    .venv/bin/python tools/table1_picture.py [OUT.svg]

Plain text: the picture carries its own background for light and for dark pages. Bars are ASR, the
share of requests that are answered; whiskers are the 95 % Wilson intervals of the table.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "python/vksteer/models/tiny-llama-chat"
OUT = ROOT / "docs/images/table1.svg"

#: Row of the table, what the picture calls it, and its kind (the colour).
ROWS = (
    ("unsteered", "not steered", "control"),
    ("none", "steered, nothing frozen", "steered"),
    ("QK", "attention patterns frozen (QK)", "part"),
    ("MLP", "MLP outputs frozen", "part"),
    ("MLP direct", "vector taken out of MLP inputs", "part"),
    ("OV", "attention values frozen (OV)", "part"),
    ("SVV", "vector taken out of values (SVV)", "part"),
    ("random 0", "a random vector instead", "control"),
)
SIDES = (
    ("harmless", "Harmless requests answered,", "steered towards refusal"),
    ("harmful", "Harmful requests answered,", "steered away from refusal"),
)
WIDTH, LABEL, BAR, GAP, ROW, TOP = 910, 270, 260, 70, 32, 62

STYLE = """\
<style>
  text { font: 14px system-ui, sans-serif; fill: #1f2328 }
  .head { font-weight: 600 } .small { font-size: 12px; fill: #59636e }
  .page { fill: #ffffff } .axis { stroke: #d1d9e0 } .whisker { stroke: #1f2328; stroke-width: 1.5 }
  .control { fill: #9aa4af } .steered { fill: #1f6feb } .part { fill: #d97706 }
  @media (prefers-color-scheme: dark) {
    text { fill: #f0f6fc } .small { fill: #9198a1 } .page { fill: #0d1117 }
    .axis { stroke: #3d444d } .whisker { stroke: #f0f6fc }
    .control { fill: #6e7681 } .steered { fill: #4493f8 } .part { fill: #e3912b }
  }
</style>"""


def text(x: float, y: float, words: str, kind: str = "", anchor: str = "start") -> str:
    return f'<text x="{x:g}" y="{y:g}" class="{kind}" text-anchor="{anchor}">{words}</text>'


def bar(left: float, y: float, side: dict, kind: str) -> list[str]:
    """A bar of the ASR with its interval and its figure."""
    at = {name: left + BAR * side[name] for name in ("asr", "low", "high")}
    middle = y + (ROW - 10) / 2
    return [
        (
            f'<rect x="{left:g}" y="{y:g}" width="{at["asr"] - left:.1f}" height="{ROW - 10}" '
            f'class="{kind}"/>'
        ),
        (
            f'<line x1="{at["low"]:.1f}" x2="{at["high"]:.1f}" y1="{middle:g}" y2="{middle:g}" '
            'class="whisker"/>'
        ),
        text(max(at["asr"], at["high"]) + 6, middle + 5, f"{side['asr']:.2f}"),
    ]


def picture(table: dict) -> str:
    setting, rows = table["setting"], table["rows"]
    height = TOP + ROW * len(ROWS) + 46
    plus, minus = setting["coefficient"]
    lefts = {name: LABEL + i * (BAR + GAP) for i, (name, *_) in enumerate(SIDES)}
    lines = [
        (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
            f'width="{WIDTH}" height="{height}" role="img">'
        ),
        "<title>Which part of tiny-llama-chat steering acts through</title>",
        STYLE,
        f'<rect class="page" width="{WIDTH}" height="{height}" rx="6"/>',
    ]
    for name, first, second in SIDES:
        left = lefts[name]
        lines += [text(left, 22, first, "head"), text(left, 42, second, "head")]
        for share in (0, 0.5, 1):
            x = left + BAR * share
            lines.append(
                f'<line x1="{x:g}" x2="{x:g}" y1="{TOP - 8}" y2="{height - 42}" class="axis"/>'
            )
    for i, (row, words, kind) in enumerate(ROWS):
        y = TOP + ROW * i
        lines.append(text(LABEL - 12, y + 16, words, anchor="end"))
        for name, *_ in SIDES:
            lines += bar(lefts[name], y, rows[row][name], kind)
    note = (
        f"tiny-llama-chat, vector of layer {setting['layer']}, strengths +{plus:g} and "
        f"-{minus:g}, {setting['n_harmless']} + {setting['n_harmful']} test requests; "
        "lines are 95 % intervals"
    )
    lines += [text(12, height - 14, note, "small"), "</svg>", ""]
    return "\n".join(lines)


def main() -> None:
    seed = str(json.loads((MODEL / "training.json").read_text())["seed"])
    out = Path(sys.argv[1]) if len(sys.argv) > 1 else OUT
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(picture(json.loads((MODEL / "table1.json").read_text())[seed]))


if __name__ == "__main__":
    main()
