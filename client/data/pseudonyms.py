"""Names for patients and images that tell nothing: HMAC-SHA256 under a key that stays in the site's state folder.

The key is made once and never replaced: under another one every patient would come back as a second person, and each
would bear two budgets. Without it nobody can tell whether a name that they guess is a pseudonym's.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import secrets
from pathlib import Path

from cryptography.fernet import Fernet, InvalidToken

from common.files import give_to_owner_of
from common.keys import read_private, write_private

KEY_FILE = "pseudonyms.key"

_DIGITS = 20  # hex: 80 bits; two of a million patients share one with probability 1e-12


class Pseudonyms:
    """Keyed names; the same text has the same name at this site, and another at any other."""

    def __init__(self, key: bytes) -> None:
        self._key = key

    @classmethod
    def of(cls, state: Path) -> Pseudonyms:
        """With the site's key, made on first use, mode 0600. Raises UsageError if others can read it."""
        path = state / KEY_FILE
        if not path.exists():
            write_private(path, secrets.token_bytes(32))
            give_to_owner_of(state, path)
        return cls(read_private(path))

    def patient(self, identifier: str) -> str:
        """One for all spellings of an identifier: to take one patient for two would halve the protection of both."""
        return self.name("patient", " ".join(identifier.split()).casefold())

    def name(self, *what: str) -> str:
        """Of anything; the parts cannot run into each other."""
        digest = hmac.digest(self._key, "\0".join(what).encode(errors="surrogateescape"), hashlib.sha256)
        return digest.hex()[:_DIGITS]

    def sealed(self, content: bytes) -> bytes:
        """So that only who has the key can read it."""
        return self._seal().encrypt(content)

    def opened(self, sealed: bytes) -> bytes:
        """The inverse. Raises ValueError if it was sealed under another key, or changed."""
        try:
            return self._seal().decrypt(sealed)
        except InvalidToken:
            raise ValueError("sealed under another key, or changed") from None

    def _seal(self) -> Fernet:
        return Fernet(base64.urlsafe_b64encode(hmac.digest(self._key, b"seal", hashlib.sha256)))

    def share(self, patient: str) -> float:
        """A number from 0 to 1 that is drawn once for each patient: which split it belongs to."""
        drawn: float = int(self.name("split", patient), 16) / 16.0**_DIGITS
        return drawn
