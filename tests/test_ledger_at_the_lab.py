"""The lab remembers every hospital's ledger in all studies, and the hospital's worker hears it before it charges."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from flwr.app import Context

from client import approval
from client.app import build_client_app
from client.ledger import Ledger
from client.worker import Worker
from common.keys import STUDY, sign
from common.plan import StudyPlan
from server.history import SiteOutcome
from server.ledgers import LedgerCopies
from server.local_grid import LocalGrid
from server.observer import Unobserved
from server.run_folder import run_history
from server.start import initial_parameters
from server.strategy import ConsiliumStrategy, RunSettings
from tests.conftest import PlanMaker, SiteMaker
from tests.fake_federation import FakeSites
from tests.test_worker import LAB, instruct, instruction, prepare, real_worker


class EnrolledGrid(LocalGrid):
    """Knows its nodes by the names that a lab enrolled them as."""

    names: tuple[str, ...] = ()

    def get_nodes(self):
        return [
            type("Node", (), {"node_id": n, "name": s}) for n, s in zip(self.get_node_ids(), self.names, strict=True)
        ]


def run(lab: Path, plan: StudyPlan, workers: Callable[[Context], object]) -> list[tuple[SiteOutcome, ...]]:
    """The study at the lab, and what each site's outcome was, the start first."""
    grid = EnrolledGrid(build_client_app(workers), nodes=len(plan.training_sites))
    grid.names = plan.training_sites
    folder = lab / "runs" / plan.study
    settings = RunSettings(
        plan=plan,
        folder=folder,
        initial=initial_parameters(plan, folder),
        resume=True,
        signed=sign(STUDY, plan.to_json(), LAB),
        ledgers=lab / "ledgers",
    )
    ConsiliumStrategy(settings, Unobserved()).start(grid)
    return [record.sites for record in run_history(folder)]


def of_site(outcomes: tuple[SiteOutcome, ...], site: str) -> SiteOutcome:
    return next(outcome for outcome in outcomes if outcome.site == site)


@pytest.fixture
def hospitals(make_site: SiteMaker) -> dict[str, Path]:
    folders = {name: make_site(name, seed=n) for n, name in enumerate(("alder", "birch"))}
    for folder in folders.values():
        real_worker(folder)
    return folders


@pytest.fixture
def study(make_plan: PlanMaker, hospitals: dict[str, Path]) -> Callable[[str], StudyPlan]:
    """A study of that name, approved everywhere."""

    def make(name: str) -> StudyPlan:
        sites = {site: {"labels": "lesion", "patients": 10} for site in hospitals}
        plan = make_plan(
            study=name,
            sites=sites,
            rounds=2,
            quorum=1,
            privacy={"noise_multiplier": 6.0, "epsilon": 8.0, "delta": 0.01},
        )
        for folder in hospitals.values():
            approval.approve(folder / "state", plan, by="a test")
        return plan

    return make


def workers(hospitals: dict[str, Path]) -> Callable[[Context], Worker]:
    """Warm workers; made again for every run, as after a restart."""
    warm: dict[str, Worker] = {}
    names = list(hospitals)

    def worker_for(context: Context) -> Worker:
        name = names[int(context.node_config["partition-id"])]
        return warm.setdefault(name, Worker(hospitals[name], state=hospitals[name] / "state"))

    return worker_for


def test_a_ledger_put_back_between_studies_is_refused_before_it_is_charged(hospitals, study, tmp_path) -> None:
    """All of state/ is as old as the ledger, so that nothing at the hospital remembers; a fork of any length too."""
    lab, birch = tmp_path / "lab", hospitals["birch"] / "state"
    shutil.copytree(birch, tmp_path / "before")
    first = run(lab, study("first"), workers(hospitals))
    assert [of_site(outcomes, "birch").code for outcomes in first] == ["ok", "ok", "ok"]
    assert LedgerCopies(lab / "ledgers", study="").newest("birch") == Ledger.existing(birch).head()
    shutil.rmtree(birch)
    shutil.copytree(tmp_path / "before", birch)
    start, *rounds = run(lab, study("second"), workers(hospitals))
    refused = of_site(start, "birch")
    assert (refused.status, refused.code) == ("refused", "ledger-rolled-back")
    assert refused.reason == "the site's privacy ledger lacks rows that were seen in it: an older copy was put back"
    assert [of_site(outcomes, "birch").status for outcomes in rounds] == ["absent", "absent"]
    assert [of_site(outcomes, "alder").ledger_rows for outcomes in rounds] == [3, 4]
    ledger = Ledger.existing(birch)
    assert ledger.charges() == ()  # nothing was charged, so nothing left
    for number in (1, 2, 3):  # it goes another way, and is longer than it was
        ledger.charge(
            study="f" * 64, round=number, event=Ledger.existing(hospitals["alder"] / "state").charges()[0].event
        )
    start, *_ = run(lab, study("third"), workers(hospitals))
    assert of_site(start, "birch").code == "ledger-rolled-back"
    assert len(Ledger.existing(birch).charges()) == 3


def test_a_ledger_put_back_within_a_study_is_refused_before_it_is_charged(hospitals, study, tmp_path) -> None:
    plan = study("first")
    state = hospitals["alder"] / "state"
    worker = Worker(hospitals["alder"], state=state)
    assert prepare(worker, plan).ledger_rows == 0
    first = worker.train(instruct(plan))
    seen = {"ledger_rows": first.ledger_rows, "ledger_head": first.ledger_head}
    assert worker.train(instruct(plan, 2, **seen)).code == "ok"
    for file in (*state.glob("ledger.*"), *state.glob("journal.*")):
        file.unlink()
    again = Worker(hospitals["alder"], state=state)
    assert again.train(instruct(plan, 1, **seen)).code == "ledger-rolled-back"
    assert again.prepare(replace(instruction(plan), **seen)).code == "ledger-rolled-back"
    assert len(Ledger.existing(state).charges()) == 0


def test_a_site_that_does_not_heed_what_it_is_told_is_named_by_the_lab(make_plan, tmp_path) -> None:
    """Fake sites forget their ledgers, charge and answer; the lab compares with what it saw in the study before."""
    lab, first = tmp_path / "lab", make_plan(study="first", rounds=3)
    run(lab, first, FakeSites(tmp_path / "fakes", first.training_sites))
    copies = LedgerCopies(lab / "ledgers", study="")
    assert copies.newest("cedar")[0] == 3
    (lab / "ledgers" / "cedar.jsonl").write_text('{"rows": 1, "head": "another"}\n{"rows": 2, "he')
    second = make_plan(study="second", rounds=2, quorum=1)
    _, one, two = run(lab, second, FakeSites(tmp_path / "others", second.training_sites))
    assert of_site(one, "cedar").reason == "the site's ledger has 1 rows, and not those that it had in an earlier study"
    assert (of_site(one, "alder").code, of_site(two, "cedar").code) == ("ok", "ok")


def test_replies_of_studies_that_run_at_once_come_in_any_order(tmp_path: Path) -> None:
    one, other = (LedgerCopies(tmp_path / "ledgers", study=name) for name in ("one", "other"))
    one.take("alder", (6, "f"))
    assert other.objection("alder", (5, "e")) is None  # charged before the other's, told after it
    other.take("alder", (5, "e"))
    other.take("alder", (0, "opened"))
    assert one.newest("alder") == (6, "f")
    assert one.seen("alder") == {5: "e", 6: "f"}
    assert "not those that it had" in (one.objection("alder", (6, "g")) or "")
    with (tmp_path / "ledgers" / "alder.jsonl").open("ab") as file:
        file.write(b'{"rows": 7, "he')  # torn by a crash
    one.take("alder", (8, "h"))
    assert other.newest("alder") == (8, "h")
