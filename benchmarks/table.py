"""The README's tables, from code and from measured files, between <!-- NAME --> and <!-- /NAME --> marks.

    table.py            prints what would stand there
    table.py --write    puts it into README.md

measured: the newest JSON of benchmarks/results that was not made on a busy machine. families: vksteer's own table of configurations.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"


def newest() -> Path | None:
    files = [(json.loads(p.read_text())["machine"]["date"], p) for p in (ROOT / "benchmarks/results").glob("*.json") if not p.stem.endswith("-busy")]
    return max(files)[1] if files else None


def number(value: float, unit: str) -> str:
    text = f"{value:.3f}" if abs(value) < 0.1 else f"{value:.2f}" if abs(value) < 10 else f"{value:.0f}"
    return f"{text} {unit}"


def measured() -> str:
    path = newest()
    if path is None:
        return "Nothing measured yet: `make bench`."
    content = json.loads(path.read_text())
    m = content["machine"]
    lines = [f"{m['cpu']}, {m['cores']} cores, {m['device']['name']}, {m['device']['driver']}; {m['date'][:10]}, commit {content['commit']}; "
             f"PyTorch {m['versions']['torch']}, transformers {m['versions']['transformers']}. Cores kept busy by others before: {m['busy_cores_before']:.1f}.", "",
             "| what | figure | wanted | |", "|:---|---:|---:|:---|"]
    for r in content["rows"]:
        rates = ", ".join(f"{name} {r[key]:.0f} tokens/s" for name, key in (("ours", "ours_tokens_per_s"), ("theirs", "peer_tokens_per_s")) if key in r)
        verdict = "" if r["met"] is None else "yes" if r["met"] else "**no**"
        lines.append(f"| {r['what']}{f' ({rates})' if rates else ''} | {number(r['value'], r['unit'])} | {r['wanted']} | {verdict} |")
    return "\n".join(lines)


def families() -> str:
    from vksteer.loading.families import markdown

    return markdown()


BLOCKS = {"measured": measured, "families": families}


def filled(text: str) -> str:
    for name, make in BLOCKS.items():
        text, n = re.subn(rf"(<!-- {name}[^>]*-->\n).*?(<!-- /{name} -->)", lambda m: f"{m[1]}{make()}\n{m[2]}", text, flags=re.S)
        if n != 1:
            raise SystemExit(f"README.md has {n} blocks named {name}")
    return text


if __name__ == "__main__":
    if "--write" in sys.argv[1:]:
        README.write_text(filled(README.read_text()))
    else:
        print("\n\n".join(f"{name}:\n{make()}" for name, make in BLOCKS.items()))
