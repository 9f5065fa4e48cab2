"""Follows the links of a built site: each leads to a file and an anchor that exist, and no page
loads anything from another host.

    docs_check.py FOLDER
"""

from __future__ import annotations

import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

#: Attributes whose address a browser loads by itself; an <a> is only followed by a reader.
LOADED = {
    ("img", "src"),
    ("script", "src"),
    ("iframe", "src"),
    ("source", "src"),
    ("video", "src"),
    ("audio", "src"),
    ("embed", "src"),
    ("object", "data"),
    ("image", "href"),
    ("use", "href"),
}
#: <link rel=...> that loads nothing.
UNLOADED = {"next", "prev", "search", "author", "copyright", "canonical", "index", "top", "up"}
CSS_ADDRESS = re.compile(r"url\(\s*['\"]?([^'\")]+)|@import\s+['\"]([^'\"]+)")


class Page(HTMLParser):
    """Addresses that a page loads, addresses that it links to, and its anchors."""

    def __init__(self, text: str):
        super().__init__()
        self.loaded: list[str] = []
        self.links: list[str] = []
        self.anchors: set[str] = {"", "top"}
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attributes = {name: value or "" for name, value in attrs}
        if "id" in attributes:
            self.anchors.add(attributes["id"])
        for name, value in attributes.items():
            if (tag, name) in LOADED:
                self.loaded.append(value)
            elif name == "srcset":
                self.loaded += [part.split()[0] for part in value.split(",") if part.split()]
            elif name == "style":
                self.loaded += css_addresses(value)
        if tag == "a" and "href" in attributes:
            self.links.append(attributes["href"])
        if tag == "link" and "href" in attributes:
            loads = attributes.get("rel", "") not in UNLOADED
            (self.loaded if loads else self.links).append(attributes["href"])


def css_addresses(text: str) -> list[str]:
    return [a or b for a, b in CSS_ADDRESS.findall(text)]


def remote(address: str) -> bool:
    return bool(urlsplit(address).netloc)


def problems(site: Path) -> list[str]:
    """One line for each broken link and each address of another host that a page loads."""
    pages = {path.resolve(): Page(path.read_text()) for path in site.rglob("*.html")}
    found = [] if pages else [f"{site}: no pages"]
    for path, page in pages.items():
        name = path.relative_to(site.resolve())
        for address in page.loaded:
            if remote(address):
                found.append(f"{name}: loads {address}")
            elif not address.startswith("data:"):
                found += broken(path, address, pages, name)
        for address in page.links:
            if not remote(address) and not address.startswith(("mailto:", "javascript:")):
                found += broken(path, address, pages, name)
    for path in site.rglob("*.css"):
        for address in css_addresses(path.read_text()):
            if remote(address):
                found.append(f"{path.relative_to(site)}: loads {address}")
    return found


def broken(path: Path, address: str, pages: dict[Path, Page], name: Path) -> list[str]:
    parts = urlsplit(address)
    target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
    if not target.is_file():
        return [f"{name}: {address} leads to no file"]
    if target in pages and unquote(parts.fragment) not in pages[target].anchors:
        return [f"{name}: {address} leads to no anchor"]
    return []


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    sys.exit("\n".join(problems(Path(sys.argv[1]))) or 0)
