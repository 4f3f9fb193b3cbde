"""A copy of the ledger, and the way back that gains no budget.

A restored ledger must hold every row that anybody here saw: the journal, `ledger.opened`, the stored releases, and the
ledger in its place if that can be read. Rows after the copy are taken from the journal, whose charges are the rows in
full. What can be had from neither is missed, and nothing is restored. Where all of these are as old as the copy, the
lab remembers: it says with its next instruction what it saw, and the worker refuses before it charges.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from client.journal import SiteJournal, charged_rows
from client.ledger import (
    FILE,
    MARKER,
    Chain,
    Ledger,
    Row,
    Terms,
    next_row,
    note_rows,
    noted_rows,
    read_chain,
    rolled_back,
    verified_chain,
    write_rows,
)
from client.release_store import ReleaseStore
from common.accounting import Event
from common.errors import LedgerDamaged, Problem, RunError, UsageError
from common.files import give_to_owner_of, sync_folder
from common.journal import Entry

_SIDE_FILES = ("", "-journal", "-wal", "-shm")  # a left -journal would be played into the restored ledger

Seen = tuple[str, int, str]  # by whom, row count, head


@dataclass(frozen=True)
class Restored:
    """What is in place now."""

    rows: int
    replayed: int  # of them, from the journal


def backup(state: Path, file: Path) -> Chain:
    """Copy the ledger in `state` to `file`, whole or not at all, also while it is being charged.

    Raises LedgerDamaged, or UsageError if `file` holds what this ledger does not.
    """
    chain = Ledger.existing(state).chain()
    if file.exists() and not chain.holds(*read_chain(file).head):
        what = "holds rows that the site's ledger does not"
        raise UsageError(Problem(str(file), what, "it may be the newer one: keep it, and give another file"))
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        write_rows(temporary, chain.rows)
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(file.absolute().parent)
    return chain


def restore(state: Path, file: Path, *, terms: Terms, journal: SiteJournal, by: str) -> Restored:
    """Put the ledger in `file` into `state`, with what was charged since; the caller sees to it that no worker runs.

    Raises LedgerDamaged or JournalDamaged if one of the two cannot be believed, LedgerRolledBack if a row is missed,
    RunError if the ledger in its place holds all of it.
    """
    copy, entries = read_chain(file), journal.entries()
    if copy.terms != terms:
        raise LedgerDamaged(f"{file} was opened with {copy.terms}; site.yaml says {terms}")
    chain = verified_chain(_continued(copy.rows, charged_rows(entries), file), file)
    present = _readable(state / FILE)
    for witness, rows, head in _seen(state, entries, present):
        if not chain.holds(rows, head):
            raise rolled_back(file, rows, witness)
    if present and present.holds(*chain.head):
        raise RunError(f"the ledger in {state} is sound and holds all {chain.head[0]} rows: nothing is to be restored")
    replayed = len(chain.rows) - len(copy.rows)
    journal.restored(by=by, rows=chain.head[0], replayed=replayed)
    _put(state, chain)
    return Restored(chain.head[0], replayed)


def _continued(rows: tuple[Row, ...], charged: Mapping[int, Entry], file: Path) -> tuple[Row, ...]:
    """`rows`, and after them those of the journal that follow without a gap."""
    continued = list(rows)
    while entry := charged.get(len(continued)):
        try:
            event = Event(entry.number_of("sample_rate"), entry.number_of("noise_multiplier"), entry.count("count"))
        except ValueError as error:
            raise LedgerDamaged(f"entry {entry.number} of the journal is no charge: {error}") from None
        at, study, round = entry.number_of("charged"), entry.text("study"), entry.count("round")
        after = entry.text("after")
        row = next_row(continued[-1], time=at, study=study, round=round, event=event, journal=after)
        if row[4] != entry.text("hash"):
            raise LedgerDamaged(f"{file} does not lead to row {row[0]} of the journal: it is another ledger")
        continued.append(row)
    return tuple(continued)


def _seen(state: Path, entries: list[Entry], present: Chain | None) -> Iterator[Seen]:
    """Everything here that ever saw the ledger."""
    for row, entry in charged_rows(entries).items():
        yield "the journal", row, entry.text("hash")
    for rows, head in noted_rows(state):
        yield MARKER, rows, head
    for folder in sorted((state / "releases").glob("*")):
        store = ReleaseStore(folder)
        for round in store.rounds():
            release = store.load(round)
            if release is not None and release.ledger_head:
                yield f"the release of round {round} in {folder}", release.ledger_rows, release.ledger_head
    if present:
        yield f"the ledger in {state}", *present.head


def _readable(file: Path) -> Chain | None:
    try:
        return read_chain(file, mode="rw")
    except LedgerDamaged:
        return None


def _put(state: Path, chain: Chain) -> None:
    """In the ledger's place; what was there stays beside it. A kill in between leaves none, which is refused."""
    temporary, aside = state / f".{FILE}.{os.getpid()}.tmp", f"{FILE}.replaced-{time.time_ns()}"
    write_rows(temporary, chain.rows)
    give_to_owner_of(state, temporary)
    for side in _SIDE_FILES:
        if (state / (FILE + side)).exists():
            (state / (FILE + side)).rename(state / (aside + side))
    note_rows(state, *chain.head)  # before the name: a marker makes a missing ledger a damaged one
    os.replace(temporary, state / FILE)
    sync_folder(state)
