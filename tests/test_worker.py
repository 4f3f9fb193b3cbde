"""The worker: verify, charge, query, store, reply. It trusts nothing that it is told."""

from __future__ import annotations

import dataclasses
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

import client.study
import client.worker
from client import approval
from client.app import build_client_app
from client.ledger import FILE
from client.membership import SITE_KEY
from client.worker import Worker
from common.algorithms import ALGORITHMS
from common.keys import STUDY, make_signing_key, sign
from common.params import Arrays, digest, to_arrays
from common.plan import StudyPlan
from common.plan_rules import EPISODIC
from common.records import PREPARE, TRAIN, PrepareInstruction, SiteReply, TrainInstruction
from common.starting_point import network_of, starting, travelling
from common.wire import decode, encode
from tests.conftest import PlanMaker, SiteMaker, join_lab


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replies of real sites are held until their span ends (tests/test_disclosure.py); not here."""
    monkeypatch.setattr("client.reply_time.time.sleep", lambda seconds: None)


def start(plan: StudyPlan) -> tuple[Arrays, Arrays]:
    """(what starts a run, what travels in each of its rounds) as a lab would send them."""
    network = network_of(plan, "alder")
    return to_arrays(starting(plan, network)), to_arrays(travelling(plan, network))


LAB = Ed25519PrivateKey.generate()


def instruction(plan: StudyPlan, *, signer: Ed25519PrivateKey = LAB) -> PrepareInstruction:
    signed = sign(STUDY, plan.to_json(), signer)
    return PrepareInstruction(signed.body, signer=signed.signer, signature=signed.signature, initial=start(plan)[0])


def prepare(worker: Worker, plan: StudyPlan) -> SiteReply:
    return worker.prepare(instruction(plan))


def real_worker(folder: Path) -> Worker:
    """Of a site that joined the lab whose key is LAB."""
    join_lab(folder, LAB)
    return Worker(folder, state=folder / "state")


def instruct(plan: StudyPlan, round: int = 1, **changes: object) -> TrainInstruction:
    initial, shared = start(plan)
    instruction = TrainInstruction(plan_digest=plan.digest, initial_digest=digest(initial), round=round, shared=shared)
    return dataclasses.replace(instruction, **changes)  # type: ignore[arg-type]


def ready(folder: Path, plan: StudyPlan, *, simulated: bool = True) -> Worker:
    worker = Worker(folder, state=folder / "state", simulated=simulated)
    approval.approve(folder / "state", plan, by="a test")
    assert prepare(worker, plan).code == "ok"
    return worker


def charges(worker: Worker, plan: StudyPlan) -> int:
    ledger = worker._studies[plan.digest].ledger
    assert ledger is not None
    return len(ledger.charges())


def test_a_round_is_charged_queried_stored_and_answered(make_site: SiteMaker, make_plan: PlanMaker) -> None:
    plan = make_plan()
    worker = ready(make_site("alder"), plan)
    reply = worker.train(instruct(plan))
    assert (reply.code, reply.site, reply.round, reply.plan_digest) == ("ok", "alder", 1, plan.digest)
    assert reply.queries == 3  # two inner steps and the monitor
    assert reply.update.keys() == start(plan)[1].keys()
    assert all(np.isfinite(value).all() for value in reply.update.values())
    assert 0 <= reply.accuracy <= 1
    assert 0 < reply.epsilon <= 8
    assert reply.ledger_rows == 1
    assert len(reply.ledger_head) == 64
    assert math.log2(reply.seconds).is_integer()


def test_a_release_is_sent_again_and_never_computed_twice(make_site: SiteMaker, make_plan: PlanMaker) -> None:
    plan, folder = make_plan(), make_site("alder")
    worker = ready(folder, plan)
    first = worker.train(instruct(plan))
    for again in (worker, ready(folder, plan)):  # the same process, and one that was restarted
        second = again.train(instruct(plan))
        assert digest(second.update) == digest(first.update)
        assert dataclasses.replace(second, update={}) == dataclasses.replace(first, update={})
        assert charges(again, plan) == 1


def test_a_round_that_crashed_after_its_charge_is_spent(
    make_site: SiteMaker, make_plan: PlanMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = make_plan()
    worker = ready(make_site("alder"), plan)
    with monkeypatch.context() as broken:
        broken.setattr(client.study.PrivateDataset, "gradient", lambda *_: 1 / 0)
        reply = worker.train(instruct(plan))
    assert (reply.code, reply.reason) == ("internal-failure", "the site failed; its own log says why")
    assert charges(worker, plan) == 1
    assert worker.train(instruct(plan)).code == "round-spent"
    assert charges(worker, plan) == 1
    assert worker.train(instruct(plan, round=2)).code == "ok"


def test_the_charge_is_written_before_the_first_query(
    make_site: SiteMaker, make_plan: PlanMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = make_plan()
    worker = ready(make_site("alder"), plan)
    seen: list[int] = []
    real = client.study.PrivateDataset.gradient

    def watched(self, params):  # type: ignore[no-untyped-def]
        seen.append(charges(worker, plan))
        return real(self, params)

    monkeypatch.setattr(client.study.PrivateDataset, "gradient", watched)
    worker.train(instruct(plan))
    assert seen == [1, 1]


@pytest.mark.parametrize("simulated", [False, True])
def test_a_real_sites_charge_is_on_the_disk_before_the_first_query(
    make_site: SiteMaker, make_plan: PlanMaker, monkeypatch: pytest.MonkeyPatch, simulated: bool
) -> None:
    """A simulation waits for no disk: its charges survive a kill, as those of the test of kills do."""
    plan, folder = make_plan(), make_site("alder")
    approval.approve(folder / "state", plan, by="a test")
    worker = Worker(folder, state=folder / "state", simulated=True) if simulated else real_worker(folder)
    assert prepare(worker, plan).code == "ok"
    synced: list[str] = []
    query = client.study.PrivateDataset.gradient
    monkeypatch.setattr(os, "fsync", lambda file: synced.append(os.readlink(f"/proc/self/fd/{file}")))
    monkeypatch.setattr(
        client.study.PrivateDataset, "gradient", lambda *asked: (synced.append("query"), query(*asked))[1]
    )
    assert worker.train(instruct(plan)).code == "ok"
    before = synced[: synced.index("query")]
    assert any(file.endswith("/ledger.opened") for file in before) is not simulated
    ledger = worker._studies[plan.digest].ledger
    assert ledger is not None
    assert ledger.durable is not simulated  # SQLite syncs its own file, as the ledger's tests show


def test_an_algorithm_that_asks_more_than_was_charged_fails_closed(
    make_site: SiteMaker, make_plan: PlanMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = make_plan()
    worker = ready(make_site("alder"), plan)
    honest = client.study.ALGORITHMS["reptile"]

    def greedy(shared, head, private, spec):  # type: ignore[no-untyped-def]
        for _ in range(10):
            private.gradient(shared | head)
        return honest.local_update(shared, head, private, spec)

    monkeypatch.setitem(client.study.ALGORITHMS, "reptile", dataclasses.replace(honest, local_update=greedy))
    reply = worker.train(instruct(plan))
    assert reply.code == "uncharged-query"
    assert not reply.update


def test_the_budget_of_the_hospital_ends_the_study(make_site: SiteMaker, make_plan: PlanMaker) -> None:
    plan = make_plan(rounds=6, privacy={"epsilon": 8.0, "delta": 0.01, "monitor": False})
    worker = ready(make_site("alder", epsilon=5.0), plan)
    codes = [worker.train(instruct(plan, round=r)).code for r in range(1, 7)]
    answered = codes.count("ok")
    assert 0 < answered < 6
    assert codes == ["ok"] * answered + ["budget-exceeded"] * (6 - answered)
    assert worker.train(instruct(plan, round=1)).code == "ok"  # what was released is still sent again


def test_a_lost_ledger_stops_the_site(make_site: SiteMaker, make_plan: PlanMaker) -> None:
    plan, folder = make_plan(), make_site("alder")
    worker = ready(folder, plan)
    (folder / "state" / FILE).unlink()
    assert worker.train(instruct(plan)).code == "ledger-damaged"
    assert prepare(Worker(folder, state=folder / "state", simulated=True), plan).code == "ledger-damaged"


@pytest.mark.parametrize(
    "changes",
    [
        {"plan_digest": "0" * 64},
        {"initial_digest": "0" * 64},
        {"round": 0},
        {"round": 4},
        {"shared": {}},
        {"shared": {"body.1.weight": np.zeros(8, np.float32)}},
    ],
    ids=str,
)
def test_an_instruction_that_contradicts_the_plan_is_refused_uncharged(
    make_site: SiteMaker, make_plan: PlanMaker, changes: dict[str, object]
) -> None:
    plan = make_plan()
    worker = ready(make_site("alder"), plan)
    reply = worker.train(instruct(plan, **changes))  # type: ignore[arg-type]
    assert reply.code in ("bad-instruction", "not-approved")
    assert charges(worker, plan) == 0


def test_parameters_that_are_not_finite_are_refused(make_site: SiteMaker, make_plan: PlanMaker) -> None:
    plan = make_plan()
    worker = ready(make_site("alder"), plan)
    shared = {name: value * math.nan for name, value in start(plan)[1].items()}
    assert worker.train(instruct(plan, shared=shared)).code == "bad-instruction"
    assert charges(worker, plan) == 0


# ---- a real site ---------------------------------------------------------------------------------------------------


def test_a_real_site_refuses_what_it_did_not_approve(make_site: SiteMaker, make_plan: PlanMaker) -> None:
    folder, plan = make_site("alder"), make_plan()
    worker = real_worker(folder)
    assert prepare(worker, plan).code == "not-approved"
    assert list(approval.pending(folder / "state")) == [plan.digest]
    approval.approve(folder / "state", plan, by="Dr Example")
    assert not approval.pending(folder / "state")
    assert prepare(worker, plan).code == "ok"
    assert prepare(worker, make_plan(rounds=4)).code == "not-approved"
    approval.withdraw(folder / "state", plan.digest)
    assert prepare(worker, plan).code == "not-approved"
    assert worker.train(instruct(plan)).code == "not-approved"


def test_a_real_site_hears_only_the_lab_that_it_joined(make_site: SiteMaker, make_plan: PlanMaker) -> None:
    folder, plan = make_site("alder"), make_plan()
    make_signing_key(folder / "state" / SITE_KEY)
    stranger = Worker(folder, state=folder / "state")
    assert prepare(stranger, plan).code == "bad-instruction"  # it joined none
    worker = real_worker(folder)
    approval.approve(folder / "state", plan, by="Dr Example")
    assert worker.prepare(instruction(plan, signer=Ed25519PrivateKey.generate())).code == "bad-instruction"
    changed = dataclasses.replace(instruction(plan), plan_json=plan.to_json().replace('"clip":1.0', '"clip":9.0'))
    assert worker.prepare(changed).code == "bad-instruction"
    assert not approval.pending(folder / "state")


def test_a_plan_outside_the_hospitals_limits_is_refused_with_the_reason(
    make_site: SiteMaker, make_plan: PlanMaker
) -> None:
    folder, plan = make_site("alder"), make_plan()
    with (folder / "site.yaml").open("a") as file:
        file.write("limits: {epsilon_per_study: 0.5}\n")
    approval.approve(folder / "state", plan, by="Dr Example")
    reply = prepare(real_worker(folder), plan)
    assert reply.code == "outside-limits"
    assert reply.reason.endswith("the hospital allows 0.5 a study")


def test_a_worker_that_starts_again_goes_on_by_itself(make_site: SiteMaker, make_plan: PlanMaker) -> None:
    folder, plan = make_site("alder"), make_plan()
    approval.approve(folder / "state", plan, by="Dr Example")
    assert prepare(real_worker(folder), plan).code == "ok"
    first = real_worker(folder).train(instruct(plan))
    assert first.code == "ok"
    again = real_worker(folder).train(instruct(plan))
    assert digest(again.update) == digest(first.update)
    assert again.ledger_rows == 1


def test_a_real_site_refuses_a_plan_without_privacy_even_if_approved(
    make_site: SiteMaker, make_plan: PlanMaker
) -> None:
    folder, plan = make_site("alder"), make_plan(privacy=None)
    approval.approve(folder / "state", plan, by="Dr Example")
    assert prepare(real_worker(folder), plan).code == "privacy-required"


def test_a_changed_approval_is_no_approval(make_site: SiteMaker, make_plan: PlanMaker) -> None:
    folder, plan = make_site("alder"), make_plan()
    approval.approve(folder / "state", plan, by="Dr Example")
    (record,) = (folder / "state" / "approved").iterdir()
    record.write_text(record.read_text().replace('\\"clip\\":1.0', '\\"clip\\":9.0'))
    assert prepare(real_worker(folder), plan).code == "not-approved"


# ---- data, words and exceptions that do not leave ------------------------------------------------------------------


def test_data_that_does_not_fit_is_refused_and_explained_at_the_site_only(
    make_site: SiteMaker, make_plan: PlanMaker
) -> None:
    folder, plan = make_site("alder", patients=4), make_plan()
    reply = prepare(Worker(folder, state=folder / "state", simulated=True), plan)
    assert (reply.code, reply.reason) == ("site-unfit", "the site's data does not fit the plan")
    assert "<10 training patients, but the plan declares 10" in (folder / "state" / "site.log").read_text()


def test_a_site_that_the_plan_does_not_name_is_refused(make_site: SiteMaker, make_plan: PlanMaker) -> None:
    folder = make_site("willow")
    assert prepare(Worker(folder, state=folder / "state", simulated=True), make_plan()).code == "site-unfit"


def deliver(app, content: RecordDict, kind: str) -> SiteReply:  # type: ignore[no-untyped-def]
    message = Message(content, dst_node_id=1, message_type=kind)
    context = Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config={})
    reply = decode(app(message, context).content, SiteReply)
    assert isinstance(reply, SiteReply)
    return reply


def test_the_client_app_carries_messages_and_no_exception_text(
    make_site: SiteMaker, make_plan: PlanMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("_run_id", "_node_id", "_task_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)
    plan, folder = make_plan(), make_site("alder")
    worker = Worker(folder, state=folder / "state", simulated=True)
    app = build_client_app(lambda _: worker)
    assert deliver(app, encode(instruction(plan)), PREPARE).code == "ok"
    assert deliver(app, encode(instruct(plan)), TRAIN).code == "ok"
    assert deliver(app, RecordDict({"fields": ConfigRecord({"secret": 1})}), TRAIN).code == "bad-instruction"

    def broken(_: Context) -> Worker:
        raise RuntimeError("patient Jane Doe")

    reply = deliver(build_client_app(broken), encode(instruct(plan)), TRAIN)
    assert reply.code == "internal-failure"
    assert "Jane" not in str(reply)


# ---- without privacy: reproducible, uncharged ----------------------------------------------------------------------


def test_without_privacy_a_round_is_reproducible_and_charges_nothing(
    make_site: SiteMaker, make_plan: PlanMaker
) -> None:
    plan, folder = make_plan(privacy=None), make_site("alder")
    updates = []
    for state in ("one", "two"):
        worker = Worker(folder, state=folder / state, simulated=True)
        assert prepare(worker, plan).code == "ok"
        torch.manual_seed(len(updates))  # global state plays no part
        updates.append(worker.train(instruct(plan)))
    assert digest(updates[0].update) == digest(updates[1].update)
    assert updates[0].epsilon == 0
    assert updates[0].ledger_rows == 0
    assert not (folder / "one" / FILE).exists()


def test_with_privacy_the_same_round_at_two_sites_of_one_seed_differs(
    make_site: SiteMaker, make_plan: PlanMaker
) -> None:
    plan, folder = make_plan(), make_site("alder")
    updates = []
    for state in ("one", "two"):
        worker = Worker(folder, state=folder / state, simulated=True)
        prepare(worker, plan)
        torch.manual_seed(0)
        updates.append(digest(worker.train(instruct(plan)).update))
    assert updates[0] != updates[1]


def test_a_baseline_keeps_its_head_at_the_site(make_site: SiteMaker, make_plan: PlanMaker) -> None:
    plan = make_plan(algorithm={"name": "fedavg", "inner_steps": 1, "inner_lr": 0.1}, privacy=None)
    folder = make_site("alder")
    worker = ready(folder, plan)
    releases = worker._studies[plan.digest].releases
    assert releases.kept_before(1) is None
    for round_ in (1, 2):
        reply = worker.train(instruct(plan, round=round_))
        assert not any(name.startswith("head.") for name in reply.update)
    one, two = releases.kept_before(2), releases.kept_before(3)
    assert one is not None
    assert two is not None
    assert float(one["head.weight"].abs().sum()) > 0
    assert not torch.equal(one["head.weight"], two["head.weight"])


@pytest.mark.parametrize(("name", "kept"), [("fedavg", True), ("reptile", False)])
def test_the_second_round_starts_from_the_kept_head_or_from_a_fresh_one(
    make_site: SiteMaker, make_plan: PlanMaker, monkeypatch: pytest.MonkeyPatch, name: str, kept: bool
) -> None:
    plan = make_plan(algorithm={"name": name, "inner_steps": 1, "inner_lr": 0.1}, privacy=None)
    worker = ready(make_site("alder"), plan)
    honest, given = client.study.ALGORITHMS[name], []

    def watched(shared, head, private, spec):  # type: ignore[no-untyped-def]
        given.append(head["head.weight"].clone())
        return honest.local_update(shared, head, private, spec)

    monkeypatch.setitem(client.study.ALGORITHMS, name, dataclasses.replace(honest, local_update=watched))
    for round_ in (1, 2):
        assert worker.train(instruct(plan, round=round_)).code == "ok"
    left = worker._studies[plan.digest].releases.kept_before(2)
    assert left is not None
    assert not given[0].any()
    assert left["head.weight"].any()
    assert torch.equal(given[1], left["head.weight"] if kept else given[0])


# ---- every algorithm -----------------------------------------------------------------------------------------------


def of_algorithm(name: str, make_plan: PlanMaker, **changes: object) -> StudyPlan:
    proximal = {"proximal": 0.1} if name in ("fedprox", "mrmtl") else {}
    return make_plan(
        algorithm={"name": name, "inner_steps": 2, "inner_lr": 0.1, "episodes": 2, **proximal},
        model={"name": "conv4", "width": 8, "trainable": "mapping" if name == "mapping" else "film"},
        evaluation={"compare": []},
        **{"privacy": {"epsilon": 100.0, "delta": 0.01, "noise_multiplier": 4.0}, **changes},
    )


@pytest.mark.parametrize("name", ALGORITHMS)
def test_two_private_rounds_of_every_algorithm(make_site: SiteMaker, make_plan: PlanMaker, name: str) -> None:
    """Charged for as much as it asks, answered with the names that travel, and what is kept survives a restart."""
    plan, folder = of_algorithm(name, make_plan), make_site("alder", patients=10, images=2, epsilon=200.0)
    shared, kept = start(plan)[1], []
    for round_ in (1, 2):
        worker = ready(folder, plan)  # a new process in each round
        reply = worker.train(instruct(plan, round=round_, shared=shared))
        assert (reply.code, reply.reason) == ("ok", "")
        assert reply.update.keys() == shared.keys()
        assert all(np.isfinite(value).all() for value in reply.update.values())
        asked = ALGORITHMS[name].queries_per_round(plan.algorithm)
        assert reply.queries == asked + (1 if asked and plan.monitored else 0)
        assert math.isnan(reply.accuracy) if not asked or name in EPISODIC else 0 <= reply.accuracy <= 1
        assert charges(worker, plan) == (round_ if asked else 0)
        shared = {key: value + reply.update[key] for key, value in shared.items()}
        kept.append(worker._studies[plan.digest].releases.kept_before(round_ + 1))
    one, two = kept
    assert one is not None
    assert two is not None
    assert one.keys() == two.keys()
    assert {"head.weight", "head.bias"} <= one.keys()
    wanted = {"mrmtl": "personal.body.2.weight", "prototypes": "sums.features", "mapping": "sums.features"}
    if name in wanted:
        assert not torch.equal(one[wanted[name]], two[wanted[name]])
    if name in ("prototypes", "mapping"):
        assert float(two["sums.std"]) == pytest.approx(2**0.5 * float(one["sums.std"]), rel=1e-5)


@pytest.mark.parametrize(
    ("name", "personal"), [("mapping", "body.2.weight"), ("mrmtl", "head.weight"), ("prototypes", "head.weight")]
)
def test_the_monitor_scores_what_the_site_itself_would_use(
    make_site: SiteMaker, make_plan: PlanMaker, monkeypatch: pytest.MonkeyPatch, name: str, personal: str
) -> None:
    scored: list[dict[str, torch.Tensor]] = []
    monkeypatch.setattr(client.study.PrivateDataset, "score", lambda self, params: scored.append(params) or 0.5)
    plan = of_algorithm(name, make_plan, privacy=None, outer={"weights": "score"})
    worker = ready(make_site("alder"), plan)
    shared = start(plan)[1]
    if name == "mapping":
        rng = np.random.default_rng(0)
        shared = {key: value + rng.normal(size=value.shape).astype(np.float32) for key, value in shared.items()}
    assert worker.train(instruct(plan, shared=shared)).accuracy == 0.5
    kept = worker._studies[plan.digest].releases.kept_before(2)
    assert kept is not None
    (params,) = scored
    assert torch.equal(params[personal], kept[personal])
    assert not torch.equal(params[personal], worker._studies[plan.digest].patients.public[personal])


def test_a_score_that_weighs_is_released_without_privacy_too(make_site: SiteMaker, make_plan: PlanMaker) -> None:
    plan = make_plan(privacy=None, outer={"weights": "score"})
    assert 0 <= ready(make_site("alder"), plan).train(instruct(plan)).accuracy <= 1
    plan = make_plan(privacy=None)
    assert math.isnan(ready(make_site("birch"), plan).train(instruct(plan)).accuracy)
