"""The federation on Flower's Ray backend: the same numbers as in one process, and nobody else's code or server."""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from common.errors import UsageError
from server import ray_engine
from server.run_folder import final_parameters, run_history
from server.simulation import drive
from tests.fake_federation import FakeSites, fake_federation

ROOT = Path(__file__).resolve().parent.parent
FLOWER_PORT = 39091  # where `flwr run . local` looks for a SuperLink

needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed")

SCRIPT = """
import json, sys
from pathlib import Path
from common.errors import ConsiliumError
from common.plan import plan_from_json
from server.simulation import drive
from tests.fake_federation import FakeSites, fake_federation

folder, plan = Path(sys.argv[1]), plan_from_json(sys.argv[2])
faults = {tuple(key) if isinstance(key, list) else key: value for key, value in json.loads(sys.argv[3])}
sites = FakeSites(folder / "fakes", plan.training_sites, faults)
try:
    drive(fake_federation(plan, folder), sites.app(), engine="ray", jobs=2, resume=True)
except ConsiliumError as error:
    print(type(error).__name__, error)
"""


@pytest.fixture
def listener() -> Iterator[list[str]]:
    """What connects to Flower's local port while the test runs."""
    heard: list[str] = []
    server = socket.socket()
    server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        server.bind(("127.0.0.1", FLOWER_PORT))
    except OSError:
        pytest.skip(f"port {FLOWER_PORT} is in use")
    server.listen()

    def listen() -> None:
        while True:
            try:
                heard.append(str(server.accept()[1]))
            except OSError:
                return

    threading.Thread(target=listen, daemon=True).start()
    yield heard
    server.close()


def run_on_ray(plan, folder: Path, cwd: Path, faults: list | None = None) -> subprocess.CompletedProcess[str]:
    script = folder.parent / "run.py"
    script.write_text(SCRIPT)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "RAY_ADDRESS": "127.0.0.1:1"}
    command = [sys.executable, str(script), str(folder), plan.to_json(), json.dumps(faults or [])]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=100, check=False)


@pytest.mark.slow
@needs_ray
def test_the_same_numbers_on_ray(make_plan, tmp_path, listener):
    plan = make_plan(rounds=3)
    foreign = tmp_path / "foreign"  # another project's packages in the working directory
    for package in ("client", "server", "common", "tests"):
        (foreign / package).mkdir(parents=True)
        (foreign / package / "__init__.py").write_text(f"open({str(tmp_path / 'was-imported')!r}, 'w')")
    done = run_on_ray(plan, tmp_path / "ray", foreign)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    sites = FakeSites(tmp_path / "fakes", plan.training_sites)
    drive(fake_federation(plan, tmp_path / "local"), sites.app(), engine="local")
    ray, local = (final_parameters(tmp_path / name) for name in ("ray", "local"))
    assert all(ray[name].equal(local[name]) for name in local)
    assert [o.status for r in run_history(tmp_path / "ray") for o in r.sites] == ["ok"] * 12
    assert not (tmp_path / "was-imported").exists()
    assert listener == []
    assert not [p for p in foreign.iterdir() if not p.is_dir()], "files were left in the working directory"


@pytest.mark.slow
@needs_ray
def test_the_servers_error_comes_out_of_ray(make_plan, tmp_path):
    faults = [[["birch", 1], "raises"], [["cedar", 1], "nan"], ["alder", "refuses"]]
    done = run_on_ray(make_plan(rounds=1, quorum=3), tmp_path / "ray", tmp_path, faults)
    assert done.stderr == ""
    assert done.stdout.startswith("RunError the start did not reach the quorum of 3 sites:\n  alder: refused")


def test_ray_is_not_installed(make_plan, tmp_path, monkeypatch):
    monkeypatch.setattr(ray_engine.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        UsageError, match=r"--engine ray: Ray is not installed -- pip install 'consilium\[simulation\]'"
    ):
        drive(fake_federation(make_plan(), tmp_path), FakeSites(tmp_path, ()).app(), engine="ray")


@pytest.mark.parametrize(("gpus", "jobs", "share"), [(0, 2, 0.0), (1, 1, 1.0), (1, 4, 0.25), (4, 2, 1.0)])
def test_sites_that_run_at_once_share_the_gpus(
    monkeypatch: pytest.MonkeyPatch, gpus: int, jobs: int, share: float
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    assert ray_engine.gpu_share(jobs) == share
