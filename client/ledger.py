"""The hospital's privacy ledger: one per patient population, for all studies, owned by the hospital.

A charge is written before anything is computed: a failed round is spent, a crash loses budget and never privacy.
Rows are chained by hashes and live in one SQLite file, so that a row is either whole or absent after any kill, and
concurrent studies never overspend together. Beside it `ledger.opened` notes every row that was written, so that an
older copy put in the ledger's place is noticed; the journal and the lab notice it where both were put back.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
import sqlite3
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from client.grant import Grant
from common.accounting import Event, epsilon, epsilon_adaptive
from common.errors import BudgetExceeded, InternalFailure, LedgerDamaged, LedgerRolledBack, RoundSpent

FILE = "ledger.sqlite"
MARKER = "ledger.opened"  # outlives a lost ledger: missing is damaged, never a full budget
_CLOCK_TOLERANCE_S = 60.0
_WAIT_S = 60.0  # for another process that is charging
_PASSING = (sqlite3.SQLITE_FULL, sqlite3.SQLITE_BUSY)  # nothing is wrong with the ledger itself
_START = "0" * 64
_NOTED = re.compile(r"(\d{1,15}) ([0-9a-f]{64})")  # a number of rows or lines, and the hash of the last

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

Row = tuple[int, str, int, str, str]  # number, study, round, body, hash: as it is stored


@dataclass(frozen=True, kw_only=True)
class Terms:
    """What a ledger was opened with; opening it with anything else is refused."""

    epsilon: float  # the budget of a patient over all studies
    delta: float
    unit: str = "patient"
    order: int | None = None  # of a Renyi filter, for parameters that depend on earlier releases; None: PLD

    def spent(self, events: Iterable[Event]) -> float:
        """Epsilon of `events` together, at the ledger's delta."""
        if self.order is None:
            return epsilon(events, self.delta)
        return epsilon_adaptive(events, self.delta, order=self.order)


@dataclass(frozen=True, kw_only=True)
class Charge:
    """One row: the private queries of one round of one study."""

    number: int
    time: float  # seconds since 1970
    study: str  # plan digest
    round: int
    event: Event
    hash: str  # over this row and, through the one before it, all earlier ones
    journal: str  # "LINE HASH" of the journal's last line before it; empty where none is kept


@dataclass(frozen=True)
class Chain:
    """A ledger's rows, verified."""

    rows: tuple[Row, ...]  # the opening row first
    terms: Terms
    charges: tuple[Charge, ...]

    @property
    def head(self) -> tuple[int, str]:
        """(number of charges, hash of the last row)."""
        return len(self.charges), self.rows[-1][4]

    def holds(self, rows: int, head: str) -> bool:
        """Whether this ledger, when it had `rows` charges, had this `head`."""
        return 0 <= rows <= len(self.charges) and self.rows[rows][4] == head


@dataclass(frozen=True)
class Ledger:
    """An open ledger. Every call reads the whole chain: rows that are word for word those that this object verified
    before are not hashed again, and nothing else is remembered between calls.

    Not `durable`, as in a simulation, a charge survives a kill, but not a power cut.
    """

    folder: Path
    terms: Terms
    durable: bool = True
    _verified: list[Chain] = field(default_factory=list, init=False, repr=False, compare=False)  # the last one

    @staticmethod
    def open(folder: Path, terms: Terms, *, durable: bool = True) -> Ledger:
        """Open the ledger in `folder`; create it if none was ever there.

        Raises LedgerDamaged if it is missing though it was there, cannot be read, was changed, is an older copy, or
        has other terms.
        """
        _check_terms(terms)
        ledger = Ledger(folder, terms, durable)
        if not (folder / FILE).exists():
            if (folder / MARKER).exists():
                raise LedgerDamaged(f"{folder / FILE} is missing, but it was opened before: restore it from its backup")
            _create(folder, terms, durable=durable)
        head = ledger.head()
        if head not in noted_rows(folder):
            note_rows(folder, *head, durable=durable)
        return ledger

    @staticmethod
    def existing(folder: Path) -> Ledger:
        """The ledger in `folder` under the terms it was opened with, for reading.

        Raises LedgerDamaged if there is none, or it was changed.
        """
        with _transaction(folder / FILE) as connection:
            chain = verified_chain(_rows(connection), folder / FILE)
        ledger = Ledger(folder, chain.terms)
        ledger.charges()
        return ledger

    @staticmethod
    def found(folder: Path) -> Ledger | None:
        """The same; None if no ledger was ever opened here. A lost one is damaged: its marker outlives it."""
        return Ledger.existing(folder) if any(folder.glob("ledger.*")) else None

    def charge(self, *, study: str, round: int, event: Event, journal: str = "") -> Grant:
        """Write the charge for one round, after the `journal`'s last line, and return leave to make its queries.

        Raises RoundSpent if this (study, round) was charged before, BudgetExceeded if the budget does not cover it,
        LedgerDamaged, or ValueError for an event that is no mechanism.
        """
        _check_event(event)
        with _transaction(self.folder / FILE, durable=self.durable) as connection:
            chain = self._read(connection)
            if any(charge.study == study and charge.round == round for charge in chain.charges):
                raise RoundSpent(f"study {study[:12]} round {round} was charged before")
            after = self.terms.spent([*(charge.event for charge in chain.charges), event])
            if not after <= self.terms.epsilon:
                raise BudgetExceeded(
                    f"round {round} of study {study[:12]} would bring epsilon to {after:.4f}; "
                    f"the budget is {self.terms.epsilon:.4f} at delta {self.terms.delta:.3g}"
                )
            now = _now(chain.charges[-1].time if chain.charges else 0.0)
            row = next_row(chain.rows[-1], time=now, study=study, round=round, event=event, journal=journal)
            _append(connection, row)
        note_rows(self.folder, row[0], row[4], durable=self.durable)
        return Grant(event.count)

    def charges(self) -> tuple[Charge, ...]:
        """All rows, verified."""
        return self.chain().charges

    def spent(self) -> float:
        """Epsilon of all charges together, at the ledger's delta."""
        return self.terms.spent(charge.event for charge in self.charges())

    def head(self) -> tuple[int, str]:
        """(row count, hash of the last row): goes to the lab with each reply, so that a rollback is noticed."""
        return self.chain().head

    def chain(self) -> Chain:
        """All rows and what they say, verified."""
        with _transaction(self.folder / FILE) as connection:
            return self._read(connection)

    def require_holds(self, rows: int, head: str, *, witness: str) -> None:
        """Raise LedgerRolledBack unless this ledger, when it had `rows` charges, had this `head`."""
        if not self.chain().holds(rows, head):
            raise rolled_back(self.folder / FILE, rows, witness)

    def _read(self, connection: sqlite3.Connection) -> Chain:
        """Every row, after checking the chain, the terms and what was noted of it."""
        file = self.folder / FILE
        chain = verified_chain(_rows(connection), file, known=next(iter(self._verified), None))
        self._verified[:] = [chain]
        if chain.terms != self.terms:
            raise LedgerDamaged(f"{file} was opened with {chain.terms}, not with {self.terms}")
        for rows, head in noted_rows(self.folder):
            if not chain.holds(rows, head):
                raise rolled_back(file, rows, MARKER)
        return chain


def read_chain(file: Path, *, mode: Literal["ro", "rw"] = "ro") -> Chain:
    """The ledger in any file, verified as far as it can be alone. A killed charge is taken back with "rw" only.

    Raises LedgerDamaged.
    """
    with _transaction(file, mode=mode) as connection:
        return verified_chain(_rows(connection), file)


def write_rows(path: Path, rows: Sequence[Row], *, durable: bool = True) -> None:
    """A ledger with these rows as a new file; on disk when this returns, if it is durable."""
    path.unlink(missing_ok=True)
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
    connection = sqlite3.connect(path, isolation_level=None)
    try:
        connection.execute(_synchronous(durable))
        connection.execute("BEGIN IMMEDIATE")
        connection.execute(_TABLE)
        for row in rows:
            _append(connection, row)
        connection.execute("COMMIT")
    finally:
        connection.close()


def next_row(last: Row, *, time: float, study: str, round: int, event: Event, journal: str) -> Row:
    """The row of a charge, chained to the `last` one."""
    fields = {"time": time, "study": study, "round": round, "journal": journal, **asdict(event)}
    body = json.dumps(fields, sort_keys=True)
    return last[0] + 1, study, round, body, _hash(last[0] + 1, last[4], body)


def note_rows(folder: Path, rows: int, head: str, *, durable: bool = True) -> None:
    """Note that the ledger had `rows` charges and this head; in any order, by any process."""
    with open(folder / MARKER, "ab") as marker:
        marker.write(f"\n{rows} {head}\n".encode())  # a line of its own, also after one that a crash tore
        if durable:
            marker.flush()
            os.fsync(marker.fileno())


def noted_rows(folder: Path) -> set[tuple[int, str]]:
    """All that was noted; a torn line says nothing."""
    try:
        lines = (folder / MARKER).read_text(errors="replace").split("\n")
    except FileNotFoundError:
        return set()
    except OSError as error:
        raise LedgerDamaged(f"{folder / MARKER}: {error.strerror}") from None
    return {(int(match[1]), match[2]) for match in map(_NOTED.fullmatch, lines) if match}


def rolled_back(file: Path, rows: int, witness: str) -> LedgerRolledBack:
    """The ledger lacks what somebody saw in it."""
    what = f"{file} does not hold row {rows} as {witness} knows it: it is an older copy, or another ledger"
    return LedgerRolledBack(f"{what}; `consilium-site ledger restore` the newest backup")


@contextmanager
def _transaction(file: Path, *, mode: str = "rw", durable: bool = True) -> Iterator[sqlite3.Connection]:
    """A transaction: one process at a time may write, and what it wrote is committed whole or not at all."""
    try:
        connection = sqlite3.connect(
            f"{file.absolute().as_uri()}?mode={mode}", uri=True, timeout=_WAIT_S, isolation_level=None
        )
    except sqlite3.Error as error:
        raise LedgerDamaged(f"{file} cannot be opened: {error}") from None
    try:
        connection.execute(_synchronous(durable))
        connection.execute("BEGIN IMMEDIATE" if mode == "rw" else "BEGIN")
        yield connection
        connection.execute("COMMIT")
    except sqlite3.Error as error:
        passing = getattr(error, "sqlite_errorcode", 0) & 0xFF in _PASSING
        raise (InternalFailure if passing else LedgerDamaged)(f"{file}: {error}") from None
    except UnicodeDecodeError:  # sqlite3 says so of an error whose own text is damaged
        raise LedgerDamaged(f"{file}: it is damaged beyond what SQLite can say") from None
    finally:
        connection.close()  # rolls back what was not committed


def _synchronous(durable: bool) -> str:
    return f"PRAGMA synchronous = {'FULL' if durable else 'OFF'}"


def _rows(connection: sqlite3.Connection) -> tuple[Row, ...]:
    return tuple(connection.execute("SELECT number, study, round, body, hash FROM entry ORDER BY number"))


def verified_chain(rows: tuple[Row, ...], file: Path, *, known: Chain | None = None) -> Chain:
    """What `rows` say, if each is chained to the one before it. Raises LedgerDamaged.

    Rows that `known` begins with are not looked at again if they are the same: a round costs its own rows, not all.
    """
    if not rows:
        raise LedgerDamaged(f"{file} holds no opening row")
    head, last, charges, begin = _START, 0.0, [], 0
    if known is not None and rows[: len(known.rows)] == known.rows:
        head, charges, begin = known.head[1], list(known.charges), len(known.rows)
        last = charges[-1].time if charges else 0.0
    for position, (number, study, round_, body, digest) in enumerate(rows[begin:], start=begin):
        if number != position or digest != _hash(number, head, body):
            raise LedgerDamaged(f"{file}: row {position} was changed, or a row is missing")
        head = digest
        if number == 0:
            continue
        charge = _charge(number, body, digest, file)
        if (charge.study, charge.round) != (study, round_) or charge.time < last:
            raise LedgerDamaged(f"{file}: row {position} contradicts itself or its time runs backwards")
        last = charge.time
        charges.append(charge)
    return Chain(rows, _terms(rows[0][3], file), tuple(charges))


def _create(folder: Path, terms: Terms, *, durable: bool) -> None:
    """A ledger with its opening row, complete before it gets its name."""
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".{FILE}.{os.getpid()}.tmp"
    body = json.dumps(asdict(terms), sort_keys=True)
    write_rows(temporary, [(0, "", 0, body, _hash(0, _START, body))], durable=durable)
    with contextlib.suppress(FileExistsError):  # another process was first: its ledger holds
        os.link(temporary, folder / FILE)
    temporary.unlink()


def _append(connection: sqlite3.Connection, row: Row) -> None:
    connection.execute("INSERT INTO entry VALUES (?, ?, ?, ?, ?)", row)


def _charge(number: int, body: str, digest: str, file: Path) -> Charge:
    try:
        fields: dict[str, Any] = json.loads(body)
        event = Event(
            sample_rate=fields["sample_rate"], noise_multiplier=fields["noise_multiplier"], count=fields["count"]
        )
        _check_event(event)
        at, study, round_, journal = float(fields["time"]), fields["study"], fields["round"], fields["journal"]
        if not math.isfinite(at) or [type(study), type(round_), type(journal)] != [str, int, str]:
            raise ValueError("time, study, round and journal are not of their types")
        if journal and not _NOTED.fullmatch(journal):
            raise ValueError(f"{journal!r} is no line of a journal")
        return Charge(number=number, time=at, study=study, round=round_, event=event, hash=digest, journal=journal)
    except (KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
        raise LedgerDamaged(f"{file}: row {number} is no charge: {error}") from None


def _terms(body: str, file: Path) -> Terms:
    try:
        terms = Terms(**json.loads(body))
        _check_terms(terms)
    except (TypeError, ValueError, RecursionError) as error:
        raise LedgerDamaged(f"{file}: the opening row says no terms: {error}") from None
    return terms


def _hash(number: int, previous: str, body: str) -> str:
    return hashlib.sha256(f"{number}\n{previous}\n{body}".encode(errors="surrogatepass")).hexdigest()


def _now(last: float) -> float:
    """The time of a new row. Raises LedgerDamaged if the clock runs behind the last row."""
    now = time.time()
    if now < last - _CLOCK_TOLERANCE_S:
        raise LedgerDamaged(f"the clock is {last - now:.0f} s behind the last charge: set the clock right")
    return max(now, last)


def _check_event(event: Event) -> None:
    if not (0 < event.sample_rate <= 1) or not (0 < event.noise_multiplier < math.inf) or event.count < 1:
        raise ValueError(f"not a Poisson-sampled Gaussian: {event}")
    if type(event.count) is not int:
        raise ValueError(f"not a number of queries: {event}")


def _check_terms(terms: Terms) -> None:
    if not (0 < terms.epsilon < math.inf) or not (0 < terms.delta < 1) or terms.unit != "patient":
        raise ValueError(f"not terms of a ledger: {terms}")
    if terms.order is not None and (type(terms.order) is not int or terms.order < 2):
        raise ValueError(f"not the order of a filter: {terms}")
