"""`consilium-site doctor`: what a node needs, checked in order, each finding with its remedy."""

from __future__ import annotations

import datetime
import email.utils
import os
import shutil
import socket
import ssl
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import httpx
from cryptography import x509
from cryptography.hazmat.primitives import hashes

from client.journal import SiteJournal
from client.ledger import Ledger
from client.membership import MEMBERSHIP_FILE, NODE, NODE_KEY, SITE_KEY, membership_of
from client.site import SiteConfig, load_site_config
from client.wall import SOCKET, WorkerProxy
from common.addresses import parse_address
from common.disclosure import shown
from common.enrolment import Membership
from common.errors import ConsiliumError, UsageError
from common.keys import objection_to_private

_TIMEOUT_S = 10.0
_LEAST_DISK = 2**30  # bytes
_CLOCK_AHEAD_S, _CLOCK_BEHIND_S = 5.0, 305.0  # beyond these Flower turns a node away
_SOON_DAYS = 14.0
_ASK_LAB = "the lab's people: `consilium-lab status`"


@dataclass(frozen=True)
class Finding:
    """One check."""

    check: str
    state: Literal["ok", "warning", "wrong", "skipped"]
    what: str
    remedy: str = ""

    def to_json(self) -> dict[str, str]:
        return asdict(self)


def examine(folder: Path) -> Iterator[Finding]:
    """Every check, in the order in which a failure of one explains those after it."""
    try:
        config = load_site_config(folder)
    except UsageError as error:
        yield Finding("site.yaml", "wrong", str(error), "mend it first: all other checks need it")
        return
    yield Finding("site.yaml", "ok", f"site {config.name}")
    yield from _keys(folder, config)
    try:
        membership = membership_of(folder)
    except UsageError as error:
        yield Finding("membership", "wrong", str(error))
    else:
        yield Finding("membership", "ok", f"{membership.lab} at {membership.address} ({MEMBERSHIP_FILE})")
        yield from _lab(membership)
    yield _disk(folder)
    yield _gpu(config)
    yield _data(folder)
    yield _ledger(folder / config.state)
    yield _journal(folder / config.state)
    yield _self_test(folder / config.state)
    yield _worker(folder)


def _keys(folder: Path, config: SiteConfig) -> Iterator[Finding]:
    for key in (folder / NODE / NODE_KEY, folder / config.state / SITE_KEY):
        objection = objection_to_private(key)
        if objection is None:
            yield Finding("key permissions", "ok", str(key))
        else:
            yield Finding("key permissions", "wrong", f"{objection.where}: {objection.what}", objection.remedy)


def _lab(membership: Membership) -> Iterator[Finding]:
    """Name, port, TLS, clock and health of the lab; stops where nothing further can be known."""
    host, port = parse_address(membership.address)
    named = _proxy_for(host)
    proxy = httpx.URL(named) if named else None
    if proxy is not None:
        yield Finding("proxy", "ok", f"calls go through {proxy.host}:{proxy.port}")
        host, port = proxy.host, proxy.port or 3128
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:  # UnicodeError: no name at all, `a..b`
        what = f"{host} has no address ({getattr(error, 'strerror', None) or error})"
        yield Finding("name resolution", "wrong", what, "ask IT for the name, or for the lab's right address")
        return
    families = {"IPv6" if family == socket.AF_INET6 else "IPv4" for family, *_ in found}
    yield Finding("name resolution", "ok", f"{host}: {' and '.join(sorted(families))}")
    try:
        socket.create_connection((host, port), timeout=_TIMEOUT_S).close()
    except OSError as error:
        what = f"{host}:{port} does not accept connections ({error.strerror or error})"
        yield Finding("port", "wrong", what, "a firewall: let this machine reach it; or the lab does not serve")
        return
    yield Finding("port", "ok", f"{host}:{port}")
    if proxy is None:
        tls = _tls(membership, host, port)
        yield tls
        if tls.state == "wrong":
            return
    yield from _health(membership)


def _tls(membership: Membership, host: str, port: int) -> Finding:
    """Whether the lab itself answers: a proxy that opens TLS shows a certificate of its own."""
    blind = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    blind.check_hostname, blind.verify_mode = False, ssl.CERT_NONE
    try:
        with (
            socket.create_connection((host, port), timeout=_TIMEOUT_S) as plain,
            blind.wrap_socket(plain, server_hostname=host) as wrapped,
        ):
            shown = x509.load_der_x509_certificate(wrapped.getpeercert(binary_form=True) or b"")
    except (OSError, ValueError) as error:
        return Finding("TLS", "wrong", f"no TLS at {host}:{port} ({error})", "is it the lab's port?")
    authority = x509.load_pem_x509_certificate(membership.authority.encode())
    if shown.issuer != authority.subject or not _signed_by(shown, authority):
        what = f"the certificate comes from {shown.issuer.rfc4514_string()!r}, not from the lab"
        remedy = "TLS is intercepted: have IT exempt this address; or the lab made itself anew: join again"
        return Finding("TLS", "wrong", what, remedy)
    now = datetime.datetime.now(datetime.UTC)
    if now < shown.not_valid_before_utc:
        hours = (shown.not_valid_before_utc - now) / datetime.timedelta(hours=1)
        what = f"the lab's certificate begins {hours:.1f} h from now"
        return Finding("clock", "wrong", what, "set the clock right (NTP)")
    left = (shown.not_valid_after_utc - now) / datetime.timedelta(days=1)
    print_ = shown.fingerprint(hashes.SHA256()).hex()[:16]
    if left < 0:
        return Finding("certificate", "wrong", f"it ended {-left:.1f} days ago", "the lab renews it")
    state: Literal["warning", "ok"] = "warning" if left < _SOON_DAYS else "ok"
    remedy = "the lab renews it" if state == "warning" else ""
    return Finding("certificate", state, f"{print_}, {left:.0f} days left", remedy)


def _signed_by(shown: x509.Certificate, authority: x509.Certificate) -> bool:
    try:
        shown.verify_directly_issued_by(authority)
    except Exception:  # one of several, by the kind of key
        return False
    return True


def _health(membership: Membership) -> Iterator[Finding]:
    trust = ssl.create_default_context(cadata=membership.authority)
    try:
        with httpx.Client(verify=trust, timeout=_TIMEOUT_S) as client:
            answer = client.get(f"https://{membership.address}/health")
    except httpx.HTTPError as error:
        yield Finding("health", "wrong", f"the lab does not answer ({error})", _ASK_LAB)
        return
    yield _clock(answer)
    if answer.status_code == 200:
        yield Finding("health", "ok", "the lab's server answers")
    else:
        what = f"the lab's gateway answers, its server does not (HTTP {answer.status_code})"
        yield Finding("health", "wrong", what, _ASK_LAB)


def _clock(answer: httpx.Response) -> Finding:
    try:
        at_lab = email.utils.parsedate_to_datetime(answer.headers["date"]).replace(tzinfo=datetime.UTC)
    except (KeyError, ValueError):
        return Finding("clock", "skipped", "the lab does not say the time")
    ahead = (datetime.datetime.now(datetime.UTC) - at_lab).total_seconds()
    if -_CLOCK_BEHIND_S < ahead < _CLOCK_AHEAD_S + 1.0:  # the lab says whole seconds
        return Finding("clock", "ok", f"{ahead:+.0f} s against the lab's")
    return Finding("clock", "wrong", f"{ahead:+.0f} s against the lab's", "set the clock right (NTP)")


def _proxy_for(host: str) -> str | None:
    """The proxy of the usual environment variables, unless NO_PROXY names the host."""
    exempt = (os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or "").split(",")
    if any(name.strip() in (host, "*") or (name.strip() and host.endswith(name.strip())) for name in exempt):
        return None
    return os.environ.get("https_proxy") or os.environ.get("HTTPS_PROXY") or os.environ.get("ALL_PROXY")


def _disk(folder: Path) -> Finding:
    free = shutil.disk_usage(folder).free
    if free < _LEAST_DISK:
        return Finding("disk", "wrong", f"{free / 2**20:.0f} MB are free", "free at least 1 GB")
    return Finding("disk", "ok", f"{free / 2**30:.1f} GB are free")


def _gpu(config: SiteConfig) -> Finding:
    if config.device == "cpu":
        return Finding("GPU", "skipped", "site.yaml asks for the CPU")
    import torch

    if torch.cuda.is_available():
        return Finding("GPU", "ok", torch.cuda.get_device_name(0))
    if config.device == "cuda":
        return Finding("GPU", "wrong", "site.yaml asks for cuda, and torch finds no GPU", "install the driver; or cpu")
    return Finding("GPU", "ok", "none: the CPU is used")


def _data(folder: Path) -> Finding:
    from client.data.checks import check_site

    report = check_site(folder, None, site=None)
    if report.fit:
        return Finding("data", "ok", f"{shown(report.images)} images of {shown(report.patients)} patients")
    what = f"{len(report.problems)} problems; the first: {report.problems[0] if report.problems else 'no images'}"
    return Finding("data", "wrong", what, f"`consilium-site data check {folder}` lists all")


def _ledger(state: Path) -> Finding:
    try:
        ledger = Ledger.found(state)
    except ConsiliumError as error:
        return Finding("ledger", "wrong", str(error), "restore it from its backup; nothing is released without it")
    if ledger is None:
        return Finding("ledger", "ok", "none yet: nothing was spent")
    return Finding("ledger", "ok", f"{len(ledger.charges())} rows, epsilon {ledger.spent():.3f}")


def _journal(state: Path) -> Finding:
    try:
        entries = SiteJournal.of(state).verify(Ledger.found(state))
    except ConsiliumError as error:
        return Finding("journal", "wrong", str(error), "no further round is charged before it is right")
    return Finding("journal", "ok", f"{len(entries)} entries, none changed")


def _self_test(state: Path) -> Finding:
    from client.selftest import FAILED, self_test

    if (state / FAILED).exists():
        what = f"failed before: {(state / FAILED).read_text()}"
        return Finding("privacy self-test", "wrong", what, f"install Consilium anew, then remove {state / FAILED}")
    lines = {
        verdict: "; ".join(check.line() for check in self_test() if check.verdict == verdict)
        for verdict in ("FAIL", "INCONCLUSIVE")
    }
    if lines["FAIL"]:
        remedy = "the worker will not start: install Consilium anew"
        return Finding("privacy self-test", "wrong", lines["FAIL"], remedy)
    if lines["INCONCLUSIVE"]:
        return Finding("privacy self-test", "warning", lines["INCONCLUSIVE"], "run it again")
    shown = ", ".join(f"{check.query} mu {check.shown:.2f} of {check.claimed:.2f}" for check in self_test())
    return Finding("privacy self-test", "ok", f"attacks on drawn patients found no more than is claimed: {shown}")


def _worker(folder: Path) -> Finding:
    try:
        told = WorkerProxy(folder / SOCKET).hello()
    except ConsiliumError:
        return Finding("worker", "warning", "it does not run", f"`consilium-site start {folder}`")
    return Finding("worker", "ok", f"process {told['pid']} (Python {sys.version.split()[0]})")
