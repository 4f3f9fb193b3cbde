"""The real federation: processes on loopback with TLS and node authentication, by the commands that people type."""

from __future__ import annotations

import json
import shutil
import ssl
import urllib.error
import urllib.request
from pathlib import Path

import grpc
import pytest
import yaml
from grpc_health.v1 import health_pb2, health_pb2_grpc

from client.data.phantoms import make_phantom_sites
from client.ledger import Ledger
from common.accounting import plan_cost
from common.plan import load_plan
from server.flower import Control
from server.lab import open_lab
from server.run_folder import final_parameters
from server.simulation import Federation, run_federation
from server.start import initial_parameters
from tests.real_federation import ROOT, RealFederation, call, real_federation, told, wait_for

SITES = ("alder", "cedar")


def write_study(folder: Path, name: str, **changes: object) -> Path:
    plan = {
        "study": name,
        "task": {
            "kind": "classification",
            "image_size": 28,
            "channels": 1,
            "label_sets": {"lung": ["normal", "nodule"], "head": ["normal", "bleed"]},
        },
        "sites": {"alder": {"labels": "lung", "patients": 60}, "cedar": {"labels": "head", "patients": 60}},
        "model": {"name": "conv4", "width": 8, "trainable": "film"},
        "algorithm": {"name": "reptile", "inner_steps": 2, "inner_lr": 0.1},
        "rounds": 2,
        "quorum": 2,
        "round_timeout_s": 90,
        "sampling": {"sample_rate": 0.2, "max_images_per_patient": 2},
        "privacy": {"epsilon": 8, "clip": 1.0},
        "evaluation": {"shots": [1], "splits": 2, "draws": 1},
    }
    file = folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump(plan | changes))
    return file


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_phantom_sites(tmp_path, names=SITES, patients=80, image_size=28, channels=1, seed=1, test_fraction=0.25)
    return tmp_path


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_two_hospitals_and_a_lab_from_init_to_report(folder: Path) -> None:
    with real_federation(folder, SITES) as federation:
        nobody_else_gets_in(federation)
        a_private_study_costs_what_the_plan_says(federation)
        a_bundle_with_code_is_not_opened(federation)
        a_study_is_stopped_and_an_approval_withdrawn(federation)
        without_privacy_it_equals_the_simulation(federation)
        a_worker_that_is_gone_is_named_and_comes_back(federation)
        a_revoked_site_is_shut_out_at_once(federation)


def a_private_study_costs_what_the_plan_says(federation: RealFederation) -> None:
    study = write_study(federation.folder, "private")
    run = federation.run(study)
    for site in SITES:
        federation.approve(site)
    said = federation.finish(run)
    plan = load_plan(study)
    start, *rounds = federation.history("private")
    assert {site["code"] for site in start["sites"]} == {"ok"}
    for number, record in enumerate(rounds, start=1):
        assert record["status"] == "committed"
        assert [(site["site"], site["code"], site["ledger_rows"]) for site in record["sites"]] == [
            (site, "ok", number) for site in SITES
        ]
    for site in SITES:
        ledger = Ledger.existing(federation.folder / site / "state")
        cost = plan_cost(plan, site)
        assert cost is not None
        assert [charge.round for charge in ledger.charges()] == [1, 2]
        assert {charge.event.noise_multiplier for charge in ledger.charges()} == {cost.noise_multiplier}
    report = federation.lab / "runs" / "private" / "report.html"
    assert str(report) in said
    assert "alder" in report.read_text()
    assert told("consilium-lab", "status", "--lab", federation.lab)["studies"][0]["state"] == "done"
    assert 'consilium_site_online{site="alder"} 1.0' in federation.metrics()
    with grpc.insecure_channel(f"127.0.0.1:{federation.health_port}") as channel:
        answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=5)
    assert answer.status == health_pb2.HealthCheckResponse.SERVING
    no_word_of_patients_in_any_log(federation)


def a_bundle_with_code_is_not_opened(federation: RealFederation) -> None:
    """Sent by the lab through Flower to hospitals that approved a study: nothing of it runs, nothing comes back."""
    bundle, loot = federation.folder / "hostile", federation.folder / "loot.json"
    shutil.copytree(ROOT / "tests" / "hostile_bundle", bundle)
    shutil.copy(ROOT / "LICENSE", bundle)
    workers = [told("consilium-site", "status", federation.folder / site)["worker"] for site in SITES]
    with Control(open_lab(federation.lab)) as control:
        control.submit(bundle, loot=str(loot))
    wait_for("the answers to the hostile orders", loot.exists)
    answers = json.loads(loot.read_text())
    assert answers["asked"] == len(answers["said"]) == 12
    assert set(answers["said"]) == {
        "bad-instruction: 0 arrays, 0 rows",
        "not-approved: 0 arrays, 0 rows",
        "error: this hospital's app does not answer such a message",
    }
    assert [told("consilium-site", "status", federation.folder / site)["worker"] for site in SITES] == workers
    assert not list(federation.folder.rglob("stolen"))


def a_study_is_stopped_and_an_approval_withdrawn(federation: RealFederation) -> None:
    """A study that one hospital did not approve says so, and ends when the lab says."""
    run = federation.run(write_study(federation.folder, "stopped", description="nobody wants it"))
    pending = federation.folder / "cedar" / "state" / "pending"
    wait_for("the study at cedar", lambda: list(pending.glob("*.json")))
    call("consilium-lab", "stop", "stopped", "--lab", federation.lab)
    assert "it was stopped by the lab" in federation.finish(run, code=1)
    for site in SITES:
        federation.approve(site)  # too late, and no harm
        call("consilium-site", "withdraw", "stopped", "--site", federation.folder / site)
        again = call("consilium-site", "withdraw", "stopped", "--site", federation.folder / site, code=2)
        assert "is not approved here" in again.stderr


def no_word_of_patients_in_any_log(federation: RealFederation) -> None:
    logs = [*federation.folder.rglob("*.log"), *federation.folder.rglob("*.out")]
    assert len(logs) > 5
    for log in logs:
        text = log.read_text(errors="replace")
        assert "nodule" not in text, log
        assert "patient-" not in text, log


def without_privacy_it_equals_the_simulation(federation: RealFederation) -> None:
    """Phantoms have no patients: only there a plan without privacy runs. Replies come in any order: a last bit."""
    study = write_study(federation.folder, "open", privacy="none", outer={"weights": "equal"})
    run = federation.run(study)
    for site in SITES:
        federation.approve(site)
    federation.finish(run)
    plan = load_plan(study)
    folders = {site: federation.folder / site for site in SITES}
    simulated = Federation(plan, federation.folder / "simulated", folders, initial_parameters(plan, federation.folder))
    run_federation(simulated)
    real, expected = (final_parameters(f) for f in (federation.lab / "runs" / "open", simulated.folder))
    assert real.keys() == expected.keys()
    for name, value in expected.items():
        assert value.allclose(real[name], rtol=1e-5, atol=1e-7), name


def a_worker_that_is_gone_is_named_and_comes_back(federation: RealFederation) -> None:
    """The lab's server too: it is killed with all its programs and started again, and the run goes on."""
    study = write_study(federation.folder, "killed", rounds=3, quorum=1, privacy={"epsilon": 1, "clip": 1.0})
    run = federation.run(study)
    for site in SITES:
        federation.approve(site)
    wait_for("the first round", lambda: len(federation.history("killed")) > 1)
    federation.running["lab"].kill()
    federation.running["lab"].wait()
    federation.start_lab()
    said = run.communicate(timeout=500)
    if run.returncode:  # the follower may have noticed that the lab was gone
        assert "does not serve" in said[1], said
        federation.finish(federation.run(study), seconds=500)
    records = federation.history("killed")[1:]
    assert [record["round"] for record in records] == [1, 2, 3]
    for site in SITES:
        rounds = [charge.round for charge in Ledger.existing(federation.folder / site / "state").charges()][2:]
        assert rounds == sorted(set(rounds))


def nobody_else_gets_in(federation: RealFederation) -> None:
    """A stolen site id, a second node with one id, a key that was never enrolled, the Control API."""
    stranger = federation.folder / "stranger"
    shutil.copytree(federation.folder / "alder", stranger, ignore=shutil.ignore_patterns("state", "node", "run"))
    (stranger / "membership.json").unlink()
    request = told("consilium-site", "init", stranger, "--name", "alder")
    options = ("--lab", federation.lab, "--out", federation.folder / "stolen.json")
    again = call(
        "consilium-lab", "enroll", request["request"], "--fingerprint", request["fingerprint"], *options, code=2
    )
    assert "enrolled with other keys" in again.stderr
    stolen = federation.folder / "alder.bundle.json"
    refused = call(
        "consilium-site", "join", stolen, "--site", stranger, "--fingerprint", federation.fingerprint, code=2
    )
    assert "not for those" in refused.stderr
    (stranger / "membership.json").write_text((federation.folder / "alder" / "membership.json").read_text())
    federation.start("stranger", "start", stranger, "--node-only")
    log = stranger / "node" / "supernode.log"
    wait_for("the stranger to be turned away", lambda: log.exists() and _turned_away(log.read_text()))
    second = call("consilium-site", "start", federation.folder / "alder", code=1)
    assert "runs here already" in second.stderr
    federation.running.pop("stranger").terminate()
    control = f"https://{federation.address}/v1/control/list-nodes"
    trust = ssl.create_default_context(cafile=str(federation.lab / "keys" / "ca.crt"))
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(urllib.request.Request(control, method="POST"), timeout=5, context=trust)
    assert caught.value.code == 404


def _turned_away(log: str) -> bool:
    return "401" in log or "2004" in log or "authentication" in log.lower()


def a_revoked_site_is_shut_out_at_once(federation: RealFederation) -> None:
    call("consilium-lab", "revoke", "cedar", "--lab", federation.lab)
    wait_for("cedar to be shut out", lambda: federation.online() == {"alder"})
