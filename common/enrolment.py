"""What a hospital and the lab sign to each other before they work together.

    request     the hospital: my name, my node's public key, proof that I hold it; signed by the hospital's own key
    membership  the lab: you are this site, here is my address and my certificate authority; signed by the study key

Both travel by any way; their fingerprints are compared by another one (telephone).
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import TypeVar

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from common.addresses import parse_address
from common.errors import UntrustedDocument
from common.keys import ENROLMENT_REQUEST, MEMBERSHIP, SignedDocument, sign
from common.names import well_named

_PROOF = ec.ECDSA(hashes.SHA384())


@dataclass(frozen=True)
class EnrolmentRequest:
    """A hospital asks to take part."""

    site: str
    site_key: str  # Ed25519, hex: signs this request
    node_key: str  # P-384, OpenSSH public line: what Flower knows the node by
    proof: str  # hex: the node key's signature over site and site_key


@dataclass(frozen=True)
class Membership:
    """The lab's answer."""

    site: str
    node_key: str
    lab: str
    address: str  # host:port
    authority: str  # PEM of the lab's certificate authority
    lab_key: str  # Ed25519, hex: signs this and every study


def make_node_key() -> tuple[bytes, str]:
    """(private key, public line), both OpenSSH, as Flower wants them."""
    key = ec.generate_private_key(ec.SECP384R1())
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
    )
    return private, _public_line(key.public_key())


def public_line(private: bytes) -> str:
    """The OpenSSH public line of a node's private key. Raises ValueError."""
    return _public_line(_node_key(private).public_key())


def request_enrolment(site: str, *, node_key: bytes, site_key: Ed25519PrivateKey) -> SignedDocument:
    """A request by `site`, signed by both of its keys."""
    node = _node_key(node_key)
    signer = site_key.public_key().public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw).hex()
    proof = node.sign(_claim(site, signer), _PROOF).hex()
    request = EnrolmentRequest(site=site, site_key=signer, node_key=_public_line(node.public_key()), proof=proof)
    return sign(ENROLMENT_REQUEST, json.dumps(asdict(request)), site_key)


def read_request(document: SignedDocument) -> EnrolmentRequest:
    """The verified request in `document`. Raises UntrustedDocument."""
    request = _parse(document.verified(ENROLMENT_REQUEST), EnrolmentRequest)
    if request.site_key != document.signer:
        raise UntrustedDocument("the enrolment request names another key than the one that signed it")
    try:
        well_named(request.site)
    except ValueError as error:
        raise UntrustedDocument(f"the enrolment request names a site {request.site!r}: {error}") from None
    try:
        node = serialization.load_ssh_public_key(request.node_key.encode())
        if not isinstance(node, ec.EllipticCurvePublicKey):
            raise ValueError("no EC key")
        if request.node_key != _public_line(node):
            raise ValueError("one key, one spelling")  # else a barred key comes back with a comment behind it
        node.verify(bytes.fromhex(request.proof), _claim(request.site, request.site_key), _PROOF)
    except (InvalidSignature, UnsupportedAlgorithm, ValueError):
        raise UntrustedDocument("the enrolment request does not prove that its sender holds the node's key") from None
    return request


def grant_membership(membership: Membership, key: Ed25519PrivateKey) -> SignedDocument:
    """The lab's signed answer."""
    return sign(MEMBERSHIP, json.dumps(asdict(membership)), key)


def read_membership(document: SignedDocument) -> Membership:
    """The membership in `document`, signed by the key that it names. Raises UntrustedDocument."""
    membership = _parse(document.verified(MEMBERSHIP), Membership)
    if membership.lab_key != document.signer:
        raise UntrustedDocument("the membership names another lab's key than the one that signed it")
    try:
        well_named(membership.site), well_named(membership.lab), parse_address(membership.address)
        x509.load_pem_x509_certificate(membership.authority.encode())
    except ValueError as error:
        raise UntrustedDocument(f"the membership is not usable: {error}") from None
    return membership


Body = TypeVar("Body", EnrolmentRequest, Membership)


def _parse(body: str, kind: type[Body]) -> Body:
    try:
        fields = json.loads(body)
        parsed = kind(**fields)
    except (ValueError, TypeError, RecursionError):
        raise UntrustedDocument(f"its body is no {kind.__name__}") from None
    if not all(isinstance(value, str) for value in asdict(parsed).values()):
        raise UntrustedDocument(f"its body is no {kind.__name__}")
    return parsed


def _claim(site: str, site_key: str) -> bytes:
    return f"consilium node of {site} {site_key}".encode()


def _node_key(private: bytes) -> ec.EllipticCurvePrivateKey:
    key = serialization.load_ssh_private_key(private, password=None)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ValueError("not an EC key")
    return key


def _public_line(key: ec.EllipticCurvePublicKey) -> str:
    line = key.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    return line.decode()
