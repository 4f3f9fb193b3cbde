"""The worker starts only if its files are those of the installed wheel."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

from client import installation
from common.errors import UsageError

ROOT = Path(installation.__file__).parents[1]
COPIED = ("client/__init__.py", "client/installation.py", "common/__init__.py", "common/errors.py",
          "common/quiet_flower.py")  # fmt: skip


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A site-packages with our wheel in it, whose RECORD is right, and from which the code seems to run."""
    root = tmp_path / "site-packages"
    for name in COPIED:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, root / name)
    (root / "server").mkdir()
    (root / "server" / "page.html").write_text("<p>")
    (root / "client" / "__pycache__").mkdir()
    (root / "client" / "__pycache__" / "x.cpython-311.pyc").write_bytes(b"as pip leaves it")
    info = root / "consilium-9.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: consilium\nVersion: 9\n")
    rows = [f"{name},sha256={sha256(root / name)},1" for name in (*COPIED, "server/page.html")]
    rows += ["consilium-9.dist-info/RECORD,,", "client/__pycache__/x.cpython-311.pyc,,", "../../bin/tool,sha256=x,1"]
    (info / "RECORD").write_text("\n".join(rows) + "\n")
    monkeypatch.syspath_prepend(str(root))
    monkeypatch.setattr(installation, "__file__", str(root / "client" / "installation.py"))
    return root


def sha256(path: Path) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(path.read_bytes()).digest()).rstrip(b"=").decode()


def refused() -> list[str]:
    with pytest.raises(UsageError) as caught:
        installation.require_verified()
    return [str(problem) for problem in caught.value.problems]


def test_an_untouched_installation_is_verified(installed: Path) -> None:
    installation.require_verified()


@pytest.mark.parametrize("name", ["client/installation.py", "server/page.html"])
def test_a_changed_file_is_found(installed: Path, name: str) -> None:
    with (installed / name).open("a") as file:
        file.write("\n")
    assert refused() == [f"{installed / name}: is not as it was installed -- install the wheel again"]


def test_a_missing_file_is_found(installed: Path) -> None:
    (installed / "common" / "errors.py").unlink()
    assert refused() == [f"{installed}/common/errors.py: is missing -- install the wheel again"]


@pytest.mark.parametrize(
    "name",
    ["server/evil.py", "client/deep/evil.py", "client/installation.abi3.so", "client/installation.so", "common/x.pyc"],
)
def test_an_added_file_that_python_would_import_is_found(installed: Path, name: str) -> None:
    """A compiled module goes before the source of its name, and no source changes."""
    (installed / name).parent.mkdir(exist_ok=True)
    (installed / name).write_bytes(b"")
    assert refused() == [f"{installed / name}: was added after the installation -- install the wheel again"]


def test_all_faults_are_said_at_once(installed: Path) -> None:
    (installed / "common" / "errors.py").unlink()
    (installed / "client" / "__init__.py").write_text("changed")
    (installed / "server" / "evil.py").write_text("")
    assert len(refused()) == 3


def test_a_record_with_an_unknown_hash_verifies_nothing(installed: Path) -> None:
    record = installed / "consilium-9.dist-info" / "RECORD"
    record.write_text(record.read_text().replace("server/page.html,sha256=", "server/page.html,md55="))
    assert refused() == [f"{installed}/server/page.html: is not as it was installed -- install the wheel again"]


def test_an_editable_checkout_is_not_verified(installed: Path) -> None:
    direct = {"url": "file:///x", "dir_info": {"editable": True}}
    (installed / "consilium-9.dist-info" / "direct_url.json").write_text(json.dumps(direct))
    assert refused() == [
        "Consilium: is installed as an editable checkout -- install the wheel; on a machine without patients' data set"
        " verified_install: false in site.yaml"
    ]


def test_a_wheel_from_a_file_is_verified_like_any(installed: Path) -> None:
    direct = {"url": "file:///x.whl", "archive_info": {}}
    (installed / "consilium-9.dist-info" / "direct_url.json").write_text(json.dumps(direct))
    installation.require_verified()


def test_an_installation_without_record_is_not_verified(installed: Path) -> None:
    (installed / "consilium-9.dist-info" / "RECORD").unlink()
    assert "has no RECORD of its files" in refused()[0]


def test_code_that_runs_from_elsewhere_is_not_verified(installed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The installed files are right, and others run."""
    monkeypatch.setattr(installation, "__file__", "/elsewhere/client/installation.py")
    assert f"runs from /elsewhere, not from its installation in {installed}" in refused()[0]


def test_source_alone_is_not_verified(monkeypatch: pytest.MonkeyPatch) -> None:
    def nowhere(name: str) -> None:
        raise PackageNotFoundError(name)

    monkeypatch.setattr("importlib.metadata.distribution", nowhere)
    assert "is not installed, only lies here as source" in refused()[0]


def test_a_real_process_verifies_the_files_that_it_runs(installed: Path) -> None:
    """No test's hand in it: Python finds package and RECORD itself."""
    command = [sys.executable, "-P", "-c", "from client.installation import require_verified as v; v()"]
    environment = {**os.environ, "PYTHONPATH": str(installed), "PYTHONDONTWRITEBYTECODE": "1"}
    subprocess.run(command, env=environment, check=True, timeout=30)
    (installed / "server" / "evil.py").write_text("")
    found = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=30)
    assert found.returncode == 1
    assert "server/evil.py: was added after the installation" in found.stderr
