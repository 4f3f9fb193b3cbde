"""YAML with line numbers: plain data plus the line of every key, for error messages.

Differences from PyYAML's safe loader: the numbers and booleans of YAML 1.2 (`1e-5` is a number; `yes`, `010`, `1:30`
and dates are text), a key given twice is an error, and so are aliases, which can make a short file endless.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from common.errors import Problem, UsageError

Location = tuple[str | int, ...]

_MAX_BYTES = 1_000_000


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            raise yaml.MarkedYAMLError(
                problem="an alias (*name) is not allowed: write the value out", problem_mark=mark
            )
        node: yaml.Node | None = super().compose_node(parent, index)
        return node


for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", "~nN"),
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?(?:0|[1-9]\d*)", "-+0123456789"),
    (
        "float",
        r"[-+]?(?:(?:\d+\.\d*|\.\d+)(?:[eE][-+]?\d+)?|\d+[eE][-+]?\d+|\.(?:inf|Inf|INF))|\.(?:nan|NaN|NAN)",
        "-+0123456789.",
    ),
):
    starts = ["", *_first] if _tag == "null" else list(_first)
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"(?:{_pattern})\Z"), starts)


@dataclass(frozen=True)
class YamlDocument:
    """`data` as plain Python values, and the 1-based line where each location stands."""

    path: Path
    data: Any
    lines: Mapping[tuple[str, ...], int] = field(default_factory=dict)

    def where(self, location: Location) -> str:
        """`file:line` of the nearest enclosing location that stands in the file."""
        place = tuple(str(part) for part in location)
        while place and place not in self.lines:
            place = place[:-1]
        return f"{self.path}:{self.lines.get(place, 1)}"


def read_yaml(path: Path) -> YamlDocument:
    """Read one YAML file.

    Raises UsageError (with file and line) if it is missing, not text, not YAML, or repeats a key.
    """
    text = _text(path)
    try:
        node = yaml.compose(text, Loader=_Loader)
        data = _Loader("").construct_document(node) if node is not None else None
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise UsageError(Problem(f"{path}:{line}", f"not valid YAML: {error.problem}", "mend the syntax")) from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        what = f"not valid YAML: the character {chr(error.character)!r} is not allowed"
        raise UsageError(Problem(f"{path}:{line}", what, "remove it")) from None
    except RecursionError:
        raise UsageError(Problem(f"{path}:1", "not usable: it is nested too deeply", "make it flatter")) from None
    except ValueError as error:
        raise UsageError(Problem(f"{path}:1", f"not usable: {error}", "mend the value")) from None
    return YamlDocument(path, data, _lines(path, node))


def _text(path: Path) -> str:
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise UsageError(Problem(str(path), f"is larger than {_MAX_BYTES:,} bytes", "is it the right file?"))
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UsageError(Problem(str(path), "there is no such file", "check the path")) from None
    except OSError as error:
        raise UsageError(Problem(str(path), f"cannot be read: {error.strerror}", "check the path")) from None
    except UnicodeDecodeError:
        raise UsageError(Problem(str(path), "is not UTF-8 text", "is it the right file?")) from None


def _lines(path: Path, root: yaml.Node | None) -> dict[tuple[str, ...], int]:
    """The line of every location; raises UsageError naming every key that is given twice."""
    lines: dict[tuple[str, ...], int] = {}
    problems = []
    for place, mark in _places(root, ()):
        line = mark.line + 1
        if place in lines:
            what = f"key {'.'.join(place)!r} is given twice, first in line {lines[place]}"
            problems.append(Problem(f"{path}:{line}", what, "keep one of them"))
        lines.setdefault(place, line)
    if problems:
        raise UsageError(problems)
    return lines


def _places(node: yaml.Node | None, here: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], yaml.Mark]]:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            place = (*here, str(key.value))
            yield place, key.start_mark
            yield from _places(value, place)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            place = (*here, str(index))
            yield place, value.start_mark
            yield from _places(value, place)
