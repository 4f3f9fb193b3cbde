"""The ledger: charge before computing, never overspend, never forget, refuse what was tampered with."""

from __future__ import annotations

import json
import math
import os
import signal
import sqlite3
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import client.ledger
from client.ledger import FILE, Ledger, Terms
from common.accounting import Event, epsilon
from common.errors import BudgetExceeded, InternalFailure, LedgerDamaged, RoundSpent

ROOT = Path(__file__).parent.parent
TERMS = Terms(epsilon=3.0, delta=1e-3)
EVENT = Event(sample_rate=0.1, noise_multiplier=2.0, count=6)
STUDY, OTHER = "a" * 64, "b" * 64


def change(folder: Path, statement: str, *values: object) -> None:
    connection = sqlite3.connect(folder / FILE)
    connection.execute(statement, values)
    connection.commit()
    connection.close()


def test_spent_is_the_composition_of_all_charges_across_studies(tmp_path: Path) -> None:
    ledger = Ledger.open(tmp_path, TERMS)
    assert ledger.spent() == 0.0
    stronger = Event(sample_rate=0.2, noise_multiplier=4.0, count=3)
    ledger.charge(study=STUDY, round=1, event=EVENT)
    ledger.charge(study=OTHER, round=1, event=stronger)
    assert Ledger.open(tmp_path, TERMS).spent() == epsilon([EVENT, stronger], TERMS.delta) > 0


def test_a_grant_covers_what_was_charged(tmp_path: Path) -> None:
    assert Ledger.open(tmp_path, TERMS).charge(study=STUDY, round=1, event=EVENT).left == 6


def test_overspend_is_refused_and_not_written(tmp_path: Path) -> None:
    ledger = Ledger.open(tmp_path, Terms(epsilon=1.0, delta=1e-3))
    for round_ in (1, 2, 3):
        ledger.charge(study=STUDY, round=round_, event=Event(0.1, 1.5, 6))
    with pytest.raises(BudgetExceeded, match=r"round 4 .* would bring epsilon to 1\.\d+; the budget is 1\.0000"):
        ledger.charge(study=STUDY, round=4, event=Event(0.1, 1.5, 6))
    assert [c.round for c in ledger.charges()] == [1, 2, 3]
    assert ledger.spent() <= 1.0
    with pytest.raises(BudgetExceeded):  # another study does not get round it
        ledger.charge(study=OTHER, round=1, event=Event(0.1, 1.5, 6))


def test_a_round_is_charged_once(tmp_path: Path) -> None:
    ledger = Ledger.open(tmp_path, TERMS)
    ledger.charge(study=STUDY, round=1, event=EVENT)
    with pytest.raises(RoundSpent):
        Ledger.open(tmp_path, TERMS).charge(study=STUDY, round=1, event=EVENT)
    ledger.charge(study=STUDY, round=2, event=EVENT)
    ledger.charge(study=OTHER, round=1, event=EVENT)
    assert len(ledger.charges()) == 3


@pytest.mark.parametrize(
    "terms", [Terms(epsilon=30.0, delta=1e-3), Terms(epsilon=3.0, delta=1e-2)], ids=["budget", "delta"]
)
def test_other_terms_are_refused(tmp_path: Path, terms: Terms) -> None:
    Ledger.open(tmp_path, TERMS)
    with pytest.raises(LedgerDamaged, match="was opened with"):
        Ledger.open(tmp_path, terms)


def test_another_unit_is_no_terms_at_all(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not terms of a ledger"):
        Ledger.open(tmp_path, Terms(epsilon=3.0, delta=1e-3, unit="image"))


@pytest.mark.parametrize(
    ("rate", "noise", "count"), [(0.0, 1.0, 1), (1.1, 1.0, 1), (math.nan, 1.0, 1), (0.1, 0.0, 1), (0.1, -1.0, 1),
                                 (0.1, math.nan, 1), (0.1, math.inf, 1), (0.1, 1.0, 0), (0.1, 1.0, -1)]
)  # fmt: skip
def test_what_is_no_mechanism_is_not_charged(tmp_path: Path, rate: float, noise: float, count: int) -> None:
    ledger = Ledger.open(tmp_path, TERMS)
    event = object.__new__(Event)  # past its own checks: the ledger must not rely on them
    for name, value in {"sample_rate": rate, "noise_multiplier": noise, "count": count}.items():
        object.__setattr__(event, name, value)
    with pytest.raises(ValueError, match="not a Poisson-sampled Gaussian"):
        ledger.charge(study=STUDY, round=1, event=event)
    assert ledger.charges() == ()


def test_a_missing_ledger_is_damage_and_not_a_full_budget(tmp_path: Path) -> None:
    ledger = Ledger.open(tmp_path, TERMS)
    (tmp_path / FILE).unlink()
    with pytest.raises(LedgerDamaged, match="is missing, but it was opened before: restore it from its backup"):
        Ledger.open(tmp_path, TERMS)
    with pytest.raises(LedgerDamaged):
        ledger.charge(study=STUDY, round=1, event=EVENT)


@pytest.mark.parametrize("keep", [0, 1, 100, 4096, 8000])
def test_a_torn_file_is_damage(tmp_path: Path, keep: int) -> None:
    Ledger.open(tmp_path, TERMS).charge(study=STUDY, round=1, event=EVENT)
    content = (tmp_path / FILE).read_bytes()
    assert len(content) > keep
    (tmp_path / FILE).write_bytes(content[:keep])
    with pytest.raises(LedgerDamaged):
        Ledger.open(tmp_path, TERMS)


@pytest.mark.parametrize(
    ("statement", "value"),
    [
        ("DELETE FROM entry WHERE number = ?", 2),
        ("DELETE FROM entry WHERE number = ?", 0),
        ("UPDATE entry SET round = 9 WHERE number = ?", 2),
        ("UPDATE entry SET body = replace(body, '\"count\": 6', '\"count\": 1') WHERE number = ?", 1),
        ("UPDATE entry SET hash = 'x' WHERE number = ?", 3),
        ("UPDATE entry SET number = 7 WHERE number = ?", 3),
    ],
)
def test_a_changed_row_is_noticed(tmp_path: Path, statement: str, value: int) -> None:
    ledger = Ledger.open(tmp_path, TERMS)
    for round_ in (1, 2, 3):
        ledger.charge(study=STUDY, round=round_, event=EVENT)
    change(tmp_path, statement, value)
    with pytest.raises(LedgerDamaged):
        ledger.charge(study=STUDY, round=4, event=EVENT)


def test_a_row_of_nonsense_with_a_right_hash_is_noticed(tmp_path: Path) -> None:
    ledger = Ledger.open(tmp_path, TERMS)
    ledger.charge(study=STUDY, round=1, event=EVENT)
    _, head = ledger.head()
    body = json.dumps(
        {"time": 9e9, "study": STUDY, "round": 2, "sample_rate": math.nan, "noise_multiplier": 1, "count": 1}
    )
    digest = client.ledger._hash(2, head, body)
    change(tmp_path, "INSERT INTO entry VALUES (2, ?, 2, ?, ?)", STUDY, body, digest)
    with pytest.raises(LedgerDamaged, match="row 2 is no charge"):
        ledger.charges()


def test_head_and_row_count_tell_a_rollback(tmp_path: Path) -> None:
    ledger = Ledger.open(tmp_path, TERMS)
    ledger.charge(study=STUDY, round=1, event=EVENT)
    backup, before = (tmp_path / FILE).read_bytes(), ledger.head()
    ledger.charge(study=STUDY, round=2, event=EVENT)
    after = ledger.head()
    (tmp_path / FILE).write_bytes(backup)
    assert (before[0], after[0]) == (1, 2)
    assert ledger.head() == before != after


def test_a_clock_that_runs_backwards_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = Ledger.open(tmp_path, TERMS)
    ledger.charge(study=STUDY, round=1, event=EVENT)
    true_time = time.time
    monkeypatch.setattr(client.ledger.time, "time", lambda: true_time() - 3600)
    with pytest.raises(LedgerDamaged, match="s behind the last charge: set the clock right"):
        ledger.charge(study=STUDY, round=2, event=EVENT)
    monkeypatch.setattr(client.ledger.time, "time", lambda: true_time() - 5)  # a clock that is being slewed
    ledger.charge(study=STUDY, round=2, event=EVENT)
    one, two = ledger.charges()
    assert one.time <= two.time


def test_concurrent_studies_never_overspend_together(tmp_path: Path) -> None:
    terms = Terms(epsilon=1.0, delta=1e-3)
    Ledger.open(tmp_path, terms)

    def attempt(number: int) -> bool:
        try:
            Ledger.open(tmp_path, terms).charge(study=f"{number:064d}", round=1, event=Event(0.1, 1.5, 6))
        except BudgetExceeded:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        accepted = sum(pool.map(attempt, range(8)))
    assert accepted == 3
    assert Ledger.open(tmp_path, terms).spent() <= 1.0


def test_a_busy_ledger_or_a_full_disk_is_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = Ledger.open(tmp_path, TERMS)
    monkeypatch.setattr(client.ledger, "_WAIT_S", 0.05)
    other = sqlite3.connect(tmp_path / FILE, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(InternalFailure, match="database is locked"):
        ledger.charge(study=STUDY, round=1, event=EVENT)
    other.close()

    def full(connection: sqlite3.Connection, *_: object) -> None:
        connection.execute("PRAGMA max_page_count = 1")
        connection.execute("CREATE TABLE more (x)")

    with monkeypatch.context() as disk:
        disk.setattr(client.ledger, "_append", full)
        with pytest.raises(InternalFailure, match="database or disk is full"):
            ledger.charge(study=STUDY, round=1, event=EVENT)
    ledger.charge(study=STUDY, round=1, event=EVENT)
    assert len(ledger.charges()) == 1


def test_a_ledger_is_read_under_its_own_terms(tmp_path: Path) -> None:
    Ledger.open(tmp_path, TERMS).charge(study=STUDY, round=1, event=EVENT)
    assert Ledger.existing(tmp_path) == Ledger(tmp_path, TERMS)
    change(tmp_path, "UPDATE entry SET body = replace(body, '3.0', '9.0') WHERE number = 0")
    with pytest.raises(LedgerDamaged, match="row 0 was changed"):
        Ledger.existing(tmp_path)
    with pytest.raises(LedgerDamaged):
        Ledger.existing(tmp_path / "nowhere")


_CHARGER = """
import sys
from pathlib import Path
from client.ledger import Ledger, Terms
from common.accounting import Event
ledger = Ledger.open(Path(sys.argv[1]), Terms(epsilon=3.0, delta=1e-3))
for round in range(1, 10_000):
    ledger.charge(study="a" * 64, round=round, event=Event(1e-4, 10.0, 1))
    print(round, flush=True)
"""


@pytest.mark.timeout(120)
def test_kill_at_any_moment_loses_no_charge(tmp_path: Path) -> None:
    """Every charge that was granted before the kill is in the ledger; the ledger opens again."""
    for attempt in range(3):
        folder = tmp_path / str(attempt)
        charger = subprocess.Popen(
            [sys.executable, "-c", _CHARGER, str(folder)], stdout=subprocess.PIPE, text=True, cwd=ROOT
        )
        assert charger.stdout is not None
        granted = [charger.stdout.readline() for _ in range(5 + 7 * attempt)]
        os.kill(charger.pid, signal.SIGKILL)
        granted += charger.stdout.readlines()
        charger.wait()
        rounds = [charge.round for charge in Ledger.open(folder, TERMS).charges()]
        last = max(int(line) for line in granted if line.strip())
        assert rounds == list(range(1, len(rounds) + 1))
        assert len(rounds) >= last
