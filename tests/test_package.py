"""The package as it is built, installed, bundled for Flower, and run by the scripts in deploy/."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PACKAGES = ("server", "client", "common", "deploy")
SCRIPTS = sorted([*ROOT.glob("deploy/**/*.sh"), ROOT / ".ci" / "run"])


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what the package is made of, and nothing else."""
    copy = tmp_path_factory.mktemp("consilium") / "consilium"
    copy.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", ".gitignore"):
        shutil.copy(ROOT / name, copy / name)
    for package in PACKAGES:
        shutil.copytree(ROOT / package, copy / package, ignore=shutil.ignore_patterns("__pycache__"))
    return copy


def sources(*packages: str) -> set[str]:
    return {p.relative_to(ROOT).as_posix() for name in packages for p in (ROOT / name).rglob("*.py")}


def test_the_wheel_holds_the_code_the_studies_and_the_templates(tree: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(command, cwd=tree, check=True, capture_output=True, timeout=60)
    (wheel,) = tmp_path.glob("consilium-*-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        entry_points = archive.read(next(n for n in names if n.endswith("entry_points.txt"))).decode()
    data = {p.relative_to(ROOT).as_posix() for p in ROOT.glob("deploy/studies/*.yaml")}
    templates = [*ROOT.glob("server/templates/*"), *ROOT.glob("client/templates/*")]
    data |= {p.relative_to(ROOT).as_posix() for p in templates if p.is_file()}
    data |= {"deploy/fab/pyproject.toml", "deploy/fab/LICENSE"}
    assert "deploy/studies/demo.yaml" in data
    assert any(name.startswith("server/templates/") for name in data)
    assert any(name.startswith("client/templates/") for name in data)
    inside = {name for name in names if ".dist-info/" not in name}
    assert inside == sources(*PACKAGES) | data
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert "consilium-lab = server.cli:main" in entry_points
    assert "consilium-site = client.cli:main" in entry_points


def test_flower_bundles_the_code_and_nothing_else(tree: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "FLWR_HOME": str(tmp_path), "FLWR_TELEMETRY_ENABLED": "0", "PYTHONSAFEPATH": "1"}
    (tree / "patients.json").write_text("{}")  # what lies about must not travel
    code = "from flwr.cli.app import app; app(['build'])"
    subprocess.run([sys.executable, "-c", code], cwd=tree, env=environment, check=True, capture_output=True, timeout=60)
    (bundle,) = tree.glob("consilium.consilium.0-1-0.*.fab")
    with zipfile.ZipFile(bundle) as archive:
        names = {name for name in archive.namelist() if not name.startswith(".info/")}
        project = tomllib.loads(archive.read("pyproject.toml").decode())
    assert names == sources("server", "client", "common") | {"pyproject.toml", "LICENSE"}
    app = project["tool"]["flwr"]["app"]
    assert app["components"] == {"serverapp": "server.app:app", "clientapp": "client.app:app"}
    assert app["config"] == {"run-folder": ""}


def test_every_library_imported_is_declared() -> None:
    """And only those: what flwr happens to bring along may go with its next release."""
    tops = set()
    for path in sorted(sources("server", "client", "common")):
        for node in ast.walk(ast.parse((ROOT / path).read_text())):
            if isinstance(node, ast.Import):
                tops |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                tops.add(node.module.split(".")[0])
    third_party = tops - set(sys.stdlib_module_names) - set(PACKAGES)
    providers = packages_distributions()
    used = {normal(providers.get(top, [top])[0]) for top in third_party}  # an extra may be absent
    extras = PROJECT["project"]["optional-dependencies"]
    declared = {requirement_name(r) for r in PROJECT["project"]["dependencies"]}
    optional = {requirement_name(r) for name in ("export", "imaging", "simulation") for r in extras[name]}
    assert used - declared - optional - {"ray"} == set(), "add it to [project] dependencies"
    assert declared - used == set(), "nothing imports it"


def requirement_name(requirement: str) -> str:
    return normal(re.split(r"[\[<>=~!; ]", requirement)[0])


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_flower_is_pinned_exactly_and_everywhere_alike() -> None:
    extras = PROJECT["project"]["optional-dependencies"]
    assert "flwr==1.41.0" in PROJECT["project"]["dependencies"]
    assert extras["simulation"] == ["flwr[simulation]==1.41.0"]


def test_the_license_is_apache_2() -> None:
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text
    assert "Version 2.0, January 2004" in text
    assert "END OF TERMS AND CONDITIONS" in text
    assert PROJECT["project"]["license"] == "Apache-2.0"


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_a_script_names_no_package_host_and_is_sound(script: Path) -> None:
    text = script.read_text()
    assert "://" not in text
    assert "index-url" not in text
    subprocess.run(["bash", "-n", str(script)], check=True, timeout=20)
    if shellcheck := shutil.which("shellcheck"):
        checked = subprocess.run([shellcheck, "-x", str(script)], cwd=ROOT, capture_output=True, text=True, timeout=60)
        assert checked.returncode == 0, checked.stdout


FAKE_PYTHON = """#!/bin/bash
# Stands in for Python and for the pip of its environments: makes a folder, and notes each installation.
case "$*" in
  *version_info*) exit {too_old} ;;
  "-m venv .venv") mkdir -p .venv/bin && cp "$0" .venv/bin/python ;;
  *hashlib*) exec {python} "$@" ;;
  "-m pip install"*) echo "$*" >> installed.txt; case "$*" in *constraints*) exit {no_cpu_build};; esac ;;
  *) echo "unexpected: $*" >&2; exit 97 ;;
esac
"""


class Checkout:
    """A checkout with the real scripts, and programs that only note that they were called."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "deploy" / "studies").mkdir(parents=True)
        for name in ("environment.sh", "demo.sh", "test.sh", "constraints-cpu.txt"):
            shutil.copy(ROOT / "deploy" / name, folder / "deploy" / name)
        shutil.copy(ROOT / "pyproject.toml", folder)
        self.bin = folder / "bin"
        self.bin.mkdir()
        self.program("nvidia-smi", "exit 1")
        self.python()

    def program(self, name: str, body: str) -> None:
        path = self.bin / name
        path.write_text(body if body.startswith("#!") else f"#!/bin/bash\n{body}\n")
        path.chmod(0o755)

    def python(self, *, too_old: int = 0, no_cpu_build: int = 0) -> None:
        for name in ("python3", "python3.11", "python3.12", "python3.13"):
            self.program(name, FAKE_PYTHON.format(python=sys.executable, too_old=too_old, no_cpu_build=no_cpu_build))

    def run(self, script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        path = f"{self.bin}:/usr/bin:/bin"
        return subprocess.run(
            ["bash", str(self.folder / "deploy" / script), *arguments],
            cwd="/",
            env={"PATH": path, **environment},
            capture_output=True,
            text=True,
            timeout=60,
        )

    @property
    def installed(self) -> list[str]:
        notes = self.folder / "installed.txt"
        return notes.read_text().splitlines() if notes.exists() else []


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    made = Checkout(tmp_path)
    for tool in ("ruff", "mypy", "pytest"):
        made.program(tool, f'echo "{tool} $*"')
    made.program(
        "consilium-lab", 'echo "lab $*"; if [ "$1" = pretrain ]; then touch deploy/studies/demo.safetensors; fi'
    )
    return made


TORCH = "-m pip install --quiet --no-compile --constraint deploy/constraints-cpu.txt torch"


def test_the_first_call_installs_and_the_second_does_not(checkout: Checkout) -> None:
    first, second = checkout.run("demo.sh"), checkout.run("demo.sh")
    assert first.returncode == second.returncode == 0, first.stderr + second.stderr
    assert checkout.installed == [TORCH, "-m pip install --quiet --no-compile --editable ."]
    assert "Installing Consilium into .venv" in first.stdout
    assert "Installing" not in second.stdout


def test_a_changed_pyproject_is_installed_again(checkout: Checkout) -> None:
    project = checkout.folder / "pyproject.toml"
    before = project.read_text()
    for times, text in enumerate([before, before + "# changed\n", before], start=1):
        project.write_text(text)
        checkout.run("demo.sh")
        assert len(checkout.installed) == 2 * times


def test_the_tests_need_more_than_the_demo_and_the_demo_nothing_more_than_the_tests(checkout: Checkout) -> None:
    checkout.run("demo.sh")
    checkout.run("test.sh")
    assert checkout.installed[3:] == ["-m pip install --quiet --no-compile --editable .[imaging,export,simulation,dev]"]
    checkout.run("demo.sh")
    checkout.run("test.sh")
    assert len(checkout.installed) == 4


def test_with_a_gpu_torch_comes_in_its_default_build(checkout: Checkout) -> None:
    checkout.program("nvidia-smi", "exit 0")
    checkout.run("demo.sh")
    assert checkout.installed == ["-m pip install --quiet --no-compile --editable ."]


def test_without_a_cpu_build_the_default_one_is_taken_and_said(checkout: Checkout) -> None:
    checkout.python(no_cpu_build=1)
    done = checkout.run("demo.sh")
    assert done.returncode == 0
    assert "no CPU-only build of torch" in done.stderr
    assert checkout.installed == [TORCH, "-m pip install --quiet --no-compile --editable ."]


def test_an_old_python_is_refused_in_words(checkout: Checkout) -> None:
    checkout.python(too_old=1)
    done = checkout.run("demo.sh")
    assert done.returncode == 1
    assert "Consilium needs Python 3.11 or newer" in done.stderr
    assert "PYTHON=/path/to/python3.11 bash" in done.stderr
    assert not (checkout.folder / ".venv").exists()


def test_the_demo_makes_its_warm_start_once_and_goes_on_where_it_stopped(checkout: Checkout) -> None:
    first, second = checkout.run("demo.sh"), checkout.run("demo.sh")
    assert "lab pretrain deploy/studies/demo.yaml --sites runs/demo-public" in first.stdout
    assert "lab pretrain" not in second.stdout
    run = f"lab simulate deploy/studies/demo.yaml --out {checkout.folder}/runs/demo --resume --jobs 2\n"
    assert first.stdout.endswith(run)
    assert second.stdout == run


def test_the_tests_run_everything_and_pass_arguments_to_pytest(checkout: Checkout) -> None:
    done = checkout.run("test.sh", "-k", "two words")
    assert done.returncode == 0, done.stderr
    ran = [line for line in done.stdout.splitlines() if "Installing" not in line]
    *checks, tests = ran
    assert checks == ["ruff check .", "ruff format --check .", "mypy "]
    assert re.fullmatch(r"pytest --numprocesses \d+ --dist load --maxschedchunk 1 -k two words", tests)


def test_the_exit_code_is_that_of_the_first_failure_and_pytest_still_runs(checkout: Checkout) -> None:
    checkout.program("mypy", "exit 5")
    checkout.program("pytest", "echo 1 failed; exit 1")
    done = checkout.run("test.sh")
    assert done.returncode == 5
    assert done.stdout.endswith("1 failed\n")
