"""The deployed ServerApp reads its run config, and goes on where its folder stands."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from flwr.app import Context, RecordDict

from common.checkpoint import save_checkpoint
from common.errors import CheckpointError, UsageError
from server.app import app
from server.local_grid import LocalGrid
from server.run_folder import run_history, starting_parameters
from server.start import initial_parameters
from tests.fake_federation import FakeSites

ROOT = Path(__file__).resolve().parent.parent


def run(tmp_path, study, config: dict[str, str]) -> None:
    sites = FakeSites(tmp_path / "fakes", study.training_sites)
    context = Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config=dict(config))
    app(LocalGrid(sites.app(), nodes=3), context)


def test_a_study_by_run_config(make_plan, tmp_path):
    plan = make_plan(rounds=2, model={"name": "conv4", "width": 8, "warm_start": "warm.safetensors"})
    (tmp_path / "study.yaml").write_text(plan.to_json())
    config = {"plan": str(tmp_path / "study.yaml"), "run-folder": str(tmp_path / "run")}
    with pytest.raises(CheckpointError, match=r"warm.safetensors: does not exist"):
        run(tmp_path, plan, config)
    cold = initial_parameters(
        plan.model_copy(update={"model": plan.model.model_copy(update={"warm_start": None})}), tmp_path
    )
    warm = {name: value + 1 for name, value in cold.items()}
    save_checkpoint(tmp_path / "warm.safetensors", warm, {})
    run(tmp_path, plan, config)
    assert len(run_history(tmp_path / "run")) == 3
    start = starting_parameters(tmp_path / "run")
    assert all(start[name].equal(warm[name]) for name in warm)
    run(tmp_path, plan, config)  # done: nothing more to do, and no error


def test_a_run_config_that_says_nothing(make_plan, tmp_path):
    with pytest.raises(UsageError) as caught:
        run(tmp_path, make_plan(), {"plan": ""})
    assert str(caught.value).splitlines() == [
        "run config: 'plan' is missing -- give plan=\"...\"",
        "run config: 'run-folder' is missing -- give run-folder=\"...\"",
    ]


@pytest.mark.parametrize("module", ["server.strategy", "client.app"])
def test_flower_is_quiet_before_it_is_imported(module):
    code = f"import {module}, os; from flwr.supercore import telemetry; print(telemetry.FLWR_TELEMETRY_ENABLED)"
    environment = {"PATH": "/usr/bin:/bin", "HOME": "/nonexistent"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "0\n"
