"""The deployed ServerApp runs the study that was ordered in its folder, and goes on where it stands."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from flwr.app import Context, RecordDict

from common.checkpoint import save_checkpoint
from common.errors import CheckpointError, RunError, UsageError
from common.plan import StudyPlan
from server.app import app
from server.lab import provision
from server.local_grid import LocalGrid
from server.orders import outcome_of
from server.run_folder import run_history, starting_parameters
from server.running import place_order, write_run_report
from server.start import initial_parameters
from tests.conftest import PlanMaker
from tests.fake_federation import FakeSites

ROOT = Path(__file__).resolve().parent.parent


def run(tmp_path: Path, study: StudyPlan, folder: str) -> None:
    sites = FakeSites(tmp_path / "fakes", study.training_sites)
    context = Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config={"run-folder": folder})
    app(LocalGrid(sites.app(), nodes=3), context)


def ordered(tmp_path: Path, plan: StudyPlan) -> Path:
    lab = provision(tmp_path / "lab", name="lab", address="127.0.0.1:9443")
    return place_order(lab, plan, tmp_path, wait_s=0.0)


def test_an_ordered_study_runs_from_its_warm_start_and_is_done(make_plan: PlanMaker, tmp_path: Path) -> None:
    plan = make_plan(rounds=2, model={"name": "conv4", "width": 8, "warm_start": "warm.safetensors"})
    with pytest.raises(CheckpointError, match=r"warm.safetensors: does not exist"):
        ordered(tmp_path, plan)
    cold = initial_parameters(
        plan.model_copy(update={"model": plan.model.model_copy(update={"warm_start": None})}), tmp_path
    )
    warm = {name: value + 1 for name, value in cold.items()}
    save_checkpoint(tmp_path / "warm.safetensors", warm, {})
    folder = ordered(tmp_path, plan)
    run(tmp_path, plan, str(folder))
    assert len(run_history(folder)) == 3
    start = starting_parameters(folder)
    assert all(start[name].equal(warm[name]) for name in warm)
    assert outcome_of(folder) == ""
    run(tmp_path, plan, str(folder))  # done: nothing more to do, and no error
    page = write_run_report(folder).read_text()
    assert "2 of 2 rounds were learned together by 3 hospitals" in page
    assert "alder" in page
    assert "Nothing was evaluated" not in page


def test_a_changed_study_needs_another_name(make_plan: PlanMaker, tmp_path: Path) -> None:
    ordered(tmp_path, make_plan())
    with pytest.raises(UsageError, match="give the changed study another name"):
        ordered(tmp_path, make_plan(rounds=7))


def test_an_end_that_a_person_must_read_is_left_behind(make_plan: PlanMaker, tmp_path: Path) -> None:
    plan = make_plan(quorum=3)
    folder = ordered(tmp_path, plan)
    sites = FakeSites(tmp_path / "fakes", plan.training_sites[:2])
    context = Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config={"run-folder": str(folder)})
    with pytest.raises(RunError):
        app(LocalGrid(sites.app(), nodes=2), context)
    assert "did not reach the quorum of 3 sites" in (outcome_of(folder) or "")


def test_a_run_config_that_says_nothing(make_plan: PlanMaker, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="'run-folder' is missing"):
        run(tmp_path, make_plan(), "")


@pytest.mark.parametrize("module", ["server.strategy", "client.app"])
def test_flower_is_quiet_before_it_is_imported(module):
    code = f"import {module}, os; from flwr.supercore import telemetry; print(telemetry.FLWR_TELEMETRY_ENABLED)"
    environment = {"PATH": "/usr/bin:/bin", "HOME": "/nonexistent"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "0\n"
