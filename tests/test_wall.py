"""The wall: who may ask a worker, what it listens to, and what of it reaches the other side. All sockets are real."""

from __future__ import annotations

import json
import logging
import os
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

import client.wall
from client.wall import WorkerProxy, serving, users_allowed
from common.errors import RunError, WorkerUnavailable
from common.records import PrepareInstruction, SiteReply, TrainInstruction
from common.wire import pack, unpack
from tests.conftest import soon

ROOT = Path(__file__).parent.parent
MINE = {os.geteuid()}
PREPARE = PrepareInstruction("{}", "", "", {})
TRAIN = TrainInstruction("a" * 64, "b" * 64, 3, {"w": np.ones((2, 3), np.float32)})

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")


@dataclass
class Servant:
    """Notes what it is asked; `until` keeps it busy."""

    site: str = "alder"
    until: threading.Event | None = None
    asked: list[object] = field(default_factory=list)
    at_once: int = 0
    most_at_once: int = 0

    def prepare(self, instruction: PrepareInstruction) -> SiteReply:
        self.asked.append(instruction)
        return SiteReply(site=self.site, code="ok", reason="prepared")

    def train(self, instruction: TrainInstruction) -> SiteReply:
        self.asked.append(instruction)
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        if self.until is not None:
            assert self.until.wait(20)
        self.at_once -= 1
        return SiteReply(site=self.site, code="ok", round=instruction.round, update=instruction.shared)

    def status(self) -> Mapping[str, Any]:
        return {"site": self.site, "asked": len(self.asked)}


Serve = Callable[..., tuple[Servant, WorkerProxy, Path]]


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    """serve(): a servant behind the wall, its proxy and its socket."""
    with ExitStack() as stack:

        def start(servant: Servant | None = None, path: Path = tmp_path / "run" / "worker.sock", **more: Any) -> Any:
            servant = servant or Servant()
            stack.enter_context(serving(servant, path, users=more.get("users", MINE)))
            return servant, WorkerProxy(path, patience_s=5.0, timeout_s=20.0), path

        yield start


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that every user of the machine reaches, as no folder of pytest's is."""
    folder = Path(tempfile.mkdtemp(prefix="wall-", dir="/tmp"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


def call(path: Path, method: str, request: bytes, *, timeout_s: float = 10.0) -> bytes:
    """What gRPC hears, without the proxy."""
    with grpc.insecure_channel(f"unix:{path}", options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
        ask: Callable[..., bytes] = channel.unary_unary(f"/consilium.Worker/{method}")
        return ask(request, timeout=timeout_s)


def in_thread(ask: Callable[[], object]) -> tuple[threading.Thread, list[object]]:
    answers: list[object] = []
    thread = threading.Thread(target=lambda: answers.append(ask()), daemon=True)
    thread.start()
    return thread, answers


# ---- what goes through ---------------------------------------------------------------------------------------------


def test_instructions_and_replies_go_through_unchanged(serve: Serve) -> None:
    servant, worker, _ = serve()
    assert worker.prepare(PREPARE).reason == "prepared"
    reply = worker.train(TRAIN)
    assert (reply.site, reply.round) == ("alder", 3)
    assert np.array_equal(reply.update["w"], TRAIN.shared["w"])
    first, second = servant.asked
    assert first == PREPARE
    assert isinstance(second, TrainInstruction)
    assert np.array_equal(second.shared["w"], TRAIN.shared["w"])
    assert worker.hello() == {"site": "alder", "pid": os.getpid()}
    assert worker.status() == {"site": "alder", "asked": 2}


def test_a_large_record_goes_through(serve: Serve) -> None:
    """Beyond gRPC's usual 4 MB, both ways."""
    _, worker, _ = serve()
    large = TrainInstruction("a" * 64, "b" * 64, 1, {"w": np.arange(2_000_000, dtype=np.float32)})
    assert np.array_equal(worker.train(large).update["w"], large.shared["w"])


def test_one_instruction_at_a_time_and_status_meanwhile(serve: Serve) -> None:
    servant, worker, _ = serve(Servant(until=threading.Event()))
    assert servant.until is not None
    threads = [in_thread(lambda: worker.train(TRAIN)) for _ in range(3)]
    assert soon(lambda: bool(servant.asked))
    begun = time.monotonic()
    assert worker.status() == {"site": "alder", "asked": 1}
    assert worker.hello()["site"] == "alder"
    assert time.monotonic() - begun < 4.0
    servant.until.set()
    for thread, _ in threads:
        thread.join(20)
    assert all(isinstance(answer[0], SiteReply) and answer[0].ok for _, answer in threads)
    assert (len(servant.asked), servant.most_at_once) == (3, 1)


def test_many_waiting_instructions_do_not_hide_the_worker(serve: Serve) -> None:
    """A node that asks again and again is turned away in time, and the worker still says that it lives."""
    servant, worker, _ = serve(Servant(until=threading.Event()))
    assert servant.until is not None
    threads = [in_thread(lambda: _tried(lambda: worker.train(TRAIN))) for _ in range(12)]
    assert soon(lambda: sum(bool(answers) for _, answers in threads) >= 12 - client.wall.MOST_WAITING)
    assert worker.status()["asked"] == 1
    turned_away = [answers[0] for _, answers in threads if answers]
    assert all(isinstance(answer, WorkerUnavailable) for answer in turned_away)
    servant.until.set()
    for thread, _ in threads:
        thread.join(20)
    assert len(servant.asked) == client.wall.MOST_WAITING
    assert worker.train(TRAIN).ok


def _tried(ask: Callable[[], object]) -> object:
    try:
        return ask()
    except WorkerUnavailable as error:
        return error


# ---- who may ask ---------------------------------------------------------------------------------------------------

_VISITOR = """
import os, socket, sys
path, uid = sys.argv[1:]
if int(uid):
    os.setgroups([])
    os.setgid(int(uid))
    os.setuid(int(uid))
visitor = socket.socket(socket.AF_UNIX)
visitor.settimeout(10)
try:
    visitor.connect(path)
    visitor.sendall(b"PRI * HTTP/2.0\\r\\n\\r\\nSM\\r\\n\\r\\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0]))
    print(len(visitor.recv(9)))
except OSError as error:
    print(type(error).__name__)
"""


def visit_as(uid: int, path: Path) -> str:
    """What a process of another user gets: how many bytes of an answer, or its error."""
    visitor = [sys.executable, "-I", "-c", _VISITOR, str(path), str(uid)]
    return subprocess.run(visitor, capture_output=True, text=True, timeout=20, check=True).stdout.strip()


@as_root
def test_another_users_process_cannot_even_connect(serve: Serve, open_folder: Path) -> None:
    _, _, path = serve(path=open_folder / "worker.sock")
    assert stat.S_IMODE(path.stat().st_mode) == 0o660
    assert visit_as(65534, path) == "PermissionError"
    assert visit_as(0, path) == "9"


@as_root
def test_another_users_process_is_turned_away_though_the_file_lets_it_in(serve: Serve, open_folder: Path) -> None:
    """Planted: somebody made the socket everybody's. The kernel still says who calls."""
    servant, worker, path = serve(path=open_folder / "worker.sock")
    path.chmod(0o666)
    assert visit_as(65534, path) in ("0", "ConnectionResetError", "BrokenPipeError")
    assert visit_as(0, path) == "9"
    assert worker.hello()["site"] == "alder"
    assert not servant.asked


@as_root
def test_the_nodes_user_is_let_in_and_root_is_not_by_itself(serve: Serve, open_folder: Path) -> None:
    _, worker, path = serve(path=open_folder / "worker.sock", users={65534})
    path.chmod(0o666)
    assert visit_as(65534, path) == "9"
    with pytest.raises(WorkerUnavailable):
        worker.hello()


@as_root
def test_nobody_gets_round_the_door(serve: Serve, open_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """gRPC's own socket lies in a folder of the worker's alone."""
    monkeypatch.setattr(tempfile, "tempdir", str(open_folder))
    serve(path=open_folder / "worker.sock")
    (inside,) = open_folder.glob("consilium-*/grpc.sock")
    assert stat.S_IMODE(inside.parent.stat().st_mode) == 0o700
    assert visit_as(65534, inside) == "PermissionError"


def test_users_allowed_are_this_one_and_the_named_one() -> None:
    assert users_allowed(None) == MINE
    assert users_allowed("root") == MINE | {0}
    with pytest.raises(RunError, match=r"site.yaml names node_user 'no-such-user', and this machine has no such user"):
        users_allowed("no-such-user")


# ---- what it listens to --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "request_"),
    [
        ("train", b""),
        ("train", b"garbage"),
        ("train", os.urandom(4096)),
        ("train", pack(TRAIN)[:-1]),
        ("train", pack(PREPARE)),
        ("prepare", pack(TRAIN)),
        ("prepare", pack(SiteReply(site="alder", code="ok"))),
        ("train", json.dumps({"round": 1}).encode()),
    ],
    ids=["empty", "text", "noise", "torn", "prepare as train", "train as prepare", "reply as prepare", "json"],
)
def test_anything_but_the_right_record_is_a_bad_instruction(serve: Serve, method: str, request_: bytes) -> None:
    servant, _, path = serve()
    reply = unpack(call(path, method, request_), SiteReply)
    assert (reply.site, reply.code) == ("alder", "bad-instruction")
    assert reply.reason == "the instruction does not match the approved plan"
    assert not servant.asked


@pytest.mark.parametrize("method", ["hello", "status"])
def test_what_asks_nothing_takes_nothing(serve: Serve, method: str) -> None:
    _, _, path = serve()
    assert json.loads(call(path, method, b"ignored"))["site"] == "alder"


@pytest.mark.parametrize("method", ["evaluate", "Train", "../train", "__init__", "release"])
def test_there_is_no_other_call(serve: Serve, method: str) -> None:
    _, _, path = serve()
    with pytest.raises(grpc.RpcError) as refused:
        call(path, method, b"")
    assert refused.value.code() == grpc.StatusCode.UNIMPLEMENTED


def test_an_oversized_message_is_refused_before_it_is_read(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client.wall, "_SIZES", [("grpc.max_receive_message_length", 2**16)])
    servant, worker, path = serve()
    with pytest.raises(grpc.RpcError) as refused:
        call(path, "train", bytes(2**16 + 1))
    assert refused.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert not servant.asked
    assert worker.hello()["site"] == "alder"


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"GET / HTTP/1.1\r\n\r\n",
        os.urandom(2**16),
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\xff" * 4096,
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\x00\x40\x00\x01\x04\x00\x00\x00\x01",
    ],
    ids=["nothing", "HTTP/1", "noise", "bad frames", "torn frame"],
)
def test_a_caller_of_nonsense_disturbs_nobody(serve: Serve, sent: bytes) -> None:
    _, worker, path = serve()
    with socket.socket(socket.AF_UNIX) as visitor:
        visitor.connect(str(path))
        try:
            visitor.sendall(sent)
        except OSError:
            assert sent  # it was hung up on while it spoke
        assert worker.train(TRAIN).ok  # while the other one is still there
    assert worker.hello()["site"] == "alder"


_CROWDED = """
import os, resource, socket, sys, time
from pathlib import Path
from client.wall import WorkerProxy, serving
from tests_servant import Servant
path = Path(sys.argv[1])
with serving(Servant(), path, users={os.geteuid()}):
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 20,) * 2)
    print("up", flush=True)
    sys.stdin.read()
"""


def test_a_crowd_at_the_door_does_not_close_it_for_good(tmp_path: Path) -> None:
    """A node that opens connections until the worker has no file left: once it stops, all is as before."""
    path = tmp_path / "worker.sock"
    source = _CROWDED.replace("from tests_servant import Servant", _SMALL_SERVANT)
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    worker = subprocess.Popen([sys.executable, "-c", source, str(path)], cwd=ROOT, **pipes)  # type: ignore[call-overload]
    try:
        assert worker.stdout.readline() == b"up\n"
        crowd = []
        for _ in range(60):
            one = socket.socket(socket.AF_UNIX)
            one.setblocking(False)
            one.connect_ex(str(path))
            crowd.append(one)
        time.sleep(0.2)
        for one in crowd:
            one.close()
        assert soon(lambda: not isinstance(_tried(WorkerProxy(path).hello), WorkerUnavailable))
    finally:
        worker.stdin.close()  # it ends in order, and cleans up
        try:
            worker.wait(10)
        finally:
            worker.kill()


_SMALL_SERVANT = """
class Servant:
    site = "alder"
    prepare = train = status = None
"""


# ---- what comes back -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["status", "train"])
def test_no_exceptions_text_gets_through(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, method: str
) -> None:
    def broken(*_: object) -> SiteReply:
        raise RuntimeError("patient Jane Doe")

    servant, worker, path = serve()
    monkeypatch.setattr(servant, method, broken)
    with pytest.raises(grpc.RpcError) as refused, caplog.at_level(logging.ERROR):
        call(path, method, pack(TRAIN))
    assert refused.value.code() == grpc.StatusCode.INTERNAL
    assert "Jane" not in str(refused.value)
    assert "Jane" in caplog.text  # the worker's own log has it
    with pytest.raises(WorkerUnavailable):
        worker.status() if method == "status" else worker.train(TRAIN)
    assert worker.hello()["site"] == "alder"


# ---- sockets that come and go --------------------------------------------------------------------------------------


def test_a_second_worker_on_a_socket_is_refused_and_the_first_goes_on(serve: Serve) -> None:
    _, worker, path = serve()
    with pytest.raises(RunError, match=f"another worker answers on {path}"):
        serve(Servant(site="birch"), path)
    assert worker.hello()["site"] == "alder"


def test_a_dead_workers_socket_is_taken_over(tmp_path: Path) -> None:
    path = tmp_path / "worker.sock"
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(path))
    assert path.exists()
    with serving(Servant(), path, users=MINE):
        assert WorkerProxy(path).hello()["site"] == "alder"
    assert not path.exists()


@pytest.mark.parametrize("there", ["no folder", "no socket", "a dead socket", "a file"])
def test_a_worker_that_is_gone_is_unavailable_at_once(tmp_path: Path, there: str) -> None:
    path = tmp_path / "run" / "worker.sock"
    if there != "no folder":
        path.parent.mkdir()
    if there == "a file":
        path.write_text("")
    if there == "a dead socket":
        with socket.socket(socket.AF_UNIX) as left:
            left.bind(str(path))
    begun = time.monotonic()
    for ask in (WorkerProxy(path).hello, WorkerProxy(path).status):
        with pytest.raises(WorkerUnavailable, match="the site's worker does not answer its node"):
            ask()
    with pytest.raises(WorkerUnavailable):
        WorkerProxy(path, patience_s=0.1).train(TRAIN)
    assert time.monotonic() - begun < 3.0


def test_a_worker_that_dies_in_the_middle_is_unavailable(tmp_path: Path) -> None:
    path, servant = tmp_path / "worker.sock", Servant(until=threading.Event())
    assert servant.until is not None
    with serving(servant, path, users=MINE):
        thread, answers = in_thread(lambda: _tried(lambda: WorkerProxy(path).train(TRAIN)))
        assert soon(lambda: bool(servant.asked))
    servant.until.set()
    thread.join(20)
    assert isinstance(answers[0], WorkerUnavailable)


def test_an_instruction_waits_for_a_worker_that_is_starting(tmp_path: Path) -> None:
    """At the very first start not even the folder is there."""
    path = tmp_path / "run" / "worker.sock"
    thread, answers = in_thread(lambda: _tried(lambda: WorkerProxy(path, patience_s=15.0).train(TRAIN)))
    time.sleep(0.2)
    with serving(Servant(), path, users=MINE):
        thread.join(20)
    assert isinstance(answers[0], SiteReply)


def test_a_node_outlives_its_worker_and_finds_the_next(tmp_path: Path) -> None:
    path = tmp_path / "worker.sock"
    worker = WorkerProxy(path)
    for site in ("alder", "birch"):
        with serving(Servant(site=site), path, users=MINE):
            assert worker.hello()["site"] == site
        with pytest.raises(WorkerUnavailable):
            worker.hello()


def test_a_path_longer_than_a_sockets_name_may_be_works(serve: Serve, tmp_path: Path) -> None:
    path = tmp_path / ("a" * 100) / ("b" * 100) / "worker.sock"
    assert len(str(path)) > 107
    _, worker, _ = serve(path=path)
    assert stat.S_ISSOCK(path.stat().st_mode)
    assert worker.train(TRAIN).ok


def test_two_sites_of_one_machine_are_never_mixed_up(serve: Serve, tmp_path: Path) -> None:
    """Their sockets have one name, and are reached through folders of one number."""
    workers = {site: serve(Servant(site=site), tmp_path / site / "worker.sock")[1] for site in ("alder", "birch")}
    for _ in range(10):
        for site, worker in workers.items():
            assert worker.hello()["site"] == site


def test_nothing_is_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    path = tmp_path / "run" / "worker.sock"

    def once() -> None:
        with serving(Servant(), path, users=MINE):
            for _ in range(3):
                assert WorkerProxy(path).hello()["site"] == "alder"

    once()
    before = len(os.listdir("/proc/self/fd"))
    once()
    assert soon(lambda: len(os.listdir("/proc/self/fd")) <= before)
    assert [entry.name for entry in tmp_path.iterdir()] == ["run"]
    assert not list(path.parent.iterdir())
