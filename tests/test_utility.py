"""The utility benchmark: its arithmetic by hand, and the script on phantoms."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from client.data.phantoms import make_phantom_sites
from common.plan import StudyPlan
from common.trials import CEILING, RANDOM, Kind, Trial
from deploy.benchmarks.utility import BOTH, Cell, Setting, evaluate, markdown, plan_of

ROOT = Path(__file__).parents[1]
STUDY = {
    "study": "tiny",
    "task": {
        "kind": "classification",
        "image_size": 16,
        "label_sets": {"nodule": ["normal", "nodule"], "mass": ["normal", "mass"]},
    },
    "sites": {"alder": {"labels": "nodule", "patients": 12}, "elm": {"labels": "mass", "patients": 12}},
    "model": {"name": "conv4", "width": 8},
    "algorithm": {"name": "reptile", "inner_steps": 1},
    "outer": {"weights": "precision"},
    "rounds": 1,
    "quorum": 2,
    "sampling": {"sample_rate": 0.5},
    "privacy": {"epsilon": 3},
    "evaluation": {
        "shots": [2],
        "splits": 2,
        "draws": 1,
        "adaptation": {"trainable": "head", "steps": 3},
        "compare": ["local_only", "anil"],
    },
}


def trial(target: str, kind: Kind, arm: str, value: float, *, split: int = 0) -> Trial:
    return Trial(
        target=target,
        kind=kind,
        ways=2,
        chance=0.5,
        arm=arm,
        shots=0 if arm == CEILING else 2,
        split=split,
        draw=0,
        metrics={"balanced_accuracy": value},
    )


def test_cells_are_means_over_learnable_targets_and_intervals_over_seeds() -> None:
    plan = StudyPlan.model_validate(STUDY)
    trials: dict[Setting, list[Trial]] = {}
    for seed in (0, 1):
        for epsilon in (math.inf, 3.0):
            first = math.isinf(epsilon)
            found = []
            for target, kind, level in (("yew", "held-out site", 0.6), ("elm", "held-out patients", 0.7)):
                for split in (0, 1):
                    found.append(trial(target, kind, RANDOM, level - 0.1, split=split))
                    found.append(trial(target, kind, "meta", level + 0.02 * seed + (0.1 if first else 0), split=split))
                    if first:
                        found.append(trial(target, kind, "local_only", level, split=split))
                        found.append(trial(target, kind, CEILING, 0.9 + 0.01 * split, split=split))
            found += [trial("pine", "held-out site", arm, 0.5, split=s) for arm in (RANDOM, "meta") for s in (0, 1)]
            found += [trial("pine", "held-out site", CEILING, 0.4 + 0.2 * s, split=s) for s in (0, 1)] if first else []
            trials[Setting(epsilon, seed, first)] = found
    cells, left_out = evaluate(plan, trials)
    assert left_out == ["pine"]

    def cell(arm: str, epsilon: float | None, group: str = BOTH) -> Cell:
        (found,) = [c for c in cells if (c.arm, c.epsilon, c.group) == (arm, epsilon, group)]
        return found

    assert cell("meta", 3.0).value.mean == pytest.approx(0.66)
    assert cell("meta", math.inf).value.mean == pytest.approx(0.76)
    assert cell("meta", 3.0, "held-out hospitals").value.mean == pytest.approx(0.61)
    assert cell("meta", 3.0).over_random.mean == pytest.approx(0.11)
    assert cell("meta", 3.0).value.high - 0.66 == pytest.approx(12.706 * 0.01, rel=1e-3)  # t of one degree of freedom
    assert cell(RANDOM, None).value.mean == pytest.approx(0.55)
    text = markdown(plan, cells, [math.inf, 3.0], 2, left_out)
    assert "| random initialization | 0.550 ± 0.000 |  |" in text
    assert "Not learnable here, not counted: pine." in text


def test_what_asks_nothing_is_measured_once() -> None:
    plan = StudyPlan.model_validate(STUDY)
    first, later = plan_of(plan, Setting(math.inf, 0, first=True)), plan_of(plan, Setting(1.0, 3, first=False))
    assert first.privacy is None
    assert first.outer.weights == "patients"  # there is no noise to weigh by
    assert later.privacy is not None
    assert (later.privacy.epsilon, later.seed) == (1.0, 3)
    assert [other.name for other in first.evaluation.compare] == ["local_only", "anil"]
    assert [other.name for other in later.evaluation.compare] == ["anil"]
    assert (first.evaluation.ceiling, later.evaluation.ceiling) == (True, False)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_script_prints_a_table(tmp_path: Path) -> None:
    make_phantom_sites(tmp_path / "sites", names=["alder", "elm"], patients=20, image_size=16, test_fraction=0.4)
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(STUDY))
    command = [sys.executable, "-m", "deploy.benchmarks.utility", "study.yaml", "--sites", "sites", "--out", "out"]
    command += ["--seeds", "2", "--epsilon", "inf", "--epsilon", "8"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    assert "balanced accuracy" in done.stdout
    text = (tmp_path / "out" / "utility.md").read_text()
    assert "**reptile** (the study)" in text
    assert "| anil |" in text
    assert (tmp_path / "out" / "utility.png").stat().st_size > 10_000
