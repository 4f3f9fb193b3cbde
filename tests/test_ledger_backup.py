"""Backup and restore: what comes back is the ledger with everything that was charged since, or nothing at all."""

from __future__ import annotations

import shutil
import sqlite3
from pathlib import Path

import pytest
from typer.testing import CliRunner

from client.cli import app
from client.journal import FILE as JOURNAL
from client.journal import SiteJournal
from client.ledger import FILE, MARKER, Ledger, Terms, read_chain
from client.ledger_backup import backup, restore
from client.membership import SITE_KEY
from client.node import WORKER
from client.release_store import ReleaseStore
from common.accounting import Event
from common.errors import BudgetExceeded, LedgerDamaged, LedgerRolledBack, RoundSpent, RunError, UsageError
from common.keys import make_signing_key
from common.records import SiteReply
from common.service import only_instance
from tests.conftest import SiteMaker

TERMS = Terms(epsilon=3.0, delta=1e-3, order=6)
EVENT = Event(1.0, 20.0, 4)
STUDY = "a" * 64


class Site:
    """A state folder in which charges are written up as a worker does."""

    def __init__(self, state: Path) -> None:
        self.state = state
        make_signing_key(state / SITE_KEY)
        self.journal = SiteJournal.of(state)
        self.releases = ReleaseStore(state / "releases" / STUDY)
        self.ledger = Ledger.open(state, TERMS)

    def charge(self, *rounds: int, told: bool = True) -> None:
        for number in rounds:
            self.ledger.charge(study=STUDY, round=number, event=EVENT)
            if told:
                self.journal.write_up(STUDY, self.ledger, self.releases)

    def restore(self, file: Path):
        return restore(self.state, file, terms=TERMS, journal=self.journal, by="Dr Example")


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path / "state")


@pytest.fixture
def copy(site: Site, tmp_path: Path) -> Path:
    """A backup after two rounds of five."""
    site.charge(1, 2)
    backup(site.state, tmp_path / "copy")
    site.charge(3, 4, 5)
    return tmp_path / "copy"


def test_a_backup_is_whole_private_and_replaces_an_older_one(site: Site, tmp_path: Path) -> None:
    site.charge(1)
    first = backup(site.state, tmp_path / "copy")
    assert read_chain(tmp_path / "copy") == first
    assert oct((tmp_path / "copy").stat().st_mode & 0o777) == "0o600"
    site.charge(2)
    assert backup(site.state, tmp_path / "copy").head == site.ledger.head()
    assert [path.name for path in tmp_path.iterdir()] == ["state", "copy"] or len(list(tmp_path.iterdir())) == 2


def test_a_backup_of_more_than_the_ledger_holds_is_kept(site: Site, copy: Path, tmp_path: Path) -> None:
    newer = tmp_path / "newer"
    backup(site.state, newer)
    for name in (FILE, MARKER):
        (site.state / name).unlink()
    shutil.copy(copy, site.state / FILE)
    with pytest.raises(UsageError, match="holds rows that the site's ledger does not"):
        backup(site.state, newer)
    assert read_chain(newer).head[0] == 5


@pytest.mark.parametrize("how", ["lost", "torn", "changed", "older", "older-with-its-marker"])
def test_an_old_backup_comes_back_with_everything_that_was_charged_since(site: Site, copy: Path, how: str) -> None:
    file, head, spent = site.state / FILE, site.ledger.head(), site.ledger.spent()
    content = file.read_bytes()
    match how:
        case "lost":
            file.unlink()
        case "torn":
            file.write_bytes(content[:5000])
        case "changed":
            file.write_bytes(content.replace(b'"count": 4', b'"count": 1'))
        case "older":
            shutil.copy(copy, file)
        case "older-with-its-marker":
            shutil.copy(copy, file)
            (site.state / MARKER).write_text("")
    done = site.restore(copy)
    assert (done.rows, done.replayed) == (5, 3)
    assert (site.ledger.head(), site.ledger.spent()) == (head, spent)
    with pytest.raises(RoundSpent):
        site.charge(5)
    site.charge(6)
    *_, restored, charged = site.journal.verify(site.ledger)
    assert (restored.what, restored.text("by"), restored.count("replayed")) == ("ledger restored", "Dr Example", 3)
    assert charged.count("row") == 6
    assert how == "lost" or len(list(site.state.glob(f"{FILE}.replaced-*"))) == 1  # what was there is kept


def test_a_sound_ledger_is_not_replaced(site: Site, copy: Path) -> None:
    before = (site.state / FILE).read_bytes()
    with pytest.raises(RunError, match="is sound and holds all 5 rows"):
        site.restore(copy)
    assert (site.state / FILE).read_bytes() == before


def forget_the_journal(site: Site, row: int) -> None:
    """Only what was written up before `row` is left: a journal from a backup, too."""
    lines = (site.state / JOURNAL).read_bytes().splitlines(keepends=True)
    (site.state / JOURNAL).write_bytes(b"".join(lines[: row - 1]))


@pytest.mark.parametrize("witness", ["journal", MARKER, "release", "present"])
def test_a_row_that_anybody_saw_and_nobody_kept_is_missed(site: Site, copy: Path, witness: str) -> None:
    """One witness at a time; the others are as old as the backup."""
    row = 4 if witness == "journal" else 3
    if witness == "journal":  # it knows row 4 and 5, and not row 3: nobody can continue the chain
        whole, state = site.journal.entries(), site.state
        (state / JOURNAL).unlink()
        site.journal.journal.add(lambda _: iter([(e.what, e.fields) for e in whole if e.count("row") != 3]))
    else:
        forget_the_journal(site, 3)
    reply = SiteReply(site="elm", code="ok", round=4, ledger_rows=4, ledger_head=site.ledger.charges()[3].hash)
    if witness != MARKER:
        (site.state / MARKER).write_text("")
    if witness == "release":
        site.releases.store(reply, {})
        row = 4
    if witness != "present":
        (site.state / FILE).unlink()
    else:
        row = 5
    named = {"journal": "the journal", "release": "the release of round 4", "present": "the ledger in"}
    with pytest.raises(LedgerRolledBack, match=f"does not hold row .* as {named.get(witness, witness)}") as caught:
        site.restore(copy)
    assert witness == MARKER or f"row {row}" in str(caught.value)
    assert (site.state / FILE).exists() == (witness == "present")


def test_a_backup_of_another_ledger_is_refused(site: Site, copy: Path, tmp_path: Path) -> None:
    other = Site(tmp_path / "other")
    other.charge(7, 8)
    backup(other.state, tmp_path / "others")
    (site.state / FILE).unlink()
    with pytest.raises(LedgerDamaged, match="does not lead to row 3 of the journal: it is another ledger"):
        site.restore(tmp_path / "others")
    with pytest.raises(LedgerDamaged, match="was opened with"):
        restore(site.state, copy, terms=Terms(epsilon=9.0, delta=1e-3), journal=site.journal, by="x")


def test_a_killed_charge_is_not_played_into_the_restored_ledger(site: Site, copy: Path) -> None:
    """A hot SQLite journal beside the old file would overwrite pages of the new one."""
    (site.state / FILE).write_bytes(b"torn")
    hot = site.state / f"{FILE}-journal"
    hot.write_bytes(b"\xd9\xd5\x05\xf9\x20\xa1\x63\xd7" + bytes(600))
    site.restore(copy)
    assert not hot.exists()
    assert len(site.ledger.charges()) == 5
    assert sqlite3.connect(site.state / FILE).execute("PRAGMA integrity_check").fetchone() == ("ok",)


def test_a_restored_budget_is_the_budget_that_was_left(site: Site, tmp_path: Path) -> None:
    backup(site.state, tmp_path / "empty")
    with pytest.raises(BudgetExceeded):
        site.charge(*range(1, 1000))
    left = len(site.ledger.charges())
    (site.state / FILE).unlink()
    assert site.restore(tmp_path / "empty").replayed == left > 10
    with pytest.raises(BudgetExceeded):
        site.charge(5000)


def test_the_commands(make_site: SiteMaker, tmp_path: Path) -> None:
    folder, copy = make_site("alder"), tmp_path / "copy"
    state = folder / "state"
    make_signing_key(state / SITE_KEY)
    ledger = Ledger.open(state, Terms(epsilon=10.0, delta=0.01))
    ledger.charge(study=STUDY, round=1, event=EVENT)
    SiteJournal.of(state).write_up(STUDY, ledger, ReleaseStore(state / "releases" / STUDY))
    invoke = CliRunner().invoke
    assert "copy: 1 rows, head" in invoke(app, ["ledger", "backup", str(copy), "--site", str(folder)]).output
    (state / FILE).unlink()
    arguments = ["ledger", "restore", str(copy), "--site", str(folder), "--by", "Dr Example"]
    with only_instance(state, WORKER):
        assert "worker runs here already" in str(invoke(app, arguments).exception)
    assert invoke(app, arguments).output == "The ledger holds 1 rows again, the last 0 of them from the journal.\n"
    assert len(ledger.charges()) == 1
