"""A journal: append-only JSON lines, each chained to the one before it by a hash and signed with an Ed25519 key.

    {"number": 3, "time": ..., "what": "released", "previous": SHA-256 of line 2, "key": ..., ..., "signature": ...}

What is signed is the line's own text, without its signature; nothing is re-serialised before the check. A line is on
disk when `add` returns. The last one may be torn by a crash: the next `add` takes it off and tells of it in a line of
its own; every whole line stays. Several processes may write: a lock on the file lets one do so at a time.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
import re
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import IO, Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from common.errors import JournalDamaged, UntrustedDocument
from common.files import give_to_owner_of
from common.keys import SignedDocument, fingerprint, public_hex, sign

KIND = "journal entry"  # of what is signed
TORN = "torn"  # a line that tells what a crash left of the line after it

_START = "0" * 64
_SIGNATURE = re.compile(rb',"signature":"([0-9a-f]{128})"\}')
_TAIL = len(b',"signature":""}') + 128
_OWN = ("number", "time", "what", "previous", "key")


@dataclass(frozen=True)
class Entry:
    """One verified line."""

    number: int  # from 1: the line in the file
    time: float  # seconds since 1970, of the machine's clock
    what: str
    key: str  # who signed it: public key, hex
    fields: Mapping[str, Any]
    hash: str  # SHA-256 of the line, which the next one names

    def text(self, name: str) -> str:
        """The text of that name. Raises JournalDamaged if there is none."""
        return str(self._field(name, str))

    def count(self, name: str) -> int:
        """The integer of that name. Raises JournalDamaged if there is none."""
        return int(self._field(name, int))

    def number_of(self, name: str) -> float:
        """The number of that name. Raises JournalDamaged if there is none."""
        return float(self._field(name, float, int))

    def _field(self, name: str, *kinds: type) -> Any:
        value = self.fields.get(name)
        if type(value) not in kinds:
            raise JournalDamaged(f"entry {self.number} of the journal ({self.what}) does not say its {name}")
        return value

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {"number": self.number, "time": self.time, "what": self.what, "key": self.key, **self.fields}


Found = tuple[str, Mapping[str, Any]]  # what is to be written: its kind and its fields


@dataclass(frozen=True)
class Journal:
    """The journal in the file `path`, written with `key`."""

    path: Path
    key: Ed25519PrivateKey

    def add(self, lacking: Callable[[list[Entry]], Iterator[Found]]) -> str:
        """Write what `lacking` says of the entries that are there; the decision and the writing are one step. Returns
        "LINE HASH" of the last line then, "0 " and zeros if there is none.

        Raises JournalDamaged if an entry was changed or the file cannot be written; what was there stays then.
        """
        with _opened(self.path) as file:
            content = file.read()
            lines, torn = _lines(content)
            entries, head = _verified(lines, self.path)
            new: list[Found] = [(TORN, {"text": torn.decode(errors="backslashreplace")})] if torn else []
            new += lacking(entries)
            end = len(content) - len(torn)
            written = b"" if content[:end].endswith(b"\n") or not lines else b"\n"
            for number, (what, fields) in enumerate(new, start=len(entries) + 1):
                line = self._line(number, head, what, fields)
                written, head = written + line + b"\n", _hash(line)
            if new:
                _append(file, written, at=end)
            return f"{len(entries) + len(new)} {head}"

    def entries(self) -> list[Entry]:
        """All of them, each signed by whoever it says. Raises JournalDamaged with the exact place."""
        if not self.path.exists():
            return []
        with _opened(self.path) as file:
            lines, _ = _lines(file.read())
        return _verified(lines, self.path)[0]

    def verified(self, *, former: Collection[str] = ()) -> list[Entry]:
        """All of them, each signed by this journal's key, or by one whose fingerprint is `former`.

        Raises JournalDamaged with the exact place.
        """
        entries, known = self.entries(), {fingerprint(public_hex(self.key)), *former}
        for entry in entries:
            if fingerprint(entry.key) not in known:
                what = f"is signed by {fingerprint(entry.key)}, which is not this site's key"
                raise JournalDamaged(f"{self.path}:{entry.number}: {what}; a former one is named with --former")
        return entries

    def _line(self, number: int, previous: str, what: str, fields: Mapping[str, Any]) -> bytes:
        own = {"number": number, "time": time.time(), "what": what, "previous": previous, "key": public_hex(self.key)}
        body = json.dumps({**own, **fields}, separators=(",", ":"), allow_nan=False)
        return f'{body[:-1]},"signature":"{sign(KIND, body, self.key).signature}"}}'.encode()


@contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    """The file, locked. Raises JournalDamaged if it cannot be opened or read."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        new = not path.exists()
        with os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o600), "r+b", buffering=0) as file:
            if new:
                give_to_owner_of(path.parent, path)
            fcntl.flock(file, fcntl.LOCK_EX)
            yield file
    except OSError as error:
        raise JournalDamaged(f"{path}: {error.strerror}") from None


def _lines(content: bytes) -> tuple[list[bytes], bytes]:
    """The whole lines, and what is left of a torn one; a last line that lacks only its end of line is whole."""
    *lines, last = content.split(b"\n")
    if last and _SIGNATURE.fullmatch(last[-_TAIL:]):
        return [*lines, last], b""
    return lines, last


def _append(file: IO[bytes], written: bytes, *, at: int) -> None:
    """Write `written` behind the whole lines, or leave only these."""
    try:
        file.truncate(at)
        file.seek(at)
        while written:
            written = written[file.write(written) :]
        os.fsync(file.fileno())
    except OSError:
        file.truncate(at)
        raise


def _verified(lines: list[bytes], path: Path) -> tuple[list[Entry], str]:
    entries, head = [], _START
    for number, line in enumerate(lines, start=1):
        try:
            entries.append(_entry(line, number, head))
        except ValueError as error:
            raise JournalDamaged(f"{path}:{number}: {error}") from None
        head = _hash(line)
    return entries, head


@lru_cache(maxsize=100_000)  # of a signature: .2 ms
def _entry(line: bytes, number: int, previous: str) -> Entry:
    """The entry in `line`. Raises ValueError if it is not the `number`th of its chain, as it was signed."""
    signature = _SIGNATURE.fullmatch(line[-_TAIL:])
    try:
        body = (line[:-_TAIL] + b"}").decode()
        fields = json.loads(body)
        own = {name: fields.pop(name) for name in _OWN}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        signature = None
    if signature is None:
        raise ValueError("is no entry: it was changed")
    if [type(value) for value in own.values()] != [int, float, str, str, str] or not math.isfinite(own["time"]):
        raise ValueError("is no entry: it was changed")
    if own["number"] != number or own["previous"] != previous:
        raise ValueError("does not follow the line before it: that one was changed, or lines are missing")
    try:
        SignedDocument(KIND, body, own["key"], signature[1].decode()).verified(KIND)
    except UntrustedDocument:
        raise ValueError("its signature is wrong: it was changed") from None
    return Entry(number, own["time"], own["what"], own["key"], fields, _hash(line))


def _hash(line: bytes) -> str:
    return hashlib.sha256(line).hexdigest()
