"""The build's reader of C structs: FIELDS_<struct>(BASE), the fields of a struct as entries of
`struct op_field` (csrc/reference/calls.h), so that tests can fill any struct by its fields' names.

    fields.py OUT.h HEADER...

Also CONSTANTS(C): C(NAME) for every `#define NAME number` of the headers, which the extension
exports as `_engine.constants`.

A header holds `BLOCK(name) { ... };` (shaders/include/params.h) or `struct name { ... };` with
members of the types below; a struct with other members is left out.
"""

import re
import sys
from pathlib import Path

KINDS = {
    r"ADDRESS\(\w+\)|uint64_t": "FIELD_ADDRESS",
    r"UINT|uint32_t": "FIELD_UINT",
    r"float": "FIELD_FLOAT",
}
STRUCT = re.compile(r"^(?:BLOCK\((\w+)\)|struct (\w+)) \{(.*?)^\};", re.M | re.S)


def fields(body: str) -> list[tuple[str, str]] | None:
    """(name, kind) of each member; None if there is one of another type."""
    out = []
    for member in filter(None, map(str.strip, body.split(";"))):
        match = re.fullmatch(r"([A-Za-z_]\w*(?:\(\w+\))?)\s+(\w+(?:\s*,\s*\w+)*)", member)
        kind = match and next((k for t, k in KINDS.items() if re.fullmatch(t, match[1])), None)
        if not kind:
            return None
        out += [(name, kind) for name in re.split(r"\s*,\s*", match[2])]
    return out


def structs(path: Path) -> dict[str, list[tuple[str, str]]]:
    text = re.sub(r"/\*.*?\*/|//[^\n]*", "", path.read_text(), flags=re.S)
    found = {a or b: fields(body) for a, b, body in STRUCT.findall(text)}
    return {name: members for name, members in found.items() if members}


def main(out: Path, headers: list[Path]) -> None:
    lines = [
        "/* Made by cmake/fields.py. BASE: where the struct begins in the arguments. */",
        "#pragma once",
    ]
    for name, members in (item for path in headers for item in structs(path).items()):
        entries = [
            f'    {{"{field}", {kind}, (BASE) + offsetof(struct {name}, {field})}}'
            for field, kind in members
        ]
        lines.append(f"#define FIELDS_{name}(BASE) \\\n" + ", \\\n".join(entries))
    named = [
        name
        for path in headers
        for name in re.findall(r"^#define (\w+) (?:0x)?[0-9a-fA-F]+u?\b", path.read_text(), re.M)
    ]
    lines.append("#define CONSTANTS(C) \\\n" + " \\\n".join(f"    C({name})" for name in named))
    out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), [Path(arg) for arg in sys.argv[2:]])
