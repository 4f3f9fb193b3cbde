"""A node that runs a stranger's code, as the node's own user: it finds no data and no key, and gets nothing released.

Consilium's node opens no bundle (test_deployment sends it one); but the wall must hold even if it were taken over.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import shutil
import socket
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from client import approval
from client.data.phantoms import make_phantom_sites
from client.ledger import Ledger
from client.membership import SITE_KEY
from client.wall import SOCKET, WorkerProxy, serving
from client.worker import Worker
from common.keys import STUDY, make_signing_key, sign
from common.params import digest, to_arrays
from common.plan import StudyPlan
from common.records import PrepareInstruction, TrainInstruction
from common.starting_point import network_of, starting, travelling
from tests.conftest import PlanMaker, join_lab

NODE_USER = 65534  # nobody
TASK = {
    "kind": "classification",
    "image_size": 28,
    "channels": 1,
    "label_sets": {"lesion": ["normal", "nodule"]},
}
LAB = Ed25519PrivateKey.generate()

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can be two users")


@pytest.fixture
def site() -> Iterator[Path]:
    """A hospital's folder as its operations page says: the state is the worker's alone, the socket's folder shared."""
    root = Path(tempfile.mkdtemp(dir="/tmp"))  # pytest's own folder is closed to other users
    root.chmod(0o755)
    (folder,) = make_phantom_sites(
        root, names=["alder"], patients=80, image_size=28, channels=1, seed=1, test_fraction=0.25
    )
    folder.chmod(0o755)
    (folder / "data.npz").chmod(0o600)
    (folder / "state").mkdir(mode=0o700)
    make_signing_key(folder / "state" / SITE_KEY)
    run = folder / SOCKET.parent
    run.mkdir()
    os.chown(run, 0, NODE_USER)
    run.chmod(0o750 | stat.S_ISGID)
    join_lab(folder, LAB)
    yield folder
    shutil.rmtree(root)


def as_node(code: Callable[..., Any], *arguments: object) -> Any:
    """What `code` returns in a process of the node's user."""
    here, there = multiprocessing.get_context("fork").Pipe()
    child = multiprocessing.get_context("fork").Process(target=_drop_and_run, args=(there, code, arguments))
    child.start()
    there.close()
    assert here.poll(60), "the node's process does not answer"
    result = here.recv()
    child.join(10)
    return result


def _drop_and_run(pipe: Any, code: Callable[..., Any], arguments: tuple[object, ...]) -> None:
    os.setgroups([])
    os.setgid(NODE_USER)
    os.setuid(NODE_USER)
    try:
        pipe.send(code(*arguments))
    except BaseException as error:
        pipe.send(f"{type(error).__name__}: {error}")
    os._exit(0)


def readable_files(folder: Path) -> list[str]:
    found = []
    for path in folder.rglob("*"):
        try:
            with path.open("rb"):
                found.append(path.name)
        except OSError:
            continue
    return sorted(found)


def test_the_nodes_user_reads_neither_images_nor_ledger_nor_keys(site: Path, make_plan: PlanMaker) -> None:
    plan = make_plan(task=TASK)
    worker = Worker(site, state=site / "state")
    approval.approve(site / "state", plan, by="Dr Example")
    assert worker.prepare(instruction(plan)).code == "ok"
    assert worker.train(train(plan)).code == "ok"
    assert (site / "state" / "ledger.sqlite").exists()
    assert set(as_node(readable_files, site)) <= {"PHANTOM.txt", "membership.json", "site.yaml"}
    assert "ledger.sqlite" in readable_files(site)  # whose user may, can: the test can fail


def instruction(plan: StudyPlan, *, signer: Ed25519PrivateKey = LAB) -> PrepareInstruction:
    signed = sign(STUDY, plan.to_json(), signer)
    initial = to_arrays(starting(plan, network_of(plan, "alder")))
    return PrepareInstruction(signed.body, signer=signed.signer, signature=signed.signature, initial=initial)


def train(plan: StudyPlan, round: int = 1) -> TrainInstruction:
    network = network_of(plan, "alder")
    initial = digest(to_arrays(starting(plan, network)))
    return TrainInstruction(plan.digest, initial, round, shared=to_arrays(travelling(plan, network)))


def ask(path: Path, method: str, request: Any) -> tuple[str, int]:
    reply = getattr(WorkerProxy(path, patience_s=5.0, timeout_s=30.0), method)(request)
    return reply.code, len(reply.update)


def throw(path: Path, rubbish: bytes) -> str:
    os.chdir(path.parent)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as caller:
        caller.settimeout(5.0)
        caller.connect(path.name)
        try:
            caller.sendall(rubbish)
            return f"{len(caller.recv(1000))} bytes"
        except OSError as error:
            return type(error).__name__


def test_no_word_through_the_wall_gets_anything_released_without_approval_and_charge(
    site: Path, make_plan: PlanMaker
) -> None:
    plan, path = make_plan(task=TASK), site / SOCKET
    worker = Worker(site, state=site / "state")
    approval.approve(site / "state", plan, by="Dr Example")
    dearer = make_plan(task=TASK, rounds=4)
    careless = make_plan(task=TASK, privacy=None)
    with serving(worker, path, users={NODE_USER}):
        os.chown(path, 0, NODE_USER)
        attempts = {
            "not prepared": ("train", train(plan), "bad-instruction"),
            "not approved": ("prepare", instruction(dearer), "not-approved"),
            "not approved, trained": ("train", train(dearer), "not-approved"),
            "another lab": ("prepare", instruction(plan, signer=Ed25519PrivateKey.generate()), "bad-instruction"),
            "another plan under the signature": (
                "prepare",
                dataclasses.replace(instruction(plan), plan_json=dearer.to_json()),
                "bad-instruction",
            ),
            "without privacy": ("prepare", instruction(careless), "not-approved"),  # a phantom's folder may
            "a round beyond the plan": ("train", train(plan, round=99), "bad-instruction"),
        }
        for name, (method, request, code) in attempts.items():
            assert as_node(ask, path, method, request) == (code, 0), name
        for rubbish in (
            b"\0" * 100_000,
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + os.urandom(10_000),
            b"GET / HTTP/1.1\r\n\r\n",
        ):
            as_node(throw, path, rubbish)
        assert not (site / "state" / "ledger.sqlite").exists()
        assert as_node(ask, path, "prepare", instruction(plan)) == ("ok", 0)
        code, arrays = as_node(ask, path, "train", train(plan))
        assert code == "ok"
        assert arrays > 0
        assert as_node(ask, path, "train", train(plan)) == ("ok", arrays)  # replayed: the same release, no charge
    assert len(Ledger.existing(site / "state").charges()) == 1


def test_another_user_is_turned_away_at_the_door(site: Path) -> None:
    path = site / SOCKET
    with serving(Worker(site, state=site / "state"), path, users={0}):
        os.chown(path, 0, NODE_USER)
        began = time.monotonic()
        assert as_node(hello, path).startswith("WorkerUnavailable")
        assert time.monotonic() - began < 30
        assert WorkerProxy(path).hello()["site"] == "alder"


def hello(path: Path) -> str:
    return str(WorkerProxy(path).hello())
