"""Prints apt sources (deb822) for the suites named, taken from the machine's own sources: same
addresses, same keys, nothing written down here.

    apt_sources.py SUITE...

The machine's own suites (bookworm, bookworm-security, ...) are printed first when the first SUITE
is "own"; every other SUITE is looked for where the machine's main suite comes from.
"""

import sys
from pathlib import Path

ETC = Path("/etc/apt")
KEEP = ("Signed-By", "Trusted", "Check-Valid-Until")


def codename() -> str:
    facts = dict(
        line.split("=", 1)
        for line in Path("/etc/os-release").read_text().splitlines()
        if "=" in line
    )
    return facts.get("VERSION_CODENAME", "").strip('"')


def one_line_entries(path: Path):
    """`deb [signed-by=K] URI SUITE COMPONENTS...`"""
    for line in path.read_text().splitlines():
        words = line.split("#")[0].split()
        if not words or words[0] != "deb":
            continue
        options = {}
        if words[1].startswith("["):
            end = next(i for i, w in enumerate(words) if w.endswith("]"))
            for option in " ".join(words[1 : end + 1]).strip("[] ").split():
                key, _, value = option.partition("=")
                options[key.title()] = value
            words[1 : end + 1] = []
        yield {"URIs": words[1], "Suites": words[2], "Components": " ".join(words[3:]), **options}


def stanza_entries(path: Path):
    for block in path.read_text().split("\n\n"):
        entry, key = {}, None
        for line in block.splitlines():
            if line.startswith("#"):
                continue
            if line[:1].isspace() and key:  # a continued field, such as a key in full
                entry[key] += "\n" + line
            elif ":" in line:
                key, _, value = line.partition(":")
                entry[key] = value.strip()
        if "deb" in entry.get("Types", "").split() and entry.get("Enabled", "yes") != "no":
            yield entry


def entries():
    for path in [ETC / "sources.list", *sorted((ETC / "sources.list.d").glob("*"))]:
        if path.suffix == ".list" and path.is_file():
            yield from one_line_entries(path)
        elif path.suffix == ".sources":
            yield from stanza_entries(path)


def show(entry: dict, suites: list[str]) -> None:
    print(
        "Types: deb",
        f"URIs: {entry['URIs']}",
        f"Suites: {' '.join(suites)}",
        "Components: main",
        sep="\n",
    )
    for key in KEEP:
        if key in entry:
            print(f"{key}: {entry[key]}")
    print()


def main(suites: list[str]) -> None:
    name, main_entry = codename(), None
    own = suites[:1] == ["own"]
    for entry in entries():
        mine = [s for s in entry["Suites"].split() if s == name or s.startswith(name + "-")]
        if not mine or "main" not in entry.get("Components", "").split():
            continue
        if own:
            show(entry, mine)
        if name in mine:
            main_entry = main_entry or entry
    if main_entry is None:
        sys.exit(f"no apt source for {name or 'this system'} in {ETC}")
    asked = suites[1:] if own else suites
    if asked:
        show(main_entry, asked)


if __name__ == "__main__":
    main(sys.argv[1:])
