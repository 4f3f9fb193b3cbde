"""How a hospital and a lab come to know each other: request, enrolment, membership, revocation, certificates."""

from __future__ import annotations

import datetime
import json
import ssl
import stat
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519

import server.certificates
from client.membership import (
    MEMBERSHIP_FILE,
    NODE,
    NODE_KEY,
    SITE_KEY,
    init_site,
    join,
    membership_of,
    own_fingerprint,
)
from client.site import load_site_config
from common.enrolment import (
    Membership,
    grant_membership,
    make_node_key,
    public_line,
    read_membership,
    read_request,
    request_enrolment,
)
from common.errors import UntrustedDocument, UsageError
from common.keys import ENROLMENT_REQUEST, MEMBERSHIP, STUDY, SignedDocument, fingerprint, public_hex, sign
from server.certificates import belong_together, days_left, is_for, read_certificate
from server.enrolment import enroll, enrolled_sites, revoke
from server.gateway import key_bytes
from server.lab import Lab, open_lab, provision, renew_certificate

SITE_SIGNER = ed25519.Ed25519PrivateKey.generate()
NODE_PRIVATE, NODE_PUBLIC = make_node_key()
REQUEST = request_enrolment("alder", node_key=NODE_PRIVATE, site_key=SITE_SIGNER)


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    return provision(tmp_path / "lab", name="leipzig", address="lab.example.org:9443")


def new_site(folder: Path, name: str = "alder") -> SignedDocument:
    return init_site(folder, name=name, epsilon=8.0, delta=1e-5)


def said(document: SignedDocument) -> str:
    """The fingerprint that the hospital reads out."""
    return fingerprint(document.signer)


def signed_request(signer: ed25519.Ed25519PrivateKey = SITE_SIGNER, **changes: object) -> SignedDocument:
    """The good request with other fields, signed again."""
    return sign(ENROLMENT_REQUEST, json.dumps(json.loads(REQUEST.body) | changes), signer)


def bundle(folder: Path, document: SignedDocument) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "bundle.json").write_text(document.to_json())
    return folder / "bundle.json"


# ---- the request ---------------------------------------------------------------------------------------------------


def test_a_request_proves_both_keys() -> None:
    request = read_request(REQUEST)
    assert (request.site, request.node_key, request.site_key) == ("alder", NODE_PUBLIC, public_hex(SITE_SIGNER))
    assert public_line(NODE_PRIVATE) == NODE_PUBLIC


@pytest.mark.parametrize("kind", [STUDY, MEMBERSHIP])
def test_another_kind_of_document_is_no_request(kind: str) -> None:
    with pytest.raises(UntrustedDocument, match=f"it is a signed {kind}, not a enrolment-request"):
        read_request(sign(kind, REQUEST.body, SITE_SIGNER))


def test_a_changed_request_is_refused() -> None:
    with pytest.raises(UntrustedDocument, match="its signature is wrong"):
        read_request(replace(REQUEST, body=REQUEST.body.replace("alder", "birch")))


def test_a_request_signed_by_another_is_refused() -> None:
    thief = ed25519.Ed25519PrivateKey.generate()
    with pytest.raises(UntrustedDocument, match="names another key than the one that signed it"):
        read_request(signed_request(thief))


def test_a_request_with_somebody_elses_node_key_is_refused() -> None:
    """The thief has the victim's whole request, and so its proof; it is for the victim's own signing key."""
    thief = ed25519.Ed25519PrivateKey.generate()
    with pytest.raises(UntrustedDocument, match="does not prove that its sender holds the node's key"):
        read_request(signed_request(thief, site_key=public_hex(thief)))
    with pytest.raises(UntrustedDocument, match="does not prove"):
        read_request(signed_request(node_key=make_node_key()[1]))
    with pytest.raises(UntrustedDocument, match="does not prove"):
        read_request(signed_request(site="birch"))  # the proof is for alder


def line_of(key: ec.EllipticCurvePublicKey | ed25519.Ed25519PublicKey) -> str:
    return key.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH).decode()


@pytest.mark.parametrize(
    "node_key",
    [
        "",
        "ssh-foo AAAA",
        "ecdsa-sha2-nistp384 AAAA",
        "ecdsa-sha2-nistp384-cert-v01@openssh.com AAAA",
        line_of(SITE_SIGNER.public_key()),
        f"{NODE_PUBLIC} a comment",
        NODE_PUBLIC + "\n",
        "\ud800",
    ],
    ids=["empty", "unknown kind", "torn", "certificate", "ed25519", "comment", "newline", "surrogate"],
)
def test_what_is_no_node_key_or_is_spelled_otherwise_is_refused(node_key: str) -> None:
    with pytest.raises(UntrustedDocument, match="does not prove that its sender holds the node's key"):
        read_request(signed_request(node_key=node_key))


@pytest.mark.parametrize("site", ["../x", "/etc/passwd", "", ".", "alder.json", "Alder", "a/b", "a\n", "-x", "a" * 42])
def test_a_site_that_is_no_name_is_refused(lab: Lab, site: str) -> None:
    request = request_enrolment(site, node_key=NODE_PRIVATE, site_key=SITE_SIGNER)
    with pytest.raises(UntrustedDocument, match=r"the enrolment request names a site .*: use lower-case letters"):
        enroll(lab, request, expected=said(request))
    assert not lab.sites.exists()


@pytest.mark.parametrize(
    "body",
    ["", "[]", "null", "{}", "[" * 100_000, '{"site": "alder"}', json.dumps({**json.loads(REQUEST.body), "proof": 1}),
     json.dumps({**json.loads(REQUEST.body), "more": ""})],
    ids=lambda body: body[:12],
)  # fmt: skip
def test_a_signed_body_of_nonsense_is_refused(body: str) -> None:
    with pytest.raises(UntrustedDocument, match="its body is no EnrolmentRequest"):
        read_request(sign(ENROLMENT_REQUEST, body, SITE_SIGNER))
    with pytest.raises(UntrustedDocument, match="its body is no Membership"):
        read_membership(sign(MEMBERSHIP, body, SITE_SIGNER))


# ---- the hospital's folder -----------------------------------------------------------------------------------------


def test_a_new_site_has_private_keys_and_a_good_request(tmp_path: Path) -> None:
    folder = tmp_path / "alder"
    request = new_site(folder)
    assert read_request(request).site == "alder"
    assert said(request) == own_fingerprint(folder)
    for key in (folder / NODE / NODE_KEY, folder / "state" / SITE_KEY):
        assert stat.S_IMODE(key.stat().st_mode) == 0o600
        assert stat.S_IMODE(key.parent.stat().st_mode) == 0o700
        assert "PRIVATE KEY" in key.read_text()
        assert "PRIVATE" not in request.to_json()
    config = load_site_config(folder)
    assert (config.budget.epsilon, config.budget.delta, config.verified_install) == (8.0, 1e-5, True)


def test_init_again_keeps_keys_and_the_hospitals_yaml(tmp_path: Path) -> None:
    folder = tmp_path / "alder"
    first = new_site(folder)
    with (folder / "site.yaml").open("a") as file:
        file.write("device: cpu\n")
    again = init_site(folder, name="alder", epsilon=99.0, delta=1e-5)
    assert read_request(again).node_key == read_request(first).node_key
    assert again.signer == first.signer
    assert (load_site_config(folder).device, load_site_config(folder).budget.epsilon) == ("cpu", 8.0)


def test_a_folder_is_of_one_site(tmp_path: Path) -> None:
    new_site(tmp_path / "alder")
    with pytest.raises(UsageError, match="is of site 'alder', not 'birch'"):
        new_site(tmp_path / "alder", "birch")
    with pytest.raises(ValueError, match="use lower-case letters"):
        new_site(tmp_path / "x", "../x")


def test_an_open_or_torn_node_key_is_said(tmp_path: Path) -> None:
    new_site(tmp_path)
    key = tmp_path / NODE / NODE_KEY
    key.chmod(0o644)
    with pytest.raises(UsageError, match=r"node.key: a private key that others can read \(mode 0644\)"):
        new_site(tmp_path)
    key.chmod(0o600)
    key.write_bytes(key.read_bytes()[:100])
    with pytest.raises(UsageError, match=r"node.key: is no node's private key -- restore it from its backup"):
        new_site(tmp_path)


# ---- enrolling and revoking ----------------------------------------------------------------------------------------


def test_request_enroll_join(tmp_path: Path, lab: Lab) -> None:
    folder = tmp_path / "alder"
    answer = enroll(lab, new_site(folder), expected=own_fingerprint(folder))
    membership = join(folder, bundle(tmp_path, answer), expected=fingerprint(lab.public_key))
    assert membership == membership_of(folder)
    assert (membership.site, membership.lab, membership.address) == ("alder", "leipzig", "lab.example.org:9443")
    assert membership.authority == lab.authority.certificate.read_text()
    assert enrolled_sites(lab)["alder"].active


def test_a_wrong_fingerprint_enrolls_nobody(lab: Lab) -> None:
    for wrong in ("", fingerprint(lab.public_key), said(REQUEST)[:-1]):
        with pytest.raises(UntrustedDocument, match=f"its fingerprint is {said(REQUEST)}, not {wrong}.*do not enroll"):
            enroll(lab, REQUEST, expected=wrong)
    assert not enrolled_sites(lab)


def test_asking_again_gets_the_same_answer(lab: Lab) -> None:
    first = enroll(lab, REQUEST, expected=said(REQUEST))
    enrolled = enrolled_sites(lab)["alder"]
    assert enroll(lab, REQUEST, expected=said(REQUEST)).body == first.body
    assert enrolled_sites(lab)["alder"] == enrolled


def test_a_name_is_not_taken_over(lab: Lab) -> None:
    enroll(lab, REQUEST, expected=said(REQUEST))
    thief = request_enrolment("alder", node_key=make_node_key()[0], site_key=ed25519.Ed25519PrivateKey.generate())
    with pytest.raises(UsageError, match=r"site alder is enrolled with other keys .*`consilium-lab revoke` it first"):
        enroll(lab, thief, expected=said(thief))
    assert enrolled_sites(lab)["alder"].node_key == NODE_PUBLIC


@pytest.mark.parametrize("shared", ["node", "site"])
def test_keys_serve_one_site(lab: Lab, shared: str) -> None:
    enroll(lab, REQUEST, expected=said(REQUEST))
    node = NODE_PRIVATE if shared == "node" else make_node_key()[0]
    signer = SITE_SIGNER if shared == "site" else ed25519.Ed25519PrivateKey.generate()
    twin = request_enrolment("birch", node_key=node, site_key=signer)
    with pytest.raises(UsageError, match="its keys are those of site alder -- each node makes its own"):
        enroll(lab, twin, expected=said(twin))
    assert set(enrolled_sites(lab)) == {"alder"}


def test_a_revoked_site_that_asks_again_is_refused(lab: Lab) -> None:
    enroll(lab, REQUEST, expected=said(REQUEST))
    revoked = revoke(lab, "alder")
    assert not revoked.active
    assert revoke(lab, "alder") == revoked  # and stays so
    with pytest.raises(UsageError, match="site alder: was revoked -- it makes new keys"):
        enroll(lab, REQUEST, expected=said(REQUEST))
    renamed = request_enrolment("birch", node_key=NODE_PRIVATE, site_key=SITE_SIGNER)
    with pytest.raises(UsageError, match="its keys are those of site alder"):
        enroll(lab, renamed, expected=said(renamed))
    with pytest.raises(UsageError, match="site cedar: is not enrolled"):
        revoke(lab, "cedar")


def test_revoked_keys_stay_barred_when_the_site_has_new_ones(lab: Lab) -> None:
    enroll(lab, REQUEST, expected=said(REQUEST))
    revoke(lab, "alder")
    new = request_enrolment("alder", node_key=make_node_key()[0], site_key=ed25519.Ed25519PrivateKey.generate())
    enroll(lab, new, expected=said(new))
    assert enrolled_sites(lab)["alder"].active
    assert [site.node_key for site in enrolled_sites(lab).values() if not site.active] == [NODE_PUBLIC]
    revoke(lab, "alder")
    with pytest.raises(UsageError, match="its keys are those of site alder"):
        enroll(lab, REQUEST, expected=said(REQUEST))


def test_a_damaged_list_of_sites_is_said(lab: Lab) -> None:
    enroll(lab, REQUEST, expected=said(REQUEST))
    (lab.sites / "alder.json").write_text("{")
    with pytest.raises(UsageError, match=r"alder.json: is no enrolled site \(JSONDecodeError\) -- restore it"):
        enrolled_sites(lab)


def test_a_node_key_in_the_calls_form() -> None:
    assert key_bytes(NODE_PUBLIC).startswith(b"-----BEGIN PUBLIC KEY-----")
    assert key_bytes(NODE_PUBLIC) != key_bytes(make_node_key()[1])


# ---- joining -------------------------------------------------------------------------------------------------------


def test_another_labs_bundle_is_not_joined(tmp_path: Path, lab: Lab) -> None:
    folder = tmp_path / "alder"
    other = provision(tmp_path / "other", name="leipzig", address="lab.example.org:9443")
    answer = enroll(other, new_site(folder), expected=own_fingerprint(folder))
    with pytest.raises(UntrustedDocument, match=rf"{fingerprint(other.public_key)}, not .*do not join"):
        join(folder, bundle(tmp_path, answer), expected=fingerprint(lab.public_key))
    assert not (folder / MEMBERSHIP_FILE).exists()
    with pytest.raises(UsageError, match="joined no lab yet -- `consilium-site join`"):
        membership_of(folder)


def test_a_bundle_for_another_site_or_other_keys_is_not_joined(tmp_path: Path, lab: Lab) -> None:
    folder, told = tmp_path / "alder", fingerprint(lab.public_key)
    birch = enroll(lab, new_site(tmp_path / "birch", "birch"), expected=own_fingerprint(tmp_path / "birch"))
    mine = enroll(lab, new_site(folder), expected=own_fingerprint(folder))
    with pytest.raises(UntrustedDocument, match="it is for site 'birch' and its keys, not for those of 'alder'"):
        join(folder, bundle(tmp_path, birch), expected=told)
    (folder / NODE / NODE_KEY).unlink()
    new_site(folder)  # a new node's key: the lab never heard of it
    with pytest.raises(UntrustedDocument, match="enroll with the request in this folder"):
        join(folder, bundle(tmp_path, mine), expected=told)
    assert not (folder / MEMBERSHIP_FILE).exists()


def test_a_membership_changed_on_disk_is_no_membership(tmp_path: Path, lab: Lab) -> None:
    folder = tmp_path / "alder"
    answer = enroll(lab, new_site(folder), expected=own_fingerprint(folder))
    join(folder, bundle(tmp_path, answer), expected=fingerprint(lab.public_key))
    file = folder / MEMBERSHIP_FILE
    file.write_text(file.read_text().replace("lab.example.org", "evil.example.org"))
    with pytest.raises(UntrustedDocument, match="its signature is wrong"):
        membership_of(folder)


@pytest.mark.parametrize(
    "changes",
    [{"site": "../x"}, {"lab": "\x1b[2J"}, {"address": "lab"}, {"address": "--insecure"}, {"authority": "no PEM"}],
    ids=str,
)
def test_a_membership_with_a_field_of_nonsense_is_refused(lab: Lab, changes: dict[str, str]) -> None:
    authority = lab.authority.certificate.read_text()
    good = Membership("alder", NODE_PUBLIC, "leipzig", "lab.example.org:9443", authority, lab.public_key)
    assert read_membership(grant_membership(good, lab.signing_key())) == good
    with pytest.raises(UntrustedDocument, match="the membership is not usable"):
        read_membership(grant_membership(replace(good, **changes), lab.signing_key()))


def test_a_membership_that_names_another_labs_key_is_refused(lab: Lab) -> None:
    membership = Membership("alder", NODE_PUBLIC, "leipzig", "lab:1", "", lab_key=public_hex(SITE_SIGNER))
    with pytest.raises(UntrustedDocument, match="names another lab's key than the one that signed it"):
        read_membership(grant_membership(membership, lab.signing_key()))
    with pytest.raises(UntrustedDocument, match="it is a signed enrolment-request, not a membership"):
        read_membership(sign(ENROLMENT_REQUEST, json.dumps(asdict(membership)), lab.signing_key()))


# ---- the lab's keys and certificates -------------------------------------------------------------------------------


def files(lab: Lab) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(lab.keys.iterdir())}


def test_provisioning_again_changes_nothing(lab: Lab) -> None:
    before = files(lab)
    assert set(before) == {"ca.crt", "ca.key", "server.crt", "server.key", "signing.key", "superexec.secret"}
    again = provision(lab.folder, name="other", address="other.example.org:1")
    assert (again.config, files(again)) == (lab.config, before)
    assert open_lab(lab.folder).config.listen == "0.0.0.0:9443"
    private = [path for path in lab.keys.iterdir() if path.suffix in (".key", ".secret")]
    assert {stat.S_IMODE(path.stat().st_mode) for path in private} == {0o600}


def test_the_chain_verifies_and_names_the_host_and_loopback(lab: Lab) -> None:
    shown, authority = read_certificate(lab.server_certificate), read_certificate(lab.authority.certificate)
    shown.verify_directly_issued_by(authority)
    assert all(is_for(shown, host) for host in ("lab.example.org", "localhost", "127.0.0.1", "::1"))
    assert not is_for(shown, "evil.example.org")
    assert shown.extensions.get_extension_for_class(x509.BasicConstraints).value.ca is False
    assert 396 < days_left(shown) < 398 < days_left(authority)
    assert belong_together(shown, lab.server_key)
    ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(lab.server_certificate, lab.server_key)


@pytest.mark.parametrize(
    "address", ["192.0.2.7:1", "[2001:DB8::1]:1", "Lab.Example.org:1", f"{'a' * 63}.example.org:1"]
)
def test_every_form_of_address_gets_a_certificate_that_stays(tmp_path: Path, address: str) -> None:
    lab = provision(tmp_path / "lab", name="lab", address=address)
    assert renew_certificate(lab) is False


def test_a_certificate_is_renewed_before_its_end(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as aged:
        aged.setattr(server.certificates, "SERVER_DAYS", 29)
        assert renew_certificate(lab, always=True)
    old = read_certificate(lab.server_certificate)
    assert renew_certificate(lab)
    new = read_certificate(lab.server_certificate)
    assert days_left(old) < 30 < days_left(new)
    assert new.serial_number != old.serial_number
    assert not renew_certificate(lab)


def test_another_address_gets_another_certificate(lab: Lab) -> None:
    text = (lab.folder / "lab.yaml").read_text()
    (lab.folder / "lab.yaml").write_text(text.replace("lab.example.org", "new.example.org"))
    moved = open_lab(lab.folder)
    assert renew_certificate(moved)
    assert is_for(read_certificate(moved.server_certificate), "new.example.org")


def test_a_kill_between_key_and_certificate_is_mended(lab: Lab) -> None:
    """Of the server's, and of the authority's, whose key stays the one that hospitals trust."""
    certificate = lab.server_certificate.read_bytes()
    assert renew_certificate(lab, always=True)
    lab.server_certificate.write_bytes(certificate)  # the new key, the old certificate
    assert renew_certificate(lab)
    ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(lab.server_certificate, lab.server_key)
    known = read_certificate(lab.authority.certificate)
    lab.authority.certificate.unlink()
    provision(lab.folder, name="leipzig", address="lab.example.org:9443")
    assert read_certificate(lab.authority.certificate).public_key() == known.public_key()
    read_certificate(lab.server_certificate).verify_directly_issued_by(known)


def test_a_lost_authority_key_is_said_and_not_replaced(lab: Lab) -> None:
    known = lab.authority.certificate.read_bytes()
    lab.authority.key.unlink()
    assert provision(lab.folder, name="leipzig", address="lab.example.org:9443")
    with pytest.raises(UsageError, match=r"ca.key: cannot be read \(No such file"):
        renew_certificate(lab, always=True)
    assert lab.authority.certificate.read_bytes() == known
    assert not lab.authority.key.exists()


@pytest.mark.parametrize("name", ["ca.key", "signing.key"])
def test_the_labs_open_keys_are_refused(lab: Lab, name: str) -> None:
    (lab.keys / name).chmod(0o644)
    with pytest.raises(UsageError, match=rf"{name}: a private key that others can read \(mode 0644\)"):
        renew_certificate(lab, always=True) if name == "ca.key" else lab.public_key


def test_what_is_no_certificate_is_said(tmp_path: Path) -> None:
    (tmp_path / "x.crt").write_text("no")
    with pytest.raises(UsageError, match=r"x.crt: holds no certificate \(ValueError\)"):
        read_certificate(tmp_path / "x.crt")
    with pytest.raises(UsageError, match=r"holds no lab.yaml -- `consilium-lab provision`"):
        open_lab(tmp_path)
    with pytest.raises(ValueError, match="is no host:port"):
        provision(tmp_path / "lab", name="lab", address="nowhere")


def test_a_hospital_whose_clock_is_behind_sees_a_valid_certificate(lab: Lab) -> None:
    shown = read_certificate(lab.server_certificate)
    behind = datetime.datetime.now(datetime.UTC) - datetime.timedelta(minutes=55)
    assert shown.not_valid_before_utc < behind
