"""`consilium-lab simulate` as a researcher uses it: real processes, phantom hospitals, kills, bad sites."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from client.ledger import Ledger
from server.cli import main
from server.run_folder import run_history

ROOT = Path(__file__).parents[1]
ROUNDS = 4
PLAN = """
study: small
seed: 3
task:
  kind: classification
  image_size: 16
  channels: 1
  label_sets:
    nodule: [normal, nodule]
    opacity: [normal, opacity]
    bleed: [normal, bleed]
    stroke: [normal, bleed, infarct]
sites:
  alder: {labels: nodule, patients: 16}
  birch: {labels: opacity, patients: 16}
  cedar: {labels: bleed, patients: 16}
  yew: {labels: stroke, patients: 12, role: held_out}
model: {name: conv4, width: 8}
algorithm: {name: reptile, inner_steps: 2, inner_lr: 0.1}
rounds: 4
quorum: 2
sampling: {sample_rate: 0.5}
privacy: {epsilon: 8, delta: auto}
evaluation:
  shots: [1, 2]
  splits: 2
  draws: 2
  adaptation: {trainable: head, steps: 5, lr: 1.0}
  compare: [fedavg, local_only]
  curve_points: 2
"""


@pytest.fixture
def plan(tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(PLAN)
    return path


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-c", "from server.cli import main; main()", *map(str, arguments)]


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def lab(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*arguments), env=environment(), capture_output=True, text=True, timeout=300)


class Ended(NamedTuple):
    returncode: int | str | None
    stderr: str


Lab = Callable[..., Ended]


@pytest.fixture
def lab_here(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Lab:
    """`lab` in this process, for what ends at once: another one would load torch for seconds."""

    def run(*arguments: object) -> Ended:
        monkeypatch.setattr(sys, "argv", ["consilium-lab", *map(str, arguments)])
        monkeypatch.setattr("atexit.register", lambda function: None)
        with pytest.raises(SystemExit) as end:
            main()
        return Ended(end.value.code, capsys.readouterr().err)

    return run


def ledgers(run: Path) -> dict[str, Ledger]:
    return {str(path.parent.relative_to(run)): Ledger.existing(path.parent) for path in run.rglob("ledger.sqlite")}


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_study_runs_to_its_report_and_is_not_run_twice(plan: Path, tmp_path: Path, lab_here: Lab) -> None:
    run = tmp_path / "run"
    done = lab("simulate", plan, "--out", run, "--json")
    assert done.returncode == 0, done.stderr
    metrics = json.loads(done.stdout)
    assert json.loads((run / "metrics.json").read_text()) == metrics
    arms = {row["arm"] for row in metrics["summary"]}
    assert arms == {"random", "ceiling", "meta", "fedavg", "local_only"}
    page = (run / "report.html").read_text()
    assert "PHANTOMS" in page
    assert "http" not in page.replace("http://www.w3.org", "")
    spent = {name: ledger.spent() for name, ledger in ledgers(run).items()}
    assert len(spent) == 6  # three hospitals in two federations, each with a ledger of its own
    assert all(0 < epsilon <= 8.0 for epsilon in spent.values())
    again = lab_here("simulate", plan, "--out", run)
    assert again.returncode == 2
    assert "go on with --resume, or take another folder" in again.stderr
    resumed = lab_here("simulate", plan, "--out", run, "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert {name: ledger.spent() for name, ledger in ledgers(run).items()} == spent
    plan.write_text(PLAN.replace("rounds: 4", "rounds: 5"))
    other = lab_here("simulate", plan, "--out", run, "--resume")
    assert other.returncode == 2
    assert "this run folder holds another study" in other.stderr


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_kill_at_random_moments_and_resume(plan: Path, tmp_path: Path) -> None:
    """Same number of rounds; what was spent is never forgotten; no round is charged twice."""
    run, rng, before = tmp_path / "run", random.Random(7), {}
    for _ in range(2):
        with started(command("simulate", plan, "--out", run, "--resume"), stdout=subprocess.DEVNULL) as process:
            wait_for(
                lambda: len(list(run.glob("federations/*/*/round-*.safetensors"))) > 1, seconds=120, process=process
            )
            time.sleep(rng.uniform(0, 1.5))
            os.kill(process.pid, signal.SIGKILL)
        spent = {name: ledger.spent() for name, ledger in ledgers(run).items()}
        assert all(spent[name] >= epsilon for name, epsilon in before.items())
        before = spent
    done = lab("simulate", plan, "--out", run, "--resume")
    assert done.returncode == 0, done.stderr
    for federation in ("all/meta", "all/fedavg"):
        records = run_history(run / "federations" / federation)
        assert [record.round for record in records] == list(range(ROUNDS + 1))
    for name, ledger in ledgers(run).items():
        rounds = [charge.round for charge in ledger.charges()]
        assert len(rounds) == len(set(rounds)) <= ROUNDS
        assert ledger.spent() >= before.get(name, 0.0)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_ctrl_c_ends_without_a_traceback_and_the_same_command_goes_on(plan: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    again = command("simulate", plan, "--out", run, "--jobs", 2, "--resume")
    for file in ("federations/all/meta/round-0002.safetensors", "trials/all/*/*.json"):  # in rounds, in evaluations
        with started(again, stdout=subprocess.PIPE) as process:
            wait_for(lambda file=file: any(run.glob(file)), seconds=120, process=process)  # type: ignore[misc]
            os.killpg(process.pid, signal.SIGINT)  # the terminal sends it to every process of the command
            errors = process.communicate(timeout=60)[1]
        assert process.returncode == 130, errors
        assert "Traceback" not in errors
    done = subprocess.run(again, env=environment(), capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr


@contextmanager
def started(words: list[str], *, stdout: int) -> Iterator[subprocess.Popen[str]]:
    """A process, killed at the end if it is still there."""
    process = subprocess.Popen(
        words, env=environment(), stderr=stdout, stdout=stdout, text=True, start_new_session=True
    )
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def wait_for(condition, *, seconds: float, process) -> None:  # type: ignore[no-untyped-def]
    deadline = time.monotonic() + seconds
    while not condition() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_one_sites_bad_data_is_named_and_never_stops_the_others(plan: Path, tmp_path: Path, lab_here: Lab) -> None:
    sites, run = tmp_path / "sites", tmp_path / "run"
    names = [word for name in ("alder", "birch", "cedar", "yew") for word in ("--name", name)]
    assert lab_here("sites", "phantoms", "--out", sites, *names, "--patients", 24, "--image-size", 16).returncode == 0
    data = dict(np.load(sites / "birch" / "data.npz"))
    np.savez(sites / "birch" / "data.npz", **{**data, "label_names": np.array(["normal", "mystery"])})
    done = lab("simulate", plan, "--sites", sites, "--out", run, "--json")
    assert done.returncode == 0, done.stderr
    assert "birch: " in done.stderr
    remarks = json.dumps(json.loads(done.stdout)["warnings"])
    assert "birch" in remarks
    assert "data.npz row" in remarks
    records = run_history(run / "federations" / "all" / "meta")
    assert {site.site: site.status for site in records[-1].sites if site.site != "birch"} == {
        "alder": "ok",
        "cedar": "ok",
    }
    shutil.rmtree(sites / "alder")
    too_few = lab_here("simulate", plan, "--sites", sites, "--out", tmp_path / "second")
    assert too_few.returncode == 2
    assert "only 1 training sites can be used, and the quorum is 2" in too_few.stderr
    assert "alder: there is no folder of this site" in too_few.stderr


def test_wrong_use_is_told_and_leaves_nothing_behind(plan: Path, tmp_path: Path, lab_here: Lab) -> None:
    plan.write_text(PLAN.replace("alder", "abbey"))
    unknown = lab_here("simulate", plan, "--out", tmp_path / "run")
    assert unknown.returncode == 2
    assert "abbey is no phantom hospital" in unknown.stderr
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("")
    occupied = lab_here("simulate", plan, "--out", tmp_path / "mine")
    assert occupied.returncode == 2
    assert "is not empty and holds no study" in occupied.stderr
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]
