"""Whether the code that runs is the code that was installed: every file against the wheel's own RECORD."""

from __future__ import annotations

import base64
import csv
import hashlib
import importlib.machinery
import importlib.metadata
import json
from pathlib import Path

from common.errors import Problem, UsageError

_DISTRIBUTION, _PACKAGES = "consilium", ("client", "common", "server")


def require_verified() -> None:
    """Raise UsageError unless what runs is what is installed, every file as the wheel recorded it, and none added."""
    try:
        distribution = importlib.metadata.distribution(_DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        raise UsageError(_unverifiable("is not installed, only lies here as source")) from None
    origin = json.loads(distribution.read_text("direct_url.json") or "{}")
    if origin.get("dir_info", {}).get("editable"):
        raise UsageError(_unverifiable("is installed as an editable checkout"))
    record = distribution.read_text("RECORD")
    if record is None:
        raise UsageError(_unverifiable("has no RECORD of its files"))
    root = Path(str(distribution.locate_file("")))
    if Path(__file__).resolve().parents[1] != root.resolve():
        raise UsageError(_unverifiable(f"runs from {Path(__file__).parents[1]}, not from its installation in {root}"))
    problems = _changed(root, record)
    if problems:
        raise UsageError(problems)


def _changed(root: Path, record: str) -> list[Problem]:
    recorded = {row[0]: row[1] for row in csv.reader(record.splitlines()) if row}
    remedy = "install the wheel again"
    problems = []
    for name, expected in recorded.items():
        if not expected or name.split("/")[0] not in _PACKAGES:
            continue  # RECORD itself, and the scripts that pip writes
        method, _, wanted = expected.partition("=")
        try:
            found = hashlib.new(method, (root / name).read_bytes()).digest()
        except OSError:
            problems.append(Problem(str(root / name), "is missing", remedy))
            continue
        except ValueError:
            found = b""
        if base64.urlsafe_b64encode(found).rstrip(b"=").decode() != wanted:
            problems.append(Problem(str(root / name), "is not as it was installed", remedy))
    for package in _PACKAGES:
        for path in sorted((root / package).rglob("*")):
            if _is_code(path) and path.relative_to(root).as_posix() not in recorded:
                problems.append(Problem(str(path), "was added after the installation", remedy))
    return problems


def _is_code(path: Path) -> bool:
    """Whether Python would import it: a compiled module goes before a source of the same name."""
    suffixes = importlib.machinery.all_suffixes()
    return path.parent.name != "__pycache__" and any(path.name.endswith(suffix) for suffix in suffixes)


def _unverifiable(what: str) -> Problem:
    remedy = "install the wheel; on a machine without patients' data set verified_install: false in site.yaml"
    return Problem("Consilium", what, remedy)
