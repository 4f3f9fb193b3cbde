"""A round is committed or it did not happen, wherever a process stops."""

from __future__ import annotations

from pathlib import Path

import pytest

from common.checkpoint import save_checkpoint
from common.errors import CheckpointError, UsageError
from server import run_folder
from server.history import checkpoint_path
from server.run_folder import final_parameters, run_history, run_plan
from server.simulation import drive
from tests.fake_federation import FakeSites, fake_federation


class Stopped(BaseException):
    """The process ends here."""


def run(plan, folder: Path) -> None:
    sites = FakeSites(folder / "fakes", plan.training_sites)
    drive(fake_federation(plan, folder), sites.app(), engine="local", resume=True)


@pytest.mark.parametrize("step", ["append_record", "save_checkpoint"])
@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize("round", [0, 2])
def test_a_stop_at_any_step_of_a_commit(make_plan, tmp_path, monkeypatch, step, moment, round):
    plan, work = make_plan(rounds=3), getattr(run_folder, step)

    def stop(*args) -> None:
        is_this_round = any(
            getattr(arg, "round", None) == round or arg == checkpoint_path(tmp_path, round) for arg in args
        )
        if is_this_round and moment == "before":
            raise Stopped
        work(*args)
        if is_this_round:
            raise Stopped

    with monkeypatch.context() as patched:
        patched.setattr(run_folder, step, stop)
        with pytest.raises(Stopped):
            run(plan, tmp_path)
    committed = (step, moment) == ("save_checkpoint", "after")
    assert len(run_history(tmp_path)) == round + committed
    run(plan, tmp_path)
    assert [record.round for record in run_history(tmp_path)] == [0, 1, 2, 3]
    run(plan, tmp_path / "whole")
    whole = final_parameters(tmp_path / "whole")
    assert all(value.equal(whole[name]) for name, value in final_parameters(tmp_path).items())


def test_a_broken_newest_checkpoint(make_plan, tmp_path):
    plan = make_plan(rounds=2)
    run(plan, tmp_path)
    final = final_parameters(tmp_path)
    path = checkpoint_path(tmp_path, 2)
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(
        CheckpointError, match=r"round-0002.*torn or damaged.*; without it, --resume goes on from round 1"
    ):
        run(plan, tmp_path)
    path.unlink()
    run(plan, tmp_path)
    assert all(value.equal(final[name]) for name, value in final_parameters(tmp_path).items())


def test_a_checkpoint_of_another_round(make_plan, tmp_path):
    plan = make_plan(rounds=3)
    run(plan, tmp_path)
    checkpoint_path(tmp_path, 3).write_bytes(checkpoint_path(tmp_path, 2).read_bytes())
    with pytest.raises(CheckpointError, match=r"round-0003.*: is not of this study and round -- remove it"):
        run(plan, tmp_path)


def test_a_checkpoint_of_another_network(make_plan, tmp_path):
    plan = make_plan(rounds=1)
    run(plan, tmp_path)
    save_checkpoint(checkpoint_path(tmp_path, 1), {"other": next(iter(final_parameters(tmp_path).values()))}, {})
    with pytest.raises(CheckpointError, match="is of another network: it lacks 'body"):
        run(plan, tmp_path)


def test_what_a_run_left(make_plan, tmp_path):
    plan = make_plan(rounds=2)
    run(plan, tmp_path)
    assert run_plan(tmp_path) == plan
    first, last = final_parameters(tmp_path, round=1), final_parameters(tmp_path)
    assert first.keys() == last.keys()
    assert any(not first[name].equal(last[name]) for name in first)
    with pytest.raises(CheckpointError, match=r"round-0007.safetensors: does not exist"):
        final_parameters(tmp_path, round=7)


def test_a_folder_without_a_run(tmp_path):
    assert run_history(tmp_path) == ()
    with pytest.raises(UsageError, match=r"holds no run \(FileNotFoundError\) -- check the path"):
        run_plan(tmp_path)
    with pytest.raises(CheckpointError, match=r"initial.safetensors: does not exist"):
        final_parameters(tmp_path)
