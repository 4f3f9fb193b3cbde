"""The real federation: processes on loopback with TLS and node authentication, by the commands that people type."""

from __future__ import annotations

import datetime
import json
import os
import shutil
import ssl
import subprocess
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import grpc
import pytest
import yaml
from grpc_health.v1 import health_pb2, health_pb2_grpc

from client.data.phantoms import make_phantom_sites
from client.ledger import Ledger
from common.accounting import plan_cost
from common.addresses import parse_address
from common.plan import load_plan
from deploy.local_federation import ROOT, LocalFederation, call, local_federation, told, wait_for
from server import certificates
from server.certificates import days_left, read_certificate
from server.flower import Control
from server.lab import open_lab
from server.run_folder import final_parameters
from server.simulation import Federation, run_federation
from server.start import initial_parameters

SITES = ("alder", "birch", "cedar")


def write_study(folder: Path, name: str, **changes: object) -> Path:
    plan = {
        "study": name,
        "task": {
            "kind": "classification",
            "image_size": 28,
            "channels": 1,
            "label_sets": {
                "lung": ["normal", "nodule"],
                "chest": ["normal", "opacity"],
                "head": ["normal", "bleed"],
            },
        },
        "sites": {
            site: {"labels": labels, "patients": 60}
            for site, labels in zip(SITES, ("lung", "chest", "head"), strict=True)
        },
        "model": {"name": "conv4", "width": 8, "trainable": "film"},
        "algorithm": {"name": "reptile", "inner_steps": 2, "inner_lr": 0.1},
        "rounds": 2,
        "quorum": 3,
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
def test_hospitals_and_a_lab_from_init_to_report(folder: Path) -> None:
    clock, environment = shifted_clock(folder)
    with (
        small_disk(folder / "alder" / "state") as fill,
        host_apart() as (lab_address, inside, link),
        local_federation(folder, SITES, host=lab_address, inside={"alder": inside, "cedar": environment}) as federation,
    ):
        nobody_else_gets_in(federation)
        two_studies_side_by_side(federation)
        a_bundle_with_code_is_not_opened(federation)
        a_full_disk_a_wrong_clock_an_expired_certificate_and_a_cut_link(federation, fill, clock, link)
        a_revoked_site_is_shut_out_at_once(federation)


def two_studies_side_by_side(federation: LocalFederation) -> None:
    """One under privacy, and one as a secure sum without noise."""
    private = write_study(federation.folder, "private")
    # only phantoms, which have no patients, take part without privacy
    open_ = write_study(
        federation.folder, "open", privacy="none", outer={"weights": "equal", "secure_sum": {"range": 2}}
    )
    runs = {study: federation.run(study) for study in (private, open_)}
    for site in SITES:
        federation.approve(site, private, by_command=site == "alder")
        federation.approve(site, open_, by_command=False)
    it_cost_what_the_plan_says(federation, private, federation.finish(runs[private]))
    federation.finish(runs[open_])
    it_equals_the_simulation(federation, open_)
    no_word_of_patients_in_any_log(federation)


def an_approval_is_withdrawn(federation: LocalFederation, study: str) -> None:
    call("consilium-site", "withdraw", study, "--site", federation.folder / "alder")
    again = call("consilium-site", "withdraw", study, "--site", federation.folder / "alder", code=2)
    assert "is not approved here" in again.stderr


def it_cost_what_the_plan_says(federation: LocalFederation, study: Path, said: str) -> None:
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
    studies = told("consilium-lab", "status", "--lab", federation.lab)["studies"]
    assert {study["study"]: study["state"] for study in studies}["private"] == "done"
    assert 'consilium_site_online{site="alder"} 1.0' in federation.metrics()
    with grpc.insecure_channel(f"127.0.0.1:{federation.health_port}") as channel:
        answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=5)
    assert answer.status == health_pb2.HealthCheckResponse.SERVING


def it_equals_the_simulation(federation: LocalFederation, study: Path) -> None:
    """With other masks, which leave nothing of themselves in the sum."""
    plan = load_plan(study)
    folders = {site: federation.folder / site for site in SITES}
    simulated = Federation(plan, federation.folder / "simulated", folders, initial_parameters(plan, federation.folder))
    run_federation(simulated)
    real, expected = (final_parameters(f) for f in (federation.lab / "runs" / "open", simulated.folder))
    assert real.keys() == expected.keys()
    for name, value in expected.items():
        assert value.allclose(real[name], rtol=1e-5, atol=1e-7), name


def no_word_of_patients_in_any_log(federation: LocalFederation) -> None:
    logs = [*federation.folder.rglob("*.log"), *federation.folder.rglob("*.out")]
    assert len(logs) > 5
    for log in logs:
        text = log.read_text(errors="replace")
        assert "nodule" not in text, log
        assert "patient-" not in text, log


def a_bundle_with_code_is_not_opened(federation: LocalFederation) -> None:
    """Sent by the lab through Flower to hospitals that approved a study: nothing of it runs, nothing comes back."""
    bundle, loot = federation.folder / "hostile", federation.folder / "loot.json"
    shutil.copytree(ROOT / "tests" / "hostile_bundle", bundle)
    shutil.copy(ROOT / "LICENSE", bundle)
    workers = [told("consilium-site", "status", federation.folder / site)["worker"] for site in SITES]
    with Control(open_lab(federation.lab)) as control:
        control.submit(bundle, loot=str(loot))
    wait_for("the answers to the hostile orders", loot.exists)
    answers = json.loads(loot.read_text())
    assert answers["asked"] == len(answers["said"]) == 6 * len(SITES)
    assert set(answers["said"]) == {
        "bad-instruction: 0 arrays, 0 rows",
        "not-approved: 0 arrays, 0 rows",
        "error: this hospital's app does not answer such a message",
    }
    assert [told("consilium-site", "status", federation.folder / site)["worker"] for site in SITES] == workers
    assert not list(federation.folder.rglob("stolen"))


def a_full_disk_a_wrong_clock_an_expired_certificate_and_a_cut_link(
    federation: LocalFederation,
    fill: Callable[[bool], None] | None,
    clock: Path,
    link: Callable[[str], object] | None,
) -> None:
    """Each takes one hospital, or the lab, out of a running study, is named, and is over when it is mended."""
    study = write_study(
        federation.folder, "weather", rounds=40, quorum=1, round_timeout_s=20, privacy={"epsilon": 1, "clip": 1.0}
    )
    run = federation.run(study)
    for site in SITES:
        federation.approve(site, study, by_command=False)

    def code(site: str) -> str:
        records = federation.history("weather")[1:]
        return next((o["code"] for o in records[-1]["sites"] if o["site"] == site), "") if records else ""

    wait_for("the first round", lambda: code("alder") == code("cedar") == "ok")
    if fill is not None:
        fill(True)
        wait_for("a round without alder", lambda: code("alder") == "internal-failure")
        fill(False)
        wait_for("alder again", lambda: code("alder") == "ok")
    clock.write_text("-3600")
    wait_for("a round without cedar", lambda: code("cedar") != "ok")
    clock.write_text("0")
    expire_certificate(federation.lab)
    wait_for("cedar again", lambda: code("cedar") == "ok")
    assert days_left(read_certificate(open_lab(federation.lab).server_certificate)) > 300
    if link is not None:
        link("down")
        wait_for("a round without alder", lambda: code("alder") in ("late", "absent", "node-lost"))
        link("up")
        wait_for("alder again", lambda: code("alder") == "ok")
    call("consilium-lab", "stop", "weather", "--lab", federation.lab)
    assert "it was stopped by the lab" in federation.finish(run, code=1)
    an_approval_is_withdrawn(federation, "weather")
    records = federation.history("weather")
    assert [record["round"] for record in records] == list(range(len(records)))
    for site in SITES:
        taken = {r["round"] for r in records[1:] for o in r["sites"] if (o["site"], o["code"]) == (site, "ok")}
        charged = [c.round for c in Ledger.existing(federation.folder / site / "state").charges()][2:]
        assert sorted(set(charged)) == charged
        assert taken <= set(charged)


@contextmanager
def small_disk(folder: Path) -> Iterator[Callable[[bool], None] | None]:
    """Give `folder` a disk of its own; what fills it or makes room again, None where a test may mount none."""
    folder.mkdir(exist_ok=True)
    options = ["-t", "tmpfs", "-o", "size=32m", "tmpfs", str(folder)]
    if subprocess.run(["mount", *options], capture_output=True, timeout=20, check=False).returncode:
        yield None
        return

    def fill(full: bool) -> None:
        ballast = folder / "ballast"
        if not full:
            ballast.unlink()
            return
        with suppress(OSError), ballast.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))

    try:
        yield fill
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], capture_output=True, timeout=20, check=True)


def shifted_clock(folder: Path) -> tuple[Path, list[str]]:
    """(a file that says by how many seconds a hospital's clock is wrong, words before the hospital's commands)."""
    clock, shim = folder / "clock", folder / "shim"
    clock.write_text("0")
    shim.mkdir()
    (shim / "sitecustomize.py").write_text(CLOCK.format(file=str(clock)))
    return clock, ["env", f"PYTHONPATH={shim}{os.pathsep}{ROOT}"]


CLOCK = """
import datetime, time
real, now = time.time, datetime.datetime.now
shift = lambda: float(open({file!r}).read() or 0)
time.time = lambda: real() + shift()
class Shifted(datetime.datetime):
    @classmethod
    def now(cls, tz=None):
        return now(tz) + datetime.timedelta(seconds=shift())
datetime.datetime = Shifted
"""


@contextmanager
def host_apart() -> Iterator[tuple[str, list[str], Callable[[str], object] | None]]:
    """A hospital on a host of its own, a network namespace with one link to the lab's.

    (the lab's address there, words before the hospital's commands, what puts the link down or up); on loopback, and
    without a link to cut, where a test may make no namespace.
    """
    name, net = f"c{os.getpid() % 10000}", f"10.99.{os.getpid() % 250}"

    def ip(words: str) -> bool:
        return subprocess.run(["ip", *words.split()], capture_output=True, timeout=20, check=False).returncode == 0

    steps = (
        f"netns add {name}",
        f"link add {name} type veth peer name eth0 netns {name}",
        f"addr add {net}.1/24 dev {name}",
        f"link set {name} up",
        f"-n {name} addr add {net}.2/24 dev eth0",
        f"-n {name} link set eth0 up",
        f"-n {name} link set lo up",
    )
    try:
        if shutil.which("ip") and all(map(ip, steps)):
            yield f"{net}.1", ["ip", "netns", "exec", name], lambda state: ip(f"link set {name} {state}")
        else:
            yield "127.0.0.1", [], None
    finally:
        if shutil.which("ip"):
            ip(f"netns del {name}")


def expire_certificate(lab: Path) -> None:
    """Put a server certificate in place that ended yesterday; the running server shows it, until it renews it."""
    opened = open_lab(lab)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(certificates, "SERVER_DAYS", -1)
        patch.setattr(certificates, "_BACKDATED", datetime.timedelta(days=9))
        host, _ = parse_address(opened.config.address)
        opened.authority.issue(host, certificate=opened.server_certificate, key=opened.server_key)


def nobody_else_gets_in(federation: LocalFederation) -> None:
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


def a_revoked_site_is_shut_out_at_once(federation: LocalFederation) -> None:
    call("consilium-lab", "revoke", "cedar", "--lab", federation.lab)
    wait_for("cedar to be shut out", lambda: federation.online() == {"alder", "birch"})
