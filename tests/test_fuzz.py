"""Whatever bytes lie in the ledger's and the journal's place, whatever message reaches a node or its worker: a clear
error or the correct result, nothing else. Each test counts its examples, and `pytest -s` shows the counts."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as some

from client import approval
from client.app import build_client_app
from client.journal import FILE as JOURNAL
from client.journal import SiteJournal
from client.ledger import FILE, MARKER, Chain, Ledger, Terms, _hash, read_chain, write_rows
from client.wall import serving
from client.worker import Worker
from common.accounting import Event
from common.errors import JournalDamaged, LedgerDamaged, Refusal
from common.journal import Journal
from common.plan import StudyPlan
from common.records import PREPARE, TRAIN, SiteReply
from common.wire import decode, encode, pack, unpack
from server.local_grid import LocalGrid
from tests.conftest import PlanMaker, SiteMaker
from tests.test_worker import instruct, instruction, prepare, real_worker

TERMS = Terms(epsilon=9.0, delta=1e-4, order=6)
STUDY = "a" * 64


def fuzz(examples: int) -> settings:
    return settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture],
    )


def codes(kind: type[Refusal] = Refusal) -> set[str]:
    """Of every refusal that there is."""
    return {kind.code}.union(*(codes(below) for below in kind.__subclasses__()))


@pytest.fixture
def counted(request: pytest.FixtureRequest) -> Iterator[Counter[str]]:
    """What a test tried and what came of it."""
    counter: Counter[str] = Counter()
    yield counter
    sys.stdout.write(f"\n{request.node.name}: {dict(counter)}\n")


def enough(counted: Counter[str], least: dict[str, int]) -> None:
    for kind, count in least.items():
        assert counted[kind] >= count, kind


SPLICES = some.lists(
    some.tuples(some.floats(0, 1), some.integers(0, 300), some.binary(max_size=40)), min_size=1, max_size=3
)


def spliced(content: bytes, splices: list[tuple[float, int, bytes]]) -> bytes:
    """Cut out here, put in there."""
    for where, gone, new in splices:
        at = int(where * len(content))
        content = content[:at] + new + content[at + gone :]
    return content


ANYTHING = some.recursive(
    some.none() | some.booleans() | some.integers() | some.floats() | some.text(max_size=8),
    lambda deeper: some.lists(deeper, max_size=3) | some.dictionaries(some.text(max_size=5), deeper, max_size=3),
    max_leaves=6,
)


# ---- the ledger's file, its marker, its rows -----------------------------------------------------------------------


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    ledger = Ledger.open(tmp_path, TERMS)
    for number in range(1, 5):
        ledger.charge(study=STUDY, round=number, event=Event(1.0, 20.0, number))
    return ledger


@pytest.mark.timeout(120)
def test_any_bytes_in_the_ledgers_place(ledger: Ledger, counted: Counter[str]) -> None:
    file = ledger.folder / FILE
    content, charges = file.read_bytes(), ledger.charges()

    @fuzz(150)
    @given(SPLICES | some.binary(max_size=64))
    def check(change: Any) -> None:
        counted["examples"] += 1
        file.write_bytes(change if isinstance(change, bytes) else spliced(content, change))
        for read in (lambda: Ledger.open(ledger.folder, TERMS), lambda: Ledger.existing(ledger.folder)):
            with contextlib.suppress(LedgerDamaged):
                assert read().charges() == charges
                counted["read rightly"] += 1
        with contextlib.suppress(LedgerDamaged):
            assert read_chain(file).charges == charges[: len(read_chain(file).charges)]

    check()
    enough(counted, {"examples": 150, "read rightly": 5})


@pytest.mark.timeout(120)
def test_any_bytes_in_the_markers_place(ledger: Ledger, counted: Counter[str]) -> None:
    marker, charges = ledger.folder / MARKER, ledger.charges()
    content = marker.read_bytes()

    @fuzz(100)
    @given(SPLICES | some.binary(max_size=200))
    def check(change: Any) -> None:
        counted["examples"] += 1
        marker.write_bytes(change if isinstance(change, bytes) else spliced(content, change))
        with contextlib.suppress(LedgerDamaged):
            assert ledger.charges() == charges

    check()
    enough(counted, {"examples": 100})


FIELDS = {
    "time": 1e9,
    "study": STUDY,
    "round": 1,
    "journal": f"3 {0:064d}",
    "sample_rate": 0.5,
    "noise_multiplier": 2.0,
    "count": 3,
}
OPENING = json.dumps({"epsilon": 9.0, "delta": 1e-4})


@some.composite
def bodies(draw: some.DrawFn) -> str:
    """A charge with some fields that are anything; or anything at all, or no JSON."""
    changed = draw(some.dictionaries(some.sampled_from([*FIELDS, "more"]), ANYTHING, max_size=3))
    body = json.dumps(draw(some.just(FIELDS | changed) | ANYTHING))
    return draw(some.sampled_from([body, body[:-1], "[" * 50_000, body]))


@pytest.mark.timeout(120)
def test_any_row_whose_hash_is_right(tmp_path: Path, counted: Counter[str]) -> None:
    """By somebody who can compute hashes: the opening row and the first charge say anything."""

    @fuzz(200)
    @given(
        some.sampled_from([True, True, False]).flatmap(lambda right: some.just(OPENING) if right else bodies()),
        some.booleans().flatmap(lambda right: some.just(json.dumps(FIELDS)) if right else bodies()),
    )
    def check(opening: str, charge: str) -> None:
        counted["examples"] += 1
        first = _hash(0, "0" * 64, opening)
        rows = [(0, "", 0, opening, first), (1, STUDY, 1, charge, _hash(1, first, charge))]
        write_rows(tmp_path / FILE, rows)
        with contextlib.suppress(LedgerDamaged):
            chain = read_chain(tmp_path / FILE)
            assert isinstance(chain, Chain)
            assert chain.terms.spent(c.event for c in chain.charges) >= 0
            counted["believed"] += 1

    check()
    enough(counted, {"examples": 200, "believed": 1})


# ---- the journal ---------------------------------------------------------------------------------------------------


@pytest.mark.timeout(120)
def test_any_bytes_in_the_journals_place(tmp_path: Path, counted: Counter[str]) -> None:
    journal = Journal(tmp_path / JOURNAL, Ed25519PrivateKey.generate())
    journal.add(lambda _: iter([("asked", {"n": n, "text": "\n\x00é"}) for n in range(4)]))
    content, entries = journal.path.read_bytes(), journal.entries()

    @fuzz(250)
    @given(SPLICES | some.binary(max_size=300))
    def check(change: Any) -> None:
        counted["examples"] += 1
        journal.path.write_bytes(change if isinstance(change, bytes) else spliced(content, change))
        with contextlib.suppress(JournalDamaged):
            found = journal.verified()
            assert found == entries[: len(found)]  # a torn end, and nothing made up
            journal.add(lambda _: iter([("asked", {"n": 9})]))
            after = journal.verified()
            assert after[: len(found)] == found
            assert [e.what for e in after[len(found) :]] in (["asked"], ["torn", "asked"])
            counted["read rightly"] += 1

    check()
    enough(counted, {"examples": 250, "read rightly": 5})


@pytest.mark.timeout(120)
def test_any_entry_that_the_sites_key_signed(ledger: Ledger, tmp_path: Path, counted: Counter[str]) -> None:
    """Of another version, or nonsense: the journal is damaged, or the entry is none of ours."""
    site = SiteJournal(Journal(tmp_path / "own" / JOURNAL, Ed25519PrivateKey.generate()))
    fields = some.dictionaries(
        some.sampled_from(["row", "hash", "study", "round", "code", "text"]), ANYTHING, max_size=4
    )

    class NoReleases:
        def rounds(self) -> list[int]:
            return []

    @fuzz(120)
    @given(some.sampled_from(["charged", "released", "refused", "asked", ""]), fields)
    def check(what: str, said: dict[str, Any]) -> None:
        counted["examples"] += 1
        site.journal.path.unlink(missing_ok=True)
        with contextlib.suppress(ValueError):  # nan is no JSON: it is not written
            site.journal.add(lambda _: iter([(what, said)]))
        for act in (
            lambda: site.refused(Refusal(), study=STUDY),
            lambda: site.write_up(STUDY, ledger, NoReleases()),
            lambda: site.verify(ledger),
        ):
            with contextlib.suppress(JournalDamaged, LedgerDamaged):
                act()

    check()
    enough(counted, {"examples": 120})


# ---- messages ------------------------------------------------------------------------------------------------------


@pytest.fixture
def hospital(make_site: SiteMaker, make_plan: PlanMaker) -> tuple[Worker, StudyPlan]:
    """A worker that is ready for an approved study."""
    plan, folder = make_plan(), make_site("alder")
    worker = real_worker(folder)
    approval.approve(folder / "state", plan, by="a test")
    assert prepare(worker, plan).code == "ok"
    return worker, plan


def rows_of(worker: Worker) -> int:
    return int(worker.status()["rounds_charged"])


TEXTS = some.text(max_size=70) | some.sampled_from(["", "0" * 64, "../" * 8, "\ud800", "[" * 2000, "{}", "null"])
FLOATS = some.sampled_from(
    [
        np.zeros(3, np.float32),
        np.full((2, 2), np.nan, np.float32),
        np.zeros((0,), np.float32),
        np.ones((), np.float32),
    ]
)
OTHER_ARRAYS = some.dictionaries(some.sampled_from(["w", "", "body.0", "__metadata__x"]), FLOATS, max_size=2)
INTEGERS = some.integers(-(2**62), 2**62) | some.sampled_from([0, 1, 2, 3, 4])


def changed_fields(kinds: dict[str, some.SearchStrategy[Any]]) -> some.SearchStrategy[dict[str, Any]]:
    """One of them, or some, or none."""
    one = [some.fixed_dictionaries({name: kind}) for name, kind in kinds.items()]
    return some.one_of(*one, some.fixed_dictionaries({}, optional=kinds))


def a_train(plan: StudyPlan) -> some.SearchStrategy[Any]:
    """The right instruction with some fields that are anything."""
    changes = changed_fields(
        {
            "plan_digest": TEXTS,
            "initial_digest": TEXTS,
            "round": INTEGERS,
            "shared": OTHER_ARRAYS,
            "ledger_rows": INTEGERS,
            "ledger_head": TEXTS,
        }
    )
    return changes.map(lambda changed: instruct(plan, **changed))


def a_prepare(plan: StudyPlan) -> some.SearchStrategy[Any]:
    right = instruction(plan)
    changes = changed_fields(
        {
            "plan_json": TEXTS | some.just(right.plan_json[:-1]),
            "signer": TEXTS,
            "signature": TEXTS,
            "initial": OTHER_ARRAYS,
            "ledger_rows": INTEGERS,
            "ledger_head": TEXTS,
        }
    )
    return changes.map(lambda changed: type(right)(**{**right.__dict__, **changed}))


def judge(reply: SiteReply, worker: Worker, before: int, counted: Counter[str]) -> None:
    """A code of the closed list, no word beyond it, and no charge without a release."""
    counted[reply.code] += 1
    assert reply.code in codes() | {"ok"}
    assert reply.code != "internal-failure"
    assert reply.ok or not reply.update
    assert rows_of(worker) == before or reply.ok


@pytest.mark.timeout(240)
def test_any_instruction_to_the_worker(hospital: tuple[Worker, StudyPlan], counted: Counter[str]) -> None:
    worker, plan = hospital

    @fuzz(120)
    @given(a_train(plan) | a_prepare(plan))
    def check(asked: Any) -> None:
        counted["examples"] += 1
        before = rows_of(worker)
        judge((worker.train if hasattr(asked, "round") else worker.prepare)(asked), worker, before, counted)

    check()
    enough(counted, {"examples": 120, "ok": 3, "bad-instruction": 20, "not-approved": 3, "ledger-rolled-back": 1})
    assert rows_of(worker) <= plan.rounds


VALUES = (
    some.text(max_size=9) | some.integers(-(2**31), 2**31) | some.floats() | some.booleans() | some.binary(max_size=5)
)


@some.composite
def contents(draw: some.DrawFn) -> RecordDict:
    """Records of any names, with any fields and arrays."""
    parts: dict[str, Any] = {}
    for name in draw(some.lists(some.sampled_from(["fields", "arrays", "more"]), max_size=3, unique=True)):
        if draw(some.booleans()) == (name == "arrays"):
            arrays = draw(some.dictionaries(some.text(min_size=1, max_size=5), some.binary(max_size=16), max_size=2))
            shape = draw(some.sampled_from([(0,), (1,), (4,), (2, 2), (2**40,)]))
            kind = draw(some.sampled_from(["float32", "float64", "object", "x"]))
            parts[name] = ArrayRecord({n: Array(kind, shape, "numpy.ndarray", data) for n, data in arrays.items()})
        else:
            names = ["plan_digest", "initial_digest", "round", "plan_json", "signer", "signature"]
            keys = some.sampled_from([*names, "ledger_rows", "ledger_head"]) | some.text(min_size=1, max_size=4)
            parts[name] = ConfigRecord(draw(some.dictionaries(keys, VALUES, max_size=8)))
    return RecordDict(parts)


@pytest.mark.timeout(240)
def test_any_message_to_the_node(hospital: tuple[Worker, StudyPlan], counted: Counter[str]) -> None:
    worker, plan = hospital
    LocalGrid(build_client_app(lambda _: worker), nodes=1)  # gives messages their sender
    context = Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config={})
    app = build_client_app(lambda _: worker)

    @fuzz(150)
    @given(contents() | a_train(plan).map(encode), some.sampled_from([PREPARE, TRAIN]))
    def check(content: RecordDict, kind: str) -> None:
        counted["examples"] += 1
        before = rows_of(worker)
        judge(decode(app(Message(content, 1, kind), context).content, SiteReply), worker, before, counted)

    check()
    enough(counted, {"examples": 150, "ok": 1, "bad-instruction": 40, "not-approved": 1})


@pytest.mark.timeout(240)
def test_any_bytes_through_the_wall(hospital: tuple[Worker, StudyPlan], tmp_path: Path, counted: Counter[str]) -> None:
    """Over the real socket, to every method and to one that there is not."""
    worker, plan = hospital
    socket, good = tmp_path / "w.sock", pack(instruct(plan))
    with serving(worker, socket, users={os.geteuid()}), grpc.insecure_channel(f"unix:{socket}") as channel:

        @fuzz(120)
        @given(
            some.sampled_from(["prepare", "train", "train", "status", "hello", "nothing"]),
            SPLICES.map(lambda splices: spliced(good, splices)) | some.binary(max_size=300) | some.just(good),
        )
        def check(method: str, data: bytes) -> None:
            counted["examples"] += 1
            before = rows_of(worker)
            call = channel.unary_unary(f"/consilium.Worker/{method}")
            if method == "nothing":
                with pytest.raises(grpc.RpcError):
                    call(data, timeout=20)
            elif method in ("status", "hello"):
                assert json.loads(call(data, timeout=20))["site"] == "alder"
            else:
                judge(unpack(call(data, timeout=20), SiteReply), worker, before, counted)

        check()
    enough(counted, {"examples": 120, "ok": 1, "bad-instruction": 20})
