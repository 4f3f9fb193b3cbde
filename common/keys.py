"""Ed25519 keys, documents signed with them, and private files that nobody else can read.

A signed document is JSON: its kind, its body as text, who signed, and the signature over kind and body together, so
that what was signed as one thing cannot be passed off as another.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from dataclasses import asdict, dataclass
from pathlib import Path

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from common.errors import Problem, UntrustedDocument, UsageError

STUDY, ENROLMENT_REQUEST, MEMBERSHIP = "study", "enrolment-request", "membership"  # kinds of signed documents
AUDIT, MASKING_KEY = "audit", "masking-key"

_LARGEST = 4_000_000  # bytes of a signed document
_FINGERPRINT_BYTES = 16  # 128 bits: nobody makes a second key for it


@dataclass(frozen=True)
class SignedDocument:
    """`body` is text exactly as it was signed; nothing is re-serialised before the check."""

    kind: str
    body: str
    signer: str  # the public key, hex
    signature: str  # hex

    def to_json(self) -> str:
        """As it is written to a file or a wire."""
        return json.dumps(asdict(self), indent=1)

    def verified(self, kind: str, *, signer: str | None = None) -> str:
        """The body, if it is of `kind` and signed by `signer` (public key, hex; None: by whom it says).

        Raises UntrustedDocument.
        """
        if self.kind != kind:
            raise UntrustedDocument(f"it is a signed {self.kind}, not a {kind}")
        if signer is not None and self.signer != signer:
            raise UntrustedDocument(f"it is signed by {fingerprint(self.signer)}, not by {fingerprint(signer)}")
        try:
            public = bytes.fromhex(self.signer)
            if public.hex() != self.signer:
                raise ValueError("one key, one spelling")  # else a barred key comes back in capitals
            key = Ed25519PublicKey.from_public_bytes(public)
            key.verify(bytes.fromhex(self.signature), _signed_bytes(self.kind, self.body))
        except (InvalidSignature, ValueError):
            raise UntrustedDocument("its signature is wrong: it was changed, or never signed") from None
        return self.body


def sign(kind: str, body: str, key: Ed25519PrivateKey) -> SignedDocument:
    """`body` signed as a document of `kind`."""
    return SignedDocument(kind, body, public_hex(key), key.sign(_signed_bytes(kind, body)).hex())


def parse_signed(text: str) -> SignedDocument:
    """The document in `text`, not yet verified. Raises UntrustedDocument if it is none."""
    try:
        fields = json.loads(text) if len(text) <= _LARGEST else None
        document = SignedDocument(**fields) if isinstance(fields, dict) else None
    except (ValueError, TypeError, RecursionError):
        document = None
    if document is None or not all(isinstance(value, str) for value in asdict(document).values()):
        raise UntrustedDocument("it is no signed document")
    return document


def read_signed(path: Path) -> SignedDocument:
    """The document in the file `path`, not yet verified. Raises UsageError or UntrustedDocument."""
    try:
        if path.stat().st_size > _LARGEST:
            raise UntrustedDocument(f"{path} is larger than {_LARGEST:,} bytes")
        return parse_signed(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(Problem(str(path), f"cannot be read ({type(error).__name__})", "check the path")) from None
    except UntrustedDocument as error:
        raise UntrustedDocument(f"{path}: {error}") from None


def fingerprint(public: str) -> str:
    """A public key (hex) as people compare it: eight groups of four, to be read aloud over the telephone."""
    digest = hashlib.sha256(public.encode(errors="backslashreplace")).digest()[:_FINGERPRINT_BYTES].hex()
    return "-".join(digest[start : start + 4] for start in range(0, len(digest), 4))


def same_fingerprint(one: str, other: str) -> bool:
    """Whether two people mean the same key, however they wrote the groups."""
    return _bare(one) == _bare(other)


def public_hex(key: Ed25519PrivateKey) -> str:
    """The public half of `key`."""
    return key.public_key().public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw).hex()


def make_signing_key(path: Path) -> Ed25519PrivateKey:
    """A new Ed25519 key in a private file. Raises FileExistsError."""
    key = Ed25519PrivateKey.generate()
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    write_private(path, pem)
    return key


def load_signing_key(path: Path) -> Ed25519PrivateKey:
    """Raises UsageError if the file is missing, is no Ed25519 key, or others can read it."""
    try:
        key = serialization.load_pem_private_key(read_private(path), password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm):  # TypeError: it has a password
        key = None
    if not isinstance(key, Ed25519PrivateKey):
        raise UsageError(Problem(str(path), "is no Ed25519 private key", "restore it from its backup"))
    return key


def write_private(path: Path, content: bytes) -> None:
    """A new file that only its owner can read; never replaces one. Raises FileExistsError."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(handle, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def read_private(path: Path) -> bytes:
    """The content of a private file. Raises UsageError if it is missing or others could have read it."""
    if objection := objection_to_private(path):
        raise UsageError(objection)
    return path.read_bytes()


def objection_to_private(path: Path) -> Problem | None:
    """Why the private file `path` may not be used, or None."""
    try:
        found = path.stat()
    except OSError as error:
        return Problem(str(path), f"cannot be read ({error.strerror})", "check the path and whose it is")
    if stat.S_IMODE(found.st_mode) & 0o077:
        what = f"a private key that others can read (mode {stat.S_IMODE(found.st_mode):04o})"
        return Problem(str(path), what, f"chmod 600 {path}; if somebody else did read it, make a new key")
    if os.geteuid() not in (found.st_uid, 0):
        return Problem(str(path), f"a private key that belongs to user {found.st_uid}", "chown it to who uses it")
    return None


def _signed_bytes(kind: str, body: str) -> bytes:
    return f"consilium {kind} 1\n{body}".encode()


def _bare(written: str) -> str:
    return "".join(c for c in written.lower() if c.isalnum())
