"""Signed documents are what they say and from whom they say; private keys are read by their owner alone."""

from __future__ import annotations

import json
import os
import stat
from dataclasses import replace
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as some

from common.addresses import parse_address
from common.errors import UntrustedDocument, UsageError
from common.keys import (
    ENROLMENT_REQUEST,
    MEMBERSHIP,
    STUDY,
    SignedDocument,
    fingerprint,
    load_signing_key,
    make_signing_key,
    objection_to_private,
    parse_signed,
    public_hex,
    read_private,
    read_signed,
    same_fingerprint,
    sign,
    write_private,
)

KEY, OTHER = (Ed25519PrivateKey.from_private_bytes(bytes([n]) * 32) for n in (1, 2))  # the same in every process
DOCUMENT = sign(STUDY, '{"rounds": 3}', KEY)


def rotated(text: str) -> str:
    """The same text with another first character."""
    return ("0" if text[0] != "0" else "1") + text[1:]


# ---- signed documents ----------------------------------------------------------------------------------------------


def test_a_document_comes_back_as_it_was_signed(tmp_path: Path) -> None:
    body = 'ünïcode, "quotes"\n and \x00'
    (tmp_path / "d.json").write_text(sign(STUDY, body, KEY).to_json(), encoding="utf-8")
    assert read_signed(tmp_path / "d.json").verified(STUDY, signer=public_hex(KEY)) == body


@pytest.mark.parametrize("kind", [ENROLMENT_REQUEST, MEMBERSHIP])
def test_one_kind_is_not_passed_off_as_another(kind: str) -> None:
    with pytest.raises(UntrustedDocument, match=f"it is a signed study, not a {kind}"):
        DOCUMENT.verified(kind)
    with pytest.raises(UntrustedDocument, match="its signature is wrong"):
        replace(DOCUMENT, kind=kind).verified(kind)  # relabelled: the kind is signed too


def test_kind_and_body_cannot_be_cut_elsewhere() -> None:
    """The line break between them belongs to neither."""
    moved = replace(sign(STUDY, "one\ntwo", KEY), kind=f"{STUDY} 1\none", body="two")
    with pytest.raises(UntrustedDocument, match="its signature is wrong"):
        moved.verified(moved.kind)


@pytest.mark.parametrize(
    "planted",
    [
        replace(DOCUMENT, body='{"rounds": 4}'),
        replace(DOCUMENT, body=DOCUMENT.body + " "),
        replace(DOCUMENT, signature=rotated(DOCUMENT.signature)),
        replace(DOCUMENT, signature=""),
        replace(DOCUMENT, signature="not hex"),
        replace(DOCUMENT, signature=sign(STUDY, DOCUMENT.body, OTHER).signature),
        replace(DOCUMENT, signer=public_hex(OTHER)),
        replace(DOCUMENT, signer=""),
        replace(DOCUMENT, signer="00" * 32),
        replace(DOCUMENT, body="\ud800"),
    ],
    ids=map(str, range(10)),
)
def test_a_changed_document_is_refused(planted: SignedDocument) -> None:
    with pytest.raises(UntrustedDocument, match="its signature is wrong: it was changed, or never signed"):
        planted.verified(STUDY)


@pytest.mark.parametrize("spelling", [str.upper, lambda key: " ".join((key[:2], key[2:]))], ids=["capitals", "spaces"])
def test_a_key_has_one_spelling(spelling) -> None:  # type: ignore[no-untyped-def]
    """Else a key that was barred comes back as another text."""
    with pytest.raises(UntrustedDocument, match="its signature is wrong"):
        replace(DOCUMENT, signer=spelling(DOCUMENT.signer)).verified(STUDY)


@pytest.mark.parametrize("signer", [public_hex(OTHER), "", "\ud800"])
def test_another_signer_is_refused_by_fingerprint(signer: str) -> None:
    with pytest.raises(UntrustedDocument) as refused:
        replace(DOCUMENT, signer=signer).verified(STUDY, signer=public_hex(KEY))
    assert str(refused.value) == f"it is signed by {fingerprint(signer)}, not by {fingerprint(public_hex(KEY))}"


def test_a_lab_that_signs_for_itself_is_not_the_expected_signer() -> None:
    honest_looking = sign(STUDY, DOCUMENT.body, OTHER)
    assert honest_looking.verified(STUDY) == DOCUMENT.body
    with pytest.raises(UntrustedDocument, match="it is signed by"):
        honest_looking.verified(STUDY, signer=public_hex(KEY))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "null",
        "[]",
        "{}",
        "{" * 100_000,
        "[" * 100_000,
        json.dumps({"kind": STUDY}),
        json.dumps({**json.loads(DOCUMENT.to_json()), "more": ""}),
        json.dumps({**json.loads(DOCUMENT.to_json()), "body": {"rounds": 3}}),
        json.dumps({**json.loads(DOCUMENT.to_json()), "signer": None}),
        " " * 4_000_001,
    ],
    ids=lambda text: text[:20],
)
def test_what_is_no_signed_document_is_refused(text: str) -> None:
    with pytest.raises(UntrustedDocument, match="it is no signed document"):
        parse_signed(text)


@settings(max_examples=40, deadline=None)
@given(some.text() | some.recursive(some.none() | some.integers() | some.text(), some.lists).map(json.dumps))
def test_any_text_is_a_document_or_untrusted(text: str) -> None:
    try:
        parse_signed(text).verified(STUDY)
    except UntrustedDocument:
        return
    pytest.fail("nobody signed this")


def test_a_file_says_its_name_with_its_fault(tmp_path: Path) -> None:
    file = tmp_path / "d.json"
    with pytest.raises(UsageError, match=rf"{file}: cannot be read \(FileNotFoundError\) -- check the path"):
        read_signed(file)
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(UsageError, match=r"d.json: cannot be read \(UnicodeDecodeError\)"):
        read_signed(file)
    file.write_text("hello")
    with pytest.raises(UntrustedDocument, match=r"d.json: it is no signed document"):
        read_signed(file)
    file.write_bytes(bytes(4_000_001))
    with pytest.raises(UntrustedDocument, match=r"is larger than 4,000,000 bytes"):
        read_signed(file)


# ---- fingerprints --------------------------------------------------------------------------------------------------


def test_a_fingerprint_is_eight_groups_of_four() -> None:
    groups = fingerprint(public_hex(KEY)).split("-")
    assert [len(group) for group in groups] == [4] * 8
    assert fingerprint(public_hex(KEY)) != fingerprint(public_hex(OTHER))


def test_a_fingerprint_is_the_same_however_it_is_written() -> None:
    told = fingerprint(public_hex(KEY))
    for written in (told.upper(), told.replace("-", " "), told.replace("-", ""), f"  {told}\n"):
        assert same_fingerprint(told, written)


@pytest.mark.parametrize("wrong", ["", "-", fingerprint("")[:-1], fingerprint(public_hex(OTHER))])
def test_a_part_of_a_fingerprint_is_not_the_fingerprint(wrong: str) -> None:
    assert not same_fingerprint(fingerprint(public_hex(KEY)), wrong)
    assert not same_fingerprint(fingerprint(public_hex(KEY)), fingerprint(public_hex(KEY))[:-1])


# ---- private files -------------------------------------------------------------------------------------------------


def test_a_new_key_is_its_owners_alone_and_is_never_replaced(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        key = make_signing_key(tmp_path / "keys" / "signing.key")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "keys" / "signing.key").stat().st_mode) == 0o600
    assert stat.S_IMODE((tmp_path / "keys").stat().st_mode) == 0o700
    assert public_hex(load_signing_key(tmp_path / "keys" / "signing.key")) == public_hex(key)
    with pytest.raises(FileExistsError):
        make_signing_key(tmp_path / "keys" / "signing.key")
    assert public_hex(load_signing_key(tmp_path / "keys" / "signing.key")) == public_hex(key)


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604, 0o620, 0o601, 0o666])
def test_a_key_that_others_can_read_is_refused(tmp_path: Path, mode: int) -> None:
    make_signing_key(tmp_path / "k")
    (tmp_path / "k").chmod(mode)
    with pytest.raises(UsageError, match=rf"others can read \(mode {mode:04o}\) -- chmod 600 .*/k; .* make a new key"):
        load_signing_key(tmp_path / "k")


@pytest.mark.parametrize("owner", [0, 4321])
def test_a_key_of_another_user_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: int) -> None:
    """Made with sudo, used by a service: it says whose it is."""
    write_private(tmp_path / "k", b"secret")
    monkeypatch.setattr("common.keys.os.geteuid", lambda: 1234)
    found = os.stat_result((0o100600, 0, 0, 1, owner, 0, 6, 0, 0, 0))
    monkeypatch.setattr(Path, "stat", lambda self, **_: found)
    objection = objection_to_private(tmp_path / "k")
    assert objection is not None
    assert objection.what == f"a private key that belongs to user {owner}"


def test_a_missing_key_is_said(tmp_path: Path) -> None:
    with pytest.raises(
        UsageError, match=r"k: cannot be read \(No such file or directory\) -- check the path and whose"
    ):
        read_private(tmp_path / "k")


def pem_of(key: Ed25519PrivateKey | ec.EllipticCurvePrivateKey, password: bytes | None = None) -> bytes:
    locked = serialization.BestAvailableEncryption(password) if password else serialization.NoEncryption()
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, locked)


@pytest.mark.parametrize(
    "content",
    [b"", b"nonsense", pem_of(KEY)[:60], pem_of(ec.generate_private_key(ec.SECP256R1())), pem_of(KEY, b"password")],
    ids=["empty", "nonsense", "torn", "another kind", "locked"],
)
def test_what_is_no_signing_key_is_refused(tmp_path: Path, content: bytes) -> None:
    write_private(tmp_path / "k", content)
    with pytest.raises(UsageError, match="is no Ed25519 private key -- restore it from its backup"):
        load_signing_key(tmp_path / "k")


# ---- addresses -----------------------------------------------------------------------------------------------------


def test_an_address_is_a_host_and_a_port() -> None:
    assert parse_address("lab.example.org:9443") == ("lab.example.org", 9443)
    assert parse_address("[2001:db8::1]:9443") == ("2001:db8::1", 9443)


@pytest.mark.parametrize(
    "text",
    ["", "lab", "lab:", ":1", "lab:0", "lab:65536", "lab:٤٤٣", "2001:db8::1:9443", "https://lab:1", "lab:1\n", "a b:1"],
)
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is no host:port"):
        parse_address(text)
