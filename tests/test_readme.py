"""README's commands, typed word by word in a copy of the repository."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from common.plan import load_plan

ROOT = Path(__file__).parents[1]
REAL_DATA = ROOT.parent / "shared" / "data"
LEFT_OUT = ("bash deploy/test.sh",)  # what runs these tests

# The environment's Python; what it would install is installed, for it runs these tests.
PYTHON = """#!/bin/sh
if [ "$1 $2" = "-m pip" ]; then exit 0; fi
exec {python} "$@"
"""
SCRIPT = """#!/bin/sh
exec {python} -c "from {module} import main; main()" "$@"
"""


def commands() -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    return [line for block in blocks for line in block.replace("\\\n", " ").splitlines() if line.strip()]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of what git would clone, with an environment."""
    copy = tmp_path / "consilium"
    for name in ("server", "client", "common", "deploy"):
        ignored = shutil.ignore_patterns("__pycache__", "*.safetensors")
        shutil.copytree(ROOT / name, copy / name, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy / name)
    bin_ = copy / ".venv" / "bin"
    bin_.mkdir(parents=True)
    programs = {"python": PYTHON, "consilium-lab": SCRIPT, "consilium-site": SCRIPT}
    for name, text in programs.items():
        module = {"consilium-lab": "server.cli", "consilium-site": "client.cli"}.get(name, "")
        (bin_ / name).write_text(text.format(python=sys.executable, module=module))
        (bin_ / name).chmod(0o755)
    return copy


def environment_of(checkout: Path) -> dict[str, str]:
    path = f"{checkout / '.venv' / 'bin'}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "PYTHONPATH": str(checkout)}


def run(line: str, checkout: Path, *, seconds: float) -> str:
    done = subprocess.run(
        line, shell=True, cwd=checkout, env=environment_of(checkout), capture_output=True, text=True, timeout=seconds
    )
    assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_readme_has_the_commands_of_every_user() -> None:
    found = commands()
    for start in ("bash deploy/demo.sh", "consilium-site ", "consilium-lab study check", "consilium-lab simulate"):
        assert any(line.startswith(start) for line in found), start
    assert (ROOT / ".ci" / "run").read_text().splitlines()[-1].endswith(LEFT_OUT[0])


def needs_real_images(line: str) -> bool:
    return "sites/hospitals" in line or "sites/masks" in line


WALK = (  # lab and hospitals take turns: who types what, when
    "consilium-lab sites phantoms --out hospitals",
    "consilium-site data check hospitals",
    "consilium-site init",
    "consilium-site audit",
    "consilium-lab provision",
    "consilium-lab serve",
    "consilium-lab enroll",
    "consilium-site join",
    "consilium-site doctor",
    "consilium-site start",
    "consilium-lab run",
    "consilium-site approve",
    "consilium-site status",
    "consilium-lab status",
    "consilium-site journal verify",
    "consilium-site ledger backup",
    "consilium-site privacy",
)


def of_the_walk(line: str) -> bool:
    return line.startswith(WALK)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_commands_work_with_fewer_steps(checkout: Path) -> None:
    """As they stand, but for the demo's length: whole it takes minutes of every core."""
    shorten(checkout / "deploy" / "studies" / "demo.yaml", patients=40)
    demo = checkout / "deploy" / "demo.sh"
    demo.write_text(demo.read_text().replace("--steps 300", "--steps 2"))
    for line in commands():
        if line not in LEFT_OUT and not needs_real_images(line) and not of_the_walk(line):
            printed = run(line.replace("--steps 300", "--steps 2"), checkout, seconds=600)
            if line == "bash deploy/demo.sh":
                assert f"Report: {checkout / 'runs/demo/report.html'}" in printed
                assert "PHANTOMS" in (checkout / "runs" / "demo" / "report.html").read_text()


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_walk_of_two_hospitals_and_a_lab_ends_in_a_report(checkout: Path) -> None:
    lines = sorted(
        filter(of_the_walk, commands()), key=lambda line: next(n for n, s in enumerate(WALK) if line.startswith(s))
    )
    services: list[subprocess.Popen[str]] = []
    fingerprints: dict[str, str] = {}
    try:
        for line in lines:
            if line.startswith(("consilium-lab serve", "consilium-site start", "consilium-lab run")):
                services.append(begin(line, checkout))
                continue
            if line.startswith("consilium-lab enroll"):
                answer = fingerprints["alder" if "alder" in line else "cedar"]
                said = until(line, checkout, answer=answer)
            elif line.startswith("consilium-site join"):
                said = until(line, checkout, answer=fingerprints["lab"])
            elif line.startswith("consilium-site status"):
                services[-1].wait(500)  # the study, which the hospitals approved
                said = until(line, checkout, answer="")
            else:
                said = until(
                    line,
                    checkout,
                    answer="y",
                    patient=line.startswith(("consilium-site doctor", "consilium-site approve")),
                )
            if found := re.search(r"(?:[0-9a-f]{4}-){7}[0-9a-f]{4}", said):
                fingerprints["lab" if "provision" in line else "alder" if "alder" in line else "cedar"] = found[0]
        page = (checkout / "lab" / "runs" / "pair" / "report.html").read_text()
        assert "alder" in page
        assert "3, 1 to 3" in said
        assert "is spent at delta" in (checkout / "alder-privacy.html").read_text()
    finally:
        for service in services:
            service.terminate()
        for service in services:
            service.wait(60)


def begin(line: str, checkout: Path) -> subprocess.Popen[str]:
    with (checkout / "services.out").open("a") as output:
        return subprocess.Popen(
            f"exec {line}",
            shell=True,
            cwd=checkout,
            env=environment_of(checkout),
            stdout=output,
            stderr=output,
            text=True,
        )


def until(line: str, checkout: Path, *, answer: str, patient: bool = False) -> str:
    """Run `line`, typing `answer`; with `patient` again until what it needs is there."""
    deadline = time.monotonic() + 120
    while True:
        done = subprocess.run(
            line,
            shell=True,
            cwd=checkout,
            env=environment_of(checkout),
            input=f"{answer}\n",
            capture_output=True,
            text=True,
            timeout=120,
        )
        if done.returncode == 0:
            return done.stdout
        services = (checkout / "services.out").read_text() if (checkout / "services.out").exists() else ""
        waiting = patient and time.monotonic() < deadline
        assert waiting, f"{line}\n{done.stdout}\n{done.stderr}\n{services}"
        time.sleep(4.0)


@pytest.mark.slow
@pytest.mark.realdata
@pytest.mark.skipif(not REAL_DATA.is_dir(), reason="the real images are not beside this checkout, in ../shared/data")
@pytest.mark.timeout(900)
def test_the_real_studies_commands_work_with_fewer_steps(checkout: Path) -> None:
    """The same commands; short warm starts, and studies of one round with few images and nothing beside them."""
    (checkout.parent / "shared").symlink_to(REAL_DATA.parent)
    for study in ("hospitals", "anomalies"):
        shorten(checkout / "deploy" / "studies" / f"{study}.yaml")
    for line in filter(needs_real_images, commands()):
        if not any(word in line for word in ("benchmarks", "masks", "attacks")):  # minutes; tests of their own run them
            run(re.sub(r"--steps \d+", "--steps 2", line), checkout, seconds=300)
    for name, told in (("hospitals", "montgomery"), ("anomalies", "more unusual than")):
        page = (checkout / "runs" / name / "report.html").read_text()
        assert told in page
        assert "PHANTOMS" not in page


def shorten(file: Path, *, patients: int | None = None) -> None:
    """Make a study short, and its phantom hospitals small; see that the whole one can be loaded."""
    load_plan(file)
    study = yaml.safe_load(file.read_text())
    study["rounds"] = 1
    for site in study["sites"].values() if patients else ():
        site["patients"] = patients
    study["algorithm"]["inner_steps"] = 1
    few = {"splits": 2, "draws": 1, "shots": [1], "leave_one_out": [], "without_privacy": False, "curve_points": 0}
    study["evaluation"] |= few | {"compare": [], "ceiling": False}
    study["evaluation"]["adaptation"] |= {"steps": 2}
    file.write_text(yaml.safe_dump(study))
