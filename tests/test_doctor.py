"""The doctor names each planted fault, with its remedy, and finds nothing wrong where nothing is."""

from __future__ import annotations

import datetime
import email.utils
import os
import shutil
import socket
import ssl
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import client.doctor
import server.certificates
from client.doctor import Finding, examine
from client.ledger import FILE, Ledger, Terms
from client.membership import MEMBERSHIP_FILE, init_site
from client.wall import SOCKET, serving
from common.enrolment import Membership, grant_membership, read_request
from common.keys import fingerprint
from server.enrolment import enroll
from server.lab import Lab, provision, renew_certificate

SiteMaker = Callable[..., Path]
PROXIES = ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy", "NO_PROXY", "no_proxy")


class Answers(BaseHTTPRequestHandler):
    """A lab's gateway, as far as the doctor asks."""

    status = 200
    ahead_s = 0.0  # of the lab's clock

    def do_GET(self) -> None:
        self.send_response_only(self.status)
        if self.ahead_s is not None:
            self.send_header("Date", email.utils.formatdate(time.time() + self.ahead_s, usegmt=True))
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def answering(lab: Lab, port: int, *, status: int = 200, ahead_s: float | None = 0.0) -> Iterator[None]:
    """The lab's server on a port of loopback, with its certificate of now."""
    kind = type("Kind", (Answers,), {"status": status, "ahead_s": ahead_s})
    server_ = ThreadingHTTPServer(("127.0.0.1", port), kind)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(lab.server_certificate, lab.server_key)
    server_.socket = context.wrap_socket(server_.socket, server_side=True)
    thread = threading.Thread(target=server_.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield
    finally:
        server_.shutdown()
        server_.server_close()
        thread.join(10)


@pytest.fixture
def port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        free: int = probe.getsockname()[1]
        return free


@pytest.fixture
def lab(tmp_path: Path, port: int, monkeypatch: pytest.MonkeyPatch) -> Lab:
    for name in PROXIES:
        monkeypatch.delenv(name, raising=False)
    return provision(tmp_path / "lab", name="leipzig", address=f"127.0.0.1:{port}")


@pytest.fixture
def site(lab: Lab, make_site: SiteMaker) -> Path:
    """A hospital with sound data that joined the lab."""
    folder = make_site("alder")
    with (folder / "site.yaml").open("a") as file:
        file.write("device: cpu\n")
    request = init_site(folder, name="alder", epsilon=8.0, delta=1e-5)
    answer = enroll(lab, request, expected=fingerprint(request.signer))
    (folder / MEMBERSHIP_FILE).write_text(answer.to_json())
    return folder


def rejoined(site: Path, lab: Lab, **changes: str) -> Path:
    """With another membership, signed by the lab all the same."""
    request = read_request(init_site(site, name="alder", epsilon=8.0, delta=1e-5))
    fields = {"address": lab.config.address, "authority": lab.authority.certificate.read_text(), **changes}
    membership = Membership(site="alder", node_key=request.node_key, lab="leipzig", lab_key=lab.public_key, **fields)
    (site / MEMBERSHIP_FILE).write_text(grant_membership(membership, lab.signing_key()).to_json())
    return site


def findings(site: Path) -> Mapping[str, Finding]:
    """By check; of two of one kind the worse."""
    found: dict[str, Finding] = {}
    for finding in examine(site):
        if finding.check not in found or finding.state == "wrong":
            found[finding.check] = finding
    return found


def wrong(site: Path) -> list[str]:
    return [name for name, finding in findings(site).items() if finding.state == "wrong"]


def test_a_sound_site_has_nothing_wrong(site: Path, lab: Lab, port: int) -> None:
    servant: Any = SimpleNamespace(site="alder", status=dict)
    with answering(lab, port), serving(servant, site / SOCKET, users={os.geteuid()}):
        found = findings(site)
    assert {name: finding.state for name, finding in found.items()} == {
        "site.yaml": "ok",
        "key permissions": "ok",
        "membership": "ok",
        "name resolution": "ok",
        "port": "ok",
        "certificate": "ok",
        "clock": "ok",
        "health": "ok",
        "disk": "ok",
        "GPU": "skipped",
        "data": "ok",
        "ledger": "ok",
        "journal": "ok",
        "privacy self-test": "ok",
        "worker": "ok",
    }
    assert found["data"].what == "30+ images of 10+ patients"
    assert "397 days left" in found["certificate"].what or "396 days left" in found["certificate"].what
    assert all(set(finding.to_json()) == {"check", "state", "what", "remedy"} for finding in found.values())


# ---- the folder ----------------------------------------------------------------------------------------------------


def test_a_broken_site_yaml_ends_the_examination(tmp_path: Path) -> None:
    (tmp_path / "site.yaml").write_text("name: [")
    (only,) = examine(tmp_path)
    assert (only.check, only.state) == ("site.yaml", "wrong")
    assert "site.yaml:1" in only.what


@pytest.mark.parametrize("key", ["node/node.key", "state/site.key"])
def test_an_open_or_missing_key(site: Path, key: str) -> None:
    (site / key).chmod(0o644)
    found = findings(site)["key permissions"]
    assert found.state == "wrong"
    assert f"{site / key}: a private key that others can read (mode 0644)" in found.what
    assert found.remedy.startswith(f"chmod 600 {site / key}")
    (site / key).unlink()
    assert "No such file or directory" in findings(site)["key permissions"].what


def test_a_site_that_joined_no_lab(site: Path) -> None:
    (site / MEMBERSHIP_FILE).unlink()
    found = findings(site)
    assert (found["membership"].state, "port" in found, "data" in found) == ("wrong", False, True)
    assert "`consilium-site join` the lab's bundle" in found["membership"].what


def test_a_changed_membership(site: Path) -> None:
    file = site / MEMBERSHIP_FILE
    file.write_text(file.read_text().replace("leipzig", "dresden"))
    assert "its signature is wrong" in findings(site)["membership"].what


def test_a_full_disk(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=5 * 2**20))
    found = findings(site)["disk"]
    assert (found.state, found.what, found.remedy) == ("wrong", "5 MB are free", "free at least 1 GB")


@pytest.mark.parametrize(("device", "there", "state"), [("cuda", False, "wrong"), ("cuda", True, "ok"),
                                                        ("auto", False, "ok"), ("auto", True, "ok")])  # fmt: skip
def test_a_missing_gpu(site: Path, monkeypatch: pytest.MonkeyPatch, device: str, there: bool, state: str) -> None:
    cuda = SimpleNamespace(is_available=lambda: there, get_device_name=lambda _: "a GPU")
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda))
    text = (site / "site.yaml").read_text()
    (site / "site.yaml").write_text(text.replace("device: cpu", f"device: {device}"))
    assert findings(site)["GPU"].state == state


def test_data_that_is_not_sound(site: Path) -> None:
    (site / "data.npz").write_bytes(b"")
    found = findings(site)["data"]
    assert found.state == "wrong"
    assert found.what.startswith("1 problems; the first: ")
    assert found.remedy == f"`consilium-site data check {site}` lists all"


def test_a_ledger_that_is_there_damaged_or_lost(site: Path) -> None:
    assert findings(site)["ledger"].what == "none yet: nothing was spent"
    Ledger.open(site / "state", Terms(epsilon=10.0, delta=0.01))
    assert findings(site)["ledger"].what == "0 rows, epsilon 0.000"
    content = (site / "state" / FILE).read_bytes()
    (site / "state" / FILE).write_bytes(content[:1000])
    assert findings(site)["ledger"].state == "wrong"
    (site / "state" / FILE).unlink()  # its marker is still there: this is no site that never spent
    lost = findings(site)["ledger"]
    assert (lost.state, lost.remedy) == ("wrong", "restore it from its backup; nothing is released without it")


def test_a_worker_that_does_not_run(site: Path) -> None:
    found = findings(site)["worker"]
    assert (found.state, found.remedy) == ("warning", f"`consilium-site start {site}`")


# ---- the way to the lab --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["no-such-lab.invalid", "lab..example.org", "a" * 64 + ".example.org"])
def test_a_name_that_does_not_resolve(site: Path, lab: Lab, host: str) -> None:
    found = findings(rejoined(site, lab, address=f"{host}:9443"))
    assert found["name resolution"].state == "wrong"
    assert found["name resolution"].what.startswith(f"{host} has no address (")
    assert "port" not in found  # nothing further can be known


def test_nothing_listens(site: Path, port: int) -> None:
    found = findings(site)
    assert (found["name resolution"].state, found["port"].state, "certificate" in found) == ("ok", "wrong", False)
    assert found["port"].what == f"127.0.0.1:{port} does not accept connections (Connection refused)"
    assert "firewall" in found["port"].remedy


@pytest.mark.parametrize("says", [b"", b"HTTP/1.1 400 Bad Request\r\n\r\n"], ids=["silence", "plain HTTP"])
def test_a_port_without_tls(site: Path, port: int, monkeypatch: pytest.MonkeyPatch, says: bytes) -> None:
    monkeypatch.setattr(client.doctor, "_TIMEOUT_S", 0.3)
    with socket.create_server(("127.0.0.1", port)) as listener:

        def speak() -> None:
            held: list[socket.socket] = []
            while len(held) < 2:
                held.append(listener.accept()[0])
                held[-1].sendall(says)
            time.sleep(0.5)

        thread = threading.Thread(target=speak, daemon=True)
        thread.start()
        found = findings(site)
        thread.join(5)
    assert found["TLS"].state == "wrong"
    assert found["TLS"].what.startswith(f"no TLS at 127.0.0.1:{port} (")
    assert "health" not in found


def test_a_certificate_of_another_authority(site: Path, lab: Lab, port: int, tmp_path: Path) -> None:
    """A proxy that opens TLS; also one that calls its authority by the lab's name."""
    for name in ("proxy", "leipzig"):
        other = provision(tmp_path / f"of-{name}", name=name, address=f"127.0.0.1:{port}")
        with answering(other, port):
            found = findings(site)
        assert found["TLS"].state == "wrong"
        assert found["TLS"].what == f"the certificate comes from 'CN={name} (Consilium)', not from the lab"
        assert "TLS is intercepted: have IT exempt this address" in found["TLS"].remedy
        assert "health" not in found


@pytest.mark.parametrize(
    ("days", "state", "what"), [(-0.02, "wrong", "it ended 0.0 days ago"), (3.0, "warning", ", 3 days left")]
)
def test_a_certificate_at_its_end(
    site: Path, lab: Lab, port: int, monkeypatch: pytest.MonkeyPatch, days: float, state: str, what: str
) -> None:
    monkeypatch.setattr(server.certificates, "SERVER_DAYS", days)
    renew_certificate(lab, always=True)
    with answering(lab, port):
        found = findings(site)
    assert (found["certificate"].state, found["certificate"].remedy) == (state, "the lab renews it")
    assert what in found["certificate"].what
    assert ("health" in found) == (state != "wrong")


def test_a_certificate_for_another_name(site: Path, lab: Lab, port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server.certificates, "_LOOPBACK", ())
    lab.authority.issue("lab.example.org", certificate=lab.server_certificate, key=lab.server_key)
    with answering(lab, port):
        found = findings(site)
    assert (found["certificate"].state, found["health"].state) == ("ok", "wrong")
    assert "IP address mismatch" in found["health"].what


@pytest.mark.parametrize(
    ("ahead_s", "state"),
    [(0.0, "ok"), (250.0, "ok"), (3600.0, "wrong"), (-60.0, "wrong"), (-3600.0, "wrong"), (None, "skipped")],
)
def test_a_clock_that_is_wrong(site: Path, lab: Lab, port: int, ahead_s: float | None, state: str) -> None:
    """Flower bears a node that is 5 minutes behind, and no node that is ahead."""
    with answering(lab, port, ahead_s=ahead_s):
        found = findings(site)["clock"]
    assert found.state == state
    if state == "wrong":
        assert ahead_s is not None
        assert abs(float(found.what.split()[0]) + ahead_s) <= 2
        assert found.remedy == "set the clock right (NTP)"


def test_a_gateway_whose_server_is_down(site: Path, lab: Lab, port: int) -> None:
    with answering(lab, port, status=503):
        found = findings(site)
    assert found["clock"].state == "ok"
    assert found["health"].what == "the lab's gateway answers, its server does not (HTTP 503)"


def test_the_proxy_of_the_environment_is_examined_instead(
    site: Path, port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        nobody = free.getsockname()[1]
    monkeypatch.setenv("HTTPS_PROXY", f"http://user:secret@127.0.0.1:{nobody}")
    found = findings(site)
    assert found["proxy"].what == f"calls go through 127.0.0.1:{nobody}"
    assert f"127.0.0.1:{nobody} does not accept connections" in found["port"].what
    assert "secret" not in str([finding.to_json() for finding in found.values()])
    for exempt in ("127.0.0.1", "x,127.0.0.1 ", "*", "0.0.1"):
        monkeypatch.setenv("NO_PROXY", exempt)
        assert "proxy" not in findings(site)


def test_a_clock_so_far_behind_that_no_certificate_is_valid_yet(
    site: Path, lab: Lab, port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server.certificates, "_BACKDATED", datetime.timedelta(hours=-24))
    renew_certificate(lab, always=True)
    with answering(lab, port):
        found = findings(site)
    assert (found["clock"].state, found["clock"].remedy) == ("wrong", "set the clock right (NTP)")
    assert found["clock"].what == "the lab's certificate begins 24.0 h from now"
    assert "health" not in found
