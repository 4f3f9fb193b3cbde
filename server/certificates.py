"""The lab's certificate authority and the certificate of its server."""

from __future__ import annotations

import datetime
import ipaddress
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from common.errors import Problem, UsageError
from common.files import write_atomically
from common.keys import read_private, write_private

CA_DAYS, SERVER_DAYS = 3650, 397  # browsers and many hospitals' proxies refuse a server's certificate above 398 days
RENEW_DAYS = 30  # before its end a certificate is renewed

_BACKDATED = datetime.timedelta(hours=1)  # a hospital's clock may be behind
_LOOPBACK = ("localhost", "127.0.0.1", "::1")  # the gateway reaches the SuperLink by these


@dataclass(frozen=True)
class Authority:
    """A certificate authority in two files: `certificate` for everybody, `key` for the lab alone."""

    certificate: Path
    key: Path

    def create(self, name: str) -> None:
        """Make it, for ten years; a key that is there already stays. Raises UsageError if that one cannot be used."""
        if not self.key.exists():
            write_private(self.key, _pem(ec.generate_private_key(ec.SECP256R1())))
        key = self._private_key()
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"{name} (Consilium)")])
        usage = _key_usage(key_cert_sign=True, crl_sign=True)
        builder = (
            _builder(subject, subject, key.public_key(), CA_DAYS)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(usage, critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        )
        write_atomically(self.certificate, builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))

    def issue(self, host: str, *, certificate: Path, key: Path) -> None:
        """A certificate for a server at `host` and on loopback; the files before are replaced, key first.

        Raises UsageError if the authority's own key is missing, or others can read it.
        """
        authority_key = self._private_key()
        authority = read_certificate(self.certificate)
        server_key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, host[:64])])
        names = x509.SubjectAlternativeName([_general_name(name) for name in dict.fromkeys((host, *_LOOPBACK))])
        signer = x509.AuthorityKeyIdentifier.from_issuer_public_key(authority_key.public_key())
        builder = (
            _builder(subject, authority.subject, server_key.public_key(), SERVER_DAYS)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_key_usage(digital_signature=True), critical=True)
            .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
            .add_extension(names, critical=False)
            .add_extension(signer, critical=False)
        )
        signed = builder.sign(authority_key, hashes.SHA256())
        key.unlink(missing_ok=True)
        write_private(key, _pem(server_key))
        write_atomically(certificate, signed.public_bytes(serialization.Encoding.PEM))

    def _private_key(self) -> ec.EllipticCurvePrivateKey:
        key = _read_key(self.key)
        if key is None:
            raise UsageError(Problem(str(self.key), "is no EC private key", "restore it from its backup"))
        return key


def read_certificate(path: Path) -> x509.Certificate:
    """Raises UsageError if `path` holds no certificate."""
    try:
        return x509.load_pem_x509_certificate(path.read_bytes())
    except (OSError, ValueError) as error:
        what = f"holds no certificate ({type(error).__name__})"
        raise UsageError(Problem(str(path), what, "`consilium-lab provision` makes one")) from None


def days_left(certificate: x509.Certificate) -> float:
    """Until it ends; negative after that."""
    left = certificate.not_valid_after_utc - datetime.datetime.now(datetime.UTC)
    return left / datetime.timedelta(days=1)


def is_for(certificate: x509.Certificate, host: str) -> bool:
    """Whether a server at `host` may show it."""
    return _general_name(host) in certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value


def belong_together(certificate: x509.Certificate, key: Path) -> bool:
    """Whether the private key in the file `key` is the certificate's. Raises UsageError if others can read it."""
    private = _read_key(key)
    return private is not None and private.public_key() == certificate.public_key()


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, days: int
) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _BACKDATED)
        .not_valid_after(now + datetime.timedelta(days=days))
    )


def _key_usage(
    *, digital_signature: bool = False, key_cert_sign: bool = False, crl_sign: bool = False
) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=digital_signature,
        key_cert_sign=key_cert_sign,
        crl_sign=crl_sign,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _read_key(path: Path) -> ec.EllipticCurvePrivateKey | None:
    try:
        key = serialization.load_pem_private_key(read_private(path), password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        return None
    return key if isinstance(key, ec.EllipticCurvePrivateKey) else None


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
