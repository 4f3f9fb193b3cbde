"""The journal: whatever was changed in it is found at its place; what a crash tore costs nothing that was whole."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from typer.testing import CliRunner

import common.journal
from client import approval
from client.cli import app
from client.journal import FILE, SiteJournal
from client.ledger import FILE as LEDGER
from client.ledger import MARKER, Ledger
from client.membership import SITE_KEY
from common.errors import JournalDamaged, LedgerRolledBack
from common.journal import Entry, Found, Journal
from common.keys import STUDY, fingerprint, make_signing_key, public_hex, sign
from common.wire import pack
from tests.conftest import PlanMaker, SiteMaker
from tests.test_worker import LAB, instruct, prepare, real_worker

ROOT = Path(__file__).parents[1]
KEY = Ed25519PrivateKey.generate()


def add(journal: Journal, what: str, **fields: object) -> None:
    journal.add(lambda _: iter([(what, fields)]))


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    """Five entries."""
    journal = Journal(tmp_path / FILE, KEY)
    for number in range(5):
        add(journal, "asked", study=str(number), text='"}\n,"signature":"é')
    return journal


def test_what_goes_in_comes_out_signed_and_chained(journal: Journal) -> None:
    entries = journal.verified()
    assert [(e.number, e.what, e.text("study")) for e in entries] == [(n, "asked", str(n - 1)) for n in range(1, 6)]
    lines = journal.path.read_bytes().splitlines()
    assert len(lines) == 5
    plain = [json.loads(line) for line in lines]  # each line is JSON that any tool reads
    assert [entry["previous"] for entry in plain[1:]] == [sha256(line).hexdigest() for line in lines[:-1]]
    assert all(entry["key"] == public_hex(KEY) and len(entry["signature"]) == 128 for entry in plain)
    assert oct(journal.path.stat().st_mode & 0o777) == "0o600"


def without(lines: list[bytes], place: int) -> list[bytes]:
    return lines[:place] + lines[place + 1 :]


def swapped(lines: list[bytes]) -> list[bytes]:
    return [lines[0], lines[2], lines[1], *lines[3:]]


def resigned(lines: list[bytes]) -> list[bytes]:
    """Another word, with the same signature."""
    return [lines[0], lines[1].replace(b'"study":"1"', b'"study":"7"'), *lines[2:]]


def by_another_key(lines: list[bytes]) -> list[bytes]:
    """The last line, changed and signed anew by somebody who has not the site's key."""
    fields, other = json.loads(lines[-1]), Ed25519PrivateKey.generate()
    del fields["signature"]
    body = json.dumps(fields | {"study": "7", "key": public_hex(other)}, separators=(",", ":"))
    return [*lines[:-1], f'{body[:-1]},"signature":"{sign(common.journal.KIND, body, other).signature}"}}'.encode()]


@pytest.mark.parametrize(
    ("change", "place", "why"),
    [
        (lambda lines: without(lines, 0), 1, "does not follow the line before it"),
        (lambda lines: without(lines, 2), 3, "does not follow the line before it"),
        (swapped, 2, "does not follow the line before it"),
        (resigned, 2, "its signature is wrong"),
        (lambda lines: [lines[0], b"", *lines[1:]], 2, "is no entry"),
        (lambda lines: [lines[0], b"{}", *lines[1:]], 2, "is no entry"),
        (lambda lines: [*lines[:3], lines[3].replace(b"asked", b"\xff\xfe"), lines[4]], 4, "is no entry"),
        (lambda lines: [*lines, lines[-1]], 6, "does not follow the line before it"),
        (by_another_key, 5, "which is not this site's key"),
    ],
    ids=["first-gone", "one-gone", "swapped", "another-word", "empty", "no-entry", "no-text", "twice", "another-key"],
)
def test_a_change_is_found_at_its_place(journal, change, place, why):
    lines = journal.path.read_bytes().splitlines()
    journal.path.write_bytes(b"\n".join(change(lines)) + b"\n")
    with pytest.raises(JournalDamaged, match=rf"{FILE}:{place}: .*{re.escape(why)}"):
        journal.verified()


def test_nothing_is_written_behind_a_change(journal: Journal) -> None:
    changed = journal.path.read_bytes().replace(b'"study":"1"', b'"study":"7"')
    journal.path.write_bytes(changed)
    with pytest.raises(JournalDamaged, match=f"{FILE}:2: its signature is wrong"):
        add(journal, "asked", study="5")
    assert journal.path.read_bytes() == changed


def test_a_torn_line_costs_nothing_that_is_whole(journal: Journal) -> None:
    """Torn at every byte of the last line: the four before it stay, and what was torn is told."""
    content = journal.path.read_bytes()
    start = content[:-1].rindex(b"\n") + 1
    for cut in range(start, len(content), 37):
        journal.path.write_bytes(content[:cut])
        assert len(journal.verified()) == 4
        add(journal, "approved", study="x")
        *whole, last = journal.verified()
        assert [e.text("study") for e in whole[:4]] == ["0", "1", "2", "3"]
        assert (last.what, last.number) == ("approved", 5 if cut == start else 6)
        if cut > start:
            assert (whole[4].what, whole[4].text("text")) == ("torn", content[start:cut].decode())


def test_a_line_that_lacks_only_its_end_is_whole(journal: Journal) -> None:
    journal.path.write_bytes(journal.path.read_bytes()[:-1])
    assert len(journal.verified()) == 5
    add(journal, "approved")
    assert [e.what for e in journal.verified()] == ["asked"] * 5 + ["approved"]


def test_a_disk_that_is_full_leaves_what_was_there(journal: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    before = journal.path.read_bytes()

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as disk:
        disk.setattr(common.journal.os, "fsync", full)
        with pytest.raises(JournalDamaged, match="No space left on device"):
            add(journal, "approved")
    assert journal.path.read_bytes() == before
    add(journal, "approved")
    assert len(journal.verified()) == 6


def test_a_former_key_is_believed_only_by_name(journal: Journal) -> None:
    new = Journal(journal.path, Ed25519PrivateKey.generate())
    add(new, "approved")  # the site goes on with its new key
    with pytest.raises(JournalDamaged, match=f"{FILE}:1: is signed by {fingerprint(public_hex(KEY))}"):
        new.verified()
    assert len(new.verified(former=[fingerprint(public_hex(KEY))])) == 6


_WRITER = """
import sys
from pathlib import Path
from common.journal import Journal
from common.keys import load_signing_key
journal = Journal(Path(sys.argv[1]), load_signing_key(Path(sys.argv[2])))
for number in range(int(sys.argv[3])):
    journal.add(lambda entries: iter([("asked", {"seen": len(entries)})]))
    print(number, flush=True)
"""


@pytest.mark.timeout(120)
def test_processes_write_one_journal_and_a_kill_tears_nothing(tmp_path: Path) -> None:
    make_signing_key(tmp_path / SITE_KEY)
    key = common.keys.load_signing_key(tmp_path / SITE_KEY)
    command = [sys.executable, "-c", _WRITER, str(tmp_path / FILE), str(tmp_path / SITE_KEY)]
    patient = [subprocess.Popen([*command, "25"], stdout=subprocess.PIPE, cwd=ROOT) for _ in range(2)]
    killed = subprocess.Popen([*command, "100000"], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert killed.stdout is not None
    told = [killed.stdout.readline() for _ in range(5)]
    os.kill(killed.pid, signal.SIGKILL)
    told += killed.stdout.readlines()
    killed.wait()
    assert [process.wait() for process in patient] == [0, 0]
    entries = Journal(tmp_path / FILE, key).verified()
    written = [entry for entry in entries if entry.what == "asked"]
    assert len(written) >= 50 + len([line for line in told if line.strip()])
    assert all(entry.count("seen") == entry.number - 1 for entry in written)  # seen and written in one step


# ---- a site's journal ----------------------------------------------------------------------------------------------


def whats(state: Path) -> list[str]:
    return [entry.what for entry in SiteJournal.of(state).entries()]


def of_kind(state: Path, what: str) -> Iterator[Entry]:
    return (entry for entry in SiteJournal.of(state).entries() if entry.what == what)


def test_a_round_leaves_its_story(make_site: SiteMaker, make_plan: PlanMaker) -> None:
    """Asked by whom, refused and why, approved by whom, charged, released: digest and size of what left."""
    plan, folder = make_plan(), make_site("alder")
    state, worker = folder / "state", real_worker(folder)
    assert prepare(worker, plan).code == "not-approved"
    assert prepare(worker, plan).code == "not-approved"  # told once a day
    SiteJournal.of(state).approved(plan, by="Dr Example")
    approval.approve(state, plan, by="Dr Example", document=sign(STUDY, plan.to_json(), LAB))
    assert prepare(worker, plan).code == "ok"
    reply = worker.train(instruct(plan))
    assert worker.train(instruct(plan)).code == "ok"  # sent again: no second release
    assert worker.train(instruct(plan, round=99)).code == "bad-instruction"
    assert whats(state) == ["asked", "refused", "approved", "charged", "released", "refused"]
    asked, refused, approved, charged, released, again = SiteJournal.of(state).entries()
    assert (asked.text("study"), asked.text("lab")) == (plan.digest, fingerprint(public_hex(LAB)))
    assert (refused.text("study"), refused.text("code")) == (plan.digest, "not-approved")
    assert approved.text("by") == "Dr Example"
    assert (charged.count("row"), charged.text("hash"), charged.count("count")) == (1, reply.ledger_head, 3)
    packed = pack(reply)
    assert (released.text("sha256"), released.count("bytes")) == (sha256(packed).hexdigest(), len(packed))
    assert (again.text("study"), again.text("code")) == (plan.digest, "bad-instruction")
    assert len(SiteJournal.of(state).verify(Ledger.existing(state))) == 6


def test_refusals_of_strangers_do_not_fill_the_disk(make_site: SiteMaker, make_plan: PlanMaker) -> None:
    folder = make_site("alder")
    worker = real_worker(folder)
    for number in range(20):
        assert worker.train(instruct(make_plan(), plan_digest=f"{number:064d}")).code == "not-approved"
    assert [(e.text("study"), e.text("code")) for e in of_kind(folder / "state", "refused")] == [("", "not-approved")]


def trained(folder: Path, make_plan: PlanMaker, rounds: int):
    """A worker that released `rounds` rounds, and its plan."""
    plan, worker = make_plan(), real_worker(folder)
    approval.approve(folder / "state", plan, by="a test")
    assert prepare(worker, plan).code == "ok"
    for number in range(1, rounds + 1):
        assert worker.train(instruct(plan, number)).code == "ok"
    return worker, plan


def test_a_damaged_journal_stops_a_round_before_its_charge(make_site: SiteMaker, make_plan: PlanMaker) -> None:
    folder = make_site("alder")
    state = folder / "state"
    worker, plan = trained(folder, make_plan, 1)
    content = (state / FILE).read_bytes()
    (state / FILE).write_bytes(content.replace(b'"round":1', b'"round":2', 1))
    assert worker.train(instruct(plan, 2)).code == "journal-damaged"
    assert len(Ledger.existing(state).charges()) == 1  # nothing was lost
    assert worker.train(instruct(plan, 1)).code == "ok"  # what was paid for is sent
    (state / FILE).write_bytes(content)
    assert worker.train(instruct(plan, 2)).code == "ok"


def test_a_journal_that_fails_after_the_charge_stops_nothing_and_catches_up(
    make_site: SiteMaker, make_plan: PlanMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_site("alder")
    worker, plan = trained(folder, make_plan, 0)
    real, calls = Journal.add, []

    def failing(self: Journal, lacking: object) -> str:
        calls.append(1)
        if len(calls) > 1:
            raise JournalDamaged("the disk is full")
        return real(self, lacking)

    with monkeypatch.context() as full:
        full.setattr(Journal, "add", failing)
        assert worker.train(instruct(plan)).code == "ok"
    assert "charged" not in whats(folder / "state")
    assert worker.train(instruct(plan, 2)).code == "ok"
    assert [e.count("round") for e in of_kind(folder / "state", "charged")] == [1, 2]
    assert [e.count("round") for e in of_kind(folder / "state", "released")] == [1, 2]


def test_a_journal_whose_end_was_cut_off_is_found_by_the_ledger(make_site: SiteMaker, make_plan: PlanMaker) -> None:
    folder = make_site("alder")
    state = folder / "state"
    worker, plan = trained(folder, make_plan, 2)
    lines = (state / FILE).read_bytes().splitlines(keepends=True)
    (state / FILE).write_bytes(b"".join(lines[:2]))
    assert SiteJournal.of(state).verify(Ledger.existing(state))  # as after a kill between a charge and its entry
    (state / FILE).write_bytes(b"")
    with pytest.raises(JournalDamaged, match=f"{FILE}:2: row 2 of the ledger was charged after line 2"):
        SiteJournal.of(state).verify(Ledger.existing(state))
    assert worker.train(instruct(plan, 3)).code == "journal-damaged"


def test_an_approval_that_was_cut_off_or_replaced_is_found_by_the_ledger(
    make_site: SiteMaker, make_plan: PlanMaker
) -> None:
    """What the patients were charged for is chained to who had approved it, and the lab keeps that chain's head."""
    folder = make_site("alder")
    state, plan, worker = folder / "state", make_plan(), real_worker(folder)
    assert prepare(worker, plan).code == "not-approved"
    SiteJournal.of(state).approved(plan, by="Dr Example")
    approval.approve(state, plan, by="Dr Example", document=sign(STUDY, plan.to_json(), LAB))
    assert prepare(worker, plan).code == "ok"
    before = (state / FILE).read_bytes().splitlines(keepends=True)
    assert worker.train(instruct(plan)).code == "ok"
    ledger = Ledger.existing(state)
    assert ledger.charges()[0].journal == f"{len(before)} {sha256(before[-1].rstrip()).hexdigest()}"
    (state / FILE).write_bytes(b"".join(before[:2]))  # one charge may be missing: its worker may have been killed
    with pytest.raises(JournalDamaged, match=f"{FILE}:3: row 1 of the ledger was charged after line 3, which is not"):
        SiteJournal.of(state).verify(ledger)
    SiteJournal.of(state).approved(plan, by="Dr Other")  # whoever has the site's key can sign another
    with pytest.raises(JournalDamaged, match=f"{FILE}:3: row 1 of the ledger was charged after line 3, which is not"):
        SiteJournal.of(state).verify(ledger)
    assert worker.train(instruct(plan, 2)).code == "journal-damaged"
    SiteJournal.of(state).reopen(ledger, by="Dr Third")
    assert SiteJournal.of(state).verify(ledger)
    assert worker.train(instruct(plan, 2)).code == "ok"
    assert SiteJournal.of(state).verify(Ledger.existing(state))


def test_the_journal_remembers_a_ledger_that_was_put_back_with_its_marker(
    make_site: SiteMaker, make_plan: PlanMaker
) -> None:
    folder = make_site("alder")
    state = folder / "state"
    worker, plan = trained(folder, make_plan, 1)
    older = {name: (state / name).read_bytes() for name in (LEDGER, MARKER)}
    assert worker.train(instruct(plan, 2)).code == "ok"
    for name, content in older.items():
        (state / name).write_bytes(content)
    assert len(Ledger.existing(state).charges()) == 1  # the ledger alone does not know
    with pytest.raises(LedgerRolledBack, match="row 2 as the journal knows it"):
        SiteJournal.of(state).verify(Ledger.existing(state))
    assert worker.train(instruct(plan, 3)).code == "ledger-rolled-back"
    assert len(Ledger.existing(state).charges()) == 1


def consilium_site(*arguments: object, code: int = 0) -> str:
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if isinstance(done.exception, JournalDamaged | LedgerRolledBack):  # what `run` tells and turns into an exit code
        assert done.exception.exit_code == code
        return str(done.exception)
    assert done.exit_code == code, done.output
    return done.output


def test_the_commands(make_site: SiteMaker, make_plan: PlanMaker) -> None:
    folder, plan = make_site("alder"), make_plan()
    state, worker = folder / "state", real_worker(folder)
    prepare(worker, plan)
    consilium_site("approve", "tiny", "--site", folder, "--by", "Dr Example", "--yes")
    prepare(worker, plan)
    worker.train(instruct(plan))
    consilium_site("withdraw", "tiny", "--site", folder, "--by", "Dr Other")
    assert whats(state) == ["asked", "refused", "approved", "charged", "released", "withdrawn"]
    shown = json.loads(consilium_site("journal", "show", folder, "--json"))
    assert [(e["what"], e.get("by")) for e in shown if "by" in e] == [
        ("approved", "Dr Example"),
        ("withdrawn", "Dr Other"),
    ]
    assert "released" in consilium_site("journal", "show", folder)
    assert "withdrawn" in consilium_site("journal", "show", folder, "--last", 1)
    assert "6 entries, none changed, none missing" in consilium_site("journal", "verify", folder)
    assert json.loads(consilium_site("journal", "verify", folder, "--json"))["entries"] == 6
    content = (state / FILE).read_bytes()
    (state / FILE).write_bytes(content.replace(b"Dr Example", b"Dr Nobody"))
    assert f"{FILE}:3: its signature is wrong" in consilium_site("journal", "verify", folder, code=1)
    consilium_site("journal", "reopen", folder, "--by", "Dr Third")
    assert whats(state) == ["journal reopened", "charged"]
    (aside,) = state.glob(f"{FILE}.replaced-*")
    reopened = SiteJournal.of(state).entries()[0]
    assert (reopened.text("by"), reopened.text("before")) == ("Dr Third", sha256(aside.read_bytes()).hexdigest())
    assert "2 entries" in consilium_site("journal", "verify", folder)


def test_the_command_line_says_the_place_and_ends_with_1(make_site: SiteMaker, make_plan: PlanMaker) -> None:
    folder = make_site("alder")
    trained(folder, make_plan, 0)
    journal: list[Found] = [("asked", {"n": n}) for n in range(3)]
    Journal(folder / "state" / FILE, SiteJournal.of(folder / "state").journal.key).add(lambda _: iter(journal))
    with (folder / "state" / FILE).open("r+b") as file:
        file.seek(20)
        file.write(b"9")
    command = [sys.executable, "-m", "client.cli", "journal", "verify", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert f"{FILE}:1: " in done.stderr
    assert "Traceback" not in done.stderr
