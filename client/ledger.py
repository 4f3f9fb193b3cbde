"""The hospital's privacy ledger: one per patient population, for all studies, owned by the hospital.

A charge is written before anything is computed: a failed round is spent, a crash loses budget and never privacy.
Rows are chained by hashes and live in one SQLite file, so that a row is either whole or absent after any kill, and
concurrent studies never overspend together.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from client.grant import Grant
from common.accounting import Event, epsilon
from common.errors import BudgetExceeded, InternalFailure, LedgerDamaged, RoundSpent

FILE = "ledger.sqlite"
_MARKER = "ledger.opened"  # outlives a lost ledger: missing is damaged, never a full budget
_CLOCK_TOLERANCE_S = 60.0
_WAIT_S = 60.0  # for another process that is charging
_PASSING = (sqlite3.SQLITE_FULL, sqlite3.SQLITE_BUSY)  # nothing is wrong with the ledger itself
_START = "0" * 64

_TABLE = """
CREATE TABLE entry (
    number INTEGER PRIMARY KEY,
    study TEXT NOT NULL,
    round INTEGER NOT NULL,
    body TEXT NOT NULL,
    hash TEXT NOT NULL,
    UNIQUE (study, round)
)
"""


@dataclass(frozen=True, kw_only=True)
class Terms:
    """What a ledger was opened with; opening it with anything else is refused."""

    epsilon: float  # the budget of a patient over all studies
    delta: float
    unit: str = "patient"


@dataclass(frozen=True, kw_only=True)
class Charge:
    """One row: the private queries of one round of one study."""

    number: int
    time: float  # seconds since 1970
    study: str  # plan digest
    round: int
    event: Event


@dataclass(frozen=True)
class Ledger:
    """An open ledger. Every call reads and verifies the whole chain: nothing is cached between calls."""

    folder: Path
    terms: Terms

    @staticmethod
    def open(folder: Path, terms: Terms) -> Ledger:
        """Open the ledger in `folder`; create it if none was ever there.

        Raises LedgerDamaged if it is missing though it was there, cannot be read, was changed, or has other terms.
        """
        _check_terms(terms)
        ledger = Ledger(folder, terms)
        if not (folder / FILE).exists():
            if (folder / _MARKER).exists():
                raise LedgerDamaged(f"{folder / FILE} is missing, but it was opened before: restore it from its backup")
            _create(folder, terms)
        with ledger._transaction() as connection:
            ledger._read(connection)
        _write_marker(folder)
        return ledger

    @staticmethod
    def existing(folder: Path) -> Ledger:
        """The ledger in `folder` under the terms it was opened with, for reading.

        Raises LedgerDamaged if there is none, or it was changed.
        """
        ledger = Ledger(folder, Terms(epsilon=math.inf, delta=1.0))
        with ledger._transaction() as connection:
            rows = connection.execute("SELECT body FROM entry WHERE number = 0").fetchall()
        if not rows:
            raise LedgerDamaged(f"{folder / FILE} holds no opening row")
        ledger = Ledger(folder, Terms(**json.loads(rows[0][0])))
        ledger.charges()
        return ledger

    @staticmethod
    def found(folder: Path) -> Ledger | None:
        """The same; None if no ledger was ever opened here. A lost one is damaged: its marker outlives it."""
        return Ledger.existing(folder) if any(folder.glob("ledger.*")) else None

    def charge(self, *, study: str, round: int, event: Event) -> Grant:
        """Write the charge for one round and return leave to make its queries.

        Raises RoundSpent if this (study, round) was charged before, BudgetExceeded if the budget does not cover it,
        LedgerDamaged, or ValueError for an event that is no mechanism.
        """
        _check_event(event)
        with self._transaction() as connection:
            charges, head = self._read(connection)
            if any(charge.study == study and charge.round == round for charge in charges):
                raise RoundSpent(f"study {study[:12]} round {round} was charged before")
            after = epsilon([*(charge.event for charge in charges), event], self.terms.delta)
            if not after <= self.terms.epsilon:
                raise BudgetExceeded(
                    f"round {round} of study {study[:12]} would bring epsilon to {after:.4f}; "
                    f"the budget is {self.terms.epsilon:.4f} at delta {self.terms.delta:.3g}"
                )
            last = charges[-1].time if charges else 0.0
            entry = Charge(number=len(charges) + 1, time=_now(last), study=study, round=round, event=event)
            _append(connection, entry, head)
        return Grant(event.count)

    def charges(self) -> tuple[Charge, ...]:
        """All rows, verified."""
        with self._transaction() as connection:
            return self._read(connection)[0]

    def spent(self) -> float:
        """Epsilon of all charges together, by PLD, at the ledger's delta."""
        return epsilon([charge.event for charge in self.charges()], self.terms.delta)

    def head(self) -> tuple[int, str]:
        """(row count, hash of the last row): goes to the lab with each reply, so that a rollback is noticed."""
        with self._transaction() as connection:
            charges, head = self._read(connection)
        return len(charges), head

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        """An immediate transaction: one process at a time, committed whole or not at all."""
        try:
            connection = sqlite3.connect(
                f"file:{self.folder / FILE}?mode=rw", uri=True, timeout=_WAIT_S, isolation_level=None
            )
        except sqlite3.Error as error:
            raise LedgerDamaged(f"{self.folder / FILE} cannot be opened: {error}") from None
        try:
            connection.execute("PRAGMA synchronous = FULL")
            connection.execute("BEGIN IMMEDIATE")
            yield connection
            connection.execute("COMMIT")
        except sqlite3.DatabaseError as error:
            passing = getattr(error, "sqlite_errorcode", 0) & 0xFF in _PASSING
            raise (InternalFailure if passing else LedgerDamaged)(f"{self.folder / FILE}: {error}") from None
        finally:
            connection.close()  # rolls back what was not committed

    def _read(self, connection: sqlite3.Connection) -> tuple[tuple[Charge, ...], str]:
        """Every charge and the head, after checking the chain and the terms."""
        rows = connection.execute("SELECT number, study, round, body, hash FROM entry ORDER BY number").fetchall()
        head, last, charges = _START, 0.0, []
        for position, (number, study, round_, body, digest) in enumerate(rows):
            if number != position or digest != _hash(number, head, body):
                raise LedgerDamaged(f"{self.folder / FILE}: row {position} was changed, or a row is missing")
            head = digest
            if number == 0:
                self._check_opening(body)
                continue
            charge = _parse(number, body)
            if (charge.study, charge.round) != (study, round_) or charge.time < last:
                raise LedgerDamaged(
                    f"{self.folder / FILE}: row {position} contradicts itself or its time runs backwards"
                )
            last = charge.time
            charges.append(charge)
        if not rows:
            raise LedgerDamaged(f"{self.folder / FILE} holds no opening row")
        return tuple(charges), head

    def _check_opening(self, body: str) -> None:
        opened = json.loads(body)
        if opened != asdict(self.terms):
            raise LedgerDamaged(f"{self.folder / FILE} was opened with {opened}, not with {asdict(self.terms)}")


def _create(folder: Path, terms: Terms) -> None:
    """A ledger with its opening row, complete before it gets its name."""
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".{FILE}.{os.getpid()}.tmp"
    temporary.unlink(missing_ok=True)
    connection = sqlite3.connect(temporary, isolation_level=None)
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute("BEGIN IMMEDIATE")
    connection.execute(_TABLE)
    body = json.dumps(asdict(terms), sort_keys=True)
    connection.execute("INSERT INTO entry VALUES (0, '', 0, ?, ?)", (body, _hash(0, _START, body)))
    connection.execute("COMMIT")
    connection.close()
    os.link(temporary, folder / FILE)  # fails, rather than replaces, if another process was first
    temporary.unlink()


def _write_marker(folder: Path) -> None:
    with open(folder / _MARKER, "a") as marker:
        os.fsync(marker.fileno())


def _append(connection: sqlite3.Connection, entry: Charge, head: str) -> None:
    body = json.dumps(
        {"time": entry.time, "study": entry.study, "round": entry.round, **asdict(entry.event)}, sort_keys=True
    )
    connection.execute(
        "INSERT INTO entry VALUES (?, ?, ?, ?, ?)",
        (entry.number, entry.study, entry.round, body, _hash(entry.number, head, body)),
    )


def _parse(number: int, body: str) -> Charge:
    try:
        fields: dict[str, Any] = json.loads(body)
        event = Event(
            sample_rate=fields["sample_rate"], noise_multiplier=fields["noise_multiplier"], count=fields["count"]
        )
        _check_event(event)
        return Charge(
            number=number,
            time=float(fields["time"]),
            study=str(fields["study"]),
            round=int(fields["round"]),
            event=event,
        )
    except (KeyError, TypeError, ValueError) as error:
        raise LedgerDamaged(f"row {number} is no charge: {error}") from None


def _hash(number: int, previous: str, body: str) -> str:
    return hashlib.sha256(f"{number}\n{previous}\n{body}".encode()).hexdigest()


def _now(last: float) -> float:
    """The time of a new row. Raises LedgerDamaged if the clock runs behind the last row."""
    now = time.time()
    if now < last - _CLOCK_TOLERANCE_S:
        raise LedgerDamaged(f"the clock is {last - now:.0f} s behind the last charge: set the clock right")
    return max(now, last)


def _check_event(event: Event) -> None:
    if not (0 < event.sample_rate <= 1) or not (0 < event.noise_multiplier < math.inf) or event.count < 1:
        raise ValueError(f"not a Poisson-sampled Gaussian: {event}")


def _check_terms(terms: Terms) -> None:
    if not (0 < terms.epsilon < math.inf) or not (0 < terms.delta < 1) or terms.unit != "patient":
        raise ValueError(f"not terms of a ledger: {terms}")
