"""What a page must have so that it can be read without a screen or a mouse."""

from __future__ import annotations

import itertools
import re
from html.parser import HTMLParser


class Tree(HTMLParser):
    """The elements of a page in their order, and its text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.text = ""
        self._style = False
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        self._style = tag == "style"
        self.text += "" if tag in ("a", "code", "strong") else " "

    def handle_endtag(self, tag: str) -> None:
        self._style = False

    def handle_data(self, data: str) -> None:
        self.text += "" if self._style else data

    def all(self, *tags: str) -> list[dict[str, str]]:
        return [attributes for tag, attributes in self.elements if tag in tags]


def text_of(html: str) -> str:
    """What a reader sees, spaces as one."""
    return " ".join(Tree(html).text.split())


def require_readable(html: str) -> Tree:
    """A language, landmarks, headings in order, tables with captions and scopes, names for what has none, no traps."""
    tree = Tree(html)
    assert html.startswith("<!doctype html>")
    assert tree.all("html")[0]["lang"] == "en"
    assert len(tree.all("title")) == len(tree.all("h1")) == len(tree.all("main")) == 1
    levels = [int(tag[1]) for tag, _ in tree.elements if re.fullmatch(r"h[1-6]", tag)]
    assert levels[0] == 1
    assert all(below - above <= 1 for above, below in itertools.pairwise(levels)), levels
    ids = [attributes["id"] for _, attributes in tree.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    for _, attributes in tree.elements:
        assert attributes.get("aria-labelledby") in (None, *ids)
        assert attributes.get("tabindex") in (None, "0", "-1")
        assert attributes.get("role") not in ("img", "region") or {"aria-label", "aria-labelledby"} & attributes.keys()
    assert all("alt" in attributes for attributes in tree.all("img"))
    assert len(tree.all("caption")) == len(tree.all("table"))
    assert all(attributes.get("scope") in ("col", "row") for attributes in tree.all("th"))
    return tree
