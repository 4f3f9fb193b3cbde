"""The headroom benchmark: its signal in closed form, and the script on phantoms."""

from __future__ import annotations

import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from client.data.load import load_site
from client.data.phantoms import make_phantom_sites
from common.plan import StudyPlan
from deploy.benchmarks.headroom import Pooled
from server.start import initial_parameters
from tests.conftest import PlanMaker, SiteMaker
from tests.test_utility import STUDY

ROOT = Path(__file__).parent.parent
NOISE, CLIP = 5.0, 1e-4


@pytest.fixture
def lone(make_plan: PlanMaker) -> StudyPlan:
    """A study of one hospital whose every gradient is longer than the clip, and its head's next to nothing."""
    privacy: dict[str, Any] = {"epsilon": 50, "delta": 0.01, "noise_multiplier": NOISE, "clip": CLIP}
    return make_plan(
        sites={"alder": {"labels": "lesion", "patients": 1}},
        quorum=1,
        sampling={"sample_rate": 1.0},
        privacy=privacy | {"head_scale": 1e-6},
    )


@pytest.mark.parametrize("part", ["film", "all"])
def test_the_signal_of_one_patient_is_the_clip_by_the_length_of_the_noise(
    lone: StudyPlan, make_site: SiteMaker, part: str
) -> None:
    data = {"alder": load_site(make_site("alder", patients=1), lone, site="alder")}
    pooled = Pooled(initial_parameters(lone, Path()), data, lone)
    pooled.learn("head", steps=5)  # a head of zeros lets no gradient through
    groups = [8, 16, 24, 32]
    film = 2 * sum(groups)
    convolutions = 8 * 25 + sum(9 * a * b for a, b in pairwise(groups)) + sum(groups)
    norm = 32 + 1
    numbers = film if part == "film" else film + convolutions + norm
    assert pooled.signal(part) == pytest.approx(1 / (NOISE * numbers**0.5), rel=1e-3)


def test_only_the_part_is_trained_and_the_start_stays(lone: StudyPlan, make_site: SiteMaker) -> None:
    start = initial_parameters(lone, Path())
    before = {name: value.clone() for name, value in start.items()}
    pooled = Pooled(start, {"alder": load_site(make_site("alder"), lone, site="alder")}, lone)
    pooled.learn("head", steps=2)
    assert all(torch.equal(pooled.body[name], start[name]) for name in pooled.body)
    pooled.learn("film", steps=2)
    moved = {name for name, value in pooled.body.items() if not torch.equal(value, start[name])}
    assert moved == {f"body.{layer}.{kind}" for layer in (2, 5, 8, 11) for kind in ("weight", "bias")}
    assert all(torch.equal(before[name], start[name]) for name in start)


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_the_script_prints_a_table(tmp_path: Path) -> None:
    make_phantom_sites(tmp_path / "sites", names=["alder", "elm"], patients=20, image_size=16, test_fraction=0.4)
    sites = STUDY["sites"] | {"elm": {"labels": "mass", "patients": 12, "role": "held_out"}}  # type: ignore[operator]
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(STUDY | {"sites": sites, "quorum": 1}))
    command = [sys.executable, "-m", "deploy.benchmarks.headroom", "study.yaml", "--sites", "sites", "--steps", "2"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "120"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stderr
    rows = [line.split("│")[1:-1] for line in done.stdout.splitlines() if line.startswith("│")]
    assert [row[0].strip() for row in rows] == ["the start", "film", "all"]
    assert all(0 < float(figure) <= 1 for row in rows for figure in row[2:4])
    assert all(float(row[4]) > 0 for row in rows[1:])
