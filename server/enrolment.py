"""Which hospitals the lab enrolled: LAB/sites/SITE.json, one file each, and SITE.revoked-TIME.json for keys that it had
before. What is written here is what holds: the running server follows it within seconds."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from common.enrolment import EnrolmentRequest, Membership, grant_membership, read_request
from common.errors import Problem, UntrustedDocument, UsageError
from common.files import write_atomically
from common.keys import SignedDocument, fingerprint, same_fingerprint
from server.lab import Lab


@dataclass(frozen=True)
class EnrolledSite:
    """One hospital, as the lab knows it."""

    site: str
    node_key: str  # OpenSSH public line
    site_key: str  # Ed25519, hex
    enrolled: float  # seconds since 1970
    revoked: float | None = None

    @property
    def active(self) -> bool:
        return self.revoked is None


def enrolled_sites(lab: Lab) -> Mapping[str, EnrolledSite]:
    """All of them, by the name of their file. Raises UsageError for a file that is none of the lab's own."""
    return {path.stem: _read(path) for path in sorted(lab.sites.glob("*.json"))}


def enroll(lab: Lab, document: SignedDocument, *, expected: str) -> SignedDocument:
    """Enroll the hospital that asks in `document`, and answer with its membership.

    `expected` is the fingerprint that the hospital read out. Asking again with the same keys gives the same answer.
    Raises UntrustedDocument if the request or its fingerprint is wrong; UsageError if the name, or the key, is another
    site's, or was revoked.
    """
    request = read_request(document)
    if not same_fingerprint(expected, fingerprint(request.site_key)):
        what = f"its fingerprint is {fingerprint(request.site_key)}, not {expected}"
        raise UntrustedDocument(Problem("enrolment request", what, "ask the hospital again; do not enroll it"))
    known = enrolled_sites(lab)
    before = known.get(request.site)
    if before is None or not _same(before, request):
        _require_free(request, known)
        if before is not None:  # its old keys stay barred
            (lab.sites / f"{before.site}.json").rename(lab.sites / f"{before.site}.revoked-{time.time_ns()}.json")
        site = EnrolledSite(request.site, request.node_key, request.site_key, enrolled=time.time())
        _write(lab, site)
    elif not before.active:
        raise UsageError(Problem(f"site {request.site}", "was revoked", "it makes new keys, and asks with these"))
    membership = Membership(
        site=request.site,
        node_key=request.node_key,
        lab=lab.config.name,
        address=lab.config.address,
        authority=lab.authority.certificate.read_text(),
        lab_key=lab.public_key,
    )
    return grant_membership(membership, lab.signing_key())


def revoke(lab: Lab, name: str) -> EnrolledSite:
    """Bar `name` from now on. Raises UsageError if there is no such site."""
    site = enrolled_sites(lab).get(name)
    if site is None:
        raise UsageError(Problem(f"site {name}", "is not enrolled", "`consilium-lab status` lists those that are"))
    if not site.active:
        return site
    barred = replace(site, revoked=time.time())
    _write(lab, barred)
    return barred


def _same(site: EnrolledSite, request: EnrolmentRequest) -> bool:
    return (site.node_key, site.site_key) == (request.node_key, request.site_key)


def _require_free(request: EnrolmentRequest, known: Mapping[str, EnrolledSite]) -> None:
    """A revoked site's name is free for new keys; nobody's keys serve twice."""
    before = known.get(request.site)
    if before is not None and before.active:
        what = f"site {request.site} is enrolled with other keys ({fingerprint(before.site_key)})"
        raise UsageError(Problem("enrolment request", what, "if it lost its keys, `consilium-lab revoke` it first"))
    for other in known.values():
        if other.node_key == request.node_key or other.site_key == request.site_key:
            what = f"its keys are those of site {other.site}"
            raise UsageError(Problem("enrolment request", what, "each node makes its own with `consilium-site init`"))


def _write(lab: Lab, site: EnrolledSite) -> None:
    write_atomically(lab.sites / f"{site.site}.json", json.dumps(asdict(site), indent=1).encode())


def _read(path: Path) -> EnrolledSite:
    try:
        return EnrolledSite(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError) as error:
        what = f"is no enrolled site ({type(error).__name__})"
        raise UsageError(Problem(str(path), what, "restore it from its backup, or remove it")) from None
