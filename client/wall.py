"""The wall: what a hospital's node, which has the network, may ask of its worker, which has the data.

    hello    which site is this?
    prepare  train    a record in, a reply out (common.wire)
    status   what stands at the site, without a word of its data

gRPC over a Unix socket, with peer credentials checked before a byte is read, sizes bounded, every message validated.
The worker believes nothing that it is told here: it verifies the plan's signature, the approval and the limits itself.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import pwd
import shutil
import socket
import struct
import tempfile
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import grpc

from common.errors import BadInstruction, RunError, WorkerUnavailable
from common.records import MalformedRecord, PrepareInstruction, SiteReply, TrainInstruction
from common.wire import LARGEST, pack, unpack

SOCKET = Path("run") / "worker.sock"  # below the site's folder
MOST_WAITING = 4  # instructions, the running one among them; further ones are turned away

_SERVICE = "consilium.Worker"
_CREDENTIALS = struct.Struct("3i")  # pid, uid, gid
_SIZES = [("grpc.max_receive_message_length", LARGEST), ("grpc.max_send_message_length", LARGEST)]
_CHANNEL = [*_SIZES, ("grpc.use_local_subchannel_pool", 1)]  # two sockets in turn may have one name: _reachable
_NO_ROOM = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.ECONNABORTED}
_PAUSE_S = 0.05
_ANSWER_S = 5.0  # for hello and status
_PIECE = 2**18

_log = logging.getLogger(__name__)


class Servant(Protocol):
    """What stands behind the wall; `client.worker.Worker`."""

    @property
    def site(self) -> str: ...

    def prepare(self, instruction: PrepareInstruction) -> SiteReply: ...

    def train(self, instruction: TrainInstruction) -> SiteReply: ...

    def status(self) -> Mapping[str, Any]: ...


@contextmanager
def serving(servant: Servant, path: Path, *, users: Collection[int]) -> Iterator[None]:
    """Answer on the socket at `path` to processes of `users` (uids). Raises RunError if another worker does."""
    private = Path(tempfile.mkdtemp(prefix="consilium-"))  # 0700: nobody reaches gRPC but through the door
    turn = _Turn()
    handlers = {
        "hello": _handler(lambda request: _json({"site": servant.site, "pid": os.getpid()})),
        "status": _handler(lambda request: _json(servant.status())),
        "prepare": _handler(lambda request: _record(servant, PrepareInstruction, servant.prepare, turn, request)),
        "train": _handler(lambda request: _record(servant, TrainInstruction, servant.train, turn, request)),
    }
    server = grpc.server(ThreadPoolExecutor(8), options=_SIZES)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(_SERVICE, handlers),))
    server.add_insecure_port(f"unix:{private}/grpc.sock")
    server.start()
    try:
        with _door(path, private / "grpc.sock", users):
            yield
    finally:
        server.stop(1.0).wait()
        shutil.rmtree(private, ignore_errors=True)


class WorkerProxy:
    """The worker, as the node sees it: asks through the socket at `path`, and waits `patience_s` for it to be there."""

    def __init__(self, path: Path, *, patience_s: float = 30.0, timeout_s: float = 86_400.0) -> None:
        self._path, self._patience_s, self._timeout_s = path, patience_s, timeout_s

    def hello(self) -> Mapping[str, Any]:
        """Site and process of the worker. Raises WorkerUnavailable."""
        return self._told("hello")

    def status(self) -> Mapping[str, Any]:
        """What `Worker.status` says. Raises WorkerUnavailable."""
        return self._told("status")

    def prepare(self, instruction: PrepareInstruction) -> SiteReply:
        return unpack(self._call("prepare", pack(instruction), self._timeout_s, self._patience_s), SiteReply)

    def train(self, instruction: TrainInstruction) -> SiteReply:
        return unpack(self._call("train", pack(instruction), self._timeout_s, self._patience_s), SiteReply)

    def _told(self, method: str) -> Mapping[str, Any]:
        answer: Mapping[str, Any] = json.loads(self._call(method, b"", _ANSWER_S, 0.0))
        return answer

    def _call(self, method: str, request: bytes, timeout_s: float, patience_s: float) -> bytes:
        try:
            patience_s = _await(self._path.parent, patience_s)
            with _reachable(self._path) as target, grpc.insecure_channel(f"unix:{target}", options=_CHANNEL) as channel:
                if patience_s > 0:
                    with contextlib.suppress(grpc.FutureTimeoutError):
                        grpc.channel_ready_future(channel).result(patience_s)
                call: Callable[..., bytes] = channel.unary_unary(f"/{_SERVICE}/{method}")
                return call(request, timeout=timeout_s)
        except (grpc.RpcError, OSError) as error:
            raise WorkerUnavailable(f"{self._path}: {error}") from None


def users_allowed(node_user: str | None) -> set[int]:
    """The uids that may ask a worker of this process's user. Raises RunError if there is no such user."""
    try:
        return {0, os.geteuid()} | ({pwd.getpwnam(node_user).pw_uid} if node_user else set())
    except KeyError:
        raise RunError(f"site.yaml names node_user {node_user!r}, and this machine has no such user") from None


def _handler(answer: Callable[[bytes], bytes]) -> grpc.RpcMethodHandler[bytes, bytes]:
    def respond(request: bytes, context: grpc.ServicerContext) -> bytes:
        try:
            return answer(request)
        except WorkerUnavailable:
            context.abort(grpc.StatusCode.UNAVAILABLE, "too many instructions are waiting")
            raise
        except Exception:  # its text stays on this side
            _log.exception("the worker cannot answer")
            context.abort(grpc.StatusCode.INTERNAL, "the worker failed; its own log says why")
            raise  # abort does

    return grpc.unary_unary_rpc_method_handler(respond)


def _record(servant: Servant, kind: Any, ask: Callable[[Any], SiteReply], turn: _Turn, data: bytes) -> bytes:
    """One instruction at a time."""
    try:
        instruction = unpack(data, kind)
    except MalformedRecord:
        refusal = BadInstruction()
        return pack(SiteReply(site=servant.site, code=refusal.code, reason=refusal.public_reason))
    with turn.waiting():
        return pack(ask(instruction))


class _Turn:
    """A lock with a short queue, so that a node that asks again and again leaves room for hello and status."""

    def __init__(self) -> None:
        self._lock, self._room = threading.Lock(), threading.BoundedSemaphore(MOST_WAITING)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Wait for the turn, and have it. Raises WorkerUnavailable if too many wait."""
        if not self._room.acquire(blocking=False):
            raise WorkerUnavailable(f"{MOST_WAITING} instructions are waiting")
        try:
            with self._lock:
                yield
        finally:
            self._room.release()


def _json(values: Mapping[str, Any]) -> bytes:
    return json.dumps(values).encode()


@contextmanager
def _door(path: Path, inside: Path, users: Collection[int]) -> Iterator[None]:
    """A socket at `path` that lets `users` through to the socket `inside`; gRPC itself cannot tell who calls."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with _reachable(path) as target:
        if path.exists() and _answers(target):
            raise RunError(f"another worker answers on {path}")
        path.unlink(missing_ok=True)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.bind(target)
    os.chmod(path, 0o660)
    listener.listen(16)
    thread = threading.Thread(target=_let_in, args=(listener, str(inside), frozenset(users)), daemon=True)
    thread.start()
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        path.unlink(missing_ok=True)


def _let_in(listener: socket.socket, inside: str, users: frozenset[int]) -> None:
    while True:
        try:
            visitor, _ = listener.accept()
        except OSError as error:
            if error.errno not in _NO_ROOM:
                return
            time.sleep(_PAUSE_S)
            continue
        credentials = visitor.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        if _CREDENTIALS.unpack(credentials)[1] not in users:
            visitor.close()
            continue
        try:
            host = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            host.connect(inside)
        except OSError:
            visitor.close()
            continue
        for one, other in ((visitor, host), (host, visitor)):
            threading.Thread(target=_carry, args=(one, other), daemon=True).start()


def _carry(source: socket.socket, sink: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while piece := source.recv(_PIECE):
            sink.sendall(piece)
    for end in (source, sink):
        with contextlib.suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)


def _await(folder: Path, patience_s: float) -> float:
    """Wait for a folder that the worker makes at its first start; what is left of the patience."""
    deadline = time.monotonic() + patience_s
    while not folder.exists() and time.monotonic() < deadline:
        time.sleep(_PAUSE_S)
    return max(deadline - time.monotonic(), 0.0)


def _answers(target: str) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as caller:
        try:
            caller.connect(target)
        except OSError:
            return False
        return True


@contextmanager
def _reachable(path: Path) -> Iterator[str]:
    """A name of the socket that is short enough for the kernel (107 bytes), wherever it lies."""
    folder = os.open(path.parent, os.O_PATH | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{folder}/{path.name}"
    finally:
        os.close(folder)
