"""The ledger: charge before computing, never overspend, never forget, refuse what was tampered with."""

from __future__ import annotations

import functools
import json
import math
import os
import signal
import sqlite3
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import client.ledger
from client.ledger import FILE, MARKER, Ledger, Terms, read_chain
from client.site import Budget
from common.accounting import Event, epsilon, epsilon_adaptive, filter_order
from common.errors import BudgetExceeded, InternalFailure, LedgerDamaged, LedgerRolledBack, RoundSpent

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


def test_a_round_hashes_its_own_rows_and_a_changed_one_is_noticed_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger, hashed, hash_of = Ledger.open(tmp_path, TERMS), [], client.ledger._hash
    for round_ in (1, 2, 3):
        ledger.charge(study=STUDY, round=round_, event=Event(0.01, 4.0, 1))
    ledger.chain()
    monkeypatch.setattr(client.ledger, "_hash", lambda *row: (hashed.append(row[0]), hash_of(*row))[1])
    ledger.charge(study=STUDY, round=4, event=Event(0.01, 4.0, 1))
    assert ledger.chain() == Ledger.open(tmp_path, TERMS).chain()
    assert hashed[:2] == [4, 4]  # made, and read back; the other ledger object reads them all
    change(tmp_path, "UPDATE entry SET body = replace(body, '\"count\": 1', '\"count\": 0') WHERE number = 2")
    with pytest.raises(LedgerDamaged, match="row 2 was changed"):
        ledger.chain()


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
    assert read_chain(tmp_path / FILE).head == before != after
    with pytest.raises(LedgerRolledBack, match=r"does not hold row 2 as ledger\.opened knows it"):
        ledger.head()
    with pytest.raises(LedgerRolledBack, match="ledger restore` the newest backup"):
        ledger.charge(study=STUDY, round=2, event=EVENT)
    with pytest.raises(LedgerRolledBack):
        Ledger.open(tmp_path, TERMS)


def test_a_ledger_that_went_another_way_since_is_noticed_at_any_length(tmp_path: Path) -> None:
    ledger = Ledger.open(tmp_path, TERMS)
    for round_ in (1, 2):
        ledger.charge(study=STUDY, round=round_, event=EVENT)
    seen = ledger.head()
    ledger.require_holds(*seen, witness="the lab")
    ledger.require_holds(1, ledger.charges()[0].hash, witness="the lab")
    for file in tmp_path.glob("ledger.*"):
        file.unlink()
    again = Ledger.open(tmp_path, TERMS)  # nothing here remembers
    for round_ in (1, 2, 3):
        again.charge(study=OTHER, round=round_, event=EVENT)
    with pytest.raises(LedgerRolledBack, match="row 2 as the lab knows it"):
        again.require_holds(*seen, witness="the lab")
    for rows in (-1, 4):
        with pytest.raises(LedgerRolledBack):
            again.require_holds(rows, again.head()[1], witness="the lab")


@pytest.mark.parametrize("torn", [b"", b"\n", b"\n1", b"\n7 " + b"f" * 63, b"\n\xff\x00", b"garbage"], ids=repr)
def test_a_note_that_a_crash_tore_says_nothing_and_hides_none(tmp_path: Path, torn: bytes) -> None:
    ledger = Ledger.open(tmp_path, TERMS)
    ledger.charge(study=STUDY, round=1, event=EVENT)
    older = (tmp_path / FILE).read_bytes()
    with (tmp_path / MARKER).open("ab") as marker:
        marker.write(torn)
    ledger.charge(study=STUDY, round=2, event=EVENT)
    assert len(ledger.charges()) == 2
    (tmp_path / FILE).write_bytes(older)
    with pytest.raises(LedgerRolledBack):
        ledger.charges()


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


@pytest.mark.parametrize(("durable", "level"), [(True, 2), (False, 0)])
def test_sqlite_waits_for_the_disk_where_the_ledger_is_durable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, durable: bool, level: int
) -> None:
    """2 is FULL: the journal is on the disk before the file changes, and the file before a charge returns."""
    seen, append = [], client.ledger._append

    def watched(connection: sqlite3.Connection, row: client.ledger.Row) -> None:
        seen.append(connection.execute("PRAGMA synchronous").fetchone()[0])
        append(connection, row)

    monkeypatch.setattr(client.ledger, "_append", watched)
    Ledger.open(tmp_path, TERMS, durable=durable).charge(study=STUDY, round=1, event=EVENT)
    assert seen == [level, level]  # the opening row, and the charge


_CHARGER = """
import sys
from pathlib import Path
from client.ledger import Ledger, Terms
from common.accounting import Event
ledger = Ledger.open(Path(sys.argv[1]), Terms(epsilon=3.0, delta=1e-3), durable=sys.argv[2] == "durable")
for round in range(1, 10_000):
    ledger.charge(study="a" * 64, round=round, event=Event(1e-4, 10.0, 1))
    print(round, flush=True)
"""


@pytest.mark.timeout(120)
@pytest.mark.parametrize("kept", ["durable", "simulated"])
def test_kill_at_any_moment_loses_no_charge(tmp_path: Path, kept: str) -> None:
    """Every charge that was granted before the kill is in the ledger; the ledger opens again."""
    for attempt in range(2):
        folder = tmp_path / str(attempt)
        charger = subprocess.Popen(
            [sys.executable, "-c", _CHARGER, str(folder), kept], stdout=subprocess.PIPE, text=True, cwd=ROOT
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


def gaussian_delta(epsilon_: float, mu: float) -> float:
    """Of a mu-Gaussian mechanism (Dong, Roth, Su 2022, corollary 1)."""
    normal = statistics.NormalDist()
    return normal.cdf(mu / 2 - epsilon_ / mu) - math.exp(epsilon_) * normal.cdf(-mu / 2 - epsilon_ / mu)


def test_studies_and_mechanisms_compose_as_the_closed_form_says(tmp_path: Path) -> None:
    """Unsampled Gaussians with z_i are together one with mu^2 = sum of count_i / z_i^2, whoever asked them."""
    ledger = Ledger.open(tmp_path, Terms(epsilon=5.0, delta=1e-4))
    asked = [(STUDY, Event(1.0, 8.0, 6)), (OTHER, Event(1.0, 12.0, 10)), (STUDY, Event(1.0, 6.0, 3))]
    for round_, (study, event) in enumerate(asked, start=1):
        ledger.charge(study=study, round=round_, event=event)
    mu = math.sqrt(sum(event.count / event.noise_multiplier**2 for _, event in asked))
    assert gaussian_delta(ledger.spent() - 2e-3, mu) > 1e-4 >= gaussian_delta(ledger.spent(), mu)


def test_a_mixture_of_mechanisms_composes_as_another_accountant_says(tmp_path: Path) -> None:
    """By dp-accounting's distributions themselves, added up in another order, in both directions of the adjacency."""
    from dp_accounting.pld import privacy_loss_distribution as pld

    events = [Event(0.1, 2.0, 6), Event(1.0, 9.0, 2), Event(0.3, 4.0, 12), Event(0.1, 2.0, 3)]
    ledger = Ledger.open(tmp_path, TERMS)
    for round_, event in enumerate(events, start=1):
        ledger.charge(study=STUDY if round_ % 2 else OTHER, round=round_, event=event)
    parts = [
        pld.from_gaussian_mechanism(
            e.noise_multiplier, sampling_prob=e.sample_rate, value_discretization_interval=1e-3
        ).self_compose(e.count)
        for e in reversed(events)
    ]
    composed = functools.reduce(lambda one, other: one.compose(other), parts)
    assert ledger.spent() == pytest.approx(composed.get_epsilon_for_delta(TERMS.delta), abs=2e-3)


FILTER = Budget(epsilon=3.0, delta=1e-4, mode="filter")


def test_a_filter_adds_divergences_of_its_own_order(tmp_path: Path) -> None:
    """Gaussians: order * sum of count / (2 z^2), and its epsilon by Canonne, Kamath, Steinke 2020."""
    order = FILTER.terms().order
    assert order is not None
    ledger = Ledger.open(tmp_path, FILTER.terms())
    for round_, noise in enumerate((8.0, 30.0, 11.5), start=1):
        ledger.charge(study=STUDY, round=round_, event=Event(1.0, noise, 2))
    rho = sum(order * 2 / (2 * noise**2) for noise in (8.0, 30.0, 11.5))
    expected = rho + math.log1p(-1 / order) - math.log(1e-4 * order) / (order - 1)
    assert ledger.spent() == pytest.approx(expected, rel=1e-9)
    assert Ledger.existing(tmp_path).terms.order == order


def test_a_filter_holds_however_the_parameters_are_chosen(tmp_path: Path) -> None:
    """An adversary that always asks for most of what is left ends at the budget, and one query more is refused."""
    ledger, terms = Ledger.open(tmp_path, FILTER.terms()), FILTER.terms()
    charged: list[Event] = []
    for round_ in range(1, 8):
        noises = [0.5 * 1.3**i for i in range(40)]
        noise = next(z for z in noises if terms.spent([*charged, Event(0.2, z, 1)]) <= terms.epsilon)
        ledger.charge(study=STUDY, round=round_, event=Event(0.2, noise, 1))
        charged.append(Event(0.2, noise, 1))
    assert 0.8 * terms.epsilon < ledger.spent() <= terms.epsilon
    with pytest.raises(BudgetExceeded):
        ledger.charge(study=STUDY, round=8, event=Event(0.2, 0.5, 1))


def test_mode_and_order_are_terms_of_the_opening(tmp_path: Path) -> None:
    plan = Budget(epsilon=3.0, delta=1e-4).terms()
    assert plan.order is None
    Ledger.open(tmp_path, FILTER.terms())
    for other in (plan, Terms(epsilon=3.0, delta=1e-4, order=64)):
        with pytest.raises(LedgerDamaged, match="was opened with"):
            Ledger.open(tmp_path, other)
    with pytest.raises(ValueError, match="order of a filter"):
        Ledger.open(tmp_path / "new", Terms(epsilon=3.0, delta=1e-4, order=1))


@pytest.mark.parametrize(("budget", "delta"), [(8.0, 2e-4), (3.0, 1e-5), (1.0, 1e-5)])
def test_a_filters_order_is_close_to_the_best_in_hindsight(budget: float, delta: float) -> None:
    """At q .1 and the noise at which a plan has 200 queries: nearly as many as at the best order, known only after."""
    order, noise = filter_order(epsilon=budget, delta=delta), {8.0: 1.012, 3.0: 2.179, 1.0: 5.429}[budget]

    def borne(at: int) -> int:
        costs = [epsilon_adaptive([Event(0.1, noise, n)], delta, order=at) for n in (1, 101)]
        return int(1 + 100 * (budget - costs[0]) / (costs[1] - costs[0]))  # divergences add up: a straight line

    best = max(borne(at) for at in range(max(2, order // 2), 2 * order))
    assert borne(order) >= 0.96 * best
    assert 140 <= borne(order) < 200  # what not fixing the schedule costs


def test_a_budget_that_no_order_can_bear_is_refused() -> None:
    with pytest.raises(ValueError, match="a filter bears nothing within epsilon"):
        Budget(epsilon=0.001, delta=1e-9, mode="filter")


_RACER = """
import sys
from pathlib import Path
from client.ledger import Ledger, Terms
from common.accounting import Event
from common.errors import BudgetExceeded, RoundSpent
ledger, study = Ledger.open(Path(sys.argv[1]), Terms(epsilon=1.0, delta=1e-3, order=12)), sys.argv[2] * 64
for round in (1, 2, 3):
    for who in (study, "f" * 64):  # a study of its own, and one that all processes serve
        try:
            ledger.charge(study=who, round=round, event=Event(1.0, 20.0, 6))
            print(who[0], round, flush=True)
        except (BudgetExceeded, RoundSpent) as refusal:
            print(type(refusal).__name__, flush=True)
"""


@pytest.mark.timeout(120)
def test_processes_charge_one_ledger_and_never_too_much(tmp_path: Path) -> None:
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", _RACER, str(tmp_path), who], stdout=subprocess.PIPE, text=True, cwd=ROOT
        )
        for who in "abc"
    ]
    said = [line for racer in racers for line in racer.communicate()[0].splitlines()]
    assert [racer.returncode for racer in racers] == [0, 0, 0]
    granted = [line for line in said if line[1] == " "]
    ledger = Ledger.existing(tmp_path)
    assert sorted(granted) == sorted(f"{c.study[0]} {c.round}" for c in ledger.charges())
    assert len(granted) == len(set(granted)) > 3
    assert "BudgetExceeded" in said
    assert 0.7 < ledger.spent() <= 1.0
