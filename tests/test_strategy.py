"""The federation's rounds over the in-process grid, with sites that fail in every way the record knows.

The parameters after n rounds are known in closed form (tests/fake_federation.py), so that a site wrongly let into the
mean, or left out of it, shows.
"""

from __future__ import annotations

import math
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from common.errors import RunError, UsageError
from common.params import to_arrays
from common.plan import StudyPlan
from server.history import RoundRecord, SiteOutcome
from server.run_folder import final_parameters, locked, run_history, starting_parameters
from server.simulation import drive
from tests.fake_federation import FakeSite, FakeSites, Recorder, expected, fake_federation

ROOT = Path(__file__).resolve().parent.parent
NAMES = ("alder", "birch", "cedar")


def run(plan: StudyPlan, folder: Path, faults: dict | None = None, *, resume: bool = False, jobs: int = 1) -> Recorder:
    recorder = Recorder()
    sites = FakeSites(folder / "fakes", plan.training_sites, faults or {})
    drive(fake_federation(plan, folder), sites.app(), engine="local", observer=recorder, resume=resume, jobs=jobs)
    return recorder


def outcome(record: RoundRecord, site: str) -> SiteOutcome:
    return next(o for o in record.sites if o.site == site)


def assert_parameters(folder: Path, plan: StudyPlan, *, rounds: int, sites: int = 3) -> None:
    start, final = to_arrays(starting_parameters(folder)), to_arrays(final_parameters(folder))
    moved = [name for name in start if not (start[name] == final[name]).all()]
    assert moved, "nothing was trained"
    wanted = expected({name: start[name] for name in moved}, rounds, sites=sites)
    for name in moved:
        assert final[name] == pytest.approx(wanted[name], abs=1e-5)


def test_rounds_follow_the_closed_form(make_plan, tmp_path):
    plan = make_plan(rounds=4)
    recorder = run(plan, tmp_path)
    assert_parameters(tmp_path, plan, rounds=4)
    records = run_history(tmp_path)
    assert [r.round for r in records] == [0, 1, 2, 3, 4]
    assert str(records[1:]) == str(tuple(recorder.records[1:]))  # nan is not equal to itself
    assert [o.site for o in records[2].sites] == list(NAMES)
    assert all(o.status == "ok" and o.ledger_rows == 2 and o.queries == 2 for o in records[2].sites)
    assert records[1].update_norm > records[2].update_norm > 0
    assert (records[0].update_norm, records[0].status) == (0, "committed")
    names = sorted(p.name for p in tmp_path.glob("round-*"))
    assert names == [f"round-{i:04d}.safetensors" for i in range(5)]


def test_the_observer_is_told_in_order(make_plan, tmp_path):
    recorder = run(make_plan(rounds=1), tmp_path)
    assert recorder.told[:3] == ["run tiny 0/1", "prepared", "round 0 committed"]
    assert recorder.told[3] == "round 1 asks alder,birch,cedar"
    assert sorted(recorder.told[4:7]) == ["round 1 alder ok", "round 1 birch ok", "round 1 cedar ok"]
    assert recorder.told[7:] == ["round 1 committed"]


@pytest.mark.parametrize(
    ("fault", "status", "code", "reason"),
    [
        ("refuses", "refused", "budget-exceeded", "the budget?[31m is spent"),
        ("raises", "failed", "internal-failure", "the site failed; its own log says why"),
        ("nan", "rejected", "rejected", "is not finite"),
        ("shape", "rejected", "rejected", "has shape (3,), not ("),
        ("names", "rejected", "rejected", "names differ from the shared parameters'"),
        ("float64", "rejected", "rejected", "malformed reply: an array is not float32"),
        ("round", "rejected", "rejected", "the reply is for round 3"),
        ("rolled-back", "rejected", "rejected", "ledger has 1 rows as before, but not the same ones"),
        ("epsilon", "rejected", "rejected", "is not a finite number"),
    ],
)
def test_a_bad_reply_is_named_and_kept_out(make_plan, tmp_path, fault, status, code, reason):
    plan = make_plan(rounds=2)
    run(plan, tmp_path, {("cedar", 2): fault})
    bad = outcome(run_history(tmp_path)[2], "cedar")
    assert (bad.status, bad.code) == (status, code)
    assert reason in bad.reason
    assert "patient" not in (tmp_path / "history.jsonl").read_text()
    start, final = starting_parameters(tmp_path), final_parameters(tmp_path)
    name = next(name for name in start if not start[name].equal(final[name]))
    after_one = 2 + (start[name] - 2) / 2  # all three
    assert final[name].numpy() == pytest.approx((1.5 + (after_one - 1.5) / 2).numpy(), abs=1e-5)  # alder, birch


def test_where_scores_are_weights_a_reply_without_one_is_kept_out(make_plan, tmp_path, monkeypatch):
    """Sites pull to 1, 2 and 3; birch, without a score, is kept out, and cedar's score is half of alder's."""
    scores, honest = {"alder": 1.0, "birch": math.nan, "cedar": 0.5}, FakeSite.train
    monkeypatch.setattr(
        FakeSite, "train", lambda self, instruction: replace(honest(self, instruction), accuracy=scores[self.name])
    )
    run(make_plan(rounds=1, outer={"weights": "score"}), tmp_path)
    refused = outcome(run_history(tmp_path)[1], "birch")
    assert (refused.status, refused.reason) == (
        "rejected",
        "the reply has no score between 0 and 1, which would be its weight",
    )
    start, final = starting_parameters(tmp_path), final_parameters(tmp_path)
    name = next(name for name in start if not start[name].equal(final[name]))
    mean = (1.0 * 1 + 0.5 * 3) / 1.5
    assert final[name].numpy() == pytest.approx((mean + (start[name] - mean) / 2).numpy(), abs=1e-5)


def test_a_ledger_that_lost_rows_is_noticed_across_a_resume(make_plan, tmp_path):
    plan = make_plan(rounds=3)
    run(plan, tmp_path)
    (tmp_path / "round-0003.safetensors").unlink()
    (tmp_path / "fakes" / "cedar.ledger").write_text("")  # an older backup was put back
    run(plan, tmp_path, resume=True)
    record = run_history(tmp_path)[3]
    assert outcome(record, "cedar").status == "rejected"
    assert outcome(record, "cedar").reason == "the site's ledger went back from 2 rows to 1"
    assert record.status == "committed"


def test_a_late_site_is_recorded_and_the_round_goes_on(make_plan, tmp_path):
    plan = make_plan(rounds=2, round_timeout_s=0.5)
    began = time.monotonic()
    run(plan, tmp_path, {("birch", 1): "sleeps"}, jobs=3)
    assert time.monotonic() - began < 2.5
    first, second = run_history(tmp_path)[1:]
    late = outcome(first, "birch")
    assert (late.status, late.reason) == ("late", "no answer in time")
    assert late.seconds == pytest.approx(0.5, abs=0.2)
    assert first.status == "committed"
    assert outcome(second, "birch").status == "late"  # still busy with the first round


@pytest.mark.parametrize(
    ("fault", "name", "status", "reason"),
    [
        ("refuses", "cedar", "refused", "this plan is not approved at the site"),
        ("raises", "node 3", "failed", "the site failed"),
        ("stranger", "node 3 (yew)", "rejected", "it is no training site of this plan"),
        ("other-plan", "cedar", "rejected", "the reply belongs to another plan"),
    ],
)
def test_a_site_that_is_not_ready_is_recorded_and_not_asked(make_plan, tmp_path, fault, name, status, reason):
    recorder = run(make_plan(rounds=1), tmp_path, {"cedar": fault})
    start, first = run_history(tmp_path)
    assert outcome(start, name).status == status
    assert reason in outcome(start, name).reason
    assert outcome(first, name).status == "absent"
    assert outcome(first, "cedar").status == "absent"
    assert "round 1 asks alder,birch" in recorder.told
    assert [o.site for o in start.sites].count("alder") == 1


def test_of_two_nodes_for_one_site_the_first_is_used(make_plan, tmp_path):
    run(make_plan(rounds=1), tmp_path, {"cedar": "twin"})
    start, first = run_history(tmp_path)
    twins = [o for o in start.sites if o.site in ("node 1 (alder)", "node 3 (alder)")]
    assert [(o.status, o.reason) for o in twins] == [("rejected", "another node answered as this site before")]
    assert outcome(start, "cedar").reason == "no node answered for this site"
    assert [o.site for o in first.sites].count("alder") == 1


def test_too_few_sites_at_the_start(make_plan, tmp_path):
    with pytest.raises(RunError) as caught:
        run(make_plan(quorum=3), tmp_path, {"birch": "refuses"})
    assert str(caught.value) == (
        "the start did not reach the quorum of 3 sites:\n  birch: refused, this plan is not approved at the site"
    )
    assert run_history(tmp_path) == ()


def test_below_quorum_the_parameters_stay_and_the_run_goes_on(make_plan, tmp_path):
    plan = make_plan(rounds=3, quorum=3)
    run(plan, tmp_path, {("birch", 2): "nan"})
    records = run_history(tmp_path)
    assert [r.status for r in records] == ["committed", "committed", "below_quorum", "committed"]
    assert records[2].update_norm == 0
    assert outcome(records[2], "alder").status == "ok"  # its charge is in the record
    before, after = (final_parameters(tmp_path, round=i) for i in (1, 2))
    assert all(before[name].equal(after[name]) for name in before)
    assert_parameters(tmp_path, plan, rounds=2)


def test_three_rounds_below_quorum_end_the_run(make_plan, tmp_path):
    plan = make_plan(rounds=9, quorum=3)
    faults = {("birch", i): "nan" for i in range(3, 10)}
    with pytest.raises(
        RunError, match="3 rounds in a row, up to round 5, did not reach the quorum of 3 sites"
    ) as caught:
        run(plan, tmp_path, faults)
    assert "birch: rejected, " in str(caught.value)
    assert "is not finite" in str(caught.value)
    run(plan, tmp_path, resume=True)  # mended: the rounds that were lost are spent
    assert [r.status for r in run_history(tmp_path)].count("committed") == 7


def test_lost_rounds_that_are_not_in_a_row_do_not_end_the_run(make_plan, tmp_path):
    run(make_plan(rounds=5, quorum=3), tmp_path, {("birch", i): "nan" for i in (1, 2, 4, 5)})
    assert [r.status == "committed" for r in run_history(tmp_path)] == [True, False, False, True, False, False]


@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "adam", "yogi"])
def test_a_resumed_run_gives_the_same_numbers(make_plan, tmp_path, optimizer):
    plan = make_plan(rounds=5, outer={"optimizer": optimizer, "lr": 0.3})
    run(plan, tmp_path / "whole")
    run(plan, tmp_path / "cut")
    for round in (3, 4, 5):
        (tmp_path / "cut" / f"round-{round:04d}.safetensors").unlink()
    recorder = run(plan, tmp_path / "cut", resume=True)
    assert recorder.told[0] == "run tiny 2/5"
    whole, cut = (final_parameters(tmp_path / name) for name in ("whole", "cut"))
    assert all(whole[name].equal(cut[name]) for name in whole)
    assert len(run_history(tmp_path / "cut")) == 6


def test_a_finished_run_asks_nobody(make_plan, tmp_path):
    plan = make_plan(rounds=2)
    run(plan, tmp_path)
    recorder = run(plan, tmp_path, dict.fromkeys(NAMES, "raises"), resume=True)
    assert recorder.told == ["run tiny 2/2"]


def test_another_study_in_the_folder(make_plan, tmp_path):
    run(make_plan(rounds=1), tmp_path)
    with pytest.raises(UsageError, match=r"this run folder holds another study: its plan differs"):
        run(make_plan(rounds=2), tmp_path, resume=True)
    with pytest.raises(UsageError, match=r"this study's run, at round 1 of 1 -- go on with --resume"):
        run(make_plan(rounds=1), tmp_path)
    plan = make_plan(rounds=1, seed=1)
    federation = fake_federation(plan, tmp_path / "new")
    sites = FakeSites(tmp_path / "fakes", NAMES)
    drive(federation, sites.app(), engine="local")
    other = {name: value + 1 for name, value in federation.initial.items()}
    changed = type(federation)(plan, federation.folder, federation.site_folders, other)
    with pytest.raises(UsageError, match="its starting point differs"):
        drive(changed, sites.app(), engine="local", resume=True)


def test_starting_parameters_of_another_network(make_plan, tmp_path):
    wide = fake_federation(make_plan(model={"name": "conv4", "width": 16}), tmp_path)
    wrong = type(wide)(make_plan(), tmp_path, wide.site_folders, wide.initial)
    with pytest.raises(UsageError, match="the starting parameters: lack 'body"):
        drive(wrong, FakeSites(tmp_path, NAMES).app(), engine="local")


def test_a_folder_is_for_one_process(make_plan, tmp_path):
    hold = "import sys,time; from pathlib import Path; from server.run_folder import locked\n"
    hold += "with locked(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"
    command = [sys.executable, "-c", hold, str(tmp_path)]
    holder = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(RunError, match="another process is running in this run folder -- wait for it"):
            run(make_plan(), tmp_path)
    finally:
        holder.kill()
        holder.communicate()
    with locked(tmp_path):  # a kill frees it
        pass


def test_fewer_sites_than_the_quorum(make_plan, tmp_path):
    federation = fake_federation(make_plan(), tmp_path, ("birch",))
    with pytest.raises(UsageError, match=r"1 training sites have data here.* add the folders of: alder, cedar"):
        drive(federation, FakeSites(tmp_path, ("birch",)).app(), engine="local")


def test_a_site_without_data_is_absent(make_plan, tmp_path):
    federation = fake_federation(make_plan(rounds=1), tmp_path, ("alder", "cedar"))
    drive(federation, FakeSites(tmp_path / "fakes", ("alder", "cedar")).app(), engine="local")
    birch = outcome(run_history(tmp_path)[1], "birch")
    assert (birch.status, birch.reason) == ("absent", "no node answered for this site")
    assert math.isnan(birch.accuracy)


def test_nothing_is_printed(make_plan, tmp_path, capfd):
    run(make_plan(rounds=1), tmp_path, {("birch", 1): "raises"})
    assert capfd.readouterr() == ("", "")


def test_a_stopped_run_ends_at_once(make_plan, tmp_path):
    from server.app import build_server_app
    from server.local_grid import LocalGrid
    from server.strategy import RunSettings

    plan = make_plan(round_timeout_s=60.0)
    stop = threading.Event()
    federation = fake_federation(plan, tmp_path)
    settings = RunSettings(plan=plan, folder=tmp_path, initial=federation.initial, stop=stop)
    sites = FakeSites(tmp_path / "fakes", NAMES, {("birch", 1): "sleeps"})
    threading.Timer(0.5, stop.set).start()
    began = time.monotonic()
    with pytest.raises(RunError, match="the run was stopped"):
        build_server_app(settings, Recorder())(LocalGrid(sites.app(), nodes=3, jobs=3), None)
    assert time.monotonic() - began < 2.5
