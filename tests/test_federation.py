"""Real workers in a simulated federation, on both engines."""

from __future__ import annotations

import importlib.util
import sqlite3
from pathlib import Path

import pytest

from common.plan import StudyPlan
from server import simulation
from server.run_folder import final_parameters, run_history, starting_parameters
from server.simulation import Federation, run_federation
from server.start import initial_parameters, round_names

NAMES = ("alder", "birch", "cedar")


@pytest.fixture
def make_federation(make_plan, make_site, tmp_path):
    folders = {name: make_site(name, seed=i, patients=12) for i, name in enumerate(NAMES)}

    def make(plan: StudyPlan, run: str = "run") -> Federation:
        return Federation(plan, tmp_path / run, folders, initial_parameters(plan, tmp_path))

    return make


def charges(federation: Federation, site: str) -> int:
    ledger = federation.folder / "sites" / site / "ledger.sqlite"
    with sqlite3.connect(ledger) as connection:
        return int(connection.execute("SELECT COUNT(*) FROM entry WHERE number > 0").fetchone()[0])


def test_a_private_federation_and_its_ledgers(make_federation, make_plan):
    federation = make_federation(make_plan(rounds=2))
    run_federation(federation)
    records = run_history(federation.folder)
    assert [r.status for r in records] == ["committed"] * 3
    assert [o.status for o in records[2].sites] == ["ok"] * 3
    assert records[2].sites[0].epsilon > records[1].sites[0].epsilon > 0
    assert [charges(federation, name) for name in NAMES] == [2, 2, 2]
    start, final = starting_parameters(federation.folder), final_parameters(federation.folder)
    assert any(not start[name].equal(final[name]) for name in start)
    assert not any(name.startswith("head.") for name in final)  # heads stay at the sites
    assert not simulation._workers, "warm workers are kept after their run"


def test_a_lost_round_is_not_charged_twice(make_federation, make_plan):
    federation = make_federation(make_plan(rounds=3))
    run_federation(federation)
    before, final = run_history(federation.folder), final_parameters(federation.folder)
    for round in (2, 3):
        (federation.folder / f"round-{round:04d}.safetensors").unlink()
    run_federation(federation, resume=True)
    after = run_history(federation.folder)
    assert [o.status for o in after[3].sites] == ["ok"] * 3
    assert [o.epsilon for o in after[3].sites] == [o.epsilon for o in before[3].sites]
    assert [charges(federation, name) for name in NAMES] == [3, 3, 3]
    again = final_parameters(federation.folder)
    # the releases were sent again, not drawn again: in whatever order, which shows in the last bit
    assert all(final[name].numpy() == pytest.approx(again[name].numpy(), rel=1e-6, abs=1e-9) for name in final)


def test_bad_data_at_one_site_stops_only_that_site(make_federation, make_plan):
    federation = make_federation(make_plan(rounds=1, privacy=None))
    (federation.site_folders["birch"] / "site.yaml").write_text("name: birch\nnpz: nowhere.npz\nbugdet: 1\n")
    (federation.site_folders["cedar"] / "data.npz").write_bytes(b"torn")
    plan = federation.plan
    federation = Federation(
        plan.model_copy(update={"quorum": 1}), federation.folder, federation.site_folders, federation.initial
    )
    run_federation(federation)
    start, first = run_history(federation.folder)
    found = {o.site: (o.status, o.code) for o in start.sites}
    assert found == {"alder": ("ok", "ok"), "birch": ("refused", "site-unfit"), "cedar": ("refused", "site-unfit")}
    assert {o.site: o.status for o in first.sites} == {"alder": "ok", "birch": "absent", "cedar": "absent"}


def test_without_privacy_a_run_is_repeatable(make_federation, make_plan):
    plan = make_plan(rounds=2, privacy=None)
    first, second = make_federation(plan, "one"), make_federation(plan, "two")
    run_federation(first)
    run_federation(second, jobs=3)
    one, two = (final_parameters(federation.folder) for federation in (first, second))
    # two jobs and more answer in any order, and a sum in another order may differ in its last bit
    assert all(one[name].numpy() == pytest.approx(two[name].numpy(), rel=1e-6, abs=1e-9) for name in one)


@pytest.mark.parametrize("name", ["metasgd", "mapping", "mrmtl"])
def test_what_else_an_algorithm_shares_travels_and_what_it_keeps_stays(make_federation, make_plan, name):
    plan = make_plan(
        rounds=2,
        privacy=None,
        algorithm={"name": name, "inner_steps": 2, "episodes": 2, "proximal": 0.1 if name == "mrmtl" else 0.0},
        model={"name": "conv4", "width": 8, "trainable": "mapping" if name == "mapping" else "film"},
        evaluation={"compare": []},
    )
    federation = make_federation(plan)
    run_federation(federation)
    assert [o.status for r in run_history(federation.folder)[1:] for o in r.sites] == ["ok"] * 6
    start, final = starting_parameters(federation.folder), final_parameters(federation.folder)
    moved = {key for key in start if not start[key].equal(final[key])}
    assert start.keys() == final.keys()
    assert moved
    assert moved <= set(round_names(plan))
    beside = {"metasgd": "rate.", "mapping": "mapping.factor", "mrmtl": "body."}[name]
    assert any(key.startswith(beside) for key in moved)
    assert not any(key.startswith(("head.", "personal.", "sums.")) for key in final)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed")
def test_real_workers_on_ray(make_federation, make_plan, tmp_path: Path):
    """More processes than one: a site's round may come to another process than its preparation."""
    plan = make_plan(rounds=3, privacy=None)
    on_ray, local = make_federation(plan, "ray"), make_federation(plan, "local")
    folder = Path.cwd()
    run_federation(on_ray, engine="ray", jobs=2)
    assert Path.cwd() == folder
    run_federation(local)
    ray, here = (final_parameters(federation.folder) for federation in (on_ray, local))
    assert all(ray[name].numpy() == pytest.approx(here[name].numpy(), abs=1e-6) for name in here)
    assert [o.status for r in run_history(on_ray.folder)[1:] for o in r.sites] == ["ok"] * 9
