"""The import rule: `common` knows neither side, the sides know `common` only, and a command line answers at once."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("common", "client", "server")
FORBIDDEN = {"common": {"client", "server"}, "client": {"server"}, "server": {"client"}}
EXCEPTIONS = {("server/simulation.py", "client"), ("server/made_sites.py", "client")}
HEAVY = {"torch", "opacus", "flwr", "ray", "matplotlib", "dp_accounting", "torchmetrics", "scipy"}
COMMAND_LINES = ("server.cli", "client.cli")

FILES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


def imported(tree: ast.AST) -> Iterator[str]:
    """Every module that `tree` imports anywhere, also inside functions and under TYPE_CHECKING."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield "." * node.level + (node.module or "")


def violations(path: str, source: str) -> list[str]:
    """What a file at `path` imports against the rule."""
    forbidden = FORBIDDEN[path.split("/")[0]]
    tops = {module.split(".")[0] for module in imported(ast.parse(source))}
    found = [top for top in sorted(tops & forbidden) if (path, top) not in EXCEPTIONS]
    return found + ["relative import"] * ("" in tops)


def test_there_is_something_to_check() -> None:
    assert {path.relative_to(ROOT).parts[0] for path in FILES} == set(PACKAGES)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_import_rule(path: Path) -> None:
    assert violations(path.relative_to(ROOT).as_posix(), path.read_text()) == []


@pytest.mark.parametrize(
    ("path", "source", "found"),
    [
        ("common/plan.py", "def f():\n    from server.study import x", ["server"]),
        ("common/plan.py", "import client.worker", ["client"]),
        ("client/worker.py", "if TYPE_CHECKING:\n    from server import app", ["server"]),
        ("server/report.py", "from client.data import load", ["client"]),
        ("server/report.py", "from .history import x", ["relative import"]),
        ("server/simulation.py", "from client.app import app", []),
        ("client/worker.py", "import common.plan, torch", []),
    ],
)
def test_a_planted_violation_is_found(path: str, source: str, found: list[str]) -> None:
    assert violations(path, source) == found


def test_what_is_on_a_researchers_own_machine_is_the_only_exception() -> None:
    """Named here, so that a further exception needs a change of this file."""
    assert {("server/simulation.py", "client"), ("server/made_sites.py", "client")} == EXCEPTIONS


@pytest.mark.parametrize("module", COMMAND_LINES)
def test_a_command_line_starts_without_the_heavy_libraries(module: str) -> None:
    code = (
        f"import sys; sys.argv = ['consilium', '--help']; sys.path.insert(0, {str(ROOT)!r}); import {module}\n"
        f"try: {module}.main()\n"
        "except SystemExit as end: assert end.code == 0, end.code\n"
        "print(*sorted({name.split('.')[0] for name in sys.modules}), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert "Usage" in done.stdout
    loaded = set(done.stderr.split())
    assert "typer" in loaded
    assert loaded & HEAVY == set()
