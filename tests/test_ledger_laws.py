"""Whatever happens to a ledger: spent is never below the truth, never above the budget.

The truth is kept beside it: every charge that was granted, so that a release may have come of it. Rules charge, charge
again, kill inside the transaction and after it, restart, set the clock, put older copies back, tear and change the
file, back up and restore. A ledger that was harmed may refuse everything; it may not forget.
"""

from __future__ import annotations

import contextlib
import shutil
import sqlite3
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from unittest import mock

import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as some
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

import client.ledger
from client.journal import SiteJournal
from client.ledger import FILE, MARKER, Ledger, Terms
from client.ledger_backup import backup, restore
from client.membership import SITE_KEY
from client.release_store import ReleaseStore
from common.accounting import Event, epsilon_adaptive
from common.errors import BudgetExceeded, LedgerDamaged, Refusal, RoundSpent, RunError
from common.keys import make_signing_key

TERMS = Terms(epsilon=0.9, delta=1e-4, order=12)  # a filter: microseconds for a charge, and the same code around it
EVENTS = [Event(1.0, 20.0, 9), Event(1.0, 30.0, 4), Event(0.5, 8.0, 6)]
STUDIES = ["a" * 64, "b" * 64]
NEVER = "0" * 64


class Killed(BaseException):
    """The process ends here."""


def truth(events: Iterable[Event]) -> float:
    """Epsilon without the ledger's own arithmetic."""
    return epsilon_adaptive(events, 1e-4, order=12)


class LedgerLaws(RuleBasedStateMachine):
    """One site's ledger and journal, on disk, in the hands of everybody."""

    done: Counter[str] = Counter()  # what the rules did, over all examples

    def __init__(self) -> None:
        super().__init__()
        self.done["examples"] += 1
        self.folder = Path(tempfile.mkdtemp())
        self.state = self.folder / "state"
        make_signing_key(self.state / SITE_KEY)
        self.journal = SiteJournal.of(self.state)
        self.granted: dict[tuple[str, int], Event] = {}  # the truth
        self.clock = 1e9
        self.copies: list[bytes] = []
        self.backups: list[Path] = []
        self.sound = True  # nobody harmed the ledger since it was last right
        Ledger.open(self.state, TERMS)
        self.write_up()
        self.back_up()
        self.copy()

    def teardown(self) -> None:
        shutil.rmtree(self.folder)

    @property
    def file(self) -> Path:
        return self.state / FILE

    def write_up(self) -> None:
        self.journal.write_up(NEVER, Ledger.open(self.state, TERMS), ReleaseStore(self.state / "releases" / NEVER))

    def charge_as_a_worker(self, study: str, round: int, event: Event) -> None:
        """As Worker._train does: write up, charge, write up."""
        with mock.patch.object(client.ledger.time, "time", return_value=self.clock):
            self.write_up()
            ledger = Ledger.open(self.state, TERMS)
            ledger.charge(study=study, round=round, event=event)
            self.granted[study, round] = event
            self.write_up()

    @rule(study=some.sampled_from(STUDIES), round=some.integers(1, 4), event=some.sampled_from(EVENTS))
    def charge(self, study: str, round: int, event: Event) -> None:
        self.clock += 10
        before = (study, round) in self.granted
        try:
            self.charge_as_a_worker(study, round, event)
        except RoundSpent:
            assert before or not self.sound or "killed" in self.done
            self.done["a second charge refused"] += 1
        except BudgetExceeded:
            self.done["overspend refused"] += 1
        except Refusal:
            assert not self.sound
            self.done["refused, for the ledger was harmed"] += 1
        else:
            assert not before
            self.done["charged"] += 1

    @precondition(lambda self: self.sound)
    @rule(moment=some.sampled_from(["before", "inside", "after"]), round=some.integers(1, 4))
    def kill(self, moment: str, round: int) -> None:
        """Before the row is written, after it and before the commit, after the commit and before it is noted."""
        if (STUDIES[0], round) in self.granted:
            return
        self.clock += 10
        real = client.ledger._append

        def append(connection: sqlite3.Connection, row: client.ledger.Row) -> None:
            if moment != "before":
                real(connection, row)
            raise Killed

        patched = ("note_rows", mock.Mock(side_effect=Killed)) if moment == "after" else ("_append", append)
        ledger = Ledger.open(self.state, TERMS)
        with (
            mock.patch.object(client.ledger, *patched),
            mock.patch.object(client.ledger.time, "time", return_value=self.clock),
            contextlib.suppress(Killed, BudgetExceeded, RoundSpent),
        ):
            ledger.charge(study=STUDIES[0], round=round, event=EVENTS[0])
        self.done["killed"] += 1
        self.write_up()

    @precondition(lambda self: self.sound)
    @rule(back=some.sampled_from([30.0, 3600.0]))
    def set_the_clock_back(self, back: float) -> None:
        last = max((charge.time for charge in Ledger.open(self.state, TERMS).charges()), default=0)
        if not last:
            return
        true, self.clock = self.clock, last - back
        study, round = "c" * 64, len(self.granted) + 100
        refused = pytest.raises((LedgerDamaged, BudgetExceeded), match=r"set the clock right|the budget is")
        with refused if back > 60 else contextlib.suppress(BudgetExceeded):
            self.charge_as_a_worker(study, round, EVENTS[0])
        self.done["clock set back"] += 1
        self.clock = true

    @precondition(lambda self: self.sound)
    @rule()
    def copy(self) -> None:
        self.copies.append(self.file.read_bytes())

    @precondition(lambda self: self.sound)
    @rule()
    def back_up(self) -> None:
        to = self.folder / f"backup-{len(self.backups)}"
        backup(self.state, to)
        self.backups.append(to)

    @precondition(lambda self: self.sound)
    @rule(
        how=some.sampled_from(["lost", "an older copy put back", "and its marker lost", "bytes changed", "torn"]),
        where=some.floats(0, 1),
        what=some.sampled_from([b"\0", b"\xff" * 40, b"1"]),
    )
    def harm(self, how: str, where: float, what: bytes) -> None:
        content = self.file.read_bytes() if self.file.exists() else b""
        at = int(where * len(content))
        match how:
            case "lost":
                self.file.unlink(missing_ok=True)
            case "an older copy put back" | "and its marker lost":
                self.file.write_bytes(self.copies[int(where * (len(self.copies) - 1))])
                if how == "and its marker lost":
                    (self.state / MARKER).write_text("")
            case "bytes changed":
                self.file.write_bytes(content[:at] + what + content[at + len(what) :])
            case "torn":
                self.file.write_bytes(content[:at])
        self.sound = False
        self.done[how] += 1

    @rule(which=some.integers(0, 99))
    def restore(self, which: int) -> None:
        """From any backup, also the oldest: with the journal all is there again."""
        try:
            restore(self.state, self.backups[which % len(self.backups)], terms=TERMS, journal=self.journal, by="a test")
        except RunError:
            self.done["nothing to restore"] += 1
            return
        except LedgerDamaged:
            self.done["restore refused"] += 1
            return
        self.sound = True
        self.done["restored"] += 1

    @invariant()
    def spent_is_between_the_truth_and_the_budget(self) -> None:
        try:
            ledger = Ledger.open(self.state, TERMS)
            self.journal.write_up(NEVER, ledger, ReleaseStore(self.state / "releases" / NEVER))
            charges, spent = ledger.charges(), ledger.spent()
        except Refusal:
            assert not self.sound
            return
        held = {(charge.study, charge.round): charge.event for charge in charges}
        assert self.granted.items() <= held.items(), "a charge was forgotten"
        assert truth(self.granted.values()) <= spent + 1e-12
        assert truth(held.values()) <= TERMS.epsilon, "more than the budget is spent"


def run(machine: type[LedgerLaws], *, examples: int) -> None:
    machine.done = Counter()
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=25,
            deadline=None,
            derandomize=True,
            database=None,
            report_multiple_bugs=False,
            phases=[Phase.generate],  # a bug that is found is found: nothing is gained by a smaller example
        ),
    )


@pytest.mark.timeout(300)
def test_spent_is_never_below_the_truth_and_never_above_the_budget() -> None:
    run(LedgerLaws, examples=30)
    sys.stdout.write(f"{dict(LedgerLaws.done)}\n")
    assert LedgerLaws.done["examples"] >= 30
    for kinds, least in (
        (["charged"], 10),
        (["killed", "clock set back", "restored"], 5),
        (["lost", "an older copy put back", "and its marker lost", "bytes changed", "torn"], 3),
        (["a second charge refused", "overspend refused", "refused, for the ledger was harmed"], 10),
    ):
        assert sum(LedgerLaws.done[kind] for kind in kinds) >= least, kinds


def forgets_to_charge(self: Ledger, *, study: str, round: int, event: Event) -> None:
    """Writes nothing at every third round."""
    if round % 3:
        REAL_CHARGE(self, study=study, round=round, event=event)


def trusts_the_file(folder: Path) -> set[tuple[int, str]]:
    """Nothing that was noted counts."""
    return set()


def restores_as_it_is(rows: tuple[client.ledger.Row, ...], *_: object) -> tuple[client.ledger.Row, ...]:
    """Nothing that was charged since the backup comes back."""
    return rows


REAL_CHARGE = Ledger.charge
PLANTED = {
    "a charge that is not written": [("client.ledger.Ledger.charge", forgets_to_charge)],
    "a budget that is not checked": [("client.ledger.epsilon_adaptive", lambda events, delta, order: 0.1)],
    "rollbacks that nobody remembers": [
        ("client.ledger.noted_rows", trusts_the_file),
        ("client.journal._missing", lambda *_: []),
    ],
    "a restored backup that gains budget": [
        ("client.ledger_backup._continued", restores_as_it_is),
        ("client.ledger_backup._seen", lambda *_: iter(())),
        ("client.ledger.noted_rows", trusts_the_file),
        ("client.journal._missing", lambda *_: []),
    ],
}


@pytest.mark.timeout(300)
@pytest.mark.parametrize("bug", PLANTED)
def test_a_planted_bug_is_found(bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for target, replacement in PLANTED[bug]:
        monkeypatch.setattr(target, replacement)
    with pytest.raises(AssertionError):
        run(type("Planted", (LedgerLaws,), {}), examples=30)
